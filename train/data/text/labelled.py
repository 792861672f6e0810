"""Texts with a label each, for classification: files of many forms, and the part held out where there is none.

A line is `label<TAB>text` or `text<TAB>label` (which of the two the file itself shows), `label text` where there is no
tab, a row of a CSV, or an object of JSON Lines; a first line such as `text<TAB>label` names the columns, and so do the
keys of JSON. One bad line is named, skipped and counted; more than a tenth of them is an error.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from core import random
from train.data import DataError, table
from train.data.text import docstrings
from train.data.text.brackets import CLASSES, brackets
from train.data.text.files import decoded_lines, unpacked
from train.data.text.parts import HELD, TESTS, VALIDATIONS, neighbour, training_file
from train.files import shown

LABELS = "label labels class category target sentiment polarity y 标签 类别".split()
TEXTS = "text texts sentence review content comment document phrase title 文本 内容 标题".split()
"""Names of columns; of several the first in this order is taken."""
NAMES = ("class.txt", "classes.txt", "labels.txt")
"""Files beside the data in which line i + 1 is the name of the label i."""

JSON = re.compile(r"\.(jsonl|ndjson|json)(\.gz)?$")

Skipped = tuple[str, str]
"""A record that is not used, and the reason."""


class Columns(NamedTuple):
    """Names of the columns with the texts and labels; None for those that the file itself shows."""

    text: str | None = None
    label: str | None = None


BY_NAME = Columns()


class Records(NamedTuple):
    """Texts and the name of the class of each; the form they were in, and the records `skipped`."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    form: str = ""
    skipped: tuple[Skipped, ...] = ()

    def some(self, indices: Sequence[int]) -> "Records":
        """The records with these numbers."""
        return self._replace(
            texts=tuple(self.texts[i] for i in indices), labels=tuple(self.labels[i] for i in indices), skipped=()
        )


class LabelledSet(NamedTuple):
    """Texts for training, validation and testing; `origin` says where the last two come from."""

    name: str
    classes: tuple[str, ...]
    train: Records
    validation: Records
    test: Records
    origin: str
    skipped: tuple[Skipped, ...] = ()

    @property
    def parts(self) -> dict[str, Records]:
        """The parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def read(path: Path, columns: Columns = BY_NAME, classes: Collection[str] = ()) -> Records:
    """The records of a file.

    Args:
        classes: labels that are known, by which their column is told from that of the texts.

    Raises DataError: it cannot be read, is in no known form, has no such column, or a tenth of it is unusable.
    """
    with unpacked(path, "a file with a labelled text per line") as file:
        lines, foreign = decoded_lines(file.read())
    skipped: list[Skipped] = []
    if JSON.search(path.name) or (lines and lines[0].startswith("{")):
        (rows, skipped), separator = _objects(path, lines), "JSON"
    elif path.name.removesuffix(".gz").endswith(".csv"):
        mark = table.separator_of(lines)
        rows, separator = table.rows_of(lines, mark, str(path)), {",": "a comma", "\t": "a tab"}.get(mark, f"'{mark}'")
    elif any("\t" in line for line in lines[:100]):
        rows, separator = [(i, line.split("\t")) for i, line in enumerate(lines, 1)], "a tab"
    else:
        rows, separator = [(i, line.split(maxsplit=1)) for i, line in enumerate(lines, 1)], "a space"
    rows = [(i, cells) for i, cells in rows if any(cell.strip() for cell in cells)]
    if not rows and not skipped:
        raise DataError(f"{path} is empty, expected a labelled text per line")
    total = len(rows) + len(skipped)
    _check_share(skipped, total)
    label, text, header = _columns(path, rows, separator, columns, classes)
    if separator == "JSON":
        form = f"label under '{shown(rows[0][1][label])}', text under '{shown(rows[0][1][text])}' of JSON objects"
    else:
        form = f"label in column {label + 1}, text in column {text + 1}, separated by {separator}"
        form += f"; the first line names them: {', '.join(rows[0][1])}" if header else "; no header"
    form += f"; {foreign} lines are not UTF-8, read as Latin-1" if foreign else ""
    records = []
    for i, cells in rows[1:] if header else rows:
        problem = None
        if max(label, text) >= len(cells):
            problem = f"has {len(cells)} column{'s' * (len(cells) > 1)}, expected at least {max(label, text) + 1}"
        elif not cells[label].strip():
            problem = "has no label"
        elif not cells[text].strip():
            problem = "has no text"
        elif "\0" in cells[label] + cells[text]:
            problem = "has a NUL byte, expected text"
        if problem:
            skipped.append((f"{shown(path.name)} line {i}", problem))
        else:
            records.append((cells[text].strip(), cells[label].strip()))
    _check_share(skipped, total)
    if not records:
        raise DataError(f"{path} has a header and no record, expected a labelled text per line")
    texts, labels = zip(*records, strict=True)
    return Records(texts, labels, form, tuple(skipped))


def _check_share(skipped: Sequence[Skipped], total: int) -> None:
    """Raise DataError if more than a tenth of the lines is unusable."""
    if len(skipped) * HELD > total:
        (where, problem), more = skipped[0], len(skipped) - 1
        rest = f" (and {more} more lines)" if more else ""
        raise DataError(f"{where} {problem}{rest}; more than a tenth of the lines")


def _objects(path: Path, lines: list[str]) -> tuple[list[table.Row], list[Skipped]]:
    """The keys of the objects as a header, line 0, then their values; and the lines that are no objects."""
    objects, skipped = [], []
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value, problem = json.loads(line), "is no JSON object"
        except ValueError as error:
            value, problem = None, f"is no JSON: {error}"
        except RecursionError:
            value, problem = None, "is nested too deeply"
        if isinstance(value, dict):
            objects.append((i, value))
        else:
            skipped.append((f"{shown(path.name)} line {i}", problem))
    names = list(dict.fromkeys(name for _, value in objects for name in value))
    rows = [(i, [_cell(value.get(name)) for name in names]) for i, value in objects]
    return [(0, names), *rows] if rows else [], skipped


def _cell(value: Any) -> str:
    """Text or a number as text, "" for anything else; halves of surrogate pairs, which JSON can spell, replaced."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return json.dumps(value) if isinstance(value, bool | int | float) else ""


