"""Streaming summaries in constant memory: moments, histograms, quantiles, largest and smallest values, second moments.

    accumulator = moments()
    state = accumulator.init(values)  # empty; of `values` only structure and shapes count
    state = accumulator.update(state, values, indices)  # a batch; indices (N,) of its examples in the data
    accumulator.result(accumulator.merge(state, other))  # `other` is of other examples

All functions are pure, and accumulate in float64 and int64. Counts (histograms, quantiles, top) do not depend on how
the data are cut into batches; sums do in the last bits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core import tree
from core.tree import Tree


class Accumulator(NamedTuple):
    """`init(values)`, `update(state, values, indices)`, `merge(state, state)`, `result(state)`.

    States are trees of tensors; `settings` is the accumulator's configuration in plain data, to compare with that of a
    state in a file.
    """

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, Tensor], Tree]
    merge: Callable[[Tree, Tree], Tree]
    result: Callable[[Tree], Any]
    settings: dict


class Moments(NamedTuple):
    """The number of values, their mean and their unbiased variance (NaN of less than two); trees as of one example."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    mean: Tree
    variance: Tree


class Deviations(NamedTuple):
    """The state of `moments`: squares are sums of squared deviations from the mean, so that nothing cancels."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    mean: Tree
    squares: Tree


def moments() -> Accumulator:
    """Mean and variance, entry by entry, of values with a leading axis N; a tensor or a tree of them.

    Two parts a and b give, with d = mean_b - mean_a and n = n_a + n_b (Chan, Golub and LeVeque 1983),

        mean = mean_a + d n_b / n;    squares = squares_a + squares_b + d^2 n_a n_b / n
    """

    def init(values: Tree) -> Deviations:
        first = tree.leaves(values)[0]
        zeros = tree.map(lambda x: torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device), values)
        return Deviations(torch.zeros((), dtype=torch.int64, device=first.device), zeros, zeros)

    def merge(a: Deviations, b: Deviations) -> Deviations:
        count = a.count + b.count
        share = b.count.to(torch.float64) / count.clamp(min=1)  # of two integers it would be float32
        mean = tree.map(lambda x, y: x + (y - x) * share, a.mean, b.mean)
        squares = tree.map(
            lambda s, t, x, y: s + t + (y - x).square() * (a.count * share), a.squares, b.squares, a.mean, b.mean
        )
        return Deviations(count, mean, squares)

    def update(state: Deviations, values: Tree, indices: Tensor) -> Deviations:
        values = tree.map(lambda x: x.to(torch.float64), values)
        count = torch.full_like(state.count, len(indices))
        mean = tree.map(lambda x: x.mean(0), values)
        squares = tree.map(lambda x, m: (x - m).square().sum(0), values, mean)
        return merge(state, Deviations(count, mean, squares))

    def result(state: Deviations) -> Moments:
        return Moments(state.count, state.mean, tree.map(lambda s: s / (state.count - 1), state.squares))

    return Accumulator(init, update, merge, result, {"kind": "moments"})


class Histogram(NamedTuple):
    """counts (bins,) between edges (bins + 1,), as numpy.histogram; and the numbers of values outside, or NaN."""

    edges: Tensor
    counts: Tensor
    below: Tensor
    above: Tensor
    nan: Tensor


def log_edges(low: float, high: float, bins: int) -> Tensor:
    """(bins + 1,) edges from low > 0 to high, each the same multiple of the one before, for `histogram`."""
    if not 0.0 < low < high < math.inf or bins < 1:
        raise ValueError(f"log_edges: expected 0 < low < high and at least one bin, got {low}, {high} and {bins} bins")
    return torch.from_numpy(np.geomspace(low, high, bins + 1))


def histogram(edges: Tensor | Sequence[float]) -> Accumulator:
    """The number of values (N,) in each bin [edge, next edge); the last bin includes its upper edge.

    Args:
        edges: (bins + 1,) in increasing order, such as torch.linspace(0, 1, 11) or `log_edges(1e-6, 1e3, 90)`.

    Raises:
        ValueError: edges that do not increase.
    """
    edges = torch.as_tensor(edges, dtype=torch.float64)
    if edges.ndim != 1 or len(edges) < 2 or not (edges.diff() > 0).all():
        raise ValueError(f"histogram: edges must increase, and be at least two, got {edges.tolist()}")
    bins = len(edges) - 1

    def init(values: Tensor) -> Tensor:
        _check_vector("histogram", values)
        return torch.zeros(bins + 3, dtype=torch.int64, device=values.device)  # below, the bins, above, NaN

    def update(state: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        values, limits = values.to(torch.float64), edges.to(values.device)
        slots = torch.bucketize(values, limits, right=True)
        slots = torch.where(values == limits[-1], bins, slots)
        return _count(state, torch.where(values.isnan(), bins + 2, slots))

    def result(state: Tensor) -> Histogram:
        return Histogram(edges, state[1:-2], state[0], state[-2], state[-1])

    return Accumulator(init, update, torch.add, result, {"kind": "histogram", "edges": edges.tolist()})


def quantiles(levels: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95), accuracy: float = 0.01) -> Accumulator:
    """Quantiles of values (N,) to a relative accuracy: DDSketch (Masson, Rim and Lee 2019, arXiv:1908.10693).

    Magnitudes from 2^-126 to 2^128, those of float32, are counted in bins (g^(i-1), g^i] with g = (1 + a) / (1 - a),
    whose estimate 2 g^i / (g + 1) is off by up to the factor a = `accuracy`; smaller values count as 0. At 1 % these
    are 17 612 counts, whatever the data.

    The result is (levels,) float64: for each level q an estimate of the value of rank floor(q (n - 1)) from below; NaN
    if a value was NaN, or there was none.

    Raises:
        ValueError: a level outside [0, 1], or an accuracy outside (0, 1).
    """
    if not all(0.0 <= level <= 1.0 for level in levels):
        raise ValueError(f"quantiles: levels must lie in [0, 1], got {list(levels)}")
    if not 0.0 < accuracy < 1.0:
        raise ValueError(f"quantiles: accuracy must lie in (0, 1), got {accuracy}")
    smallest, largest = 2.0**-126, 2.0**128
    growth = math.log((1 + accuracy) / (1 - accuracy))
    bins = math.ceil(math.log(largest / smallest) / growth) + 1
    estimates = smallest * (torch.arange(bins, dtype=torch.float64) * growth).exp() * (1 - accuracy)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    # From -inf over 0 in the middle to inf; the count of NaN comes last.
    centres = torch.cat([-infinity, -estimates.flip(0), torch.zeros(1, dtype=torch.float64), estimates, infinity])

    def init(values: Tensor) -> Tensor:
        _check_vector("quantiles", values)
        return torch.zeros(2 * bins + 4, dtype=torch.int64, device=values.device)

    def update(state: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        values = values.to(torch.float64)
        size = values.abs()
        place = (torch.log(size.clamp(smallest, largest) / smallest) / growth).ceil().clamp(max=bins - 1)
        place = torch.where(size < smallest, 0, torch.where(size.isinf(), bins + 1, place + 1))
        slots = torch.where(values.isnan(), 2 * bins + 3, bins + 1 + place * values.sign())
        return _count(state, slots.to(torch.int64))

    def result(state: Tensor) -> Tensor:
        count, ranks = state[:-1].sum(), torch.tensor(list(levels), dtype=torch.float64, device=state.device)
        if count == 0 or state[-1] > 0:
            return torch.full_like(ranks, math.nan)
        ranks = (ranks * (count - 1)).floor()
        return centres.to(state.device)[torch.searchsorted(state[:-1].cumsum(0), ranks.to(torch.int64), right=True)]

    settings = {"kind": "quantiles", "levels": list(levels), "accuracy": accuracy}
    return Accumulator(init, update, torch.add, result, settings)


class Top(NamedTuple):
    """values (k,) float64, the most extreme first, and the indices (k,) of their examples; fewer of fewer values."""

    values: Tensor
    indices: Tensor


NOBODY = 2**63 - 1  # the index of an empty entry; it comes after all others


def top(k: int, largest: bool = True) -> Accumulator:
    """The k largest (or smallest) of values (N,) and the indices of their examples; of ties the first, NaN ignored."""
    if k < 1:
        raise ValueError(f"top: k must be at least 1, got {k}")
    sign = 1.0 if largest else -1.0

    def init(values: Tensor) -> Top:
        _check_vector("top", values)
        worst = torch.full((k,), -math.inf, dtype=torch.float64, device=values.device)
        return Top(worst, torch.full((k,), NOBODY, device=values.device))

    def merge(a: Top, b: Top) -> Top:
        values, indices = torch.cat([a.values, b.values]), torch.cat([a.indices, b.indices])
        by_index = indices.argsort(stable=True)
        order = by_index[values[by_index].argsort(descending=True, stable=True)][:k]
        return Top(values[order], indices[order])

    def update(state: Top, values: Tensor, indices: Tensor) -> Top:
        missing = values.isnan()
        signed = torch.where(missing, -math.inf, sign * values.to(torch.float64))
        return merge(state, Top(signed, torch.where(missing, NOBODY, indices)))

    def result(state: Top) -> Top:
        present = state.indices != NOBODY
        return Top(sign * state.values[present], state.indices[present])

    return Accumulator(init, update, merge, result, {"kind": "top", "k": k, "largest": largest})


class Products(NamedTuple):
    """The number of vectors (size,), their sum, and sum_n v_n v_n^T (size, size)."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    sum: Tensor
    products: Tensor


