"""Differentially private training: each example's gradient is clipped, and noise is added to their sum.

g = ( sum_{n in B} g_n min(1, C / |g_n|) + N(0, (noise_multiplier C)^2) ) / expected |B|

Abadi et al. 2016, "Deep Learning with Differential Privacy" (arXiv:1607.00133), with B a random batch of `sampling`.
The parameters after any number of steps are private, as `spent_epsilon` says; losses, fractions and norms that a step
reports are of the examples themselves, without noise.

The noise is as secret as the key it is drawn from: whoever knows the seed can subtract it. And floating-point numbers
are not reals (Mironov 2012): good for research, not for a release that somebody has reason to attack.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from core import per_example, random, tree
from core.per_example import Weighted, clip_factor
from core.tree import Tree
from train.gradients.accounting import (
    ACCOUNTANTS,
    check_noise,
    check_number,
    check_positive,
    noise_for_epsilon,
    spent_epsilon,
)
from train.gradients.sampling import Sample, fixed_sample, poisson_sample
from train.objective import FULL_PRECISION, Gradient, Policy, check_split, evaluation, losses_of
from train.optimizers import Optimizer
from train.step import TrainState, step_of_gradient

__all__ = [
    "ACCOUNTANTS",
    "CLIPPING",
    "AdaptiveNorm",
    "Sample",
    "add_noise",
    "clipped_sum",
    "fixed_sample",
    "make_private_step",
    "noise_for_epsilon",
    "noisy_gradient",
    "poisson_sample",
    "sensitivity",
    "spent_epsilon",
    "with_norm",
]

CLIPPING = ("flat", "per_layer", "automatic")
NORM = "clip_norm"  # the Stat of adaptive clipping
_STABILITY = 0.01  # gamma of automatic clipping, as in the paper's experiments
_NOISE = 2**32 - 1  # folded into the run's key; no step has this number

Norm = float | Mapping[str, float]
"""max_norm: a number, or {pattern: number} of groups of parameters."""


class AdaptiveNorm(NamedTuple):
    """A clipping norm C that follows a quantile of the gradients' norms (Andrew et al. 2021, arXiv:1905.03871).

    C <- C exp(-rate (b - quantile)),   b = 1/2 + ( sum_n (1[|g_n| <= C] - 1/2) + N(0, count_noise^2) ) / expected |B|

    The count is private by noise of its own, and the gradients get that much more (theorem 1), so that a step costs
    what `noise_multiplier` alone says: noise_multiplier_g = (noise_multiplier^-2 - (2 count_noise)^-2)^(-1/2).
    """

    initial: float
    """C before the first step; above or below the quantile, it gets there geometrically."""
    quantile: float = 0.5
    rate: float = 0.2
    count_noise: float | None = None
    """Standard deviation of the noise on the count; by default expected |B| / 20, as in the paper."""


def clipped_sum(
    loss: Callable[[Tree, Tree], Tensor],
    params: Tree,
    batch: Tree,
    *,
    max_norm: Norm | Tensor,
    mask: Tensor | None = None,
    clipping: str = "flat",
) -> Weighted:
    """sum_n w_n g_n, in which every example has a part of bounded length: `sensitivity(max_norm)`.

    Args:
        loss: `loss(params, batch) -> (N,)`, one per example, as in `core.per_example.reports`.
        max_norm: a positive number; or {pattern: number}, such as {"blocks.*": 1.0, "*": 0.1}: the parameters whose
            names fit a pattern first are a group, which is clipped by itself.
        mask: (N,) bool; an example where it is False has weight 0, whatever its values and gradients, NaN too.
        clipping: "flat": w_n = min(1, max_norm / |g_n|). "automatic": w_n = max_norm / (|g_n| + 0.01), which leaves
            the learning rate as the only thing to tune (Bu et al. 2022, arXiv:2206.07136). "per_layer": every parameter
            by itself, to max_norm / sqrt(number of parameters).

    Returns:
        `Weighted`; its weights are a tree of (N,) with "per_layer" and with groups. Losses and norms of masked examples
        are 0.

    Raises:
        ValueError: max_norm is not positive, an unknown way of clipping, or groups with another than "flat"; a mask
            that is not (N,) or has other values than 0 and 1.
        PerExampleError: a parameter has no exact per-example gradients (batch norm in training, say); it is named.
    """
    _check_clipping(max_norm, clipping)
    if mask is not None:
        count = len(tree.leaves(batch)[0])
        mask = _checked_mask(mask, count)
        # In place of masked examples one that counts: 0 * NaN would be NaN.
        rows = torch.where(mask, torch.arange(count, device=mask.device), mask.to(torch.int64).argmax())
        batch = tree.map(lambda x: x[rows], batch)

    def weights(norm: Tree) -> Tree:
        if mask is not None:  # C / infinity = 0
            norm = tree.map(lambda n: torch.where(mask, n, math.inf), norm)
        return _factors(norm, max_norm, clipping)

    out = per_example.weighted(loss, params, batch, weights)
    if mask is None:
        return out
    sums = tree.map(lambda g: torch.where(mask.any(), g, 0), out.sum)
    values = (out.losses, out.norm, out.total_norm)
    losses, norm, total_norm = tree.map(lambda x: torch.where(mask, x, 0), values)
    return out._replace(losses=losses, sum=sums, norm=norm, total_norm=total_norm)


def _factors(norm: Tree, max_norm: Norm | Tensor, clipping: str) -> Tree:
    """The weights (N,) of the examples, or a tree of them, from the norms of each parameter."""
    if isinstance(max_norm, Mapping):
        return clip_factor(max_norm)(norm)
    if clipping == "per_layer":
        bound = max_norm / math.sqrt(len(tree.leaves(norm)))
        return tree.map(lambda n: _shortened(n, bound), norm)
    total = per_example.total_norm(norm)  # (N,)
    return max_norm / (total + _STABILITY) if clipping == "automatic" else _shortened(total, max_norm)


def _shortened(norm: Tensor, bound: float | Tensor) -> Tensor:
    """min(1, bound / norm); where the norm is 0 any factor gives 0."""
    return (bound / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)


def sensitivity(max_norm: Norm) -> float:
    """The greatest length of one example's part in `clipped_sum`: of groups the root of the sum of their squares."""
    return math.sqrt(sum(x**2 for x in max_norm.values())) if isinstance(max_norm, Mapping) else max_norm


