"""Generated scenes: coloured digits on a textured canvas, with their masks, boxes and captions, all from a key.

Every pixel, box and word is a pure function of the key, so tasks that look at pictures (segmentation, detection,
captions) have data offline whose truth is known exactly.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import random
from train.data.images.arrays import Labelled

COLOURS = {
    "red": (0.95, 0.2, 0.2),
    "green": (0.2, 0.85, 0.3),
    "blue": (0.3, 0.45, 1.0),
    "yellow": (0.95, 0.9, 0.25),
    "purple": (0.75, 0.35, 0.95),
    "white": (0.95, 0.95, 0.95),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INK = 0.4
"""Opacity from which on a pixel belongs to a digit."""
ATTEMPTS = 12


class Scenes(NamedTuple):
    """Scenes of up to `most` digits; slots without a digit have label and colour -1 and a box of zeros.

    Attributes:
        images: (count, 3, side, side) float32 in [0, 1].
        masks: (count, side, side) int64, 0 background, 1 + digit.
        instances: (count, side, side) int64, 0 background, 1 + slot of the digit in front.
        boxes: (count, most, 4) float32, left, top, right, bottom in pixels, tight around the whole digit.
        labels: (count, most) int64, the digits.
        colours: (count, most) int64, numbers in the order of `COLOURS`.
    """

    images: Tensor
    masks: Tensor
    instances: Tensor
    boxes: Tensor
    labels: Tensor
    colours: Tensor


def scenes(
    key: Tensor,
    count: int,
    digits: Labelled,
    *,
    side: int = 64,
    least: int = 1,
    most: int = 4,
    sizes: tuple[int, int] = (16, 30),
    overlap: float = 0.15,
    without: Sequence[tuple[str, int]] = (),
) -> Scenes:
    """Draw scenes of `least` to `most` digits; one that finds no room is left out.

    Args:
        key: (2,).
        digits: the handwritten digits to draw from, square ones in one channel.
        side: height and width of the canvas.
        sizes: smallest and largest side of a digit in pixels.
        overlap: greatest part of a digit's square that another one covers.
        without: pairs of a colour and a digit that do not occur, to be held out.

    Raises:
        ValueError: digits larger than the canvas, more of them asked for at least than at most, an unknown colour.
    """
    if not 0 < sizes[0] <= sizes[1] <= side:
        raise ValueError(f"scenes: sizes {sizes} of digits; expected them ascending and up to the canvas of {side}")
    if not 0 <= least <= most or most < 1:
        raise ValueError(f"scenes: from {least} to {most} digits; expected at least one, and no more least than most")
    for name, digit in without:
        if name not in COLOURS or not 0 <= digit <= 9:
            raise ValueError(f"scenes: no pair ({name}, {digit}); expected a digit and one of {', '.join(COLOURS)}")
    k = random.split(key, 7)
    numbers = random.randint(k[0], (count,), least, most + 1)  # (count,)
    wanted = torch.arange(most) < numbers[:, None]  # (count, most)
    rows = random.randint(k[1], (count, most), 0, len(digits.labels))
    labels = digits.labels[rows]  # (count, most)
    colours = _colours(k[2], labels, without)
    squares, fits = _squares(k[3], count, most, side, sizes, overlap, wanted)  # (count, most, 3), (count, most)
    labels, colours = torch.where(fits, labels, -1), torch.where(fits, colours, -1)

    canvas = _texture(k[4], count, side)  # (count, 3, side, side)
    tints = random.uniform(k[5], (count, most, 3, 1, 1), minval=-0.08, maxval=0.08)
    palette = torch.tensor(list(COLOURS.values()))
    instances, boxes = torch.zeros(count, side, side, dtype=torch.int64), []
    for slot in range(most):
        alpha = _stamp(digits.images[rows[:, slot]], squares[:, slot], side)  # (count, side, side)
        alpha = alpha * fits[:, slot, None, None]
        ink = (palette[colours[:, slot].clamp(min=0)][..., None, None] + tints[:, slot]).clamp(0, 1)  # (count, 3, 1, 1)
        canvas = torch.lerp(canvas, ink.expand_as(canvas), alpha[:, None])
        instances = torch.where(alpha >= INK, slot + 1, instances)
        boxes.append(_box(alpha >= INK))
    canvas = (canvas + 0.03 * random.normal(k[6], canvas.shape)).clamp(0, 1)
    slots = torch.cat([torch.zeros(count, 1, dtype=torch.int64), labels + 1], 1)  # (count, 1 + most)
    masks = slots.gather(1, instances.flatten(1)).view_as(instances)
    return Scenes(canvas, masks, instances, torch.stack(boxes, 1), labels, colours)


def _colours(key: Tensor, labels: Tensor, without: Sequence[tuple[str, int]]) -> Tensor:
    """A colour for each digit, (count, most); pairs that are held out have probability 0."""
    allowed = torch.ones(10, len(COLOURS), dtype=torch.bool)
    for name, digit in without:
        allowed[digit, list(COLOURS).index(name)] = False
    logits = torch.zeros(10, len(COLOURS)).masked_fill(~allowed, -torch.inf)
    return random.categorical(key, logits[labels])


def _squares(
    key: Tensor, count: int, most: int, side: int, sizes: tuple[int, int], overlap: float, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """Left, top and side of the square of each digit, (count, most, 3), and (count, most) True where it finds room."""
    size_key, place_key = random.split(key).unbind(0)
    size = random.randint(size_key, (count, most), sizes[0], sizes[1] + 1)  # (count, most)
    share = random.uniform(place_key, (count, most, ATTEMPTS, 2))
    squares, fits = torch.zeros(count, most, 3), torch.zeros(count, most, dtype=torch.bool)
    for slot in range(most):
        own = size[:, slot, None, None]
        corners = (share[:, slot] * (side - own + 1)).floor()  # (count, attempts, 2)
        tries = torch.cat([corners, own.expand(-1, ATTEMPTS, 1).to(corners.dtype)], -1)  # (count, attempts, 3)
        covered = _covered(tries[:, :, None], squares[:, None]) * fits[:, None]  # (count, attempts, most)
        free = (covered.amax(-1) <= overlap) & wanted[:, slot, None]  # (count, attempts)
        first = free.to(torch.int64).argmax(1)
        placed = tries[torch.arange(count), first]  # (count, 3)
        squares = torch.cat([squares[:, :slot], placed[:, None], squares[:, slot + 1 :]], 1)
        fits = torch.cat([fits[:, :slot], free.any(1, keepdim=True), fits[:, slot + 1 :]], 1)
    return squares, fits


def _covered(a: Tensor, b: Tensor) -> Tensor:
    """Area common to two squares, as a share of the smaller one: (..., 3) and (..., 3) -> (...)."""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    return common / torch.minimum(a[..., 2], b[..., 2]).clamp(min=1).square()


def _texture(key: Tensor, count: int, side: int) -> Tensor:
    """Dark clouds, (count, 3, side, side)."""
    clouds = random.uniform(key, (count, 3, 5, 5), minval=0.0, maxval=0.4)
    return F.interpolate(clouds, size=(side, side), mode="bilinear", align_corners=True)


def _stamp(images: Tensor, squares: Tensor, side: int) -> Tensor:
    """Digits, (count, 1, 8, 8), enlarged into their squares, (count, 3), of a canvas: opacity (count, side, side)."""
    left, top, size = squares.clamp(min=0).unbind(-1)
    size = size.clamp(min=1)
    zero = torch.zeros_like(left)
    # From the canvas's coordinates, -1 to 1, to the digit's own.
    scale = side / size
    rows = [
        torch.stack([scale, zero, (side - 2 * left) / size - 1], -1),
        torch.stack([zero, scale, (side - 2 * top) / size - 1], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [len(images), 1, side, side], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False).squeeze(1).clamp(0, 1)


def _box(mask: Tensor) -> Tensor:
    """(count, 4): left, top, right, bottom around the True pixels of (count, side, side); zeros if there are none."""
    side, ends = mask.shape[-1], []
    for axis in (1, 2):  # columns, rows
        line = mask.any(axis)  # (count, side)
        first = line.to(torch.int64).argmax(1)
        last = side - line.flip(1).to(torch.int64).argmax(1)
        ends.append((first, last))
    (left, right), (top, bottom) = ends
    box = torch.stack([left, top, right, bottom], -1).float()
    return box * mask.any(2).any(1)[:, None]


def captions(scenes: Scenes) -> list[str]:
    """A sentence for each scene, its digits from left to right: "a red seven left of a blue three"."""
    centres = (scenes.boxes[..., 0] + scenes.boxes[..., 2]) / 2
    order = torch.where(scenes.labels < 0, torch.inf, centres).argsort(dim=1, stable=True)
    names, out = list(COLOURS), []
    for row, labels, colours in zip(order.tolist(), scenes.labels.tolist(), scenes.colours.tolist(), strict=True):
        words = [f"a {names[colours[slot]]} {NUMBERS[labels[slot]]}" for slot in row if labels[slot] >= 0]
        out.append(" left of ".join(words) or "nothing")
    return out
