"""Masks: pictures whose pixels are classes, by their grey values, the entries of their palette, or their colours.

    table = read_table("classes.txt") or infer([read_mask(path) for path in paths])
    labels = labelled(read_mask(path), table)  # (height, width) bytes: a class, or VOID

A file of classes has a line per class: a value ("3 road"), a colour ("128 64 128 road", "road,128,64,128") or only a
name, whose line number from 0 on is its value. Classes of one name are one class; "void", "unlabelled" and "ignore" are
none. Without such a file the table is inferred from the masks; `infer` has the rules.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data import DataError
from train.data.images.picture import opened

VOID = 255
"""Label of pixels that count in nothing."""
NONE = ("void", "unlabelled", "unlabeled", "ignore", "ignored")
MOST = 64
"""Classes that are inferred from masks, at most: more values than these are no classes but noise, or objects."""
CAMVID = (
    *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
    "void",
)
"""Classes of the values 0 to 11 in the masks of SegNet's CamVid."""

Colour = tuple[int, int, int]


class Mask(NamedTuple):
    """The pixels of a mask file.

    Attributes:
        values: (height, width) integers: grey values or entries of the palette; of a coloured mask `packed` colours.
        palette: the colours of the entries in use, {} without a palette.
        coloured: whether the values are colours.
    """

    values: np.ndarray
    palette: dict[int, Colour]
    coloured: bool


class Table(NamedTuple):
    """classes by label; the label of each value, or `packed` colour if coloured."""

    classes: tuple[str, ...]
    labels: dict[int, int]
    coloured: bool

    @property
    def background(self) -> bool:
        """Class 0 is what is no object."""
        return self.classes[0] == "background"


OBJECTS = Table(("background", "object"), {}, False)
"""The table of maps of objects: 0 is the background, every other value an object."""


def packed(colour: Sequence[int]) -> int:
    """Colour (red, green, blue) of bytes as one integer."""
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def described(value: int, coloured: bool) -> str:
    """A value for messages: "colour (255, 0, 7)" or "value 7"."""
    return f"colour ({value >> 16}, {value >> 8 & 255}, {value & 255})" if coloured else f"value {value}"


def read_mask(path: str | os.PathLike) -> Mask:
    """A mask file; a JPEG has two values, 0 and 255, whatever compression made of them.

    Raises DataError: it cannot be read, its pixels are fractions, or it is a JPEG of more values.
    """
    palette, lossy = {}, False
    with opened(path) as image:
        lossy = image.format in ("JPEG", "MPO")
        if lossy:
            values = np.asarray(image.convert("L"))
        elif image.mode == "P":
            values = np.asarray(image)
            colours = np.array(image.getpalette() or [], np.uint8).reshape(-1, 3)
            used = [entry for entry in np.unique(values).tolist() if entry < len(colours)]
            palette = {entry: tuple(colours[entry].tolist()) for entry in used}
        elif image.mode in ("1", "L", "F") or image.mode.startswith("I"):
            values = np.asarray(image)
        elif image.mode == "LA":
            values = np.asarray(image.getchannel("L"))
        else:
            values = np.asarray(image.convert("RGB"))  # (height, width, 3)
    if values.dtype.kind == "f" and not (values == np.round(values)).all():
        raise DataError(f"{path} holds fractions ({values.min():.4g} to {values.max():.4g}), expected a mask")
    if lossy:
        values = _two_values(values, path)
    if values.ndim == 2:
        return Mask(values.astype(np.uint8 if values.dtype.itemsize == 1 else np.int32), palette, False)
    if (values == values[..., :1]).all():  # grey, saved as colour
        return Mask(np.ascontiguousarray(values[..., 0]), {}, False)
    red, green, blue = np.moveaxis(values.astype(np.int32), -1, 0)
    return Mask(red << 16 | green << 8 | blue, {}, True)


