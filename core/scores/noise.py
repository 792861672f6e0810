"""Signal and noise of stochastic gradients: noise scale, gradient diversity, signal-to-noise ratio.

Of a batch, and as an average over the steps of a run:

    noise = estimate(reports(loss, params, batch))  of one batch, unbiased, and so noisy
    state = update(state, noise, 0.95)              an average over steps, of both parts
    scale(average(state)).total                     B = tr Σ / |G|²
"""

from typing import NamedTuple

import torch
from torch import Tensor

from core import tree
from core.per_example import Reports
from core.per_example.blocked import wide
from core.tree import Tree


class Noise(NamedTuple):
    """The two parts of the noise scale, for each parameter tensor: trees like the parameters of 0-D tensors."""

    trace: Tree
    """tr Σ, the trace of the covariance of one example's gradient."""
    square: Tree
    """|G|², the squared norm of the expected gradient."""


class Scale(NamedTuple):
    """B = tr Σ / |G|² in examples: of each parameter tensor alone (a tree), and of all together (0-D)."""

    layers: Tree
    total: Tensor


class Smoothed(NamedTuple):
    """The state of an exponential moving average: sums with weights decay^age, and the sum of these weights."""

    sums: Noise
    weight: Tensor


def estimate(reports: Reports) -> Noise:
    """tr Σ and |G|² from the gradients g_1 .. g_N of one batch and their mean ḡ (McCandlish et al. 2018, "An Empirical
    Model of Large-Batch Training", arXiv:1812.06162, appendix A.1, with small batches of one):

    tr Σ = N / (N - 1) (mean |g_i|² - |ḡ|²),   |G|² = (N |ḡ|² - mean |g_i|²) / (N - 1)

    Both are unbiased; |G|² can come out negative, so average both over steps before dividing.

    Args:
        reports: with "norm", of at least two examples (of micro-batches: `core.per_example.combine`).

    Raises:
        ValueError: no norms, or one example.
    """
    count = reports.losses.shape[-1]
    if reports.norm is None:
        raise ValueError('noise.estimate: the reports have no norms; want=("norm",)')
    if count < 2:
        raise ValueError(f"noise.estimate: expected reports of at least two examples, got {count}")
    small = tree.map(lambda x: x.square().mean(-1), reports.norm)
    large = tree.map(lambda x: wide(x).square().sum(), _beside(reports.norm, reports.mean))
    return two_batches(small, large, 1, count)


def _beside(quantity: Tree, values: Tree) -> Tree:
    """The values of those parameters that have a report (`core.per_example.reports(only=...)`)."""
    by_name = dict(tree.items(values))
    return tree.map_with_names(lambda name, _: by_name[name], quantity)


def two_batches(small: Tree, large: Tree, small_size: int, large_size: int) -> Noise:
    """tr Σ and |G|² from the squared norms of the mean gradients of two batch sizes (McCandlish et al. 2018, eq. A.3):

    E |G_B|² = |G|² + tr Σ / B

    Args:
        small, large: |G_B|² of batches of `small_size` and `large_size` examples, trees or tensors of one structure;
            `small` may be the mean over several such batches.

    Raises:
        ValueError: sizes that are not 1 <= small_size < large_size.
    """
    if not 1 <= small_size < large_size:
        raise ValueError(f"two_batches: expected 1 <= small_size < large_size, got {small_size} and {large_size}")
    gap = large_size - small_size
    trace = tree.map(lambda s, b: (s - b) * (small_size * large_size / gap), small, large)
    square = tree.map(lambda s, b: (large_size * b - small_size * s) / gap, small, large)
    return Noise(trace, square)


def total(noise: Noise) -> Noise:
    """Both parts over all parameters, 0-D each: sums over the leaves."""
    return Noise(*(torch.stack(tree.leaves(part)).sum(0) for part in noise))


def scale(noise: Noise) -> Scale:
    """B = tr Σ / |G|²: the batch size above which more examples gain little (McCandlish et al. 2018, eq. 2.9).

    Negative or infinite where the estimate of |G|² is not above zero.
    """
    trace, square = total(noise)
    return Scale(tree.map(torch.div, noise.trace, noise.square), trace / square)


