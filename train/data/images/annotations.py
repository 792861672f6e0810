"""Pictures with boxes: Pascal VOC's XML files and COCO's JSON, and the parts to train and to test on.

Boxes are left, top, right, bottom in pixels; a box that ends at a pixel of the file ends behind it, so that VOC's
(1, 1, 640, 480), counted from 1, is (0, 0, 640, 480). A picture without objects is kept: it has none. One bad box,
annotation or picture is named, skipped and counted.
"""

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core import random
from train.data import DataError
from train.data.file_tree import Skipped
from train.data.images.picture import is_picture
from train.files import shown

HELD = 5
"""Without a part to test on, every fifth picture, in a fixed random order, is held out."""
TRAIN, TEST = ("train", "trainval"), ("test", "val", "valid", "validation")


class Annotated(NamedTuple):
    """A picture and what is in it: names of classes, and boxes as (left, top, right, bottom); `size` is (width, height)
    by its annotation, None if that does not say it. `crowd` marks boxes around groups, `difficult` ones included."""

    path: Path
    size: tuple[int, int] | None
    labels: tuple[str, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    crowd: tuple[bool, ...]


class BoxSet(NamedTuple):
    """Pictures to train on and to test on; `form` and `origin` say what was read, and where the parts come from."""

    train: tuple[Annotated, ...]
    test: tuple[Annotated, ...]
    classes: tuple[str, ...]
    form: str
    origin: str
    skipped: tuple[Skipped, ...] = ()


def open_boxes(data: str, classes: Sequence[str] | None = None) -> BoxSet:
    """The pictures of a folder with VOC's XML files (Annotations and JPEGImages, or side by side; ImageSets/Main with
    the names of the parts), of a COCO file "FILE.json", or of two, "TRAIN.json,TEST.json".

    The pictures of a COCO file lie in its folder, in a folder of its name, or below either.

    Args:
        classes: of a trained net; other ones are skipped. None: all that occur in the training part.

    Raises DataError: no such file or folder, a file that is no annotation, no picture that can be used.
    """
    paths = [Path(part) for part in data.split(",")] if "," in data and not Path(data).exists() else [Path(data)]
    for path in paths:
        if not path.exists():
            raise DataError(
                f"{path} does not exist; expected a folder of pictures with VOC's XML files, or COCO's JSON"
            )
    skipped: list[Skipped] = []
    if paths[0].is_dir():
        form, (train, test, origin) = "Pascal VOC, XML", _voc(paths[0], skipped)
    else:
        form, parts = "COCO, JSON", [_coco(path, skipped) for path in paths[:2]]
        train, test, origin = parts[0], parts[1] if len(parts) > 1 else None, "the second file"
    if test is None:
        train, test = _held_out(train, paths[0])
        origin = f"one picture of {HELD}, held out"
    names = tuple(classes) if classes else tuple(sorted({label for one in train for label in one.labels}))
    if not names:
        raise DataError(f"{paths[0]}: no picture of the training part has a box")
    parts = [_of_classes(part, names, skipped) for part in (train, test)]
    return BoxSet(*parts, names, form, origin, tuple(skipped))


def _held_out(pictures: Sequence[Annotated], path: Path) -> tuple[tuple[Annotated, ...], tuple[Annotated, ...]]:
    if len(pictures) < 2:
        raise DataError(f"{path} has {len(pictures)} pictures; expected at least 2, of which one is for testing")
    order, held = random.permutation(random.key(0), len(pictures)).tolist(), max(1, len(pictures) // HELD)
    test = set(order[:held])
    return tuple(one for i, one in enumerate(pictures) if i not in test), tuple(pictures[i] for i in sorted(test))


def _of_classes(pictures: Iterable[Annotated], names: tuple[str, ...], skipped: list[Skipped]) -> tuple[Annotated, ...]:
    out = []
    for one in pictures:
        known = [i for i, label in enumerate(one.labels) if label in names]
        unknown = sorted({label for label in one.labels if label not in names})
        if unknown:
            skipped.append((one.path, f"boxes of the unknown class '{shown(unknown[0])}'"))
        labels, boxes, crowd = (tuple(values[i] for i in known) for values in (one.labels, one.boxes, one.crowd))
        out.append(one._replace(labels=labels, boxes=boxes, crowd=crowd))
    return tuple(out)


# Pascal VOC.


def _voc(folder: Path, skipped: list[Skipped]) -> tuple[list[Annotated], list[Annotated] | None, str]:
    """(train, test or None, where that comes from) of a folder, or of the one folder in it that has annotations."""
    inside = [path for path in sorted(folder.iterdir()) if (path / "Annotations").is_dir()] if folder.is_dir() else []
    root = inside[0] if len(inside) == 1 and not (folder / "Annotations").is_dir() else folder
    splits = [(name, root / name) for name in (*TRAIN, *TEST) if (root / name).is_dir()]
    if splits and not (root / "Annotations").is_dir():
        first = {part: next((path for name, path in splits if name in part), None) for part in (TRAIN, TEST)}
        if first[TRAIN] is None:
            raise DataError(f"{folder} has a folder '{splits[0][0]}' and none of {', '.join(TRAIN)}")
        train = list(_voc_files(first[TRAIN], skipped).values())
        if first[TEST] is None:
            return train, None, ""
        return train, list(_voc_files(first[TEST], skipped).values()), f"its folder '{first[TEST].name}'"
    pictures = _voc_files(root, skipped)
    lists = {path.stem: path for path in (root / "ImageSets" / "Main").glob("*.txt")}
    names = {part: next((name for name in part if name in lists), None) for part in (("trainval", "train"), TEST)}
    learn, test = names.values()
    if learn is None or test is None:
        return list(pictures.values()), None, ""
    learn = "train" if test == "val" and "train" in lists else learn  # "trainval" has both
    parts = [_listed(lists[name], pictures, skipped) for name in (learn, test)]
    return *parts, f"ImageSets/Main/{test}.txt"


def _listed(path: Path, pictures: dict[str, Annotated], skipped: list[Skipped]) -> list[Annotated]:
    out = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        name = line.split()[0] if line.split() else ""
        if name in pictures:
            out.append(pictures[name])
        elif name:
            skipped.append((path, f"names '{shown(name)}', of which there is no picture with an annotation"))
    return out


def _voc_files(root: Path, skipped: list[Skipped]) -> dict[str, Annotated]:
    """Name without suffix -> the picture with its boxes."""
    files = sorted(path for path in root.rglob("*.xml") if not any(part.startswith(".") for part in path.parts))
    pictures = {path.stem: path for path in sorted(root.rglob("*")) if is_picture(path.name) and path.is_file()}
    if not files:
        raise DataError(
            f"{root} has no XML file; expected Pascal VOC's annotations, beside the pictures or in Annotations"
        )
    out = {}
    for file in files:
        if file.stem not in pictures:
            skipped.append((file, "an annotation without its picture"))
            continue
        try:
            out[file.stem] = _voc_file(file, pictures[file.stem], skipped)
        except (ElementTree.ParseError, OSError, ValueError) as error:
            skipped.append((file, f"is no annotation: {error}"))
    without = sorted(set(pictures) - {file.stem for file in files})
    skipped += [(pictures[name], "a picture without its annotation") for name in without]
    if not out:
        where, reason = skipped[0]
        raise DataError(f"{root}: no picture with an annotation can be used; {where}: {reason}")
    return out


def _voc_file(file: Path, picture: Path, skipped: list[Skipped]) -> Annotated:
    root = ElementTree.parse(file).getroot()
    sizes = [root.findtext(f"size/{name}") for name in ("width", "height")]
    size = tuple(round(float(x)) for x in sizes) if all(sizes) else None
    size = None if size is None or min(size) < 1 else size
    labels, boxes, crowd = [], [], []
    for number, entry in enumerate(root.findall("object"), 1):
        name, corners = (entry.findtext("name") or "").strip(), []
        for tag in ("xmin", "ymin", "xmax", "ymax"):
            try:
                corners.append(float(entry.findtext(f"bndbox/{tag}") or ""))
            except ValueError:
                break
        problem = "has no name" if not name else "has no box" if len(corners) < 4 else None
        if problem is None:
            left, top, right, bottom = corners
            box, problem = _checked((left - 1, top - 1, right, bottom), size, corners[2] <= left or corners[3] <= top)
        if problem:
            skipped.append((file, f"object {number} {problem}"))
            continue
        labels.append(name)
        boxes.append(box)
        crowd.append((entry.findtext("difficult") or "0").strip() == "1")
    return Annotated(picture, size, tuple(labels), tuple(boxes), tuple(crowd))


def _checked(box: tuple, size: tuple[int, int] | None, empty: bool) -> tuple[tuple, str | None]:
    """(the box inside its picture, the reason why it cannot be used)."""
    left, top, right, bottom = box
    if empty:
        return (
            box,
            "has a box of no area" if right >= left and bottom >= top else "has a box with its corners exchanged",
        )
    left, top = max(left, 0.0), max(top, 0.0)
    if size is not None:
        right, bottom = min(right, float(size[0])), min(bottom, float(size[1]))
    if right <= left or bottom <= top:
        return box, "has a box outside its picture"
    return (left, top, right, bottom), None


# COCO.


def _coco(file: Path, skipped: list[Skipped]) -> list[Annotated]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is no JSON: {error}") from None
    missing = [
        name for name in ("images", "annotations", "categories") if not isinstance(content, dict) or name not in content
    ]
    if missing:
        raise DataError(
            f"{file} has no '{missing[0]}'; expected images, annotations and categories, as COCO's files have"
        )
    names = {entry.get("id"): str(entry.get("name", "")).strip() for entry in _records(content["categories"])}
    images, boxes = {}, {}
    for number, entry in enumerate(_records(content["images"]), 1):
        path = picture_of(file, str(entry.get("file_name", "")))
        if "id" not in entry or path is None:
            reason = (
                "has no id"
                if "id" not in entry
                else f"names '{shown(str(entry.get('file_name')))}', which is not there"
            )
            skipped.append((file, f"image {number} {reason}"))
            continue
        images[entry["id"]], boxes[entry["id"]] = (path, entry), []
    for number, entry in enumerate(_records(content["annotations"]), 1):
        image = entry.get("image_id")
        problem = None if image in images else f"is of image {image}, which is not there"
        name = names.get(entry.get("category_id"), "")
        problem = problem or (None if name else f"has the category {entry.get('category_id')}, which has no name")
        if problem is None:
            try:
                left, top, width, height = (float(x) for x in entry["bbox"])
            except (KeyError, TypeError, ValueError):
                problem = "has no box of four numbers"
            else:
                size = _size(images[image][1])
                corners = (left, top, left + width, top + height)
                box, problem = _checked(corners, size, width <= 0 or height <= 0)
        if problem:
            skipped.append((file, f"annotation {number} {problem}"))
        else:
            boxes[image].append((name, box, bool(entry.get("iscrowd", 0))))
    out = []
    for key, (path, entry) in images.items():
        labels, frames, crowd = zip(*boxes[key], strict=True) if boxes[key] else ((), (), ())
        out.append(Annotated(path, _size(entry), tuple(labels), tuple(frames), tuple(crowd)))
    if not out:
        raise DataError(f"{file}: none of its {len(content['images'])} pictures is there")
    return out


def _records(values: Any) -> list[dict]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _size(entry: dict) -> tuple[int, int] | None:
    sizes = [entry.get(name) for name in ("width", "height")]
    return tuple(sizes) if all(isinstance(x, int) and x > 0 for x in sizes) else None


def picture_of(file: Path, name: str) -> Path | None:
    """The picture of this name that belongs to a file; None if it is not there."""
    places = [
        file.parent,
        file.parent / "images",
        file.parent / file.stem,
        file.parent.parent / "images",
        file.parent.parent,
    ]
    places.append(file.parent.parent / re.sub("^(instances|captions)_", "", file.stem))
    return next((place / name for place in places if name and os.path.isfile(place / name)), None)


def facts(data: BoxSet) -> dict[str, Any]:
    """Names and values of a set, for `train.data.understood`."""
    counts = {
        part: {name: sum(one.labels.count(name) for one in pictures) for name in data.classes}
        for part, pictures in (("train", data.train), ("test", data.test))
    }
    empty = sum(not one.labels for one in (*data.train, *data.test))
    return {
        "form": data.form,
        "pictures": {"train": len(data.train), "test": len(data.test)},
        "to test on": data.origin,
        "boxes": counts,
        "pictures without boxes": empty,
        "skipped": list(data.skipped),
    }