def products() -> Accumulator:
    """The second-moment matrix of vectors (N, size), such as sketches of gradients: TRAK's Phi^T Phi
    (Park et al. 2023, arXiv:2303.14186, section 3)."""

    def init(values: Tensor) -> Products:
        if values.ndim != 2:
            raise ValueError(f"products: expected vectors (N, size), got {tuple(values.shape)}")
        zeros = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
        return Products(torch.zeros((), dtype=torch.int64, device=values.device), zeros, torch.outer(zeros, zeros))

    def merge(a: Products, b: Products) -> Products:
        return tree.map(torch.add, a, b)

    def update(state: Products, values: Tensor, indices: Tensor) -> Products:
        values = values.to(torch.float64)
        return merge(state, Products(torch.full_like(state.count, len(indices)), values.sum(0), values.T @ values))

    return Accumulator(init, update, merge, lambda state: state, {"kind": "products"})


def _check_vector(what: str, values: Tensor) -> None:
    if not isinstance(values, Tensor) or values.ndim != 1:
        shape = tuple(getattr(values, "shape", ())) or type(values).__name__
        raise ValueError(f"{what}: expected one number per example, (N,), got {shape}")


def _count(counts: Tensor, slots: Tensor) -> Tensor:
    return counts.scatter_add(0, slots, torch.ones_like(slots))
