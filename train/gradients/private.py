"""Differentially private training: each example's gradient is clipped, and noise is added to their sum.

g = ( sum_{n in B} g_n min(1, C / |g_n|) + N(0, (noise_multiplier C)^2) ) / expected |B|,  every n in B with chance rate

Abadi et al. 2016, "Deep Learning with Differential Privacy" (arXiv:1607.00133). Two data sets are neighbours if one has
an example more than the other. What is private are the parameters after any number of steps, as `spent_epsilon` says;
losses, shares and norms that a step reports are of the examples themselves, without noise.

The noise is as secret as the key it is drawn from: whoever knows the seed can subtract it. And floating-point numbers
are no reals (Mironov 2012): good for research, not for a release that somebody has reason to attack.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core import per_example, random, tree
from core.per_example import Weighted, clip_factor
from core.tree import Tree
from train.optimizers import Optimizer, apply_updates
from train.step import TrainState, compiled

CLIPPING = ("flat", "per_layer", "automatic")
ACCOUNTANTS = ("pld", "rdp")
_STABILITY = 0.01  # gamma of automatic clipping, as in the paper's experiments
_NOISE = 2**32 - 1  # folded into the run's key; no step has this number


class Sample(NamedTuple):
    """indices (size,) int64 into the data, and mask (size,) bool: what is False only fills up."""

    indices: Tensor
    mask: Tensor


def poisson_sample(key: Tensor, step: int | Tensor, count: int, rate: float, multiple: int = 1) -> Sample:
    """The batch of one step, a pure function of key and step: each of `count` examples is in it with chance `rate`,
    independently of the others. This is what the accounting of privacy assumes, and what an order of epochs is not.

    Args:
        key: (2,).
        rate: in (0, 1]; what is drawn is its next lower multiple of 2**-32.
        multiple: the sample is filled up to a multiple of it, and never empty, so that compiled code sees one shape.
    """
    _check_rate("poisson_sample: rate", rate)
    if count < 1 or multiple < 1:
        raise ValueError(f"poisson_sample: count is {count}, multiple {multiple}; expected at least 1")
    # A 32-bit integer is below -2**31 + k for k of its 2**32 values.
    drawn = random.bits(random.fold_in(key, step), (count,))
    chosen = (drawn <= math.floor(rate * 2**32) - 2**31 - 1).nonzero().squeeze(1)
    size = max(1, math.ceil(len(chosen) / multiple)) * multiple
    mask = torch.arange(size, device=chosen.device) < len(chosen)
    return Sample(torch.nn.functional.pad(chosen, (0, size - len(chosen))), mask)


def clipped_sum(
    loss: Callable[[Tree, Tree], Tensor],
    params: Tree,
    batch: Tree,
    *,
    max_norm: float,
    mask: Tensor | None = None,
    clipping: str = "flat",
) -> Weighted:
    """sum_n w_n g_n of length at most max_norm for each n.

    Args:
        loss: `loss(params, batch) -> (N,)`, one an example, as in `core.per_example.reports`.
        mask: (N,) bool; an example where it is False has weight 0.
        clipping: "flat": w_n = min(1, max_norm / |g_n|). "automatic": w_n = max_norm / (|g_n| + 0.01), which leaves
            the learning rate as the only thing to tune (Bu et al. 2022, arXiv:2206.07136). "per_layer": every parameter
            by itself, to max_norm / sqrt(number of parameters); takes the memory of all gradients of the examples.

    Returns:
        `Weighted`; its weights are a tree of (N,) with "per_layer".

    Raises:
        ValueError: max_norm is not positive, or an unknown way of clipping.
        PerExampleError: a parameter's gradients per example cannot be had (batch norm in training, say); it is named.
    """
    if not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm is {max_norm}; expected a positive number")
    if clipping not in CLIPPING:
        raise ValueError(f"clipping '{clipping}' is unknown; expected one of {', '.join(CLIPPING)}")

    def masked(weights: Tensor) -> Tensor:
        return weights if mask is None else weights * mask

    if clipping == "per_layer":
        gradients = per_example.each(loss, params, batch)
        factor = clip_factor(max_norm / math.sqrt(len(tree.leaves(gradients))))
        norm = tree.map(lambda g: torch.linalg.vector_norm(g.flatten(1), dim=1), gradients)
        weights = tree.map(lambda n: masked(factor(n)), norm)
        sums = tree.map(lambda g, w: torch.tensordot(w, g, 1), gradients, weights)
        return Weighted(loss(params, batch).detach(), sums, weights, norm, per_example.total_norm(norm))
    if clipping == "automatic":
        return per_example.weighted(
            loss, params, batch, lambda norm: masked(max_norm / (per_example.total_norm(norm) + _STABILITY))
        )
    return per_example.weighted(loss, params, batch, lambda norm: masked(clip_factor(max_norm)(norm)))


def add_noise(key: Tensor, values: Tree, std: float) -> Tree:
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
    max_norm: float,
    noise_multiplier: float,
    expected_batch: float,
    mask: Tensor | None = None,
    clipping: str = "flat",
) -> Tree:
    """(`clipped_sum` + N(0, (noise_multiplier max_norm)^2)) / expected_batch, like the parameters.

    Args:
        expected_batch: rate times the number of examples, whatever the size of this batch: that is private too.
    """
    _check_noise(noise_multiplier, expected_batch)
    found = clipped_sum(loss, params, batch, max_norm=max_norm, mask=mask, clipping=clipping)
    return tree.map(lambda g: g / expected_batch, add_noise(key, found.sum, noise_multiplier * max_norm))


def make_private_step(
    loss: Callable[[Tree, Tree, Tensor], Tensor],
    optimizer: Optimizer,
    *,
    max_norm: float,
    noise_multiplier: float,
    expected_batch: float,
    clipping: str = "flat",
    physical_batch: int | None = None,
    compile: bool = True,
    backend: str = "inductor",
) -> Callable[..., tuple[TrainState, dict[str, Tensor]]]:
    """The train step of `train.step.make_step` with `noisy_gradient` in place of the gradient.

    Args:
        loss: `loss(params, batch, keys) -> (N,)`, one an example; `keys` is (N, 2).
        max_norm, clipping: see `clipped_sum`.
        expected_batch: see `noisy_gradient`.
        physical_batch: how many examples go through the net at once; a batch must be a multiple of it. Clipped sums
            add up and the noise comes once, so it does not change the result; it bounds memory, and gives compiled code
            one shape for samples of every size. None: the whole batch, one graph for each size of it.
        compile, backend: as in `make_step`.

    Returns:
        `step(state, batch, mask=None) -> (state, metrics)`, mask (N,) bool as in `clipped_sum`. Metrics are 0-D:
        `loss` and `example_norm` (means of the examples), `clipped` (the share whose gradient is longer than max_norm),
        `examples` (their number), `grad_norm` (of the noisy gradient) and `update_norm`. The first four are not
        private.

    Raises:
        ValueError: a number out of range; from the step: Stats (batch norm mixes its examples), or a batch that is no
            multiple of `physical_batch`.
    """
    _check_noise(noise_multiplier, expected_batch)
    if physical_batch is not None and physical_batch < 1:
        raise ValueError(f"physical_batch is {physical_batch}; expected at least 1")

    def part(params: Tree, batch: Tree, mask: Tensor, key: Tensor, step: Tensor, first: Tensor):
        # The keys of train.step.step_keys, whatever part of the batch this is.
        keys = random.fold_in(random.fold_in(key, step), first + torch.arange(len(mask), device=key.device))
        found = clipped_sum(
            lambda params, batch: loss(params, *batch),
            params,
            (batch, keys),
            max_norm=max_norm,
            mask=mask,
            clipping=clipping,
        )
        values = {
            "loss": found.losses,
            "example_norm": found.total_norm,
            "clipped": found.total_norm > max_norm,
            "examples": torch.ones_like(mask),
        }
        return found.sum, {name: (mask * x).sum() for name, x in values.items()}

    def finish(state: TrainState, sums: Tree, totals: dict):
        key = random.fold_in(random.fold_in(state.key, _NOISE), state.step)
        grads = tree.map(lambda g: g / expected_batch, add_noise(key, sums, noise_multiplier * max_norm))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = apply_updates(state.params, updates)
        count = totals["examples"]
        metrics = {name: total / count.clamp(min=1) for name, total in totals.items()}
        metrics |= {"examples": count, "grad_norm": tree.norm(grads), "update_norm": tree.norm(updates)}
        return TrainState(params, state.stats, opt_state, state.key, state.step + 1), metrics

    run_part, run_finish = (compiled(f, backend) if compile else f for f in (part, finish))

    def step(state: TrainState, batch: Tree, mask: Tensor | None = None):
        if tree.leaves(state.stats):
            name = tree.names(state.stats)[0]
            raise ValueError(f"'{name}' is a Stat: a layer that mixes the examples of a batch cannot be private")
        leaf = tree.leaves(batch)[0]
        count = len(leaf)
        size = physical_batch or count
        mask = torch.ones(count, dtype=torch.bool, device=leaf.device) if mask is None else mask
        if mask.shape != (count,):
            raise ValueError(f"the mask has shape {tuple(mask.shape)}; expected ({count},), one an example")
        if count % size:
            raise ValueError(f"a batch of {count} examples is no multiple of physical_batch {size}")
        total = None
        for i in range(0, count, size):
            chunk = tree.map(lambda x, i=i: x[i : i + size], batch)
            first = torch.tensor(i, device=leaf.device)
            found = run_part(state.params, chunk, mask[i : i + size], state.key, state.step, first)
            total = found if total is None else tree.map(torch.add, total, found)
        return run_finish(state, *total)

    return step


def spent_epsilon(
    noise_multiplier: float, sampling_rate: float, steps: int, delta: float, accountant: str = "pld"
) -> float:
    """The least epsilon for which `steps` steps on Poisson samples are known to be (epsilon, delta)-private.

    Args:
        accountant: "pld", privacy loss distributions (Koskela et al. 2020, arXiv:1906.03049): tight, takes about half a
            second. "rdp", Renyi differential privacy (Mironov 2017, arXiv:1702.07476): fast, a tenth larger.

    Returns:
        epsilon; 0 without a step, infinity without noise.

    Raises:
        ValueError: a number out of range, or an unknown accountant.
    """
    import dp_accounting
    from dp_accounting import pld, rdp

    _check_rate("sampling_rate", sampling_rate)
    if accountant not in ACCOUNTANTS:
        raise ValueError(f"accountant '{accountant}' is unknown; expected one of {', '.join(ACCOUNTANTS)}")
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; expected a number between 0 and 1")
    if steps < 0:
        raise ValueError(f"steps is {steps}; expected at least 0")
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier is {noise_multiplier}; expected a number that is not negative")
    if steps == 0 or noise_multiplier == 0:
        return math.inf if steps else 0.0
    event = dp_accounting.PoissonSampledDpEvent(sampling_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    spent = pld.PLDAccountant() if accountant == "pld" else rdp.RdpAccountant()
    return float(spent.compose(event, steps).get_epsilon(delta))


def noise_for_epsilon(epsilon: float, delta: float, sampling_rate: float, steps: int, accountant: str = "pld") -> float:
    """The least noise multiplier with which `steps` steps spend at most `epsilon`: the inverse of `spent_epsilon`.

    Found to a thousandth, from above; takes some six times as long as `spent_epsilon`.

    Raises:
        ValueError: as `spent_epsilon`; epsilon is not positive, or so small that the accountant cannot show it.
    """
    from scipy.optimize import brentq

    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}; expected a positive number")
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")

    def excess(log_noise: float, accountant: str) -> float:
        """log(spent / epsilon), about linear in the logarithm of the noise."""
        spent = spent_epsilon(math.exp(log_noise), sampling_rate, steps, delta, accountant)
        return math.log(max(spent, 1e-12) / epsilon)

    low, high = -3.0, 12.0
    if excess(high, "rdp") > 0:
        raise ValueError(f"epsilon is {epsilon}; no noise multiplier up to {math.exp(high):.0f} is known to keep to it")
    while excess(low, "rdp") <= 0:
        low -= 1
    found = brentq(excess, low, high, ("rdp",), xtol=1e-4)
    if accountant == "pld":
        # Renyi differential privacy asks for more noise, rarely for half as much again.
        low = found - 0.4
        while excess(low, accountant) <= 0:
            low -= 0.4
        found = brentq(excess, low, found + 1e-3, (accountant,), xtol=3e-4)
    while excess(found, accountant) > 0:
        found += 3e-4
    return math.exp(found)


def _check_rate(name: str, rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"{name} is {rate}; expected a number in (0, 1]")


def _check_noise(noise_multiplier: float, expected_batch: float) -> None:
    if not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier is {noise_multiplier}; expected a number that is not negative")
    if not 0 < expected_batch < math.inf:
        raise ValueError(f"expected_batch is {expected_batch}; expected a positive number")
