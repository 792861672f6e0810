"""What operations do with a parameter: for each, what its report needs, and the result.

A rule is called like the operation, with the session first. It returns NotImplemented where it does not apply.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core.per_example.backward_rules import Sizes
from core.per_example.errors import PerExampleError
from core.per_example.leaves import Spread, Valued, Watched, watched_in


def _linear(session, input, weight, bias=None):
    if not isinstance(weight, Watched) or weight.ndim != 2:
        return NotImplemented
    y = _product(session, input, weight, "linear")
    return y if y is NotImplemented else _plus(y, bias, "linear")


def _plus(y, bias, what: str):
    """y + bias, as an operation of its own, so that eager and compiled layers have one plan."""
    return y if bias is None else y + bias


def _product(session, x, weight: Watched, what: str):
    """x W^T."""
    if not isinstance(x, Tensor) or x.ndim < 2 or not session.batched(x, weight.name, what):
        return NotImplemented
    y = F.linear(x, session.operand(weight))
    p, d = weight.base.shape
    sizes = Sizes(x[0].numel() // x.shape[-1] if x.ndim > 2 else 1, 1, p, d)
    return session.record(weight, "linear", what, (weight.transposed,), sizes, y, x)


def _matmul(session, input, other):
    if not isinstance(other, Watched) or other.ndim != 2:
        return NotImplemented
    return _product(session, input, other.t(), "matmul")


def _mm(session, input, mat2):
    return _matmul(session, input, mat2)


def _rmatmul(session, weight, x):
    return _matmul(session, x, weight)


def _per_axis(value, dims: int) -> tuple:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _conv(name: str, dims: int, function: Callable) -> Callable:
    def rule(session, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        x = input
        if not isinstance(weight, Watched) or weight.transposed or not isinstance(x, Tensor) or x.ndim != dims + 2:
            return (
                NotImplemented
                if not isinstance(bias, Valued) or isinstance(weight, Valued)
                else _plus(function(x, weight, None, stride, padding, dilation, groups), _beside(bias, dims), name)
            )
        if not session.batched(x, weight.name, name):
            return NotImplemented
        stride, dilation, kernel = _per_axis(stride, dims), _per_axis(dilation, dims), tuple(weight.shape[2:])
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            x = F.pad(x, [n for total in reversed(totals) for n in (total // 2, total - total // 2)])
            padding = 0
        padding = _per_axis(0 if padding == "valid" else padding, dims)
        y = function(x, session.operand(weight), None, stride, padding, dilation, groups)
        sizes = Sizes(y[0, 0].numel(), groups, weight.shape[0] // groups, weight.base[0].numel())
        settings = (kernel, stride, padding, dilation, groups)
        y = session.record(weight, "conv", name, settings, sizes, y, x)
        return y if bias is None else _plus(y, _beside(bias, dims), name)

    return rule


def _conv_transpose(name: str, dims: int, function: Callable) -> Callable:
    def rule(session, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        x = input
        if not isinstance(weight, Watched) or weight.transposed or not isinstance(x, Tensor) or x.ndim != dims + 2:
            return (
                NotImplemented
                if not isinstance(bias, Valued) or isinstance(weight, Valued)
                else _plus(
                    function(x, weight, None, stride, padding, output_padding, groups, dilation),
                    _beside(bias, dims),
                    name,
                )
            )
        if not session.batched(x, weight.name, name):
            return NotImplemented
        stride, padding, dilation = (_per_axis(value, dims) for value in (stride, padding, dilation))
        y = function(x, session.operand(weight), None, stride, padding, output_padding, groups, dilation)
        sizes = Sizes(x[0, 0].numel(), groups, weight.shape[0] // groups, weight.base[0].numel())
        settings = (tuple(weight.shape[2:]), stride, padding, dilation, groups)
        y = session.record(weight, "conv_transpose", name, settings, sizes, y, x)
        return y if bias is None else _plus(y, _beside(bias, dims), name)

    return rule


def _beside(bias, dims: int):
    """A channel's bias in the shape in which it is added."""
    return bias.reshape(bias.shape[0], *(1,) * dims)