def add_noise(key: Tensor, values: Tree, std: float | Tensor) -> Tree:
    """values + N(0, std^2), drawn from the key (2,)."""
    leaves = tree.leaves(values)
    sizes = [x.numel() for x in leaves]
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in leaves], torch.float32)
    # One draw for all leaves: one for each would be most of a compiled step, and of the time that it takes to compile.
    noise = random.normal(key, (sum(sizes),), dtype).split(sizes)
    return tree.unflatten(values, [x + (std * n.view_as(x)).to(x.dtype) for x, n in zip(leaves, noise, strict=True)])


def noisy_gradient(
    loss: Callable[[Tree, Tree], Tensor],
    params: Tree,
    batch: Tree,
    key: Tensor,
    *,
    max_norm: Norm,
    noise_multiplier: float,
    expected_batch: float,
    mask: Tensor | None = None,
    clipping: str = "flat",
) -> Tree:
    """(`clipped_sum` + N(0, (noise_multiplier sensitivity)^2)) / expected_batch, like the parameters.

    Args:
        expected_batch: rate times the number of examples, whatever the size of this batch: that is private too. Of
            samples of a fixed size, their size.

    Other arguments and errors as in `clipped_sum`.
    """
    check_noise(noise_multiplier)
    check_positive("expected_batch", expected_batch)
    _check_clipping(max_norm, clipping)
    out = clipped_sum(loss, params, batch, max_norm=max_norm, mask=mask, clipping=clipping)
    return tree.map(lambda g: g / expected_batch, add_noise(key, out.sum, noise_multiplier * sensitivity(max_norm)))


