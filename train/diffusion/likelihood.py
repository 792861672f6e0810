"""Likelihood of images in bits per dimension: the variational bound, and the probability-flow ODE.

The two are of different distributions: the bound is of ancestral sampling (`ddpm` in all steps), the flow's of the
deterministic samplers. Only the bound clips, its predicted image, as `ddpm` does.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from core import random
from train.diffusion.losses import bound_term, gaussian_divergence
from train.diffusion.process import PREDICTIONS, check_choice, convert, diffuse, draw_noise, draw_time, heads
from train.diffusion.schedules import Schedule
from train.diffusion.tables import Model, spaced, table_of

FLOW_ENDS = 1e-4
FlowStep = Callable[[Model, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Bound(NamedTuple):
    """Bits per dimension. total (batch,): the bound. prior (batch,): its part that no model changes.

    terms (batch, count): the others, L_t at times (batch, count); all of them add up to total - prior.
    """

    total: Tensor
    prior: Tensor
    terms: Tensor
    times: Tensor


def prior_bits(schedule: Schedule, image: Tensor) -> Tensor:
    """KL(q(x_T | image) || N(0, 1)), bits per dimension, (batch,): the image's trace after the last noising."""
    last = schedule.alpha_bars[-1].to(image)
    zero = torch.zeros_like(image)
    return _bits(gaussian_divergence(last.sqrt() * image, zero + (1 - last).log(), zero, zero))


def variational_bound(
    model: Model,
    schedule: Schedule,
    image: Tensor,
    key: Tensor,
    *,
    draws: int | None = None,
    predicts: str = "noise",
    variance: str = "small",
    clip: bool = True,
    levels: int = 256,
    callback: Callable[[int], None] | None = None,
) -> Bound:
    """Upper bound on -log2 p(image) / dimensions (Ho et al. 2020, arXiv:2006.11239, eq. 5).

    L = KL(q(x_T | image) || p(x_T)) + sum_{t > 0} KL(q(x_{t-1} | x_t, image) || p(x_{t-1} | x_t)) - log p(image | x_0)

    Each term is estimated with one sample of its noise.

    Args:
        image: (batch, channels, ...), `levels` values in [-1, 1]: 8 bits are k / 127.5 - 1.
        key: one (2,), or one per example (batch, 2).
        draws: None for all times, one call of the model each; or the number of uniform times per example, whose mean
            times the number of steps estimates their sum.
        predicts, variance: as for `train.diffusion.losses.diffusion_loss`.
        clip: the predicted images into [-1, 1].
        callback: `callback(i)`, called after time number i.

    Raises:
        ValueError: less than 1 draw, or a choice that is not there.
    """
    check_choice("predicts", predicts, PREDICTIONS)
    if draws is not None and draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    steps = len(schedule.betas)
    terms, times = [], []
    for i in range(steps if draws is None else draws):
        for_time, for_noise = random.sites(random.fold_in(key, i), 2)
        if draws is None:
            time = torch.full((len(image),), i, device=image.device)
        else:
            time = draw_time(for_time, schedule, len(image))
        x = diffuse(schedule, image, time, draw_noise(for_noise, image))
        prediction, fraction = heads(model(x, time), x)
        choices = {"predicts": predicts, "variance": variance, "levels": levels, "clip": clip}
        terms.append(bound_term(schedule, prediction, fraction, image, x, time, **choices))
        times.append(time)
        if callback is not None:
            callback(i)
    terms, prior = torch.stack(terms, 1), prior_bits(schedule, image)
    total = prior + (terms.sum(1) if draws is None else steps * terms.mean(1))
    return Bound(total, prior, terms, torch.stack(times, 1))


def dequantise(key: Tensor, image: Tensor, levels: int = 256) -> Tensor:
    """The image plus uniform noise over each element's bin, 2 / (levels - 1) wide around its value.

    Args:
        key: one (2,), or one per example (batch, 2).
    """
    width = 2 / (levels - 1)
    return image + width * (random.uniform(key, image.shape[key.ndim - 1 :], image.dtype) - 0.5)


