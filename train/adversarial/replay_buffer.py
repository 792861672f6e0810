"""Replay buffer: generated images, from which the critic also gets past ones.

Shrivastava et al. 2017, "Learning from Simulated and Unsupervised Images through Adversarial Training"
(arXiv:1612.07828), section 2.3: a critic that sees the latest images only forgets what it learned of earlier ones.
CycleGAN's form: the first `capacity` images are stored and pass; from then on an image passes with probability 1/2, and
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
        raise ValueError(f"replay_buffer: capacity is {capacity}; expected at least 1")
    images = torch.zeros((capacity, *shape), dtype=dtype, device=device)
    return Buffer(images, torch.zeros((), dtype=torch.int64, device=device))


def buffer(state: Buffer, images: Tensor, key: Tensor) -> tuple[Buffer, Tensor]:
    """(new state, images for the critic): as if the images came one after another.

    Args:
        images: (batch, channels, height, width); those that pass have their dtype, the state keeps its own.
        key: (2,).

    Raises:
        ValueError: images of another shape than those of the state.
    """
    stored, count = state
    if images.shape[1:] != stored.shape[1:]:
        shape, expected = tuple(images.shape[1:]), tuple(stored.shape[1:])
        raise ValueError(f"replay_buffer: expected images of shape {expected}, found {shape}")
    batch, capacity = len(images), len(stored)
    swap_key, place_key = random.split(key).unbind(0)
    turn = torch.arange(batch, device=images.device)
    fills = count + turn < capacity
    swaps = ~fills & random.bernoulli(swap_key, 0.5, (batch,))
    slots = torch.where(fills, count + turn, random.randint(place_key, (batch,), 0, capacity).long())

    def last_writer(slots_read: Tensor, before: Tensor) -> Tensor:
        """Number of the last image below `before` that went into each slot; -1 for none."""
        written = (fills | swaps) & (slots == slots_read[:, None]) & (turn < before[:, None])
        return torch.where(written, turn, -1).amax(1)  # (slots read,)

    def at(slots_read: Tensor, before: Tensor) -> Tensor:
        """The images in the slots before image number `before` comes."""
        writer = last_writer(slots_read, before)
        new = images[writer.clamp(min=0)].to(stored.dtype)
        return torch.where(column(writer >= 0), new, stored[slots_read])  # (slots read, channels, height, width)

    def column(x: Tensor) -> Tensor:
        return x.reshape(-1, *(1,) * (images.ndim - 1))  # (batch, 1, 1, 1)

    passed = torch.where(column(swaps), at(slots, turn).to(images.dtype), images)  # (batch, channels, height, width)
    every = torch.arange(capacity, device=images.device)
    filled = (count + batch).clamp(max=capacity)
    return Buffer(at(every, torch.full_like(every, batch)), filled), passed