def with_norm(state: TrainState, norm: AdaptiveNorm) -> TrainState:
    """The state of a private run before its first step, with the norm that adaptive clipping moves."""
    return state._replace(stats={**state.stats, NORM: torch.tensor(float(norm.initial), device=state.key.device)})


def make_private_step(
    loss: Callable[[Tree, Tree, Tensor], Tensor],
    optimizer: Optimizer,
    *,
    max_norm: Norm | AdaptiveNorm,
    noise_multiplier: float,
    expected_batch: float,
    clipping: str = "flat",
    physical_batch: int | None = None,
    policy: Policy = FULL_PRECISION,
    donate: bool = False,
    update_norm: bool = True,
    compile: bool = True,
    backend: str = "inductor",
) -> Callable[..., tuple[TrainState, dict[str, Tensor]]]:
    """The train step of `train.step.make_step` with `noisy_gradient` in place of the gradient.

    Args:
        loss: `loss(params, batch, keys) -> (N,)`, one per example; `keys` is (N, 2).
        max_norm, clipping: see `clipped_sum`; or an `AdaptiveNorm`, whose state comes from `with_norm`.
        noise_multiplier: standard deviation of the noise over `sensitivity(max_norm)`.
        expected_batch: see `noisy_gradient`.
        physical_batch: number of examples that go through the net at once; a batch must be a multiple of it. Clipped
            sums add up and the noise comes once, so it does not change the result; it bounds memory, and gives compiled
            code one shape for samples of every size. None: the whole batch, one graph per size.
        policy, donate, update_norm, compile, backend: as in `make_step`.

    Returns:
        `step(state, batch, mask=None) -> (state, metrics)`, mask (N,) bool as in `clipped_sum`. Metrics are 0-D:
        `loss` and `example_norm` (means over the examples), `clipped` (fraction with a gradient longer than max_norm),
        `examples` (their number), `grad_norm` (of the noisy gradient) and `update_norm`; with an `AdaptiveNorm` also
        `clip_norm`. The first four are not private.

    Raises:
        ValueError: a number out of range; from the step: Stats (batch norm mixes its examples), a batch that is no
            multiple of `physical_batch`, a mask as in `clipped_sum`, or an `AdaptiveNorm` and a state without.
    """
    check_noise(noise_multiplier)
    check_positive("expected_batch", expected_batch)
    if physical_batch is not None:
        check_number("physical_batch", physical_batch, "at least 1", lambda x: x >= 1)
    adaptive = isinstance(max_norm, AdaptiveNorm)
    if adaptive:
        gradient_noise, count_noise = _split_noise(max_norm, noise_multiplier, expected_batch, clipping)
    else:
        _check_clipping(max_norm, clipping)
    losses = losses_of(evaluation(loss, policy))

    def part(state: TrainState, batch: tuple[Tree, Tensor], keys: Tensor):
        check_split(state)
        examples, mask = batch
        bound = state.stats[NORM] if adaptive else max_norm
        inputs = (examples, keys)
        out = clipped_sum(losses, state.params, inputs, max_norm=bound, mask=mask, clipping=clipping)
        values = {
            "loss": out.losses,
            "example_norm": out.total_norm,
            "clipped": (out.total_norm > (bound if adaptive else sensitivity(bound))).float(),
            "examples": mask.float(),
        }
        return out.sum, {name: x.sum() for name, x in values.items()}

    def result(state: TrainState, contribution: tuple[Tree, dict]):
        sums, totals = contribution
        key = random.fold_in(random.fold_in(state.key, _NOISE), state.step)
        std = gradient_noise * state.stats[NORM] if adaptive else noise_multiplier * sensitivity(max_norm)
        grads = tree.map(lambda g: g / expected_batch, add_noise(key, sums, std))
        count = totals["examples"]
        metrics = {name: total / count.clamp(min=1) for name, total in totals.items()} | {"examples": count}
        if not adaptive:
            return grads, state.stats, metrics
        noise = count_noise * random.normal(random.fold_in(key, 1), ())
        fraction = 0.5 + (0.5 * count - totals["clipped"] + noise) / expected_batch  # b
        norm = state.stats[NORM] * torch.exp(-max_norm.rate * (fraction - max_norm.quantile))
        return grads, {NORM: norm.to(state.stats[NORM].dtype)}, {**metrics, NORM: state.stats[NORM]}

    options = {"donate": donate, "update_norm": update_norm, "compile": compile, "backend": backend}
    size = None if physical_batch is None else lambda examples: physical_batch
    gradient = Gradient(part, lambda one, other: tree.map(torch.add, one, other), result)
    run = step_of_gradient(gradient, optimizer, size, **options)

    def step(state: TrainState, batch: Tree, mask: Tensor | None = None):
        names = tree.names(state.stats)
        if adaptive and names != [NORM]:
            raise ValueError(f"the state has the Stats {names}; expected ['{NORM}']: make it by `with_norm`")
        if not adaptive and names:
            raise ValueError(f"'{names[0]}' is a Stat: a layer that mixes the examples of a batch cannot be private")
        leaf = tree.leaves(batch)[0]
        count = len(leaf)
        if physical_batch and count % physical_batch:
            raise ValueError(f"a batch of {count} examples is no multiple of physical_batch {physical_batch}")
        mask = torch.ones(count, dtype=torch.bool, device=leaf.device) if mask is None else _checked_mask(mask, count)
        return run(state, (batch, mask))

    return step


