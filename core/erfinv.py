"""Inverse error function as in JAX and XLA: Giles 2012, "Approximating the erfinv function", in single precision.

`torch.erfinv` differs from it by up to 86 units in the last place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# erfinv(x) / x with w = -log(1 - x²): a polynomial in w - 2.5 where w < 5, in sqrt(w) - 3 elsewhere; highest power
# first.
_CENTRE = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
_TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


def erfinv(x: Tensor) -> Tensor:
    """Inverse error function on (-1, 1); half precision is computed in single precision."""
    if x.dtype == torch.float64:
        return torch.erfinv(x)
    dtype, x = x.dtype, x.float()
    w = -torch.log1p(-x * x)  # -log(1 - x²)
    # The clamp keeps the gradient of the square root finite where the other branch is taken.
    tail = _polynomial(torch.sqrt(w.clamp(min=5.0)) - 3.0, _TAIL)
    return (torch.where(w < 5.0, _polynomial(w - 2.5, _CENTRE), tail) * x).to(dtype)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Polynomial by Horner's rule, highest power first."""
    value = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value
