"""Batches of pictures with boxes: all of one size, and random flips, zooms and mosaics that take their boxes along.

Pictures are (batch, channels, height, width); boxes (batch, most, 4), left, top, right, bottom in pixels; labels
(batch, most), -1 in rows without a box. All is drawn from keys, one per example, and works in fixed shapes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from core import boxes as box_ops
from core import random
from train.data import DataError
from train.data.file_tree import Skipped
from train.data.images.annotations import Annotated
from train.data.images.picture import converted, opened

BACKGROUND = -1
FILL = 114
"""Grey of the bytes around a picture that is no square."""
VISIBLE = 0.3
"""Least share of a box that must be left inside, or it is no object any more."""


class Boxed(NamedTuple):
    """images uint8 or float in [0, 1]; boxes (count, most, 4); labels (count, most); crowd (count, most) boolean;
    scales (count,), pixels here per pixel of the file."""

    images: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    scales: Tensor

    def some(self, rows: Tensor) -> "Boxed":
        """The rows (count,) of each field."""
        return Boxed(*(values[rows] for values in self))


def read(
    pictures: Sequence[Annotated], classes: Sequence[str], size: int, channels: int = 3
) -> tuple[Boxed, list[Skipped]]:
    """Pictures scaled so that the longer side has `size` pixels, and filled up to squares with grey on the right and at
    the bottom; one that cannot be read, or has other sizes than its annotation says, is skipped.

    Raises DataError: none can be used.
    """
    rows, skipped = [], []
    for one in pictures:
        try:
            with opened(one.path) as image:
                actual = image.size
                pixels, scale = fitted(image, size, channels)
        except DataError as error:
            skipped.append((one.path, str(error).removeprefix(f"{one.path} ")))
            continue
        if one.size not in (None, actual):
            sizes = f"is {actual[0]} x {actual[1]}, its annotation says {one.size[0]} x {one.size[1]}"
            skipped.append((one.path, sizes))
            continue
        rows.append((pixels, scale, one))
    if not rows:
        where, reason = skipped[0] if skipped else ("the list", "is empty")
        raise DataError(f"no picture with boxes can be used; {where} {reason}")
    most = max([1, *(len(one.labels) for *_, one in rows)])
    numbers = {name: i for i, name in enumerate(classes)}
    boxes, labels = torch.zeros(len(rows), most, 4), torch.full((len(rows), most), BACKGROUND)
    crowd = torch.zeros(len(rows), most, dtype=torch.bool)
    for i, (_, scale, one) in enumerate(rows):
        count = len(one.labels)
        if count:
            boxes[i, :count] = torch.tensor(one.boxes) * scale
            labels[i, :count] = torch.tensor([numbers[name] for name in one.labels])
            crowd[i, :count] = torch.tensor(one.crowd)
    images = torch.from_numpy(np.stack([pixels for pixels, *_ in rows]))
    return Boxed(images, boxes, labels, crowd, torch.tensor([scale for _, scale, _ in rows])), skipped


def fitted(image: Image.Image, size: int, channels: int) -> tuple[np.ndarray, float]:
    """The picture as `read` scales it: ((channels, size, size) bytes, pixels of these per pixel of the picture)."""
    image = converted(image, channels)
    scale = size / max(image.size)
    width, height = (max(1, min(size, round(side * scale))) for side in image.size)
    canvas = Image.new(image.mode, (size, size), (FILL,) * channels if channels > 1 else FILL)
    canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR), (0, 0))
    return np.asarray(canvas).reshape(size, size, channels).transpose(2, 0, 1).copy(), scale


def unfilled(image: Tensor) -> Tensor:
    """An image (channels, height, width) of bytes without the grey that `fitted` filled it up with."""
    inside = (image != FILL).any(0)
    if not inside.any():
        return image
    height, width = (int(inside.any(dim).nonzero().max()) + 1 for dim in (1, 0))
    return image[:, :height, :width]


def flip(keys: Tensor, images: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Horizontal flips of half of the examples."""
    coin = random.bernoulli(keys, 0.5, ())  # (batch,)
    width, live = images.shape[3], (labels >= 0)[..., None]
    left, top, right, bottom = boxes.unbind(-1)
    mirrored = torch.stack([width - right, top, width - left, bottom], -1)
    mirrored = torch.where(live, mirrored, boxes)
    return (
        torch.where(coin[:, None, None, None], images.flip(3), images),
        torch.where(coin[:, None, None], mirrored, boxes),
        labels,
    )


def zoom(
    keys: Tensor, images: Tensor, boxes: Tensor, labels: Tensor, least: float = 0.6, greatest: float = 1.4
) -> tuple[Tensor, Tensor, Tensor]:
    """Random enlargement by `least` to `greatest` (evenly in its logarithm), and a random place; outside is grey.

    A box of which too little is left inside is dropped.
    """
    (height, width), own = images.shape[2:], random.split(keys, 2)  # (batch, 2, 2)
    low, high = torch.tensor([least, greatest]).log().tolist()
    scale = random.uniform(own[:, 0], (), minval=low, maxval=high).exp()  # (batch,)
    share = random.uniform(own[:, 1], (2,))  # (batch, 2)
    room = torch.tensor([width, height]) * (1 - scale[:, None])  # (batch, 2); negative where it is enlarged
    shift = share * room  # of the picture's corner
    move = torch.cat([shift, shift], -1)[:, None]  # (batch, 1, 4)
    # From the coordinates of the result, -1 to 1, to those of the picture.
    size = torch.tensor([width, height]).to(shift.dtype)
    offset = (1 - 2 * shift / size) / scale[:, None] - 1  # (batch, 2)
    zero = torch.zeros_like(scale)
    rows = [torch.stack([1 / scale, zero, offset[:, 0]], -1), torch.stack([zero, 1 / scale, offset[:, 1]], -1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    out = F.grid_sample(images - 0.45, grid, mode="bilinear", align_corners=False) + 0.45
    moved = boxes * scale[:, None, None] + move
    return out, *_visible(moved, labels, height, width)


def _visible(boxes: Tensor, labels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    inside = box_ops.clip(boxes, height, width)
    whole = box_ops.area(boxes)
    share = box_ops.area(inside) / torch.where(whole > 0, whole, 1.0)
    live = (labels >= 0) & (share > VISIBLE)
    return torch.where(live[..., None], inside, 0.0), torch.where(live, labels, BACKGROUND)


def mosaic(images: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four examples of the batch, at half their size, in one: i, i + 1, i + 2 and i + 3. -> boxes (batch, 4 most, 4).

    Bochkovskiy et al. 2020, "YOLOv4" (arXiv:2004.10934), here without random seams.
    """
    height, width = images.shape[2:]
    small = F.interpolate(images, size=(height // 2, width // 2), mode="bilinear", antialias=True)
    parts, frames, kinds = [], [], []
    for i in range(4):
        offset = torch.tensor([i % 2 * (width // 2), i // 2 * (height // 2)] * 2)
        own, label = boxes.roll(-i, 0) / 2 + offset, labels.roll(-i, 0)
        parts.append(small.roll(-i, 0))
        frames.append(torch.where((label >= 0)[..., None], own, 0.0))
        kinds.append(label)
    rows = [torch.cat(parts[:2], 3), torch.cat(parts[2:], 3)]  # each (batch, channels, height / 2, width)
    return torch.cat(rows, 2), torch.cat(frames, 1), torch.cat(kinds, 1)