def _split_noise(
    norm: AdaptiveNorm, noise_multiplier: float, expected_batch: float, clipping: str
) -> tuple[float, float]:
    """(noise multiplier of the gradients, standard deviation of the noise on the count)."""
    check_positive("max_norm: initial", norm.initial)
    check_positive("max_norm: rate", norm.rate)
    check_number("max_norm: quantile", norm.quantile, "a number in [0, 1]", lambda x: 0 <= x <= 1)
    if clipping != "flat":
        raise ValueError(f"clipping is '{clipping}'; an adaptive norm is for 'flat' clipping")
    if noise_multiplier == 0:
        return 0.0, 0.0
    count_noise = expected_batch / 20 if norm.count_noise is None else norm.count_noise
    # An example changes the shifted count by 1/2.
    check_number("max_norm: count_noise", count_noise, f"more than noise_multiplier / 2, {noise_multiplier / 2}",
                 lambda x: noise_multiplier / 2 < x < math.inf)  # fmt: skip
    return (noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5, count_noise


def _check_clipping(max_norm: Norm | Tensor, clipping: str) -> None:
    if clipping not in CLIPPING:
        raise ValueError(f"clipping '{clipping}' is unknown; expected one of {', '.join(CLIPPING)}")
    if isinstance(max_norm, Mapping):
        if clipping != "flat" or not max_norm:
            choice = f"max_norm has {len(max_norm)} groups, clipping is '{clipping}'"
            raise ValueError(f"{choice}; expected 1 group or more, which go with 'flat'")
        for pattern, bound in max_norm.items():
            check_positive(f"max_norm of '{pattern}'", bound)
    elif not isinstance(max_norm, Tensor):
        check_positive("max_norm", max_norm)


def _checked_mask(mask: Tensor, count: int) -> Tensor:
    """The mask (count,) as bool."""
    if not isinstance(mask, Tensor) or mask.shape != (count,):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"the mask has shape {shape}; expected ({count},), one per example")
    if mask.dtype == torch.bool:
        return mask
    if torch.compiler.is_compiling() or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"the mask is {mask.dtype}; expected bool, or outside of compiled code 0 and 1 alone")
    return mask.bool()
