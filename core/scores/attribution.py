"""Attribution of an output to the entries of the input: integrated gradients.

Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks", arXiv:1703.01365:

IG_i(x) = (x_i - b_i) ∫ df/dx_i (b + a (x - b)) da,   a from 0 to 1,   sum_i IG_i = f(x) - f(b)

The sum is the check of the integral, which is taken by Gauss and Legendre's rule.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.transforms import grad


class Attribution(NamedTuple):
    """Integrated gradients.

    values: IG_i, shape of the input.
    difference: f(x) - f(b), 0-D.
    error: |sum of the values - difference|, 0-D.
    """

    values: Tensor
    difference: Tensor
    error: Tensor


def integrated_gradients(
    function: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, points: int = 32, *, chunk: int | None = None
) -> Attribution:
    """Share of each entry of x in f(x) - f(baseline).

    Args:
        function: `function(x) -> ()`, of one input, which vmap can map.
        x, baseline: floating-point tensors of equal shape.
        points: on the way from the baseline to x; the rule is exact for polynomials up to degree 2 points.
        chunk: points at a time; all if None.

    Raises:
        ValueError: shapes that differ, no point.
    """
    if x.shape != baseline.shape:
        raise ValueError(f"integrated_gradients: x is {tuple(x.shape)}, the baseline {tuple(baseline.shape)}")
    if points < 1:
        raise ValueError(f"integrated_gradients: points is {points}; expected at least 1")
    nodes, weights = (torch.from_numpy(a).to(x) for a in np.polynomial.legendre.leggauss(points))  # on [-1, 1]
    step = x - baseline

    def slope(node: Tensor) -> Tensor:
        return grad(function)(baseline + (node + 1) / 2 * step)  # like x

    slopes = torch.func.vmap(slope, chunk_size=chunk)(nodes)  # (points, ...)
    values = step * torch.tensordot(weights / 2, slopes, 1)
    difference = function(x) - function(baseline)
    return Attribution(values, difference, (values.sum() - difference).abs())