def flow_bits(
    model: Model,
    schedule: Schedule,
    image: Tensor,
    key: Tensor,
    *,
    steps: int = 100,
    predicts: str = "noise",
    probes: int = 1,
    levels: int = 256,
    step: FlowStep | None = None,
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """-log2 p(image) / dimensions by the flow, of a uniformly dequantised image: (batch,).

    A density p at image + u, u uniform over the bins, gives an upper bound on average: the bin's mass is at least
    exp(E[log p]) times its volume (Theis et al. 2016, arXiv:1511.01844).

    Args:
        image, key, levels: as for `variational_bound`.
        steps, predicts, probes, step, callback: as for `flow_log_density`.
    """
    for_bins, for_probes = random.sites(key, 2)
    x = dequantise(for_bins, image, levels)
    options = {"steps": steps, "predicts": predicts, "probes": probes, "step": step, "callback": callback}
    log_density = flow_log_density(model, schedule, x, for_probes, **options)
    return -log_density / (math.log(2) * image[0].numel()) - math.log2(2 / (levels - 1))


def flow_log_density(
    model: Model,
    schedule: Schedule,
    x: Tensor,
    key: Tensor,
    *,
    steps: int = 100,
    predicts: str = "noise",
    probes: int = 1,
    step: FlowStep | None = None,
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """log p(x) in nats, (batch,), by the probability-flow ODE (Song et al. 2021, arXiv:2011.13456, section 4.3).

    With alpha = cos(a) and sigma = sin(a) the ODE is dx / da = velocity (Salimans and Ho 2022, arXiv:2202.00512,
    appendix D), so log p(x) = log N(x_T; 0, 1) + integral of the trace of its Jacobian from x to x_T, the noise that
    the flow takes x to. The trace is Hutchinson's estimate e^T J e with random signs e, the same along the whole path:
    unbiased, but noisy for a single image. p is the model's density at time 0, where the least noise has been added:
    the model knows nothing before it.

    Args:
        x: (batch, channels, ...), continuous.
        key: one (2,), or one per example (batch, 2), for the signs.
        steps: of Heun's method, between times of the schedule as "linspace" chooses them; two calls of the model and
            two of its vector-Jacobian product each. The times are those with alpha_bar at least `FLOW_ENDS`, and there
            are fewer steps than times.
        probes: samples of e that are averaged.
        step: `flow_step(predicts)`, compiled.
        callback: called after step i as `callback(i)`.

    Raises:
        ValueError: less than 1 probe, steps that the schedule does not have, another prediction.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    step, time = flow_step(predicts) if step is None else step, flow_times(schedule, steps)
    alpha_bars = schedule.alpha_bars.cpu()[time]
    alpha, sigma = alpha_bars.sqrt(), (1 - alpha_bars).sqrt()
    columns = (time, alpha, sigma)
    now, after = [c[:-1] for c in columns], [c[1:] for c in columns]
    table = table_of((*now, *after, torch.atan2(sigma, alpha).diff())).to(x.device)

    uniform = torch.stack([random.uniform(k, x.shape[key.ndim - 1 :], x.dtype) for k in random.sites(key, probes)])
    signs = torch.where(uniform < 0.5, -1.0, 1.0).to(x.dtype)  # (probes, batch, channels, ...)
    log_density = x.new_zeros(len(x))
    for i in range(steps):
        x, change = step(model, table[i], x, signs)
        log_density = log_density + change
        if callback is not None:
            callback(i)
    # log N(x_T; 0, 1) + integral
    return log_density - 0.5 * (x.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def flow_times(schedule: Schedule, steps: int) -> Tensor:
    """The times that the steps of `flow_log_density` are between, rising, (steps + 1,) int64.

    Raises ValueError: steps that the schedule does not have.
    """
    # Where alpha is nearly 0, the velocity that follows from a predicted noise, (noise - sigma x) / alpha, is mostly
    # error: the flow ends where noise is nearly all there is.
    total = int((schedule.alpha_bars >= FLOW_ENDS).sum())
    if not 1 <= steps < total:
        raise ValueError(f"a flow over {total} times of the schedule takes 1 to {total - 1} steps, got {steps}")
    return spaced(total, steps + 1, "linspace").flip(0)


def flow_step(predicts: str = "noise") -> FlowStep:
    """`step(model, row, x, signs) -> (x, integral of the trace over the step (batch,))`, signs (probes, *x.shape)."""
    check_choice("predicts", predicts, PREDICTIONS)

    def slope(
        model: Model, time: Tensor, alpha: Tensor, sigma: Tensor, x: Tensor, signs: Tensor
    ) -> tuple[Tensor, Tensor]:
        def velocity(x: Tensor) -> Tensor:
            prediction, _ = heads(model(x, time.to(torch.int64).expand(len(x))), x)
            return convert(predicts, "velocity", prediction, x, alpha.to(x.dtype), sigma.to(x.dtype))

        # The model does not mix examples, so one product has the trace of each: e^T J e.
        value, pull = vjp(velocity, x)
        traces = [(pull(sign)[0] * sign).flatten(1).sum(1) for sign in signs.unbind()]
        return value, torch.stack(traces).mean(0)

    def step(model: Model, row: Tensor, x: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        time, alpha, sigma, next_time, next_alpha, next_sigma, angle = row.unbind()
        angle = angle.to(x.dtype)
        first, trace = slope(model, time, alpha, sigma, x, signs)
        second, next_trace = slope(model, next_time, next_alpha, next_sigma, x + angle * first, signs)
        return x + angle / 2 * (first + second), angle / 2 * (trace + next_trace)  # Heun: the mean of both slopes

    return step


def _bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)
