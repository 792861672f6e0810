"""Losses of diffusion models, one value per example.

| weight     | loss at a time t                                                                                |
| ---------- | ----------------------------------------------------------------------------------------------- |
| `simple`   | mean squared error of the prediction (Ho et al. 2020, arXiv:2006.11239, eq. 14)              |
| `min-snr`  | that times a weight: in the image's error min(SNR, gamma) (Hang et al. 2023, arXiv:2303.09556)  |
| `bound`    | steps * L_t, L_t the variational bound's term in bits per dimension                             |
| `hybrid`   | simple + 0.001 bound, which teaches the variance alone (Nichol and Dhariwal 2021, eq. 16)       |

Averaged over uniform times, `bound` is the bound but for its constant prior term (`train.diffusion.likelihood`).
"""

import math

import torch
from torch import Tensor

from core import random
from train.diffusion.process import (
    PREDICTIONS,
    check_choice,
    convert,
    diffuse,
    draw_noise,
    draw_time,
    heads,
    model_log_variance,
    posterior_log_variance,
    posterior_mean,
    scales,
    signal_to_noise,
    target,
)
from train.diffusion.schedules import Schedule
from train.diffusion.tables import Model

WEIGHTS = ("simple", "min-snr", "bound", "hybrid")


def diffusion_loss(
    model: Model,
    schedule: Schedule,
    image: Tensor,
    key: Tensor | None = None,
    *,
    time: Tensor | None = None,
    noise: Tensor | None = None,
    predicts: str = "noise",
    weight: str = "simple",
    variance: str = "small",
    gamma: float = 5.0,
    bound_weight: float = 0.001,
    levels: int = 256,
) -> Tensor:
    """The loss of each example at one time, (batch,), in float32 or wider.

    Args:
        model: `(x, time) -> output`, see `train.diffusion`.
        image: (batch, channels, ...) in [-1, 1].
        key: one (2,), or one per example (batch, 2), for the time (uniform) and the noise where they are None.
        time: (batch,) int64.
        noise: the shape of `image`.
        predicts: prediction target of the model: "noise", "image" or "velocity".
        weight: one of `WEIGHTS`.
        variance: variance of the reverse steps, in `bound` only: "small", "large" or "learned". `hybrid` takes
            "learned".
        gamma: the bound on the weights of `min-snr`.
        bound_weight: weight of the bound in `hybrid`; the papers' lambda.
        levels: grey levels of the images, for the term of the bound at time 0; see `discretised_log_likelihood`.

    Raises:
        ValueError: a choice that is not there, `hybrid` without a learned variance, neither a key nor both time and
            noise, or an output of another shape.
    """
    check_choice("predicts", predicts, PREDICTIONS)
    check_choice("weight", weight, WEIGHTS)
    if weight == "hybrid" and variance != "learned":
        raise ValueError(f"the hybrid loss is for a learned variance, got variance {variance!r}")
    if key is None and (time is None or noise is None):
        raise ValueError("diffusion_loss needs a key, or both time and noise")
    keys = None if key is None else random.sites(key, 2)
    time = draw_time(keys[0], schedule, len(image)) if time is None else time
    # In half precision the model alone: its noise has few values and no tails.
    dtype, image = image.dtype, _wide(image)
    noise = draw_noise(keys[1], image) if noise is None else _wide(noise)

    x = diffuse(schedule, image, time, noise)  # sqrt(alpha_bar) image + sqrt(1 - alpha_bar) noise
    output = _wide(model(x.to(dtype), time))
    prediction, fraction = heads(output, x)

    def bound(prediction: Tensor) -> Tensor:
        terms = bound_term(
            schedule, prediction, fraction, image, x, time, predicts=predicts, variance=variance, levels=levels
        )
        return len(schedule.betas) * terms

    if weight == "bound":
        return bound(prediction)
    # mean (prediction - target)^2
    error = _mean(prediction - target(predicts, image, noise, *scales(schedule, time, x)), square=True)
    if weight == "min-snr":
        error = error * min_snr_weights(schedule, predicts, gamma).to(error.device)[time].to(error.dtype)
    if weight == "hybrid":
        error = error + bound_weight * bound(prediction.detach())
    return error


