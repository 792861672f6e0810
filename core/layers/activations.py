"""Activations by name, and those that torch.nn.functional lacks.

Nets call torch.nn.functional (`F.relu`, `F.gelu`, `F.glu`, `F.softmax` ...) directly; the table is for configurations
that name their activation.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from core.initializers import Initializer, constant
from core.layers.checks import check_arguments
from core.spec import Param
from core.tree import Tree

QUARTER = constant(0.25)


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b with (a, b) the halves of the last axis: (..., 2d) -> (..., d). Shazeer 2020, arXiv:2002.05202."""
    a, b = x.chunk(2, -1)  # each (..., d)
    return F.silu(a) * b


def geglu(x: Tensor) -> Tensor:
    """gelu(a) * b with (a, b) the halves of the last axis: (..., 2d) -> (..., d). Shazeer 2020, arXiv:2002.05202."""
    a, b = x.chunk(2, -1)  # each (..., d)
    return F.gelu(a) * b


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x). Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2; the one of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def prelu_spec(channels: int = 1, *, init: Initializer = QUARTER, axes: tuple[str | None] = (None,)) -> Tree:
    """weight (channels,), or one slope for all channels. 0.25 as in He et al. 2015, arXiv:1502.01852, section 2.1."""
    return {"weight": Param((channels,), init, axes)}


def prelu(p: Tree, x: Tensor) -> Tensor:
    """max(0, x) + weight * min(0, x). x: (batch, channels, ...).

    Raises:
        TypeError: p is not a dict, or x not a tensor.
        ValueError: x has other channels than the weight.
    """
    check_arguments("prelu", p, x)
    slopes = p["weight"].shape[0]
    if slopes != 1 and (x.ndim < 2 or x.shape[1] != slopes):
        raise ValueError(f"prelu: expected x of shape (batch, {slopes}, ...), found {tuple(x.shape)}")
    # Not F.prelu: its batching rule is wrong where the weight is batched and x is not (an ensemble on one batch).
    return torch.where(x > 0, x, p["weight"].reshape((slopes,) + (1,) * max(x.ndim - 2, 0)) * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "geglu": geglu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "glu": F.glu,
    "hard_sigmoid": F.hardsigmoid,
    "hard_swish": F.hardswish,
    "hard_tanh": F.hardtanh,
    "identity": lambda x: x,
    "leaky_relu": F.leaky_relu,
    "log_sigmoid": F.logsigmoid,
    "log_softmax": partial(F.log_softmax, dim=-1),
    "mish": F.mish,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softmax": partial(F.softmax, dim=-1),
    "softplus": F.softplus,
    "softsign": F.softsign,
    "swiglu": swiglu,
    "tanh": torch.tanh,
}
"""Functions of one tensor; the gated ones halve the last axis, the softmaxes go over it."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation with that name. Raises ValueError listing the names."""
    if name not in ACTIVATIONS:
        raise ValueError(f"no activation '{name}'; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
