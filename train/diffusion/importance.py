"""Importance sampling of times (Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.3).

p_t is proportional to sqrt(E[L_t^2]), the mean over the last losses at t, and the loss is weighted by
1 / (steps p_t): the same expectation as with uniform times, and less noise where the terms differ as much as the
variational bound's. Until each time has a full history, times are uniform.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from core import random


class LossHistory(NamedTuple):
    """losses (steps, length) float64: the last ones at each time, a ring buffer. counts (steps,) int64: all so far."""

    losses: Tensor
    counts: Tensor


def init(steps: int, length: int = 10) -> LossHistory:
    """An empty history.

    Args:
        steps: steps of the schedule.
        length: losses per time; 10 in the paper.
    """
    if steps < 1 or length < 1:
        raise ValueError(f"a history needs at least 1 step and 1 loss each, got {steps} and {length}")
    return LossHistory(torch.zeros(steps, length, dtype=torch.float64), torch.zeros(steps, dtype=torch.int64))


def probabilities(history: LossHistory, uniform: float = 0.001) -> Tensor:
    """p_t, (steps,) float64.

    Args:
        uniform: fraction of uniform times, so that no p_t is 0 and no weight infinite.
    """
    steps, length = history.losses.shape
    size = history.losses.square().mean(1).sqrt()  # sqrt(E[L_t^2]), (steps,)
    total = size.sum()
    p = (1 - uniform) * size / torch.where(total > 0, total, 1) + uniform / steps
    ready = (history.counts >= length).all() & (total > 0)
    return torch.where(ready, p, torch.full_like(p, 1 / steps))


def draw(history: LossHistory, key: Tensor, count: int, uniform: float = 0.001) -> tuple[Tensor, Tensor]:
    """(time, weights): times (count,) int64 drawn from `probabilities`, and 1 / (steps p_t) to multiply their losses.

    Args:
        key: (2,).
    """
    p = probabilities(history, uniform)
    time = random.categorical(key, p.log(), shape=(count,))
    return time, (1 / (len(p) * p[time])).to(torch.float32)


def update(history: LossHistory, time: Tensor, losses: Tensor) -> LossHistory:
    """The history after a batch: the unweighted losses (batch,) at time (batch,), in the order of the batch."""
    steps, length = history.losses.shape
    same = time[:, None] == time[None, :]
    rank, total = same.tril(-1).sum(1), same.sum(1)
    slot = time * length + (history.counts[time] + rank) % length  # (batch,)
    # Of more losses at one time than fit, the last stay; the others go to a slot that is cut off.
    slot = torch.where(rank >= total - length, slot, steps * length)
    flat = torch.cat([history.losses.flatten(), history.losses.new_zeros(1)])
    flat = flat.index_put((slot,), losses.detach().to(flat.dtype))
    counts = history.counts.index_add(0, time, torch.ones_like(time))
    return LossHistory(flat[:-1].reshape(steps, length), counts)
