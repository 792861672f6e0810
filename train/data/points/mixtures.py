"""Two-dimensional mixtures of Gaussians, on which a GAN's missing modes can be counted.

The two of the literature: eight on a ring and twenty-five on a grid. Up to a common scale they are those of the program
of WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028), of VEEGAN (Srivastava et al. 2017, arXiv:1705.07761) and of PacGAN
(Lin et al. 2018, arXiv:1712.04086).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from core import random
from train.data import DataError


class Mixture(NamedTuple):
    """Equally likely round Gaussians: centres (modes, 2), and the standard deviation of each coordinate."""

    centres: Tensor
    deviation: float


def ring(modes: int = 8, radius: float = 2.0, deviation: float = 0.02) -> Mixture:
    """Modes on a circle: centres radius (cos 2 pi i / modes, sin 2 pi i / modes)."""
    if modes < 1 or not radius > 0 or not deviation > 0:
        raise DataError(f"a ring of {modes} modes, radius {radius}, deviation {deviation}: expected positive numbers")
    angles = 2 * math.pi / modes * torch.arange(modes, dtype=torch.float64)
    return Mixture((radius * torch.stack([angles.cos(), angles.sin()], 1)).float(), deviation)


def grid(side: int = 5, spacing: float = 2.0, deviation: float = 0.05) -> Mixture:
    """Modes on a grid: side x side centres, `spacing` apart, around the origin."""
    if side < 1 or not spacing > 0 or not deviation > 0:
        raise DataError(f"a grid of side {side}, spacing {spacing}, deviation {deviation}: expected positive numbers")
    positions = spacing * (torch.arange(side, dtype=torch.float32) - (side - 1) / 2)  # (side,)
    return Mixture(torch.cartesian_prod(positions, positions), deviation)  # (side^2, 2)


MIXTURES = {"ring": ring, "grid": grid}


def standardised(mixture: Mixture, spread: float = 1.0) -> Mixture:
    """The mixture moved and scaled so that a coordinate has mean 0 and standard deviation `spread`, averaged over both.

    With 1 it divides the default ring by 1.414 and the default grid by 2.828, as the WGAN-GP paper's program does.
    """
    centred = mixture.centres - mixture.centres.mean(0)
    scale = math.sqrt(float(centred.double().square().mean()) + mixture.deviation**2)
    return Mixture(spread * centred / scale, spread * mixture.deviation / scale)


def sample(mixture: Mixture, key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Samples, a function of the key alone: (points (count, 2), the mode of each (count,) int64)."""
    if count < 1:
        raise DataError(f"cannot sample {count} points")
    mode_key, noise_key = random.sites(key, 2).unbind(0)
    modes = random.randint(mode_key, (count,), 0, len(mixture.centres)).long()  # (count,)
    noise = random.normal(noise_key, (count, 2), dtype=mixture.centres.dtype)
    return mixture.centres[modes] + mixture.deviation * noise, modes  # (count, 2), (count,)
