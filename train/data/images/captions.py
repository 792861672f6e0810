"""Pictures with captions: tables beside the pictures, COCO's JSON of captions, and the parts to train and to test on.

A table is a TSV, a CSV or JSON Lines with a picture and a caption per record; a picture with several captions has as
many records. One bad record or picture is named, skipped and counted.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core import random
from train.data import DataError, table
from train.data.file_tree import Skipped, files_below
from train.data.images import folders
from train.data.images.annotations import HELD, picture_of
from train.data.images.picture import Cut, converted, decode, is_picture, opened
from train.data.text.files import decoded_lines, unpacked
from train.files import shown

PICTURES = "picture image file file_name filename image_name image_path path img 图片".split()
CAPTIONS = "caption captions text sentence sentences description title comment 描述 标题 文本".split()
"""Names of columns; of several the first in this order is taken."""
TABLES = tuple(f"{name}.{kind}" for name in ("captions", "metadata") for kind in ("tsv", "csv", "jsonl", "json", "txt"))
"""Files of a folder that are looked for, in this order."""
WORD = re.compile(r"\w")
EXPECTED = "expected a folder with pictures and captions.tsv, a TSV, CSV or JSON Lines, or COCO's JSON of captions"


class Captioned(NamedTuple):
    """A picture and its captions, at least one."""

    path: Path
    captions: tuple[str, ...]


class CaptionSet(NamedTuple):
    """Pictures to train on and to test on; `form` and `origin` say what was read, and where the parts come from."""

    train: tuple[Captioned, ...]
    test: tuple[Captioned, ...]
    form: str
    origin: str
    skipped: tuple[Skipped, ...] = ()


def open_captions(data: str) -> CaptionSet:
    """The pictures of a folder with one of `TABLES`, of a folder with such folders to train and to test on, of a table
    or COCO file "FILE", or of two, "TRAIN,TEST".

    Pictures lie in the folder of their file, or below it in `images` or a folder of the file's name; without a part to
    test on, every fifth is held out.

    Raises DataError: no such file or folder, no table, no picture that can be used.
    """
    parts, skipped = data.split(",") if "," in data and not Path(data).exists() else [data], []
    paths, origin = [Path(part) for part in parts[:2]], "the second file"
    if len(paths) == 1 and paths[0].is_dir() and _table_in(paths[0]) is None:
        layout = folders.layout(paths[0])
        if layout.test is not None and layout.train is not None:
            paths, origin = [layout.train, layout.test], f"its folder '{layout.test.name}'"
            skipped += layout.skipped
    read = [_read(path, skipped) for path in paths]
    form = read[0][1]
    if len(read) > 1:
        return CaptionSet(read[0][0], read[1][0], form, origin, tuple(skipped))
    pictures, count = read[0][0], len(read[0][0])
    if count < 2:
        raise DataError(f"{data} has {count} picture with captions; expected at least 2, of which one is for testing")
    held = set(random.permutation(random.key(0), count).tolist()[: max(1, count // HELD)])
    train, test = (tuple(one for i, one in enumerate(pictures) if (i in held) == part) for part in (False, True))
    return CaptionSet(train, test, form, f"one picture of {HELD}, held out", tuple(skipped))


def _table_in(folder: Path) -> Path | None:
    return next((folder / name for name in TABLES if (folder / name).is_file()), None)


def _read(path: Path, skipped: list[Skipped]) -> tuple[tuple[Captioned, ...], str]:
    """(pictures, form) of a folder or file."""
    if not path.exists():
        raise DataError(f"{path} does not exist; {EXPECTED}")
    file = _table_in(path) if path.is_dir() else path
    if file is None:
        raise DataError(f"{path} has none of {', '.join(TABLES[:3])}; {EXPECTED}")
    records, form = _records(file, skipped)
    captions: dict[Path, dict[str, None]] = {}
    named = set()
    for where, name, caption in records:
        picture = picture_of(file, name) or picture_of(file, re.sub(r"#\d+$", "", name))  # of Flickr8k: name.jpg#0
        caption = " ".join(caption.split())
        named.add(picture and picture.resolve())
        if not name:
            skipped.append((file, f"{where} names no picture"))
        elif not WORD.search(caption):
            skipped.append((file, f"{where} has a caption of no words"))
        elif picture is None:
            skipped.append((file, f"{where} names '{shown(name)}', which is not there"))
        else:
            captions.setdefault(picture, {})[caption] = None
    if path.is_dir():
        below = [one for one in files_below(path).paths if is_picture(one.name) and one.resolve() not in named]
        skipped += [(one, "is a picture without a caption") for one in below]
    if not captions:
        reason = f"; {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DataError(f"{file}: no picture with a caption can be used{reason}")
    return tuple(Captioned(one, tuple(texts)) for one, texts in captions.items()), form


Record = tuple[str, str, str]
"""Its place in the file, the name of its picture, its caption."""


def _records(file: Path, skipped: list[Skipped]) -> tuple[list[Record], str]:
    with unpacked(file, "a table of pictures and captions") as content:
        lines, foreign = decoded_lines(content.read())
    note = f"; {foreign} lines are not UTF-8, read as Latin-1" if foreign else ""
    if re.search(r"\.(jsonl?|ndjson)(\.gz)?$", file.name):
        records, form = _json(file, lines, skipped)
    else:
        records, form = _cells(file, lines, skipped)
    return records, form + note


def _cells(file: Path, lines: list[str], skipped: list[Skipped]) -> tuple[list[Record], str]:
    tabs = ".csv" not in file.suffixes and any("\t" in line for line in lines[: table.LOOKED_AT])
    if tabs:  # quotation marks are part of the text
        mark, rows = "\t", [(i, line.split("\t")) for i, line in enumerate(lines, 1)]
    else:
        mark = table.separator_of(lines)
        rows = table.rows_of(lines, mark, str(file))
    rows = [(i, cells) for i, cells in rows if any(cell.strip() for cell in cells)]
    if not rows:
        raise DataError(f"{file} is empty; expected a picture and a caption per line")
    first = [cell.strip() for cell in rows[0][1]]
    picture, caption, header = _columns(file, first)
    out, last = [], max(picture, caption)
    for i, cells in rows[1:] if header else rows:
        if len(cells) <= last:
            columns = f"{len(cells)} column{'s' * (len(cells) > 1)}"
            skipped.append((file, f"line {i} has {columns}, expected at least {last + 1}"))
            continue
        # Separators in a caption that ends the line are part of it.
        text = mark.join(cells[caption:]) if caption == len(first) - 1 else cells[caption]
        out.append((f"line {i}", cells[picture].strip(), text))
    names = f"the first line names them: {', '.join(map(shown, first))}" if header else "no header"
    kind = {"\t": "a tab", ",": "a comma"}.get(mark, f"'{mark}'")
    return out, f"picture in column {picture + 1}, caption in column {caption + 1}, separated by {kind}; {names}"


def _columns(file: Path, first: Sequence[str]) -> tuple[int, int, bool]:
    """(column of the pictures, column of the captions, whether the first line names them)."""
    names = [cell.lower() for cell in first]
    columns = [next((names.index(name) for name in known if name in names), None) for known in (PICTURES, CAPTIONS)]
    if None not in columns:
        return *columns, True
    pictures = [i for i, cell in enumerate(first) if is_picture(re.sub(r"#\d+$", "", cell))]
    if len(first) == 2 and len(pictures) == 1:
        return pictures[0], 1 - pictures[0], False
    there = ", ".join(map(shown, first[:4]))
    raise DataError(f"{file}: no columns of pictures and captions; there are {there}; expected picture<TAB>caption")


def _json(file: Path, lines: list[str], skipped: list[Skipped]) -> tuple[list[Record], str]:
    whole = _parsed("\n".join(lines)) if file.name.removesuffix(".gz").endswith(".json") else None
    if isinstance(whole, dict) and "annotations" in whole:
        return _coco(file, whole, skipped), "COCO's captions, JSON"
    values = whole if isinstance(whole, list) else [_parsed(line) for line in lines if line.strip()]
    out, keys = [], None
    for i, value in enumerate(values, 1):
        if not isinstance(value, dict):
            skipped.append((file, f"record {i} is no JSON object"))
            continue
        own = [next((name for name in known if name in value), None) for known in (PICTURES, CAPTIONS)]
        if None in own:
            keys_there = ", ".join(map(shown, list(value)[:4]))
            skipped.append((file, f"record {i} has no picture and caption; there are {keys_there or 'no keys'}"))
            continue
        keys = keys or own
        texts = value[own[1]] if isinstance(value[own[1]], list) else [value[own[1]]]
        out += [(f"record {i}", _text(value[own[0]]).strip(), _text(text)) for text in texts or [""]]
    if keys is None:
        raise DataError(f"{file} has no JSON object with a picture and a caption, such as file_name and text")
    return out, f"picture under '{keys[0]}', caption under '{keys[1]}' of JSON objects"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(value: Any) -> str:
    """A text, halves of surrogate pairs replaced; "" of anything else."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else ""


