"""Affine map of the last axis, y = x Wᵀ + b."""

import torch
from torch import Tensor
from torch.nn import functional as F

from core.initializers import Initializer, lecun_normal, zeros
from core.layers.checks import check_arguments
from core.layers.int8 import Int8
from core.layers.low_rank import LowRank, low_rank
from core.layers.split import Split
from core.spec import Param
from core.tree import Tree

LECUN_NORMAL = lecun_normal()


def linear_spec(
    d_in: int,
    d_out: int,
    *,
    bias: bool = True,
    init: Initializer = LECUN_NORMAL,
    bias_init: Initializer = zeros,
    axes: tuple[str | None, str | None] = ("out", "in"),
    parts: tuple[int, ...] = (),
) -> Tree:
    """weight (d_out, d_in) and bias (d_out,); `parts` of the rows as in `core.spec.Param`.

    The default keeps the variance of a unit-variance input: weights of variance 1 / d_in (LeCun et al. 1998,
    "Efficient BackProp", section 4.6), bias zero. torch.nn.Linear draws both from U(-1/sqrt(d_in), 1/sqrt(d_in)).
    """
    weight = Param((d_out, d_in), init, axes, parts=parts)
    return {"bias": Param((d_out,), bias_init, axes[:1], parts=parts), "weight": weight} if bias else {"weight": weight}


def linear(p: Tree, x: Tensor) -> Tensor:
    """y = x Wᵀ + b. x: (..., d_in) of any rank -> (..., d_out). The weight may be a LowRank, an Int8 or a Split.

    Raises:
        TypeError: p is not a dict, or x not a tensor.
        ValueError: x has another last axis than d_in; p has no weight.
    """
    check_arguments("linear", p, x, needs=("weight",))
    d_in = p["weight"].shape[-1]
    if x.ndim == 0 or x.shape[-1] != d_in:
        raise ValueError(f"linear: expected a last axis of {d_in}, found x of shape {tuple(x.shape)}")
    weight, bias = p["weight"], p.get("bias")
    if isinstance(weight, Split):
        return weight.linear(x, bias)
    if isinstance(weight, LowRank):
        y = low_rank(weight, lambda w: _product(x, w), lambda a, b: F.linear(F.linear(x.to(a.dtype), a), b), -1)
    elif isinstance(weight, Int8) or (torch.compiler.is_compiling() and bias is not None):
        # Apart from the product, the bias is fused into the operations after it; on a CPU, inductor keeps addmm whole.
        y = _product(x, weight)
    else:
        return F.linear(x, weight, bias)  # (..., d_out)
    return y if bias is None else y + bias  # (..., d_out)


def _product(x: Tensor, weight: Tensor | Int8) -> Tensor:
    return weight.product(x) if isinstance(weight, Int8) else F.linear(x, weight)
