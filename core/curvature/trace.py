"""Trace and diagonal of an operator from random vectors, each with its standard error."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random, tree
from core.curvature.vectors import Operator, check_count, draw, on_vectors, unravel, width
from core.tree import Tree


class Estimate(NamedTuple):
    """The mean over the probes, and the standard error of that mean (nan for a single probe)."""

    value: Tree
    standard_error: Tree


def _estimate(
    name: str, product: Operator, like: Tree, key: Tensor, probes: int, distribution: str, sample: Callable
) -> tuple[Tensor, Tensor]:
    check_count(name, probes=probes)
    multiply = on_vectors(name, product, like)
    mean: Any = 0.0
    spread: Any = None
    # Welford's update, which takes no more memory for more probes. Its sum of squares s = sum_i (x_i - mean)² is kept
    # as the root, for s itself overflows or vanishes at scales that the samples x_i do not reach.
    for i, probe_key in enumerate(random.sites(key, probes), 1):
        v = draw(probe_key, tree.count(like), width(like), distribution)
        x = sample(v, multiply(v))
        change = x - mean
        mean = mean + change / i
        if i > 1:
            step = change.abs() * math.sqrt(1 - 1 / i)  # s ← s + (x - mean before) (x - mean)
            spread = step if i == 2 else torch.hypot(spread, step)
    if probes == 1:
        return mean, torch.full_like(mean, float("nan"))
    return mean, spread / math.sqrt(probes * (probes - 1))


def hutchinson_trace(
    product: Operator, like: Tree, key: Tensor, probes: int = 32, distribution: str = "rademacher"
) -> Estimate:
    """The trace, tr A = E vᵀ A v for v of independent elements with mean 0 and variance 1 (Hutchinson 1990).

    A Rademacher probe has the variance 2 sum_{i≠j} A_ij², a normal one 2 sum_ij A_ij² (A symmetric). It consists of
    tensor operations alone, so it compiles, and a product that is not finite gives a value that is not.

    Args:
        like: a tree like the vectors, such as the parameters.
        key: (2,).
        probes: number of random vectors, one product each.
        distribution: "rademacher" or "normal".

    Returns:
        two 0-D tensors.

    Raises:
        TypeError, ValueError: a product that is not a tree like its vector, fewer than one probe, another distribution.
    """
    return Estimate(*_estimate("hutchinson_trace", product, like, key, probes, distribution, torch.dot))


def hutchinson_diagonal(
    product: Operator, like: Tree, key: Tensor, probes: int = 32, distribution: str = "rademacher"
) -> Estimate:
    """The diagonal, A_ii = E v_i (A v)_i.

    Bekas, Kokiopoulou and Saad 2007, "An estimator for the diagonal of a matrix", divide sum v_i (A v)_i by sum v_i².
    With Rademacher probes, of variance sum_{j≠i} A_ij², this is the same, since v_i² = 1.

    Args, Raises: as in `hutchinson_trace`.

    Returns:
        two trees like `like`.
    """
    estimate = _estimate("hutchinson_diagonal", product, like, key, probes, distribution, torch.mul)
    return Estimate(*(unravel(x, like) for x in estimate))