def _embedding(
    session, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    ids = input
    if not isinstance(weight, Watched) or weight.transposed:
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq:
        raise PerExampleError(
            f"'{weight.name}': embedding with max_norm or scale_grad_by_freq has no per-example gradient"
        )
    return _look_up(session, weight, ids, padding_idx, "embedding")


def _look_up(session, weight: Watched, ids: Tensor, padding_idx: int | None, what: str):
    batched = session.batched(ids, weight.name, what)
    if not batched:  # the same rows for every example
        ids = ids.unsqueeze(0).expand(session.examples, *ids.shape)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    rows = session.operand(weight)
    y = F.embedding(ids, rows, padding)
    sizes = Sizes(ids[0].numel(), 1, *weight.shape)
    y = session.record(weight, "embedding", what, (padding,), sizes, y, ids)
    return y if batched else Spread(session, weight.name, y)


def _getitem(session, weight, index):
    integers = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and index.ndim > 0
    if not isinstance(weight, Watched) or weight.transposed or weight.ndim != 2 or not integers:
        return NotImplemented
    return _look_up(session, weight, index % weight.shape[0], None, "indexing")


def _normalised(session, operation: str, settings: tuple, normalise: Callable, x: Any, weight: Any) -> Any:
    """weight * normalised x."""
    own = isinstance(weight, Watched) and not weight.transposed and isinstance(x, Tensor)
    if own and session.batched(x, weight.name, operation):
        y = normalise(x, session.operand(weight))
        sizes = Sizes(1, 1, 1, weight.base.numel())
        return session.record(weight, operation, operation, settings, sizes, y, x)
    return NotImplemented


def _layer_norm(session, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    shape = tuple(normalized_shape)
    y = _normalised(
        session, "layer_norm", (shape, eps), lambda x, w: F.layer_norm(x, shape, w, None, eps), input, weight
    )
    if y is NotImplemented:
        y = F.layer_norm(input, shape, eps=eps)
        y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(session, input, normalized_shape, weight=None, eps=None):
    shape = tuple(normalized_shape)
    y = _normalised(session, "rms_norm", (shape, eps), lambda x, w: F.rms_norm(x, shape, w, eps), input, weight)
    if y is NotImplemented:
        y = F.rms_norm(input, shape, eps=eps)
        y = y if weight is None else y * weight
    return y


def _channels(y: Any, weight, bias):
    """The affine map of a norm with one weight a channel."""
    dims = y.ndim - 2
    y = y if weight is None else y * _beside(weight, dims)
    return y if bias is None else y + _beside(bias, dims)


def _group_norm(session, input, num_groups, weight=None, bias=None, eps=1e-5):
    groups = num_groups
    y = _normalised(
        session, "group_norm", (groups, eps), lambda x, w: F.group_norm(x, groups, w, None, eps), input, weight
    )
    if y is NotImplemented:
        y = _channels(F.group_norm(input, groups, eps=eps), weight, None)
    return _channels(y, None, bias)


def _instance_norm(
    session,
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    if use_input_stats and running_mean is not None:
        raise batch_statistics(weight if weight is not None else bias, "instance norm that keeps running statistics")
    y = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _channels(y, weight, bias)


def batch_statistics(leaf, what: str) -> PerExampleError:
    where = f"'{leaf.name}'" if isinstance(leaf, Valued) else "a layer without weights"
    return PerExampleError(
        f"{where}: {what} in training mode mixes the examples of a batch, so no example has a gradient of its own; "
        "use group norm, or eval mode"
    )


def _batch_norm(
    session, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    if training:
        raise batch_statistics(weight if weight is not None else bias, "batch norm")
    y = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    return _channels(y, weight, bias)


def _batch_norm_of_torch(session, input, weight, bias, running_mean, running_var, training, momentum, eps, *rest):
    return _batch_norm(session, input, running_mean, running_var, weight, bias, training, momentum, eps)


def _like(function: Callable) -> Callable:
    """A tensor made in the likeness of a parameter, from nothing of its values."""

    def rule(session, *args, **kwargs):
        return function(*(x.plain if isinstance(x, Valued) else x for x in args), **kwargs)

    return rule


def _setitem(session, x, index, value):
    name = watched_in((index, value))[0].name
    raise PerExampleError(f"'{name}' is written into another tensor by assignment; use torch.cat, stack or where")


_MADE_LIKE = (
    *(Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros),
    *(torch.empty_like, torch.full_like, torch.is_complex, torch.is_floating_point, torch.ones_like, torch.zeros_like),
)

RULES: dict[Callable, Callable] = {
    F.batch_norm: _batch_norm,
    F.embedding: _embedding,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.linear: _linear,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    Tensor.__getitem__: _getitem,
    Tensor.__matmul__: _matmul,
    Tensor.__setitem__: _setitem,
    Tensor.__rmatmul__: _rmatmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _mm,
    torch.matmul: _matmul,
    torch.mm: _mm,
    torch.batch_norm: _batch_norm_of_torch,
    torch.embedding: lambda session, weight, ids, *rest: _embedding(session, ids, weight, *rest),
    **{f: _like(f) for f in _MADE_LIKE},
    **{f: _conv(f"conv{n}d", n, f) for n, f in enumerate((F.conv1d, F.conv2d, F.conv3d), 1)},
    **{
        f: _conv_transpose(f"conv_transpose{n}d", n, f)
        for n, f in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1)
    },
}
