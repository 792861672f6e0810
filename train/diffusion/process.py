"""The noising process q, the prediction targets of models, and the Gaussian posterior that reverse steps approximate.

alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar) are the scales of image and noise in
x = alpha image + sigma noise, alpha^2 + sigma^2 = 1. A prediction of one of

    "noise"     the noise itself                            (Ho et al. 2020, arXiv:2006.11239)
    "image"     the image before any noise
    "velocity"  v = alpha noise - sigma image               (Salimans and Ho 2022, arXiv:2202.00512)

gives with x the other two. In 100 lines of plain torch, with the training and the sampler: `nets/explained/ddpm.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from core import random
from train.diffusion.schedules import Schedule

VARIANCES = ("small", "large", "learned")

# (source, result): function of the source, x, alpha, sigma.
_CONVERSIONS: dict[tuple[str, str], Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    ("noise", "image"): lambda noise, x, alpha, sigma: (x - sigma * noise) / alpha,
    ("noise", "velocity"): lambda noise, x, alpha, sigma: (noise - sigma * x) / alpha,
    ("image", "noise"): lambda image, x, alpha, sigma: (x - alpha * image) / sigma,
    ("image", "velocity"): lambda image, x, alpha, sigma: (alpha * x - image) / sigma,
    ("velocity", "image"): lambda velocity, x, alpha, sigma: alpha * x - sigma * velocity,
    ("velocity", "noise"): lambda velocity, x, alpha, sigma: alpha * velocity + sigma * x,
}
PREDICTIONS = ("noise", "image", "velocity")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError, with all choices, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def at(values: Tensor, time: Tensor, like: Tensor) -> Tensor:
    """values (steps,) at time (batch,), as (batch, 1, ...) of the dtype of `like` (batch, ...), to multiply it with."""
    picked = values.to(like.device)[time].to(like.dtype)  # (batch,)
    return picked.reshape(picked.shape + (1,) * (like.ndim - 1))  # (batch, 1, ...)


def scales(schedule: Schedule, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at time (batch,), each (batch, 1, ...)."""
    return at(schedule.alpha_bars.sqrt(), time, like), at((1 - schedule.alpha_bars).sqrt(), time, like)


def draw_noise(key: Tensor, like: Tensor) -> Tensor:
    """Standard normal, shape and dtype of `like` (batch, ...), from one key (2,), or one per example (batch, 2)."""
    return random.normal(key, like.shape[key.ndim - 1 :], like.dtype)


def draw_time(key: Tensor, schedule: Schedule, count: int) -> Tensor:
    """Times (count,), int64, uniform over the schedule, from one key (2,), or one per example (count, 2)."""
    shape = (count,) if key.ndim == 1 else ()
    return random.randint(key, shape, 0, len(schedule.betas)).to(torch.int64)


def diffuse(schedule: Schedule, image: Tensor, time: Tensor, noise: Tensor) -> Tensor:
    """x at time (batch,): sqrt(alpha_bar) image + sqrt(1 - alpha_bar) noise (Ho et al. 2020, eq. 4).

    Args:
        image, noise: (batch, ...).
    """
    alpha, sigma = scales(schedule, time, image)
    return alpha * image + sigma * noise  # sqrt(alpha_bar) image + sqrt(1 - alpha_bar) noise


