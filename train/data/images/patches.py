"""Patches of pictures at two resolutions, for super-resolution: a batch is a function of key and step.

    low = lowered_all(pictures, 3)
    small, large = batch_at(key, step, 16, 36, 3, pictures, low)  # (16, channels, 12, 12), (16, channels, 36, 36)

The low-resolution pictures are made once, of whole pictures: a patch lowered by itself would differ at its border.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core import random
from train.data import DataError
from train.data.images import resize
from train.data.images.augment import unit


def lowered_all(pictures: Sequence[Tensor], scale: int) -> tuple[Tensor, ...]:
    """The low-resolution version of each picture (channels, height, width) of bytes, cropped to multiples of the scale:
    floats, (channels, height / scale, width / scale), with 1 for white."""
    return tuple(resize.lowered(resize.cropped(unit(x)[None], scale), scale)[0] for x in pictures)


def batch_at(
    key: Tensor, step: int, batch: int, size: int, scale: int, high: Sequence[Tensor], low: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The batch of a step: random patches, turned and mirrored, each position of each picture equally likely.

    Args:
        key: (2,).
        size: pixels per side of a high-resolution patch, a multiple of the scale.
        high: (channels, height, width) of bytes each.
        low: `lowered_all` of them.

    Returns:
        (batch, channels, size / scale, size / scale) and (batch, channels, size, size), 1 for white.

    Raises DataError: a size that is no multiple of the scale, or larger than all pictures.
    """
    if size % scale or size < scale:
        raise DataError(f"a patch of {size} pixels cannot be lowered by {scale}; expected a multiple")
    side = size // scale
    rows, columns = torch.tensor([[max(0, n - side + 1) for n in x.shape[1:]] for x in low]).unbind(1)
    ends = (rows * columns).cumsum(0)  # (pictures,)
    if ends[-1] == 0:
        raise DataError(f"no picture has a patch of {size} x {size} pixels; expected a smaller one")
    position_key, turn_key = random.sites(random.fold_in(key, step), 2)
    positions = (random.uniform(position_key, (batch,), torch.float64) * ends[-1]).long()
    number = torch.searchsorted(ends, positions, right=True)  # (batch,)
    within = positions - (ends - rows * columns)[number]
    tops, lefts = within // columns[number], within % columns[number]
    turns = random.bernoulli(turn_key, 0.5, (batch, 3)).tolist()

    small, large = [], []
    for i, top, left, (flip, mirror, turn) in zip(number.tolist(), tops.tolist(), lefts.tolist(), turns, strict=True):
        for patches, picture, n, k in ((small, low[i], side, 1), (large, high[i], size, scale)):
            patch = picture[:, k * top : k * top + n, k * left : k * left + n]
            patches.append(turned(patch, flip, mirror, turn))
    return torch.stack(small), unit(torch.stack(large))


def turned(x: Tensor, flip: bool, mirror: bool, turn: bool) -> Tensor:
    """One of the eight symmetries of a square of the last two axes: upside down, left to right, then transposed."""
    axes = [axis for axis, yes in ((-2, flip), (-1, mirror)) if yes]
    x = x.flip(axes) if axes else x
    return x.mT if turn else x


def returned(x: Tensor, flip: bool, mirror: bool, turn: bool) -> Tensor:
    """The inverse of `turned`."""
    return turned(x.mT if turn else x, flip, mirror, False)


SYMMETRIES = [(flip, mirror, turn) for turn in (False, True) for flip in (False, True) for mirror in (False, True)]
