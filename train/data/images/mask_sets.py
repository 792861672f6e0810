"""Pictures with masks that the `--data` of an experiment names, all in memory, as files they are in any of the layouts
of `mask_folders`.

Sizes may differ from picture to picture; batches are made of windows (`windows`). One bad pair (unreadable, of two
sizes, without partner, a mask with unknown values) is named, logged, skipped and counted.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core import random
from train.data import DataError
from train.data.file_tree import Skipped
from train.data.images import mask_folders, masks
from train.data.images.mask_folders import Pairs
from train.data.images.masks import OBJECTS, VOID, Mask, Table
from train.data.images.picture import converted, opened
from train.files import shown

log = logging.getLogger(__name__)

MEMORY = 16 << 30
"""Bytes of pictures that are read, at most."""


class Segmented(NamedTuple):
    """Pictures with their masks.

    Attributes:
        images: (3, height, width) uint8 each.
        masks: (height, width) uint8 each, labels or VOID; of a part to test on in the size of the file.
        paths: file of each picture.
        objects: (height, width) int32 each, 0 or the number of an object; () where masks have classes alone.
    """

    images: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    paths: tuple[Path, ...]
    objects: tuple[Tensor, ...] = ()


class MaskSet(NamedTuple):
    """Pictures to train on and to test on, and the table of their masks; `origin` names where the two come from."""

    train: Segmented
    test: Segmented
    table: Table
    origin: tuple[str, str]
    skipped: tuple[Skipped, ...] = ()


def open_masks(data: str, longest: int | None = None, part: str = "split", table: Table | None = None) -> MaskSet:
    """The pictures and masks of a folder, or of "IMAGES,MASKS".

    Without a part to test on, every fifth pair, in a fixed random order, is held out.

    Args:
        longest: pixels of the longer side that larger pictures are scaled to. Masks to train on are too (the nearest
            pixel), those to test on are not.
        part: "split"; or "all": nothing is held out, so that both parts are all pairs, of a folder with a part to test
            on those of that part.
        table: of a trained net, whose classes keep their labels.

    Raises DataError: as `mask_folders.layout`; no pair that can be used; too large for the memory.
    """
    if not data or "," not in data and not Path(data).is_dir():
        problem = "is a file" if data and Path(data).exists() else "does not exist"
        raise DataError(f"--data '{data}' {problem}; expected scenes, a folder of pictures with masks, or IMAGES,MASKS")
    place = mask_folders.layout(data)
    pairs, test = place.train, place.test
    origin = ("its own training part", "its own test part")
    if part == "all":
        pairs, origin = (pairs if test is None else test), ("", "all of it" if test is None else "its own test part")
        test = pairs
    elif test is None:
        pairs, test = _held_out(pairs)
        origin = ("four fifths of it", "one fifth of it")
    if place.table is not None and table is None:
        table = masks.read_table(place.table)
    table = OBJECTS if table is None and pairs.objects else table
    reader = _Reader(table, longest, place.camvid)
    if part == "all":
        only = reader.read(pairs, full=True)
        return MaskSet(only, only, reader.table, origin, (*pairs.skipped, *reader.skipped))
    learn = reader.read(pairs, full=False)
    skipped = pairs.skipped if test.skipped == pairs.skipped else (*pairs.skipped, *test.skipped)
    rest = reader.read(test, full=True)
    return MaskSet(learn, rest, reader.table, origin, (*skipped, *reader.skipped))


def _held_out(pairs: Pairs) -> tuple[Pairs, Pairs]:
    count = len(pairs.images)
    if count < 2:
        raise DataError(f"{pairs.images[0].parent} has one pair; expected at least 2, of which one is for testing")
    order, held = random.permutation(random.key(0), count).tolist(), max(1, count // 5)

    def some(indices: list[int]) -> Pairs:
        images, files = ([values[i] for i in sorted(indices)] for values in (pairs.images, pairs.masks))
        return pairs._replace(images=tuple(images), masks=tuple(files))

    return some(order[held:]), some(order[:held])


class _Reader:
    """Reads pairs; the first ones give the table if there is none yet."""

    def __init__(self, table: Table | None, longest: int | None, camvid: bool):
        self.table, self.skipped = table, []
        self._longest, self._camvid, self._bytes = longest, camvid, 0

    def read(self, pairs: Pairs, full: bool) -> Segmented:
        """full: masks in the size of their files."""
        rows = []
        for path, files in zip(pairs.images, pairs.masks, strict=True):
            row = self._usable(path, self._pair, path, files)
            rows += [] if row is None else [(path, *row)]
            if self._bytes > MEMORY:
                needs = f"more than {MEMORY >> 30} GiB of memory; scale them down with --longest"
                raise DataError(f"the pictures of {pairs.images[0].parent} need {needs}")
        if self.table is None and rows:
            self.table = self._infer([mask for _, _, mask in rows])
        images, labels, objects, paths = [], [], [], []
        for path, image, mask in rows:
            label = self._usable(path, masks.labelled, mask, self.table)
            if label is None:
                continue
            size = None if full else image.size
            images.append(torch.from_numpy(np.stack([np.asarray(channel) for channel in image.split()])))
            labels.append(resized(label, size))
            paths.append(path)
            if self.table == OBJECTS:
                objects.append(resized(mask.values.astype(np.int32), size))
        if not images:
            path, reason = self.skipped[0]
            raise DataError(f"none of the {len(pairs.images)} pictures can be used; {path} {reason}")
        return Segmented(tuple(images), tuple(labels), tuple(paths), tuple(objects))

    def _usable(self, path: Path, read: Callable, *args: Any) -> Any:
        """`read(*args)`, or None where it raises DataError, whose reason is noted."""
        try:
            return read(*args)
        except DataError as error:
            reason = str(error).removeprefix(f"{shown(path)} ")
        log.warning("skipped: %s %s", shown(path), reason)
        self.skipped.append((path, reason))
        return None

    def _infer(self, values: Sequence[Mask]) -> Table:
        if self._camvid and all(not mask.coloured and int(mask.values.max()) < 12 for mask in values):
            return masks.camvid_table()
        clean = [mask for mask in values if len(np.unique(mask.values)) <= masks.MOST]  # others are no masks
        return masks.infer(clean if 2 * len(clean) > len(values) else values)

    def _pair(self, path: Path, files: Sequence[Path]) -> tuple[Image.Image, Mask]:
        with opened(path) as image:
            image = converted(image, 3).copy()
        several = [masks.read_mask(file) for file in files]
        for file, mask in zip(files, several, strict=True):
            if mask.values.shape != (image.height, image.width):
                height, width = mask.values.shape
                sizes = f"is {image.width} x {image.height} pixels, its mask {shown(file.name)} {width} x {height}"
                raise DataError(sizes)
        if self._longest and max(image.size) > self._longest:
            image = image.resize(shrunk(image.size, self._longest), Image.Resampling.BILINEAR)
        self._bytes += 3 * image.width * image.height + sum(mask.values.nbytes for mask in several)
        return image, several[0] if len(several) == 1 else _joined(several)


def shrunk(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """A size in the same proportions, whose longer side has `longest` pixels."""
    return tuple(max(1, round(longest * side / max(size))) for side in size)


def _joined(several: Sequence[Mask]) -> Mask:
    """One map of objects of a mask each."""
    values = np.zeros(several[0].values.shape, np.int32)
    for number, mask in enumerate(several, 1):
        values[mask.values > 0] = number
    return Mask(values, {}, False)


def resized(values: np.ndarray, size: tuple[int, int] | None) -> Tensor:
    """(height, width): the nearest pixels at a size (width, height)."""
    if size is not None and size != values.shape[::-1]:
        values = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))
    return torch.from_numpy(np.array(values))


def facts(data: MaskSet, name: str) -> dict[str, Any]:
    """Names and values of a set, for `train.data.understood`. name: the value of `--data`."""
    shares = class_counts(data.train)[: len(data.table.classes)]
    shares = 100 * shares / shares.sum().clamp(min=1)
    out: dict[str, Any] = {"pictures": name}
    out["classes"] = {c: f"{share:.2g} %" for c, share in zip(data.table.classes, shares.tolist(), strict=True)}
    pixels = sum(mask.numel() for mask in data.train.masks)
    out["void"] = f"{100 * int(class_counts(data.train)[VOID]) / pixels:.2g} % of the pixels to learn from"
    same = data.train is data.test
    rows = [("test", data.test)] if same else [("train", data.train), ("test", data.test)]
    for (purpose, part), origin in zip(rows, data.origin[-len(rows) :], strict=True):
        sizes = sorted({f"{image.shape[2]} x {image.shape[1]}" for image in part.images})
        listed = ", ".join(sizes[:3]) + (f" and {len(sizes) - 3} more sizes" if len(sizes) > 3 else "")
        out[f"pictures to {purpose} on"] = f"{len(part.images):,} of {listed} pixels ({origin})"
    return out | {"skipped": list(dict.fromkeys(data.skipped))}


def class_counts(part: Segmented) -> Tensor:
    """(256,): number of pixels of each label, VOID among them."""
    return torch.stack([mask.flatten().bincount(minlength=256) for mask in part.masks]).sum(0)


def median_weights(part: Segmented, classes: int) -> Tensor:
    """(classes,) float32: the median frequency divided by that of each class; 0 for a class without pixels.

    The frequency of a class is its share of the pixels of those pictures that have it (Eigen and Fergus 2015,
    arXiv:1411.4734, section 6.3.2).
    """
    each = torch.stack([mask.flatten().bincount(minlength=256)[:classes] for mask in part.masks]).double()
    valid = each.sum(1, keepdim=True)  # (pictures, 1)
    frequency = each.sum(0) / ((each > 0) * valid).sum(0).clamp(min=1)  # (classes,)
    there = frequency > 0
    return torch.where(there, frequency[there].median() / frequency, 0.0).float()