def _coco(file: Path, content: dict, skipped: list[Skipped]) -> list[Record]:
    images, annotations = (
        [entry for entry in content.get(name) or () if isinstance(entry, dict)] for name in ("images", "annotations")
    )
    names, out = {str(entry.get("id")): _text(entry.get("file_name")) for entry in images}, []
    for i, entry in enumerate(annotations, 1):
        key = str(entry.get("image_id"))
        if key not in names:
            skipped.append((file, f"annotation {i} is of image {shown(key)}, which is not there"))
        else:
            out.append((f"annotation {i}", names[key], _text(entry.get("caption"))))
    return out


def read_pictures(paths: Sequence[Path], size: int, whole: bool = False) -> tuple[Tensor, Tensor, list[Skipped]]:
    """(pictures (count, 3, size, size) of bytes, their numbers among the paths (count,), those that cannot be read).

    Args:
        whole: squeeze each picture into the square. False: scale its shorter side, and take the middle.

    Raises DataError: none can be read.
    """
    rows, numbers, skipped = [], [], []
    for i, path in enumerate(paths):
        try:
            rows.append(
                _squeezed(path, size) if whole else decode(path, Cut(size, resize=size, interpolation="bicubic"))
            )
            numbers.append(i)
        except DataError as error:
            skipped.append((path, str(error).removeprefix(f"{path} ")))
    if not rows:
        where, reason = skipped[0] if skipped else ("the list", "is empty")
        raise DataError(f"no picture can be read; {where} {reason}")
    return torch.from_numpy(np.stack(rows)), torch.tensor(numbers), skipped


def _squeezed(path: Path, size: int) -> np.ndarray:
    with opened(path) as image:
        return np.stack([np.asarray(channel) for channel in converted(image, 3).resize((size, size)).split()])


def facts(data: CaptionSet) -> dict[str, Any]:
    """Names and values of a set, for `train.data.understood`."""
    parts = {"train": data.train, "test": data.test}
    return {
        "form": data.form,
        "pictures": {name: len(part) for name, part in parts.items()},
        "captions": {name: sum(len(one.captions) for one in part) for name, part in parts.items()},
        "different captions": len(set(_captions(data.train)) | set(_captions(data.test))),
        "to test on": data.origin,
        "skipped": list(data.skipped),
    }


def _captions(part: Iterable[Captioned]) -> list[str]:
    return [text for one in part for text in one.captions]