def _columns(
    path: Path, rows: list[table.Row], separator: str, columns: Columns, classes: Collection[str]
) -> tuple[int, int, bool]:
    """(column of the label, column of the text, whether the first line names them)."""
    cells = [cell.strip() for cell in rows[0][1]]
    first = [cell.lower() for cell in cells]
    wanted = [name for name in columns if name]
    if wanted and separator == "a space":
        raise DataError(f"{path} has no column '{shown(wanted[0])}': it is no table with a header")
    for name in wanted:
        if name not in cells:
            raise DataError(f"{path} has no column '{shown(name)}'; there are {', '.join(map(shown, cells))}")
    if wanted and columns.label == columns.text:
        raise DataError(f"texts and labels are both in the column '{shown(wanted[0])}'; expected two columns")
    named = [
        cells.index(name) if name else next((first.index(other) for other in others if other in first), None)
        for name, others in ((columns.label, LABELS), (columns.text, TEXTS))
    ]
    if wanted and None in named and len(cells) == 2:
        sole = named[0] if named[1] is None else named[1]
        named = [1 - sole if i is None else i for i in named]
    if None not in named and named[0] != named[1] and separator != "a space":
        return *named, True
    if wanted or separator == "JSON":
        problem = f"has the columns {', '.join(map(shown, cells))}"
        raise DataError(f"{path} {problem}; name those of texts and labels with --text-column and --label-column")
    if separator == "a space":
        return 0, 1, False
    (width, _), *_ = Counter(len(cells) for _, cells in rows).most_common(1)
    if width != 2:
        problem = f"has {width} column{'s' * (width > 1)} and no header that names a label and a text"
        raise DataError(f"{path} {problem}; expected label{'<TAB>' if separator == 'a tab' else ','}text")
    # Labels recur, texts do not; where all but the first label do, that is the name of their column.
    kinds = [Counter(cells[i].strip() for _, cells in rows if len(cells) == 2) for i in (0, 1)]
    matches = [len(kind.keys() & set(classes)) for kind in kinds]
    label = int(len(kinds[0]) > len(kinds[1])) if matches[0] == matches[1] else int(matches[1] > matches[0])
    (name, count), *others = kinds[label].items()
    header = name not in classes and count == 1 and min((n for _, n in others), default=1) > 1
    return label, 1 - label, header


def open_labelled(
    data: str, validation: str | None = None, test: str | None = None, columns: Columns = BY_NAME
) -> LabelledSet:
    """The texts of `--data`: "brackets" (generated), "docstrings" (of Python, by package), a file, or a folder with one
    training file.

    Files for validation and testing are those named, or lie beside a file with "train" in its name and have "dev",
    "valid", "val" or "validation", and "test" there; a part that has none is held out, one record of ten of each class.

    Raises DataError: as `read`; there is one class only; several training files.
    """
    if data == "brackets" and not Path(data).exists():
        return _generated()
    if data == "docstrings" and not Path(data).exists():
        return _docstrings()
    path = training_file(Path(data))
    beside = {"validation": validation or neighbour(path, VALIDATIONS), "test": test or neighbour(path, TESTS)}
    parts = {"train": read(path, columns)}
    classes = frozenset(parts["train"].labels)
    parts |= {name: read(Path(other), columns, classes) for name, other in beside.items() if other}
    skipped = [entry for part in parts.values() for entry in part.skipped]
    origins = [f"{name} in {shown(Path(other).name)}" for name, other in beside.items() if other]
    everything, taken = parts["train"], set()
    counts = Counter(everything.labels)
    order = [i for i, label in enumerate(everything.labels) if counts[label] > 2]
    order.sort(key=everything.labels.__getitem__)  # the classes of a file may follow one another in turn
    for first, name in ((HELD - 2, "validation"), (HELD - 1, "test")):
        if not beside[name]:
            rows = sorted(order[first::HELD])
            parts[name] = everything.some(rows)
            taken |= set(rows)
            origins.append(f"{name} held out, a tenth of each class")
    parts["train"] = everything.some([i for i in range(len(everything.texts)) if i not in taken])
    labels = sorted(set(parts["train"].labels), key=lambda label: (not label.isdecimal(), label.zfill(8)))
    if len(labels) < 2:
        raise DataError(f"{path}: all records have the label '{labels[0]}'; expected at least two classes")
    for name in ("validation", "test"):
        parts[name], unknown = known(parts[name], labels, name)
        skipped += unknown
    names = _names(path, labels)
    parts = {
        part: records._replace(labels=tuple(names[label] for label in records.labels))
        for part, records in parts.items()
    }
    classes = tuple(names[label] for label in labels)
    return LabelledSet(shown(data), classes, **parts, origin=", ".join(origins), skipped=tuple(skipped))