def init(like: Tree) -> Smoothed:
    """The state before the first step; `like` is a tree like the parameters."""

    def zero(x: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)

    return Smoothed(Noise(tree.map(zero, like), tree.map(zero, like)), zero(tree.leaves(like)[0]))


def begin(first: Noise) -> Smoothed:
    """The state in which all steps before were as `first`, so that there is no bias to correct."""
    return Smoothed(first, torch.ones_like(tree.leaves(first)[0]))


def update(state: Smoothed, noise: Noise, decay: float | Tensor) -> Smoothed:
    """The next step of the average; `decay` in [0, 1) is the weight of the steps before."""
    sums = tree.map(lambda old, new: decay * old + (1 - decay) * new, state.sums, noise)
    return Smoothed(sums, decay * state.weight + (1 - decay))


def average(state: Smoothed) -> Noise:
    """The weighted mean over the steps so far, its bias to zero corrected (as Adam's); NaN before the first."""
    return tree.map(lambda x: x / state.weight, state.sums)


def smooth(series: Tree, decay: float) -> Tree:
    """`average` after each step of a record: leaves (steps, ...) of a tree such as `Noise`, in and out."""

    def over_steps(values: Tensor) -> Tensor:
        average, weight, rows = torch.zeros_like(values[:1]), 0.0, []
        for row in values.split(1):
            average, weight = decay * average + (1 - decay) * row, decay * weight + (1 - decay)
            rows.append(average / weight)
        return torch.cat(rows)

    return tree.map(over_steps, series)


def gradient_diversity(reports: Reports) -> Tensor:
    """Gradient diversity (Yin et al. 2018, "Gradient Diversity: a Key Ingredient for Scalable Distributed Learning",
    arXiv:1706.05699, definition 2): sum |g_n|² / |sum g_n|², 0-D.

    From 1/N (all gradients equal), 1 where they are orthogonal, without bound where they cancel. Times N it bounds the
    batch size at which mini-batches still help as much as single examples.

    Args:
        reports: with "norm".
    """
    if reports.norm is None:
        raise ValueError('gradient_diversity: the reports have no norms; want=("norm",)')
    sums = tree.leaves(_beside(reports.norm, reports.sum))
    return reports.total_norm.square().sum() / sum(wide(x).square().sum() for x in sums)


def gradient_snr(reports: Reports) -> Tree:
    """Gradient signal-to-noise ratio, entry by entry (Liu et al. 2020, "Understanding Why Neural Networks Generalize
    Well Through GSNR of Parameters", arXiv:2001.07384, eq. 1): r_j = E[g_j]² / Var[g_j], like the parameters.

    The expectation is the mean over the batch, so r_j is about 1/N where there is no signal at all. 0 where an entry
    has no gradient in any example (a token that does not occur), infinite where it is the same in all, to rounding.

    Args:
        reports: with "square", of at least two examples.
    """
    if reports.square is None:
        raise ValueError('gradient_snr: the reports have no squares; want=("square",)')

    def ratio(mean: Tensor, variance: Tensor, moment: Tensor) -> Tensor:
        finite = mean.square() / torch.where(variance > 8 * torch.finfo(moment.dtype).eps * moment, variance, 0.0)
        return torch.where(mean == 0, 0.0, finite)

    mean = tree.map(wide, _beside(reports.square, reports.mean))
    return tree.map(ratio, mean, reports.variance, reports.second_moment)


def layer_snr(reports: Reports) -> Tree:
    """`gradient_snr` averaged over those entries of each parameter tensor that have a gradient which varies (section 2
    of the paper), 0-D at every leaf."""

    def mean(ratio: Tensor) -> Tensor:
        counted = (ratio > 0) & ratio.isfinite()
        return torch.where(counted, ratio, 0.0).sum() / counted.sum().clamp(min=1)

    return tree.map(mean, gradient_snr(reports))