def min_snr_weights(schedule: Schedule, predicts: str, gamma: float = 5.0) -> Tensor:
    """(steps,): weights of the squared error of `predicts`, with which the image's error has min(SNR, gamma).

    The noise's error is SNR times the image's, and the velocity's SNR + 1 times (Hang et al. 2023).
    """
    check_choice("predicts", predicts, PREDICTIONS)
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    snr = signal_to_noise(schedule)
    return snr.clamp(max=gamma) / {"image": torch.ones_like(snr), "noise": snr, "velocity": snr + 1}[predicts]


def bound_term(
    schedule: Schedule,
    prediction: Tensor,
    fraction: Tensor | None,
    image: Tensor,
    x: Tensor,
    time: Tensor,
    *,
    predicts: str = "noise",
    variance: str = "small",
    levels: int = 256,
    clip: bool = False,
) -> Tensor:
    """The variational bound's term at each example's time, in bits per dimension: (batch,).

    KL(q(x_{t-1} | x_t, image) || p(x_{t-1} | x_t)) for t > 0, and -log p(image | x_0) for t = 0 (Ho et al. 2020, eq. 5
    and section 3.3).

    Args:
        prediction, fraction: the model's output at x, from `heads`.
        clip: clip the predicted image to [-1, 1].
    """
    alpha, sigma = scales(schedule, time, x)
    predicted = convert(predicts, "image", prediction, x, alpha, sigma)
    predicted = predicted.clamp(-1, 1) if clip else predicted
    mean = posterior_mean(schedule, predicted, x, time)
    log_variance = model_log_variance(schedule, time, x, variance, fraction)
    divergence = gaussian_divergence(
        posterior_mean(schedule, image, x, time), posterior_log_variance(schedule, time, x), mean, log_variance
    )
    decoding = -discretised_log_likelihood(image, mean, log_variance, levels)
    return torch.where(time == 0, _mean(decoding), _mean(divergence)) / math.log(2)


def gaussian_divergence(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other mean, other variance)) of each element, in nats; shapes broadcast."""
    difference = log_variance - other_log_variance
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (torch.exp(difference) - 1 - difference + distance)  # (v/w - 1 - log v/w + (m - n)^2 / w) / 2


def discretised_log_likelihood(image: Tensor, mean: Tensor, log_variance: Tensor, levels: int = 256) -> Tensor:
    """Log of the Gaussian's mass in the bin of each element, in nats (Ho et al. 2020, eq. 13).

    Args:
        image: elements on the grid -1, -1 + w, ..., 1 with w = 2 / (levels - 1). A bin is w wide around its value; the
            first reaches to minus infinity and the last to infinity.
        mean, log_variance: broadcast to `image`.
        levels: 256 for images of 8 bits.

    Raises:
        ValueError: fewer than 2 levels.
    """
    if levels < 2:
        raise ValueError(f"images have at least 2 levels, got {levels}")
    half = 1 / (levels - 1)
    inverse = torch.exp(-0.5 * log_variance)  # 1 / standard deviation
    # In the lower tail, where the logarithm of the cumulative function is exact, a bin above the mean is mirrored.
    distance = (image - mean).abs()
    near, far = (half - distance) * inverse, (-half - distance) * inverse
    upper = log_cumulative(near)
    # The bound on the difference matters to bins that rounding leaves empty: an infinite logarithm has no gradient.
    narrower = (log_cumulative(far) - upper).clamp(max=-1e-12)
    inside = upper + torch.log(-torch.expm1(narrower))
    first, last = image < -1 + half, image > 1 - half
    open_end = torch.where(first, image + half - mean, mean - image + half) * inverse
    return torch.where(first | last, log_cumulative(open_end), inside)


def log_cumulative(z: Tensor) -> Tensor:
    """log of the standard normal's cumulative function, without underflow; `torch.special.log_ndtr` under vmap too."""
    below = z < -1
    # Phi(z) = erfc(-z / sqrt(2)) / 2, and erfcx(y) = exp(y^2) erfc(y) keeps its size in the tail.
    tail, body = torch.where(below, z, -1), torch.where(below, -1, z)
    in_tail = torch.special.erfcx(-tail * math.sqrt(0.5)).log() - tail.square() / 2
    return torch.where(below, in_tail, torch.special.erfc(-body * math.sqrt(0.5)).log()) - math.log(2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(values: Tensor, square: bool = False) -> Tensor:
    """The mean over all axes but the first: (batch, ...) -> (batch,)."""
    return (values.square() if square else values).flatten(1).mean(1)
