"""Convolution and transposed convolution over one, two or three spatial axes, by the rank of the weight."""

from math import prod

from torch import Tensor
from torch.nn import functional as F

from core.initializers import Initializer, zeros
from core.layers.checks import check_arguments
from core.layers.linear import LECUN_NORMAL
from core.layers.low_rank import LowRank, low_rank
from core.spec import Param
from core.tree import Tree

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

Sizes = int | tuple[int, ...]


def conv_spec(
    d_in: int,
    d_out: int,
    kernel: Sizes,
    *,
    dims: int | None = None,
    groups: int = 1,
    bias: bool = True,
    transposed: bool = False,
    init: Initializer = LECUN_NORMAL,
    bias_init: Initializer = zeros,
    axes: tuple[str | None, str | None] = ("out", "in"),
) -> Tree:
    """weight (d_out, d_in / groups, *kernel) and bias (d_out,); transposed: weight (d_in, d_out / groups, *kernel).

    The default init is that of `linear_spec`; the fan-in is that of the weight's layout, shape[1] * prod(kernel), as
    in torch.

    Args:
        kernel: one size per axis, or one for all axes.
        dims: number of spatial axes; by default the length of `kernel`, and 2 for a single number.
        transposed: for `conv_transpose`.

    Raises:
        ValueError: groups does not divide d_in and d_out, or `kernel` does not name `dims` (1 to 3) sizes.
    """
    dims = dims or (2 if isinstance(kernel, int) else len(kernel))
    if dims not in _CONV:
        raise ValueError(f"conv_spec: expected 1 to 3 spatial axes, found {dims}")
    if groups < 1 or d_in % groups or d_out % groups:
        raise ValueError(f"conv_spec: groups={groups} must divide d_in={d_in} and d_out={d_out}")
    kernel = _per_axis(kernel, dims, "kernel")
    channels = (d_in, d_out // groups) if transposed else (d_out, d_in // groups)
    names = axes[::-1] if transposed else axes
    weight = Param((*channels, *kernel), init, (*names, *(None,) * dims))
    return {"bias": Param((d_out,), bias_init, axes[:1]), "weight": weight} if bias else {"weight": weight}


def conv(
    p: Tree,
    x: Tensor,
    *,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Cross-correlation, as torch.nn.Conv1d, 2d and 3d. x: (batch, d_in, *space) -> (batch, d_out, *space').

    Args:
        padding: positions on both sides of each axis, "valid" (none) or "same" (space' = space; stride 1 only; of an
            odd total, the right side gets one more).
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Raises:
        TypeError: p is not a dict, or x not a tensor.
        ValueError: x has other channels or another rank than the weight; an unknown padding or mode; "same" with a
            stride.
    """
    check_arguments("conv", p, x, needs=("weight",))
    weight = p["weight"]
    dims = _check("conv", x, weight, weight.shape[1] * groups)
    if padding_mode not in _PADDING_MODES:
        raise ValueError(f"conv: padding_mode is one of {', '.join(_PADDING_MODES)}, not '{padding_mode}'")
    if padding == "same" and prod(_per_axis(stride, dims, "stride")) != 1:
        raise ValueError(f"conv: padding 'same' needs stride 1, found {stride}")
    pads = _pads(padding, weight.shape[2:], _per_axis(dilation, dims, "dilation"))
    if padding_mode == "zeros" and all(left == right for left, right in pads):
        padding = tuple(left for left, _ in pads)
    else:
        x, padding = _pad(x, pads, padding_mode), 0  # (batch, d_in, *(left + space + right))
    if isinstance(weight, LowRank):

        def low(a: Tensor, b: Tensor) -> Tensor:
            a = _per_group(a, groups)
            return _combine(b, _CONV[dims](x.to(a.dtype), a, None, stride, padding, dilation, groups), groups)

        y = low_rank(weight, lambda w: _CONV[dims](x, w, None, stride, padding, dilation, groups), low, 1)
        return _plus_bias(y, p)  # (batch, d_out, *space')
    return _CONV[dims](x, weight, p.get("bias"), stride, padding, dilation, groups)  # (batch, d_out, *space')


def conv_transpose(
    p: Tree,
    x: Tensor,
    *,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Tensor:
    """The transpose of `conv`, as torch.nn.ConvTranspose1d, 2d and 3d.

    x: (batch, d_in, *space) -> (batch, d_out, *space'), where
    space' = (space - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1.

    Raises:
        TypeError: p is not a dict, or x not a tensor.
        ValueError: x has other channels or another rank than the weight.
    """
    check_arguments("conv_transpose", p, x, needs=("weight",))
    dims = _check("conv_transpose", x, p["weight"], p["weight"].shape[0])
    sizes = (stride, padding, output_padding, groups, dilation)
    if isinstance(weight := p["weight"], LowRank):

        def low(a: Tensor, b: Tensor) -> Tensor:
            b = b.unflatten(0, (groups, -1)).mT.flatten(0, 1)  # (groups * rank, d_in / groups)
            return _CONV_TRANSPOSE[dims](_combine(b, x.to(b.dtype), groups), _per_group(a, groups), None, *sizes)

        y = low_rank(weight, lambda w: _CONV_TRANSPOSE[dims](x, w, None, *sizes), low, 1, rows_axis=1)
        return _plus_bias(y, p)  # (batch, d_out, *space')
    return _CONV_TRANSPOSE[dims](x, weight, p.get("bias"), *sizes)


def _per_group(a: Tensor, groups: int) -> Tensor:
    """The kernels of A for every group: (rank, d_in / groups, *kernel) -> (groups * rank, ...)."""
    return a if groups == 1 else a.repeat(groups, *(1,) * (a.ndim - 1))


def _combine(b: Tensor, u: Tensor, groups: int) -> Tensor:
    """B u at every position: b (d_out, rank), u (batch, groups * rank, *space) -> (batch, d_out, *space)."""
    return _CONV[u.ndim - 2](u, b.reshape(*b.shape, *(1,) * (u.ndim - 2)), groups=groups)


def _plus_bias(y: Tensor, p: Tree) -> Tensor:
    return y + p["bias"].reshape(-1, *(1,) * (y.ndim - 2)) if "bias" in p else y


def _check(name: str, x: Tensor, weight: Tensor, d_in: int) -> int:
    """The number of spatial axes of the weight, checked to fit x."""
    if x.ndim != weight.ndim or x.shape[1] != d_in:
        space = ", ".join(["space"] * (weight.ndim - 2))
        raise ValueError(f"{name}: expected x of shape (batch, {d_in}, {space}), found {tuple(x.shape)}")
    return weight.ndim - 2


def _per_axis(value: Sizes, dims: int, name: str) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        value = int(value)  # torch.jit.trace makes tensors of sizes
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims:
        raise ValueError(f"conv: expected {dims} integers for {name}, found {value}")
    return values


def _pads(padding: Sizes | str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    """(left, right) of each spatial axis."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):
        raise ValueError(f"conv: padding is 'same', 'valid' or integers, not '{padding}'")
    return [(p, p) for p in _per_axis(padding, len(kernel), "padding")]


def _pad(x: Tensor, pads: list[tuple[int, int]], mode: str) -> Tensor:
    # F.pad counts from the last axis.
    flat = [n for pair in reversed(pads) for n in pair]
    return F.pad(x, flat, mode="constant" if mode == "zeros" else mode)
