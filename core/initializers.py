"""Initialisers: functions `(key, shape, dtype) -> tensor`.

`zeros` and `ones` are initialisers themselves; the others are returned by a call, `xavier_uniform(gain=1.0)`, and
compare equal for equal arguments, so that equal specs compare equal. All work under `torch.vmap` over keys. Values are
drawn in float32 at least and then rounded to a narrower dtype.

Fans are counted as torch does: a weight is (out, in, *kernel), fan_in = in * prod(kernel), fan_out = out *
prod(kernel).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core import random

Initializer = Callable[[Tensor, Sequence[int], torch.dtype], Tensor]


def zeros(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """All 0, on the key's device."""
    return torch.zeros(tuple(shape), dtype=dtype, device=key.device)


def ones(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """All 1, on the key's device."""
    return torch.ones(tuple(shape), dtype=dtype, device=key.device)


def constant(value: float) -> Initializer:
    """All `value`."""
    return Constant(value)


def uniform(low: float = 0.0, high: float = 1.0) -> Initializer:
    """Uniform in [low, high)."""
    return Uniform(low, high)


def normal(std: float = 1.0, mean: float = 0.0) -> Initializer:
    """Normal with standard deviation `std` and mean `mean`."""
    return Normal(std, mean)


def truncated_normal(std: float = 1.0, lower: float = -2.0, upper: float = 2.0) -> Initializer:
    """`std` times a standard normal truncated to (lower, upper).

    The bounds are in units of `std`, as in JAX; those of `torch.nn.init.trunc_normal_` are absolute. The standard
    deviation of the result is therefore smaller than `std` (0.88 of it at the default bounds).
    """
    return TruncatedNormal(std, lower, upper)


def xavier_uniform(gain: float = 1.0) -> Initializer:
    """Uniform within gain * sqrt(6 / (fan_in + fan_out)).

    Glorot & Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks", eq. 16.
    """
    return VarianceScaling(gain, "fan_avg", "uniform")


def xavier_normal(gain: float = 1.0) -> Initializer:
    """Normal with std = gain * sqrt(2 / (fan_in + fan_out)) (Glorot & Bengio 2010, eq. 12)."""
    return VarianceScaling(gain, "fan_avg", "normal")


def kaiming_uniform(a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu") -> Initializer:
    """Uniform within gain(nonlinearity, a) * sqrt(3 / fan).

    He et al. 2015, "Delving deep into rectifiers" (arXiv:1502.01852), eq. 10 (fan_in), eq. 14 (fan_out) and eq. 15
    (slope a).

    Args:
        a: negative slope of a leaky ReLU; not used otherwise. The default, 0, is a ReLU.
        mode: "fan_in" keeps the variance of the activations, "fan_out" that of the gradients.
        nonlinearity: see `gain`.
    """
    return VarianceScaling(gain(nonlinearity, a), mode, "uniform")


def kaiming_normal(a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu") -> Initializer:
    """Normal with std = gain(nonlinearity, a) / sqrt(fan) (He et al. 2015); arguments as in `kaiming_uniform`."""
    return VarianceScaling(gain(nonlinearity, a), mode, "normal")


def lecun_uniform() -> Initializer:
    """Uniform within sqrt(3 / fan_in) (LeCun et al. 1998, "Efficient BackProp", eq. 16)."""
    return VarianceScaling(1.0, "fan_in", "uniform")


def lecun_normal() -> Initializer:
    """Normal with std = 1 / sqrt(fan_in) (LeCun et al. 1998, eq. 16)."""
    return VarianceScaling(1.0, "fan_in", "normal")


def orthogonal(gain: float = 1.0) -> Initializer:
    """`gain` times a random matrix with orthonormal rows or columns, whichever are fewer: W Wᵀ or Wᵀ W = gain² I.

    Dimensions after the first are flattened into columns. Saxe et al. 2014, "Exact solutions to the nonlinear
    dynamics of learning in deep linear neural networks".
    """
    return Orthogonal(gain)


def dirac(key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The identity of a convolution: 1 in the middle of the kernel between channels of one number, 0 elsewhere."""
    if len(shape) < 3:
        raise ValueError(f"dirac needs a weight of shape (out, in, *kernel), got {tuple(shape)}")
    weight = torch.eye(shape[0], shape[1], dtype=dtype, device=key.device)  # (out, in)
    for size in shape[2:]:
        middle = (torch.arange(size, device=key.device) == size // 2).to(dtype)
        weight = weight[..., None] * middle  # (out, in, *kernel)
    return weight


def gain(nonlinearity: str, a: float = 0.01) -> float:
    """Gain of a nonlinearity: the factor on the weights that keeps the variance of the activations.

    1 for "linear" and "sigmoid", 5/3 for "tanh", sqrt(2) for "relu", sqrt(2 / (1 + a²)) for "leaky_relu" with
    negative slope a, 3/4 for "selu".
    """
    gains = {
        "linear": 1.0,
        "sigmoid": 1.0,
        "tanh": 5 / 3,
        "relu": math.sqrt(2),
        "leaky_relu": math.sqrt(2 / (1 + a**2)),
        "selu": 3 / 4,
    }
    if nonlinearity not in gains:
        raise ValueError(f"unknown nonlinearity '{nonlinearity}': expected one of {', '.join(gains)}")
    return gains[nonlinearity]


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight (out, in, *kernel)."""
    if len(shape) < 2:
        raise ValueError(f"fans need a weight of shape (out, in, *kernel), got {tuple(shape)}")
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel


@dataclass(frozen=True)
class Constant:
    """See `constant`."""

    value: float

    def __call__(self, key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(tuple(shape), self.value, dtype=dtype, device=key.device)


@dataclass(frozen=True)
class Uniform:
    """See `uniform`."""

    low: float
    high: float

    def __call__(self, key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return random.uniform(key, shape, _wide(dtype), self.low, self.high).to(dtype)


@dataclass(frozen=True)
class Normal:
    """See `normal`."""

    std: float
    mean: float

    def __call__(self, key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return (random.normal(key, shape, _wide(dtype)) * self.std + self.mean).to(dtype)


@dataclass(frozen=True)
class TruncatedNormal:
    """See `truncated_normal`."""

    std: float
    lower: float
    upper: float

    def __call__(self, key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return (random.truncated_normal(key, self.lower, self.upper, shape, _wide(dtype)) * self.std).to(dtype)


@dataclass(frozen=True)
class VarianceScaling:
    """Mean 0 and std = gain / sqrt(fan), for a fan and a distribution: "normal", or "uniform" within sqrt(3) std."""

    gain: float
    mode: str
    distribution: str

    def __post_init__(self):
        if self.mode not in ("fan_in", "fan_out", "fan_avg"):
            raise ValueError(f"unknown mode '{self.mode}': expected fan_in, fan_out or fan_avg")
        if self.distribution not in ("normal", "uniform"):
            raise ValueError(f"unknown distribution '{self.distribution}': expected normal or uniform")

    def __call__(self, key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        fan_in, fan_out = fans(shape)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        # A weight without inputs has no elements, so any scale will do.
        std = self.gain / math.sqrt(max(fan, 1))
        if self.distribution == "normal":
            return (random.normal(key, shape, _wide(dtype)) * std).to(dtype)
        bound = math.sqrt(3) * std
        return random.uniform(key, shape, _wide(dtype), -bound, bound).to(dtype)


@dataclass(frozen=True)
class Orthogonal:
    """See `orthogonal`."""

    gain: float

    def __call__(self, key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        if len(shape) < 2:
            raise ValueError(f"orthogonal needs a shape with at least 2 dimensions, got {tuple(shape)}")
        rows, columns = shape[0], math.prod(shape[1:])
        tall = random.normal(key, (max(rows, columns), min(rows, columns)), _wide(dtype))  # (long, short)
        q, r = torch.linalg.qr(tall)  # (long, short), (short, short)
        # QR is unique up to these signs; fixing them makes q uniform over the orthogonal matrices.
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
        matrix = q if rows >= columns else q.T  # (rows, columns)
        return (matrix.reshape(tuple(shape)) * self.gain).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to draw in: half-precision draws have 128 or 1024 different values only."""
    return torch.promote_types(dtype, torch.float32)
