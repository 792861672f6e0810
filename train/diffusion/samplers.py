"""Samplers: a table of coefficients for some of the times, one pure step function, and a loop.

| name           | a step                                                                                             |
| -------------- | -------------------------------------------------------------------------------------------------- |
| `ddpm`         | a sample of the model's Gaussian (Ho et al. 2020, arXiv:2006.11239, algorithm 2)                   |
| `ddim`         | towards the predicted image, new noise as eta says (Song et al. 2021, arXiv:2010.02502)            |
| `dpm-solver++` | second order, by this prediction and the last, no noise (Lu et al. 2022, arXiv:2211.01095, 2M)     |
| `heun`         | second order, two predictions per step, no noise (Karras et al. 2022, arXiv:2206.00364, alg. 1)    |

A step is `step(model, row, x, memory, noise) -> (x, memory)`, where `row` is a row of the table, `memory` the image
that the step before predicted (zeros at first), and `noise` standard normal or None. All steps have the same shapes
and no branch, so one compiled graph serves them all:

    sampler = make("ddim", schedule, 50)
    images = sample(sampler, model, noise, step=torch.compile(sampler.step, fullgraph=True))

A model closed over other parameters is another function, and compiled anew. So where parameters change between calls,
compile a function of them:

    @torch.compile(fullgraph=True)
    def compiled(params, row, x, memory, noise):
        return sampler.step(lambda x, time: net(params, x, time), row, x, memory, noise)

    images = sample(sampler, None, noise, step=lambda model, *rest: compiled(params, *rest))
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from core import random
from train.diffusion.process import PREDICTIONS, VARIANCES, check_choice, draw_noise, interpolate_variance, posterior
from train.diffusion.schedules import Schedule
from train.diffusion.tables import Model, Sampler, Step, levels_of, predict, table_of, unpack


def ddpm(
    schedule: Schedule,
    steps: int | None = None,
    *,
    predicts: str = "noise",
    variance: str = "small",
    clip: bool = True,
    spacing: str = "leading",
) -> Sampler:
    """Ancestral sampling; over fewer steps than the schedule has, the posterior is that of the longer steps.

    Args:
        steps: sampling steps; all of the schedule's if None.
        predicts: prediction target of the model: "noise", "image" or "velocity".
        variance: variance of the reverse steps, "small", "large", or "learned" from a model of twice the channels. The
            last step has none.
        clip: clip each predicted image to [-1, 1].
        spacing: spacing of the times; see `train.diffusion.tables.spaced`.
    """
    check_choice("predicts", predicts, PREDICTIONS)
    check_choice("variance", variance, VARIANCES)
    time, alpha_bars = levels_of(schedule, steps, spacing)
    now, after = alpha_bars[:-1], alpha_bars[1:]
    to_image, to_x, small, large = posterior(now, after)
    noisy = (after < 1).to(small.dtype)
    # The last step's small variance is 0 and its logarithm infinite: any finite one will do, it is multiplied by 0.
    log_small = torch.where(after < 1, small, large).log()

    def step(model: Model, row: Tensor, x: Tensor, memory: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        time, alpha, sigma, to_image, to_x, log_small, log_large, noisy = unpack(row, x)
        image, _, fraction = predict(model, time, x, alpha, sigma, predicts, clip)
        if variance == "learned":
            log_variance = interpolate_variance(log_small, log_large, fraction)
        else:
            log_variance = log_small if variance == "small" else log_large
        # mean of q(y | x, image) + standard deviation * noise
        return to_image * image + to_x * x + noisy * torch.exp(0.5 * log_variance) * noise, image

    columns = (time, now.sqrt(), (1 - now).sqrt(), to_image, to_x, log_small, large.log(), noisy)
    return Sampler(table_of(columns), step, alpha_bars, True)


def ddim(
    schedule: Schedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    predicts: str = "noise",
    clip: bool = True,
    spacing: str = "leading",
) -> Sampler:
    """Implicit sampling (Song et al. 2021, eqs. 12 and 16). Where the image is clipped, the noise follows from it.

    Args:
        eta: 0 draws no noise: images are a function of the first x. 1 is `ddpm` with the small variance.
        steps, predicts, clip, spacing: as for `ddpm`.

    Raises:
        ValueError: eta outside [0, 1], and what `ddpm` raises.
    """
    check_choice("predicts", predicts, PREDICTIONS)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    time, alpha_bars = levels_of(schedule, steps, spacing)
    now, after = alpha_bars[:-1], alpha_bars[1:]
    _, _, small, _ = posterior(now, after)
    spread = eta * small.sqrt()

    def step(model: Model, row: Tensor, x: Tensor, memory: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        time, alpha, sigma, to_image, to_noise, spread = unpack(row, x)
        image, predicted, _ = predict(model, time, x, alpha, sigma, predicts, clip)
        # sqrt(alpha_bar') image + sqrt(1 - alpha_bar' - spread^2) noise predicted, + spread * new noise
        new = to_image * image + to_noise * predicted
        return (new + spread * noise if eta > 0 else new), image

    columns = (time, now.sqrt(), (1 - now).sqrt(), after.sqrt(), (1 - after - spread**2).clamp(min=0).sqrt(), spread)
    return Sampler(table_of(columns), step, alpha_bars, eta > 0)


def dpm_solver(
    schedule: Schedule,
    steps: int = 20,
    *,
    predicts: str = "noise",
    clip: bool = True,
    spacing: str = "linspace",
) -> Sampler:
    """DPM-Solver++(2M), multistep and in the predicted image (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    With lambda = log(alpha / sigma), h its change in this step and r that in the step before over h:

    x' = sigma' / sigma x - alpha' (e^-h - 1) ((1 + 1 / (2 r)) image - 1 / (2 r) image of the step before)

    The first step, which has none before it, and the last, where h is infinite, are of first order, as in `ddim`.

    Args:
        steps: fewer than the schedule has, but for spacing "trailing".
        spacing: "leading" and "linspace" here take one time more and leave out time 0, from which the last step would
            hardly move.
        predicts, clip: as for `ddpm`.
    """
    check_choice("predicts", predicts, PREDICTIONS)
    time, alpha_bars = levels_of(schedule, steps, spacing, without_first=spacing != "trailing")
    alphas, sigmas = alpha_bars.sqrt(), (1 - alpha_bars).sqrt()
    log_ratio = alphas.log() - sigmas.log()
    h = log_ratio.diff()
    towards = -alphas[1:] * torch.expm1(-h)
    lookback = torch.zeros_like(h)
    lookback[1:-1] = 0.5 * h[1:-1] / h[:-2]

    def step(model: Model, row: Tensor, x: Tensor, memory: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        time, alpha, sigma, to_x, to_image, to_memory = unpack(row, x)
        image, _, _ = predict(model, time, x, alpha, sigma, predicts, clip)
        return to_x * x + to_image * image + to_memory * memory, image

    columns = (time, alphas[:-1], sigmas[:-1], sigmas[1:] / sigmas[:-1], towards * (1 + lookback), -towards * lookback)
    return Sampler(table_of(columns), step, alpha_bars, False)


def heun(
    schedule: Schedule,
    steps: int = 20,
    *,
    predicts: str = "noise",
    clip: bool = True,
    spacing: str = "linspace",
) -> Sampler:
    """Heun's method on the probability-flow ODE, in the variance-preserving parametrisation.

    In y = x / alpha and s = sigma / alpha the ODE is dy / ds = noise (Karras et al. 2022, eqs. 1 and 3, with their
    sigma = s). A step goes by the noise predicted here, predicts again where that leads, and goes by the mean of the
    two. The last step, to s = 0, goes by the first alone, as in the paper; the model is called twice there too, at the
    same time, so that all steps are one graph.

    Args:
        steps, predicts, clip, spacing: as for `ddpm`.
    """
    check_choice("predicts", predicts, PREDICTIONS)
    time, alpha_bars = levels_of(schedule, steps, spacing)
    alphas, sigmas = alpha_bars.sqrt(), (1 - alpha_bars).sqrt()
    change = (sigmas / alphas).diff()
    half = torch.full_like(change, 0.5)
    half[-1] = 0

    def step(model: Model, row: Tensor, x: Tensor, memory: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        time, alpha, sigma, _, next_alpha, next_sigma, new_alpha, change, half = unpack(row, x)
        image, first, _ = predict(model, time, x, alpha, sigma, predicts, clip)
        y = x / alpha
        guess = next_alpha * (y + change * first)
        next_time = row[3].to(torch.int64).expand(len(x))
        _, second, _ = predict(model, next_time, guess, next_alpha, next_sigma, predicts, clip)
        return new_alpha * (y + change * ((1 - half) * first + half * second)), image

    def later(values: Tensor) -> Tensor:
        # At the last step the second prediction is made at the same time: at s = 0 there is no noise to predict.
        return torch.cat([values[1:], values[-1:]])

    now = (time, alphas[:-1], sigmas[:-1])
    columns = (*now, *(later(values) for values in now), alphas[1:], change, half)
    return Sampler(table_of(columns), step, alpha_bars, False)


SAMPLERS: dict[str, Callable[..., Sampler]] = {"ddpm": ddpm, "ddim": ddim, "dpm-solver++": dpm_solver, "heun": heun}


def make(name: str, schedule: Schedule, steps: int, **options: float | str | bool) -> Sampler:
    """A sampler of `SAMPLERS`.

    Raises:
        ValueError: a name that is not there; the choices are listed.
    """
    if name not in SAMPLERS:
        raise ValueError(f"no sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name](schedule, steps, **options)


def sample(
    sampler: Sampler,
    model: Model | None,
    x: Tensor,
    key: Tensor | None = None,
    *,
    noise: Sequence[Tensor] | None = None,
    step: Step | None = None,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Run all steps from x (batch, channels, ...), standard normal, to images of that shape.

    Args:
        model: `(x, time) -> output`; handed on to the step.
        key: one (2,), or one per example (batch, 2); step i draws its noise from `fold_in(key, i)`. Needed if the
            sampler is noisy.
        noise: instead of the key, the noise of each step.
        step: `sampler.step`, compiled, or a function in its place; see above.
        callback: `callback(i, x, image)`, called after step i, for a progress bar or an animation.

    Raises:
        ValueError: a noisy sampler without key or noise, or noise for another number of steps.
    """
    steps = len(sampler.table)
    if sampler.noisy and key is None and noise is None:
        raise ValueError("this sampler draws noise in its steps: sample needs a key")
    if noise is not None and len(noise) != steps:
        raise ValueError(f"sample takes the noise of {steps} steps, got {len(noise)}")
    step = sampler.step if step is None else step
    table, memory, new_noise = sampler.table.to(x.device), torch.zeros_like(x), None
    for i in range(steps):
        if sampler.noisy:
            new_noise = draw_noise(random.fold_in(key, i), x) if noise is None else noise[i]
        x, memory = step(model, table[i], x, memory, new_noise)
        if callback is not None:
            callback(i, x, memory)
    return x


@torch.no_grad()
def sample_many(
    sampler: Sampler,
    model: Callable[[Tensor], Any],
    key: Tensor,
    shape: tuple[int, ...],
    count: int,
    batch: int = 256,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """(count, *shape) on the CPU, in as few batches of one size as can be: sample i is a function of key and i.

    Args:
        model: `model(rows)` is the model of the samples with these numbers (size,), handed on to the step; their
            labels, say.
        key: (2,).
        batch: largest size of a batch.
        callback: as for `sample`, of the steps of every batch.
    """
    for_start, for_steps = (random.sites(k, count) for k in random.sites(key, 2))
    size, images = -(-count // -(-count // batch)), []
    for start in range(0, count, size):
        rows = torch.arange(start, start + size, device=key.device) % count  # the last batch is filled up
        x = random.normal(for_start[rows], shape)  # (size, *shape)
        images.append(sample(sampler, model(rows), x, for_steps[rows], callback=callback).cpu())
    return torch.cat(images)[:count]