def convert(source: str, result: str, prediction: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """A prediction of `source` as one of `result`, each of `PREDICTIONS`.

    Args:
        prediction, x: (batch, ...).
        alpha, sigma: the scales of image and noise in x; see `scales`. They broadcast to x.
    """
    check_choice("a prediction", source, PREDICTIONS)
    check_choice("a prediction", result, PREDICTIONS)
    return prediction if source == result else _CONVERSIONS[source, result](prediction, x, alpha, sigma)


def target(predicts: str, image: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The target of a model that predicts `predicts`."""
    check_choice("predicts", predicts, PREDICTIONS)
    return {"noise": lambda: noise, "image": lambda: image, "velocity": lambda: alpha * noise - sigma * image}[
        predicts
    ]()


def heads(output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(prediction, fraction): a model's output of twice the channels of x is both, one of x's shape the first alone.

    fraction = (second half + 1) / 2 interpolates the log variance, 0 "small", 1 "large".

    Raises:
        ValueError: an output of another shape.
    """
    if output.shape == x.shape:
        return output, None
    if output.shape != (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        raise ValueError(
            f"a model of x {tuple(x.shape)} returns that shape or twice its channels: {tuple(output.shape)}"
        )
    prediction, fraction = output.chunk(2, 1)
    return prediction, (fraction + 1) / 2


def posterior(alpha_bars: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q(y | x, image) for y with alpha_bar `previous`, a reverse step from x with `alpha_bars`; any number of noisings.

    Mean: to_image image + to_x x; variance: small, that of q itself. `large` is the variance of x given y. As a step's
    variance they are the two extremes: right for data that is a single point, and for unit Gaussian data (Ho et al.
    2020, eqs. 6 and 7, and section 3.2).

    Returns:
        (to_image, to_x, small, large), each of the shape of the arguments.
    """
    alphas = alpha_bars / previous  # of this step alone
    betas = 1 - alphas
    to_image = previous.sqrt() * betas / (1 - alpha_bars)
    to_x = alphas.sqrt() * (1 - previous) / (1 - alpha_bars)
    return to_image, to_x, betas * (1 - previous) / (1 - alpha_bars), betas


def before(schedule: Schedule) -> Tensor:
    """alpha_bars one step earlier (steps,): 1 for the first, which starts from the image."""
    return torch.cat([torch.ones_like(schedule.alpha_bars[:1]), schedule.alpha_bars[:-1]])


def posterior_mean(schedule: Schedule, image: Tensor, x: Tensor, time: Tensor) -> Tensor:
    """The mean of q(x_{t-1} | x_t, image), the image itself for t = 0 (Ho et al. 2020, eq. 7)."""
    to_image, to_x, _, _ = posterior(schedule.alpha_bars, before(schedule))
    return at(to_image, time, x) * image + at(to_x, time, x) * x


def posterior_log_variance(schedule: Schedule, time: Tensor, like: Tensor) -> Tensor:
    """Log of the variance of q(x_{t-1} | x_t, image), (batch, 1, ...); at t = 0, where that is 0, that at t = 1."""
    return at(_log_variances(schedule)[0], time, like)


def model_log_variance(
    schedule: Schedule, time: Tensor, like: Tensor, variance: str, fraction: Tensor | None = None
) -> Tensor:
    """Log of the variance of a model's reverse step, broadcastable to `like` (batch, ...).

    "small": that of the posterior. "large": beta; at t = 0 the small one, which is nearer to the width of a pixel's
    bin. "learned": fraction log large + (1 - fraction) log small (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15).

    Raises:
        ValueError: another variance, or "learned" without a fraction.
    """
    check_choice("variance", variance, VARIANCES)
    small, large = (at(values, time, like) for values in _log_variances(schedule))
    if variance == "small":
        return small
    if variance == "large":
        first = (time == 0).reshape(small.shape)
        return torch.where(first, small, large)
    return interpolate_variance(small, large, fraction)


def interpolate_variance(small: Tensor, large: Tensor, fraction: Tensor | None) -> Tensor:
    """The log variance of a fraction (see `heads`): fraction log large + (1 - fraction) log small."""
    if fraction is None:
        raise ValueError("a learned variance needs a model that returns twice the channels of x")
    return fraction * large + (1 - fraction) * small


def _log_variances(schedule: Schedule) -> tuple[Tensor, Tensor]:
    _, _, small, large = posterior(schedule.alpha_bars, before(schedule))
    return torch.cat([small[1:2], small[1:]]).log(), large.log()


def signal_to_noise(schedule: Schedule) -> Tensor:
    """alpha_bar / (1 - alpha_bar), (steps,)."""
    return schedule.alpha_bars / (1 - schedule.alpha_bars)