def known(records: Records, labels: Sequence[str], name: str) -> tuple[Records, list[Skipped]]:
    """The records with one of the labels, and the others. Raises DataError if none is left, or more than a tenth is not
    known."""
    unknown = [i for i, label in enumerate(records.labels) if label not in labels]
    skipped = [(f"{name} record {i + 1}", f"has the unknown label '{shown(records.labels[i])}'") for i in unknown]
    if len(unknown) * HELD > len(records.labels) or not records.labels:
        if not records.labels:
            raise DataError(f"there is no record for {name}; expected at least one")
        (where, problem), expected = skipped[0], ", ".join(map(shown, labels[:8]))
        raise DataError(f"{where} {problem} (and {len(unknown) - 1} more records); expected {expected}")
    rest = sorted(set(range(len(records.labels))) - set(unknown))
    return records.some(rest), skipped


def open_test(data: str, classes: Sequence[str], columns: Columns = BY_NAME) -> tuple[Records, tuple[Skipped, ...]]:
    """All records of a file with one of these classes, and those that are not used. Raises DataError as `read` does, or
    if more than a tenth has another class."""
    path = Path(data)
    records = read(path, columns, classes)
    names = _names(path, sorted(set(records.labels)))
    records = records._replace(labels=tuple(names[label] for label in records.labels))
    usable, unknown = known(records, classes, shown(path.name))
    return usable, (*records.skipped, *unknown)


def _names(path: Path, labels: Sequence[str]) -> dict[str, str]:
    """Label -> name of the class: its line in a file beside the data, if labels are numbers; else itself."""
    for name in NAMES:
        file = path.with_name(name)
        if file.is_file() and all(label.isdecimal() for label in labels):
            lines = decoded_lines(file.read_bytes())[0]
            if all(int(label) < len(lines) and lines[int(label)].strip() for label in labels):
                return {label: lines[int(label)].strip() for label in labels}
    return {label: label for label in labels}


def _generated() -> LabelledSet:
    """10,000 sequences of brackets to learn from, and 1000 and 2000 others of which none occurs among them."""
    train_key, other_key = random.split(random.key(0)).unbind(0)
    taken: set[str] = set()

    def records(key: Tensor, count: int) -> Records:
        pairs = [(t, CLASSES[y]) for t, y in zip(*brackets(key, 2 * count), strict=True) if t not in taken]
        texts, labels = zip(*pairs[:count], strict=True)
        return Records(texts, labels)

    train = records(train_key, 10_000)
    taken |= set(train.texts)
    rest = records(other_key, 3000)
    origin = "other sequences, of which none occurs in training"
    return LabelledSet("brackets", CLASSES, train, rest.some(range(1000)), rest.some(range(1000, 3000)), origin)


def _docstrings() -> LabelledSet:
    """First paragraphs of docstrings of Python's library and the packages they are from, split by blocks of eight."""
    records, blocks = docstrings.by_package()
    texts, labels = zip(*records, strict=True)
    everything = Records(texts, labels, "first paragraphs of docstrings, names blanked, and their packages")
    parts: list[list[int]] = [[], [], []]
    for i, block in enumerate(blocks):
        parts[max(0, block % HELD - HELD + 3)].append(i)
    origin = f"validation and test held out, two of every ten blocks of {docstrings.BLOCK} neighbours"
    return LabelledSet("docstrings", tuple(sorted(set(labels))), *map(everything.some, parts), origin=origin)


def facts(data: LabelledSet) -> dict[str, Any]:
    """Names and values of a set, for `train.data.understood`."""
    texts = set(data.train.texts)
    repeated = {name: sum(text in texts for text in data.parts[name].texts) for name in ("validation", "test")}
    return {
        "data": data.name,
        "form": data.train.form,
        "classes": list(data.classes),
        "records": {name: len(part.texts) for name, part in data.parts.items()},
        "other parts": data.origin,
        "also in training": {name: count for name, count in repeated.items() if count},
        "skipped": list(data.skipped),
    }