def _two_values(values: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """0 and 255 of a JPEG that has had these alone; compression moves values, and mixes them at borders."""
    if np.minimum(values, 255 - values).clip(max=64).mean() > 8:
        raise DataError(f"{path} is a JPEG of more than two values, which compression mixes; expected a PNG")
    return np.where(values < 128, 0, 255).astype(np.uint8)


def in_colours(mask: Mask) -> Mask:
    """The same mask as a coloured one."""
    if mask.coloured:
        return mask
    lookup = np.arange(max(256, int(mask.values.max()) + 1)).clip(max=255) * packed((1, 1, 1))  # grey
    for entry, colour in mask.palette.items():
        lookup[entry] = packed(colour)
    return Mask(lookup[mask.values].astype(np.int32), {}, True)


def labelled(mask: Mask, table: Table) -> np.ndarray:
    """(height, width) uint8: the label of each pixel, or VOID.

    Raises DataError: a value or colour that the table does not have; the message continues the name of the file.
    """
    if table == OBJECTS:
        if mask.coloured:
            raise DataError("is in colour, expected a map of objects: 0 and their numbers")
        return (mask.values > 0).astype(np.uint8)
    if mask.coloured and not table.coloured:
        raise DataError(f"is in colour, expected {_listed(table)}")
    values = in_colours(mask).values if table.coloured else mask.values
    keys = np.array(sorted(table.labels))
    places = np.searchsorted(keys, values).clip(max=len(keys) - 1)
    unknown = keys[places] != values
    if unknown.any():
        some, counts = np.unique(values[unknown], return_counts=True)
        names = ", ".join(described(value, table.coloured) for value in some[:3].tolist())
        more = f" and {len(some) - 3} more" if len(some) > 3 else ""
        raise DataError(f"has the unknown {names}{more} in {counts.sum():,} pixels, expected {_listed(table)}")
    return np.array([table.labels[key] for key in keys.tolist()], np.uint8)[places]


def _listed(table: Table) -> str:
    keys = sorted(table.labels)
    names = ", ".join(described(key, table.coloured).partition(" ")[2] for key in keys[:6])
    return f"the {'colours' if table.coloured else 'values'} {names}" + (" ..." if len(keys) > 6 else "")


def infer(masks: Sequence[Mask]) -> Table:
    """The table that masks have without a file of classes.

    - Values 0 and one other, such as 0 and 255: background and object.
    - Values 0 to 11, in SegNet's copy of CamVid only (`camvid_table`).
    - Small values and 255: each a class, 255 void, as in Pascal VOC.
    - Other values: each a class, in ascending order.
    - Colours, if a mask is coloured, or if two palettes have other colours for one entry: each a class, black first.

    Raises DataError: more than 64 of them, or one alone.
    """
    colours: dict[int, set[Colour]] = {}
    for mask in masks:
        for entry, colour in mask.palette.items():
            colours.setdefault(entry, set()).add(colour)
    coloured = any(mask.coloured for mask in masks) or any(len(several) > 1 for several in colours.values())
    masks = [in_colours(mask) for mask in masks] if coloured else masks
    values = sorted(set().union(*(np.unique(mask.values).tolist() for mask in masks)))
    kind = "colours" if coloured else "values"
    if len(values) > MOST:
        hint = (
            "expected a file of classes, masks that nothing has smoothed or, of maps of objects, a folder 'instances'"
        )
        raise DataError(f"the masks have {len(values)} {kind}, which are too many to be classes: {hint}")
    if len(values) < 2:
        raise DataError(f"all pixels of the masks have the {described(values[0], coloured)}; expected two classes")
    if len(values) == 2 and values[0] == 0:
        return Table(("background", "object"), {0: 0, values[1]: 1}, coloured)
    void = {VOID: VOID} if not coloured and values[-1] == VOID and values[-2] < MOST else {}
    values = [value for value in values if value not in void]
    names = tuple(f"#{value:06x}" if coloured else str(value) for value in values)
    names = ("background", *names[1:]) if coloured and values[0] == 0 else names
    return Table(names, {value: label for label, value in enumerate(values)} | void, coloured)


def camvid_table() -> Table:
    """The eleven classes of SegNet's copy of CamVid."""
    return _table([(i,) for i in range(12)], CAMVID)


def _table(keys: Sequence[Sequence[int]], names: Sequence[str]) -> Table:
    classes = tuple(dict.fromkeys(name for name in names if name.lower() not in NONE))
    coloured, labels = len(keys[0]) == 3, {}
    for key, name in zip(keys, names, strict=True):
        number = packed(key) if coloured else key[0]
        if number in labels:
            raise DataError(f"two classes have the {described(number, coloured)}")
        labels[number] = classes.index(name) if name in classes else VOID
    return Table(classes, labels, coloured)


def read_table(path: str | os.PathLike) -> Table:
    """A file of classes. Raises DataError: it cannot be read, or has lines of another form."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text, expected a line per class") from None
    rows = [(number, _words(line)) for number, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"]
    if rows and rows[0][1][0] == () and any(key for _, (key, _) in rows[1:]):  # a header: name,r,g,b
        del rows[0]
    sizes = {len(key) for _, (key, _) in rows}
    if not rows or len(sizes) > 1 or not sizes <= {0, 1, 3}:
        expected = "lines 'VALUE NAME', 'RED GREEN BLUE NAME' or 'NAME', all of one form"
        raise DataError(f"{path} has {'no line' if not rows else 'lines of several forms'}, expected {expected}")
    keys = [key or (i,) for i, (_, (key, _)) in enumerate(rows)]
    for (number, (_, name)), key in zip(rows, keys, strict=True):
        if not name:
            raise DataError(f"{path} line {number} has no name")
        if len(key) == 3 and max(key) > 255:
            raise DataError(f"{path} line {number}: a colour is three numbers from 0 to 255, found {key}")
    try:
        table = _table(keys, [name for _, (_, name) in rows])
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if not 2 <= len(table.classes) < VOID:
        raise DataError(f"{path} has {len(table.classes)} classes, expected 2 to {VOID - 1}")
    return table


def _words(line: str) -> tuple[tuple[int, ...], str]:
    """(numbers, name) of a line: numbers before or after the name."""
    words = re.split(r"[\s,;]+", line.strip().strip(",;"))
    lead = next((i for i, word in enumerate(words) if not word.isdecimal()), len(words))
    last = next((i for i, word in enumerate(reversed(words)) if not word.isdecimal()), 0)
    if lead == len(words) and lead in (2, 4):  # the name is a number too
        lead -= 1
    if lead:
        return tuple(map(int, words[:lead])), " ".join(words[lead:])
    split = len(words) - last
    return tuple(map(int, words[split:])), " ".join(words[:split])
