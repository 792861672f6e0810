"""A segmentation net that `experiments/segment.py` has trained: its predictions, in tiles where pictures are large, and
the files of its `predict`."""

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from core import spec, tree
from nets.classifiers.torchvision_weights import preprocess
from nets.dense import by_name
from train.data.images import augment, mask_sets
from train.data.images.blended_tiles import blended
from train.data.images.masks import Table
from train.data.images.picture import converted, opened
from train.files import distinct_stems, replacing, shown
from train.plots import segmentation as pictures
from train.run import SavedRun

TOGETHER = 16
"""Small pictures of one size that go through the net at once."""


@dataclass(frozen=True)
class Trained:
    """A run's net and its preparation of pictures; the entry "trained" of its configuration."""

    net: str
    """Preset of nets.dense."""
    classes: tuple[str, ...]
    values: tuple[tuple[int, int], ...]
    """(value or colour of a mask, label) pairs; none of maps of objects."""
    coloured: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    longest: int | None = None
    """Pixels of the longer side that larger pictures are scaled to."""
    members: int = 1

    @property
    def table(self) -> Table:
        return Table(self.classes, {value: label for value, label in self.values}, self.coloured)

    @property
    def background(self) -> bool:
        return self.table.background


class Segmenter(NamedTuple):
    """values: parameters and Stats; of several members stacked."""

    values: tree.Tree
    net: ModuleType
    cfg: Any
    trained: Trained
    tile: int = 512
    overlap: int = 96


def normalised(pixels: Tensor, trained: Trained) -> Tensor:
    """Bytes, or numbers in [0, 1], (batch, 3, height, width), as the net takes them."""
    return preprocess(augment.unit(pixels), trained)


def load(run: SavedRun, device: torch.device) -> Segmenter:
    """The net of a run, at its checkpoint."""
    trained = run.read("trained", Trained)
    net, preset = by_name.find(trained.net)
    cfg = run.read("net", type(preset))
    like = spec.abstract(net.spec(cfg))
    if trained.members > 1:
        like = tree.stack([like] * trained.members)
    parts = zip(("params", "stats"), spec.split(net.spec(cfg), like), strict=True)
    values = tree.merge(*(run.restore(part, name) if tree.leaves(part) else part for name, part in parts))
    return Segmenter(tree.move(values, device), net, cfg, trained)


@torch.no_grad()
def _together(model: Segmenter, pixels: Tensor) -> Tensor:
    """Probabilities (batch, members * classes, height, width) of pictures that fit into a tile."""
    x = normalised(pixels.to(tree.leaves(model.values)[0].device), model.trained)
    apply = partial(model.net.apply, cfg=model.cfg)
    if model.trained.members == 1:
        return apply(model.values, x).float().softmax(1)
    each = torch.vmap(apply, in_dims=(0, None))(model.values, x)  # (members, batch, classes, height, width)
    return each.float().softmax(2).transpose(0, 1).flatten(1, 2)


def _side(model: Segmenter) -> tuple[int, bool]:
    """(pixels per side of a tile, whether the net takes no other size)."""
    fixed = getattr(model.cfg, "image", None)
    return (fixed, True) if fixed else (model.tile, False)


def bands(model: Segmenter, picture: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, probabilities (members, classes, rows, width)) of a picture (3, height, width), from above."""
    tile, square = _side(model)
    overlap = min(model.overlap, tile // 4) if square else model.overlap
    for rows, values in blended(partial(_together, model), picture, tile, overlap, square=square):
        yield rows, values.unflatten(0, (model.trained.members, -1))


def probabilities(model: Segmenter, images: Sequence[Tensor]) -> Iterator[Tensor]:
    """(members, classes, height, width) of each picture, in their order; small ones of one size at once."""
    tile, square = _side(model)
    for shape, group in itertools.groupby(images, lambda image: tuple(image.shape)):
        if square or max(shape[1:]) > tile:
            yield from (torch.cat([values for _, values in bands(model, image)], 2) for image in group)
            continue
        while some := list(itertools.islice(group, TOGETHER)):
            values = _together(model, torch.stack(some)).cpu()
            yield from values.unflatten(1, (model.trained.members, -1))


def scaled(probs: Tensor, size: tuple[int, int]) -> Tensor:
    """(members, classes, *size): probabilities at another size."""
    if tuple(probs.shape[2:]) == tuple(size):
        return probs
    return F.interpolate(probs, tuple(size), mode="bilinear", align_corners=False)


def entropy(probs: Tensor) -> Tensor:
    """-sum_c p_c log p_c in nats: (classes, ...) -> (...)."""
    return torch.special.entr(probs).sum(0)


def regions(labels: Tensor, background: bool) -> Tensor:
    """(height, width) int32: the connected regions of one class, numbered from 1; 0 for the background."""
    numbers, total = np.zeros(labels.shape, np.int32), 0
    for c in labels.unique().tolist():
        if background and c == 0:
            continue
        own, count = ndimage.label(labels.numpy() == c)
        numbers[own > 0] = own[own > 0] + total
        total += count
    return torch.from_numpy(numbers)


def check_sizes(net: ModuleType, cfg: Any, tile: int, overlap: int, size: int | None = None) -> None:
    """Raise ValueError unless the net takes windows of `--size`, and tiles, at least twice as large as the overlap."""
    if tile < 2 * overlap:
        raise ValueError(f"--tile is {tile} and --overlap {overlap}; expected tiles of at least twice the overlap")
    model = spec.abstract(net.spec(cfg))
    for flag, side in (("--size", size), ("--tile", None if hasattr(cfg, "image") else tile)):
        if side is not None:
            try:
                net.apply(model, torch.empty(1, 3, side, side, device="meta"), cfg)
            except ValueError as error:
                raise ValueError(f"{flag} is {side}: {error}") from None


class Prediction(NamedTuple):
    """labels (height, width) uint8; entropy of the mean over members, and its part that is their disagreement (the
    mutual information of label and member), (height, width) in nats."""

    labels: Tensor
    entropy: Tensor
    disagreement: Tensor


def _summed_up(probs: Tensor) -> Prediction:
    """probs: (members, classes, rows, width)."""
    mean = probs.mean(0)  # (classes, rows, width)
    total = entropy(mean)
    # I = H(mean of p_m) - mean of H(p_m)
    return Prediction(mean.argmax(0).byte(), total, total - torch.stack([entropy(one) for one in probs]).mean(0))


def predicted(model: Segmenter, image: Image.Image) -> Prediction:
    """The prediction of a picture in its own size. Raises ValueError: it is smaller than the net's stride."""
    picture, full = image, (image.height, image.width)
    if model.trained.longest and max(image.size) > model.trained.longest:
        picture = image.resize(mask_sets.shrunk(image.size, model.trained.longest), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.stack([np.asarray(channel) for channel in picture.split()]))
    if picture is not image:
        return _summed_up(scaled(torch.cat([probs for _, probs in bands(model, pixels)], 2), full))
    parts = [_summed_up(probs) for _, probs in bands(model, pixels)]
    return Prediction(*(torch.cat(column) for column in zip(*parts, strict=True)))


