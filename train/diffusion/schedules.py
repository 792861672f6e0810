"""Noise schedules: `SCHEDULES[name](steps)`, in float64.

| name            | alpha_bar, the variance left of the image after a fraction u of the steps                      |
| --------------- | ---------------------------------------------------------------------------------------------- |
| `linear`        | betas rise linearly (Ho et al. 2020, arXiv:2006.11239, section 4)                              |
| `cosine`        | cos^2(pi / 2 (u + s) / (1 + s)) over its value at 0 (Nichol and Dhariwal 2021, arXiv:2102.09672) |
| `sigmoid`       | a falling sigmoid (Jabri et al. 2022, arXiv:2212.11972; Chen 2023, arXiv:2301.10972)           |
| `sigmoid-betas` | betas rise as a sigmoid (Xu et al. 2022, arXiv:2203.02923)                                     |
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Schedule(NamedTuple):
    """betas (steps,): the variance that noising t adds. alpha_bars (steps,): prod_{s <= t} (1 - beta_s). Both float64.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.
    """

    betas: Tensor
    alpha_bars: Tensor


def from_betas(betas: Tensor) -> Schedule:
    """The schedule with these betas (steps,).

    Raises:
        ValueError: fewer than 2 steps, or a beta that is not inside (0, 1).
    """
    if betas.ndim != 1 or len(betas) < 2:
        raise ValueError(f"a diffusion takes at least 2 steps, got betas of shape {tuple(betas.shape)}")
    betas = betas.to(torch.float64)
    outside = ~((betas > 0) & (betas < 1))
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ValueError(f"betas must lie inside (0, 1): of {len(betas)} steps, beta {first} is {float(betas[first])}")
    return Schedule(betas, torch.cumprod(1 - betas, 0))


def from_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], steps: int, largest: float = 0.999) -> Schedule:
    """beta_t = min(1 - alpha_bar((t + 1) / steps) / alpha_bar(t / steps), largest), t from 0.

    Args:
        alpha_bar: function of the fraction of the steps done, decreasing from 1 in [0, 1].
        largest: keeps the last betas below 1, where alpha_bar ends at 0.
    """
    _check_steps(steps)
    values = alpha_bar(torch.arange(steps + 1, dtype=torch.float64) / steps)
    return from_betas((1 - values[1:] / values[:-1]).clamp(max=largest))


def linear(steps: int, first: float = 1e-4, last: float = 0.02, scaled: bool = True) -> Schedule:
    """Betas from `first` to `last`, equally spaced.

    Args:
        first, last: for 1000 steps, those of Ho et al.
        scaled: multiply both by 1000 / steps, so that about the same small part of the image is left after all steps
            (alpha_bar 4e-5 after 1000). Unscaled, 100 steps end with alpha_bar 0.36, far from the pure noise that
            sampling starts with. Below 21 steps the scaled betas do not fit into (0, 1).
    """
    _check_steps(steps)
    scale = 1000 / steps if scaled else 1.0
    return from_betas(torch.linspace(scale * first, scale * last, steps, dtype=torch.float64))


def cosine(steps: int, offset: float = 0.008, largest: float = 0.999) -> Schedule:
    """alpha_bar falls as a squared cosine, f(u) / f(0) with f(u) = cos^2(pi / 2 (u + offset) / (1 + offset)).

    Nichol and Dhariwal 2021, eq. 17; `offset` is their s, and `largest` the bound on betas of their section 3.2.
    """
    return from_alpha_bar(lambda u: torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2, steps, largest)


def sigmoid(
    steps: int, start: float = -3.0, end: float = 3.0, temperature: float = 1.0, largest: float = 0.999
) -> Schedule:
    """alpha_bar falls from 1 to 0 along a sigmoid: (s(b) - s(a + u (b - a))) / (s(b) - s(a)).

    s(z) = sigmoid(z / temperature), a = start, b = end. A higher temperature is closer to a straight line.

    Raises:
        ValueError: start not below end, or a temperature that is not positive.
    """
    if not start < end or not temperature > 0:
        raise ValueError(f"sigmoid needs start < end and temperature > 0, got {start}, {end} and {temperature}")
    low, high = (1 / (1 + math.exp(-z / temperature)) for z in (start, end))

    def alpha_bar(u: Tensor) -> Tensor:
        return (high - torch.sigmoid((start + u * (end - start)) / temperature)) / (high - low)

    return from_alpha_bar(alpha_bar, steps, largest)


def sigmoid_betas(steps: int, first: float = 1e-4, last: float = 0.02, scaled: bool = True) -> Schedule:
    """Betas from `first` to `last` along the sigmoid of -6 to 6; `scaled` as in `linear`."""
    _check_steps(steps)
    scale = 1000 / steps if scaled else 1.0
    rise = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float64))
    return from_betas(scale * (first + rise * (last - first)))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "sigmoid-betas": sigmoid_betas,
}


def make(name: str, steps: int, **options: float) -> Schedule:
    """A schedule of `SCHEDULES`.

    Raises:
        ValueError: a name that is not there; the choices are listed.
    """
    if name not in SCHEDULES:
        raise ValueError(f"no schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](steps, **options)


def _check_steps(steps: int) -> None:
    if steps < 2:
        raise ValueError(f"a diffusion takes at least 2 steps, got {steps}")
