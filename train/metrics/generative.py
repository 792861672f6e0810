"""Metrics of generated examples: distances between sets of features, and covered modes of a known mixture.

Features are (examples, width), of real and of generated examples by one and the same network. The figures depend on
that network and on the numbers of examples: compare only those with equal ones. All arithmetic is in float64.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 1024  # examples whose distances to all others are computed at once


def _features(real: Tensor, fake: Tensor, least: int) -> tuple[Tensor, Tensor]:
    for name, x in (("real", real), ("fake", fake)):
        if x.ndim != 2 or len(x) < least:
            raise ValueError(f"the {name} features have shape {tuple(x.shape)}, expected ({least} or more, width)")
        if not torch.isfinite(x).all():
            raise ValueError(f"the {name} features hold values that are not finite")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"the real features have width {real.shape[1]}, the fake ones {fake.shape[1]}")
    return real.double(), fake.double()


def frechet_distance(real: Tensor, fake: Tensor) -> Tensor:
    """The squared 2-Wasserstein distance of the Gaussians with the features' means and covariances; 0-D.

    |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)    (Heusel et al. 2017, arXiv:1706.08500, eq. 6; Dowson and
                                                                 Landau 1982)

    The FID is this on features of an Inception network. It is biased upwards, the more so the fewer examples.

    Args:
        real, fake: (examples, width), 2 examples or more each; the order of the two does not matter.

    Raises:
        ValueError: other shapes, widths that differ, or values that are not finite.
    """
    real, fake = _features(real, fake, 2)
    means = [x.mean(0) for x in (real, fake)]
    # S = R^T R, so the square roots of the eigenvalues of S_1 S_2 are the singular values of R_1 R_2^T: no root of a
    # covariance, which is singular where there are fewer examples than features, is ever taken.
    roots = [
        torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R
        for x, mean in zip((real, fake), means, strict=True)
    ]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()  # tr (S_1 S_2)^(1/2)
    traces = sum(root.square().sum() for root in roots)
    # |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)
    return ((means[0] - means[1]).square().sum() + traces - 2 * cross).clamp(min=0)


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Distances of the rows of a to all of b, (up to ROWS, rows of b) at a time."""
    centre = b.mean(0)  # cdist computes |a|^2 + |b|^2 - 2 a b, which would lose digits far from 0
    for rows in (a - centre).split(ROWS):
        yield torch.cdist(rows, b - centre)


def _radii(x: Tensor, k: int) -> Tensor:
    """Distance of each row to its k-th nearest neighbour, the row itself not counted: (rows,)."""
    return torch.cat([d.topk(k + 1, dim=1, largest=False).values[:, -1] for d in _distances(x, x)])


class PrecisionRecall(NamedTuple):
    """Precision and recall, each in [0, 1], 0-D."""

    precision: Tensor
    recall: Tensor


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Fraction of generated examples in the region of the real ones (precision), and of real ones in that of the
    generated (recall); each 0-D in [0, 1].

    A set's region is the union of balls around its examples that reach to their k-th nearest neighbours in it
    (Kynkaanniemi et al. 2019, arXiv:1904.06991, eqs. 1 and 2).

    Args:
        real, fake: (examples, width), more than k examples each.

    Raises:
        ValueError: k below 1, and as in `frechet_distance`.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    real, fake = _features(real, fake, k + 1)
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    precise, recalled = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for d, radii in zip(_distances(fake, real), fake_radii.split(ROWS), strict=True):
        precise.append((d <= real_radii).any(1))
        recalled |= (d <= radii[:, None]).any(0)
    return PrecisionRecall(torch.cat(precise).double().mean(), recalled.double().mean())


class DensityCoverage(NamedTuple):
    """Density, at least 0, and coverage, in [0, 1]; 0-D."""

    density: Tensor
    coverage: Tensor


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> DensityCoverage:
    """As precision and recall, but with balls around the real examples only, so that outliers count less; each 0-D.

    density   1 / (k M) sum_j sum_i [y_j in B(x_i)]    balls around a generated example over their expected number; 1
                                                       where the two sets agree, and may exceed it
    coverage  1 / N sum_i [some y_j in B(x_i)]         fraction of real examples with a generated one near

    (Naeem et al. 2020, arXiv:2002.09797, section 3). Arguments and errors as in `precision_recall`, but `fake` may
    hold any number of examples.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
    real, fake = _features(real, fake, 1)
    if len(real) <= k:
        raise ValueError(f"{len(real)} real examples have no {k}-th neighbours")
    radii = _radii(real, k)
    balls, covered = torch.zeros((), dtype=torch.float64, device=real.device), torch.zeros_like(radii, dtype=torch.bool)
    for d in _distances(fake, real):
        inside = d <= radii
        balls, covered = balls + inside.sum(), covered | inside.any(0)
    return DensityCoverage(balls / (k * len(fake)), covered.double().mean())


class Modes(NamedTuple):
    """covered: number of modes with a good sample, 0-D integer; good: fraction of good samples, 0-D float64;
    counts: good samples of each mode (modes,)."""

    covered: Tensor
    good: Tensor
    counts: Tensor


def modes(points: Tensor, centres: Tensor, deviation: float, *, within: float = 3.0) -> Modes:
    """Covered modes of a mixture of Gaussians; `train.data.points.mixtures` makes such mixtures.

    A sample is good within 3 standard deviations of the centre next to it, and a mode is covered by one good sample
    (VEEGAN, Srivastava et al. 2017, arXiv:1705.07761, and PacGAN after it). Of samples of the mixture
    itself, in two dimensions, 1 - exp(-3^2 / 2) = 98.9 % are good. A sample that is not finite is not good.

    Args:
        points: (samples, dimensions).
        centres: (modes, dimensions).
        deviation: standard deviation of each coordinate within a mode.
        within: largest distance of a good sample from its centre, in standard deviations.

    Raises:
        ValueError: other shapes, or a deviation that is not above 0.
    """
    if points.ndim != 2 or centres.ndim != 2 or points.shape[1] != centres.shape[1] or not len(points):
        shapes = f"points {tuple(points.shape)} and centres {tuple(centres.shape)}"
        raise ValueError(f"expected points (1 or more, dimensions) and centres (modes, dimensions), got {shapes}")
    if not deviation > 0 or not within > 0:
        raise ValueError(f"deviation {deviation} and within {within} must be positive")
    offsets = points.double().unsqueeze(1) - centres.double()  # (samples, modes, dimensions)
    distances = torch.linalg.vector_norm(offsets, dim=2)  # (samples, modes)
    nearest = distances.argmin(1, keepdim=True) == torch.arange(len(centres), device=points.device)
    counts = (nearest & (distances <= within * deviation)).sum(0)
    return Modes((counts > 0).sum(), counts.double().sum() / len(points), counts)