def write_predictions(folder: Path, model: Segmenter, paths: Sequence[Path], objects: bool) -> None:
    """NAME.png, a mask whose values are the classes' numbers, listed in classes.txt, and NAME_overlay.png of each
    picture; NAME_uncertainty.png of several members; with `objects` NAME_objects.png and objects.csv.

    Raises ValueError if no picture can be used.
    """
    trained, skipped, rows = model.trained, [], []
    colours = pictures.palette(len(trained.classes), trained.background)
    folder.mkdir(parents=True)
    for path, name in zip(paths, distinct_stems(paths), strict=True):
        try:
            with opened(path) as file:
                image = converted(file, 3).copy()
            out = predicted(model, image)
        except ValueError as error:
            skipped.append((path, str(error).removeprefix(f"{shown(path)} ")))
            print(f"skipped: {shown(path)} {skipped[-1][1]}")
            continue
        mask = Image.fromarray(out.labels.numpy())
        mask.putpalette(colours.tobytes())
        over = pictures.overlay(
            np.stack([np.asarray(c) for c in image.split()]), out.labels, colours, trained.background
        )
        files = {"": mask, "_overlay": Image.fromarray(over)}
        if trained.members > 1:
            files["_uncertainty"] = Image.fromarray(pictures.heat(out.entropy, math.log(len(trained.classes))))
        if objects:
            numbers = regions(out.labels, trained.background)
            files["_objects"] = Image.fromarray(numbers.numpy().astype(np.uint16))
            rows += [[shown(path), *row] for row in _boxes(numbers, out.labels, trained.classes)]
        for ending, picture in files.items():
            with replacing(folder / f"{name}{ending}.png") as temporary:
                picture.save(temporary, format="PNG")
        counts = out.labels.flatten().bincount(minlength=len(trained.classes))
        shares = {c: n / out.labels.numel() for c, n in zip(trained.classes, counts.tolist(), strict=True) if n}
        best = sorted(shares.items(), key=lambda item: -item[1])[:5]
        print(shown(path), *(f"{shown(c)} {share:.1%}" for c, share in best), sep="  ")
    if len(skipped) == len(paths):
        folder.rmdir()
        raise ValueError(f"none of the {len(paths)} pictures can be used; {shown(paths[0])} {skipped[0][1]}")
    with replacing(folder / "classes.txt") as temporary:
        temporary.write_text("".join(f"{i} {c}\n" for i, c in enumerate(trained.classes)), encoding="utf-8")
    if objects:
        with replacing(folder / "objects.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["picture", "object", "class", "left", "top", "right", "bottom", "pixels"])
            table.writerows(rows)
        print(f"{len(rows)} objects")
    if skipped:
        print(f"{len(skipped)} of {len(paths)} pictures skipped")


def _boxes(numbers: Tensor, labels: Tensor, classes: Sequence[str]) -> Iterator[list]:
    """[number, class, left, top, right, bottom, pixels] of each region."""
    for number, box in enumerate(ndimage.find_objects(numbers.numpy()), 1):
        inside = numbers[box] == number
        label = classes[int(labels[box][inside][0])]
        yield [number, label, box[1].start, box[0].start, box[1].stop, box[0].stop, int(inside.sum())]
