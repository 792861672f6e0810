"""A buffer of generated images, from which the critic gets some of the past ones too.

Shrivastava et al. 2017, "Learning from Simulated and Unsupervised Images through Adversarial Training"
(arXiv:1612.07828), section 2.3: a critic that sees the latest images only forgets what it learned of earlier ones.
CycleGAN's form: the first `capacity` images are kept and pass; from then on an image passes with chance 1/2, and
otherwise takes the place of a stored one, which passes instead.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core import random


class Buffer(NamedTuple):
    """images (capacity, channels, height, width), of which the first `count` (0-D, int64) are filled."""

    images: Tensor
    count: Tensor


def create(
    shape: Sequence[int],
    capacity: int = 50,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Buffer:
    """An empty buffer of images of `shape`, (channels, height, width). Raises ValueError if the capacity is below 1."""
    if capacity < 1:
        raise ValueError(f"image_buffer: capacity is {capacity}; expected at least 1")
    images = torch.zeros((capacity, *shape), dtype=dtype, device=device)
    return Buffer(images, torch.zeros((), dtype=torch.int64, device=device))


def buffer(state: Buffer, images: Tensor, key: Tensor) -> tuple[Buffer, Tensor]:
    """(new state, what the critic gets): as if the images came one after another.

    Args:
        images: (batch, channels, height, width).
        key: (2,).

    Raises:
        ValueError: images of another shape than those of the state.
    """
    stored, count = state
    if images.shape[1:] != stored.shape[1:]:
        found, expected = tuple(images.shape[1:]), tuple(stored.shape[1:])
        raise ValueError(f"image_buffer: expected images of shape {expected}, found {found}")
    batch, capacity = len(images), len(stored)
    swap_key, place_key = random.split(key).unbind(0)
    turn = torch.arange(batch, device=images.device)
    fills = count + turn < capacity
    swaps = ~fills & random.bernoulli(swap_key, 0.5, (batch,))
    slots = torch.where(fills, count + turn, random.randint(place_key, (batch,), 0, capacity).long())

    def last_writer(slots_read: Tensor, before: Tensor) -> Tensor:
        """The last example, of those with a smaller number than `before`, that went into each slot; -1 if none did."""
        written = (fills | swaps) & (slots == slots_read[:, None]) & (turn < before[:, None])
        return torch.where(written, turn, -1).amax(1)

    def at(slots_read: Tensor, before: Tensor) -> Tensor:
        """What each slot then holds."""
        writer = last_writer(slots_read, before)
        return torch.where(column(writer >= 0), images[writer.clamp(min=0)], stored[slots_read])

    def column(x: Tensor) -> Tensor:
        return x.reshape(-1, *(1,) * (images.ndim - 1))

    passed = torch.where(column(swaps), at(slots, turn), images)
    every = torch.arange(capacity, device=images.device)
    filled = (count + batch).clamp(max=capacity)
    return Buffer(at(every, torch.full_like(every, batch)), filled), passed
