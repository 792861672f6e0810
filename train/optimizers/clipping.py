"""Clipping of gradients, as links of a chain: by value, by the norm of the whole tree, by a quantile of past norms."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core import tree
from core.tree import Tree
from train.optimizers.protocol import Optimizer, require, require_number, widened, zero_count


class NormsState(NamedTuple):
    """Number of steps, and the last norms (window,)."""

    count: Tensor
    norms: Tensor


def clip_by_value(limit: float) -> Optimizer:
    """Clamp every element to [-limit, limit]."""
    require(limit > 0, "limit", limit, "positive")
    return Optimizer(
        lambda _: (), lambda updates, state, _: (tree.map(lambda u: u.clamp(-limit, limit), updates), state)
    )


def clip_by_global_norm(limit: float, eps: float = 1e-6, *, norm: Callable[[Tree], Tensor] = tree.norm) -> Optimizer:
    """g * min(1, limit / (|g| + eps)), where |g| is the norm of the whole tree (Pascanu et al. 2013, arXiv:1211.5063).

    `eps` is that of torch's `clip_grad_norm_`; with `eps=0` it is optax's clip_by_global_norm. `norm` is that of a tree
    of which this process has only pieces, if so.
    """
    require_number("limit", limit)
    require(limit > 0, "limit", limit, "positive")

    def update(updates: Tree, state: tuple, params: Tree) -> tuple[Tree, tuple]:
        return _clipped(updates, limit, norm(updates) + eps), state

    return Optimizer(lambda params: (), update, sharded=lambda over: clip_by_global_norm(limit, eps, norm=over.norm))


def clip_by_norm_quantile(
    quantile: float = 0.9, window: int = 100, *, norm: Callable[[Tree], Tensor] = tree.norm
) -> Optimizer:
    """g * min(1, q / |g|), q the quantile of the norms of the last `window` steps, this one included (AutoClip,
    Seetharaman et al. 2020, arXiv:2007.14469, who take the quantile 0.1 of all steps so far).

    So the share of clipped steps is 1 - quantile, whatever the scale of the gradients. Norms that are not finite are
    not recorded. `norm` as in `clip_by_global_norm`.
    """
    require(0.0 <= quantile <= 1.0, "quantile", quantile, "in [0, 1]")
    require(window >= 1, "window", window, "at least 1")

    def init(params: Tree) -> NormsState:
        count = zero_count(params)
        return NormsState(count, torch.full((window,), math.inf, device=count.device))

    def update(updates: Tree, state: NormsState, params: Tree) -> tuple[Tree, NormsState]:
        now = norm(updates).to(state.norms.dtype)
        oldest = torch.arange(window, device=now.device) == state.count % window
        norms = torch.where(oldest & now.isfinite(), now, state.norms)  # (window,), infinite where none is recorded
        count = state.count + now.isfinite().to(state.count.dtype)
        # Linear interpolation between the two sorted norms around the quantile, as numpy.quantile.
        position = quantile * (count.clamp(max=window) - 1).clamp(min=0).to(norms.dtype)
        below, values = position.floor(), norms.sort().values
        low, high = (values.gather(0, x.long().reshape(1)).reshape(()) for x in (below, position.ceil()))
        limit = torch.where(position > below, low + (position - below) * (high - low), low)
        return _clipped(updates, limit, now), NormsState(count, norms)

    return Optimizer(init, update, sharded=lambda over: clip_by_norm_quantile(quantile, window, norm=over.norm))


def _clipped(updates: Tree, limit: float | Tensor, norm: Tensor) -> Tree:
    """g * min(1, limit / |g|); nan if the norm is."""
    scale = torch.where(norm <= limit, 1.0, limit / norm)
    return tree.map(lambda u: (widened(u) * scale).to(u.dtype), updates)
