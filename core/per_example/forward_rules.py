"""Forward rules: the output of an operation on a parameter, recorded with what its report needs.

A rule is called like the operation, with the session first, and returns NotImplemented where it does not apply. Its
arguments are plain tensors, parameters and copies (`core.per_example.leaves`); where any may come, `apply` calls the
operation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core.per_example.backward_rules import Sizes
from core.per_example.errors import PerExampleError
from core.per_example.leaves import Copies, Parameter, contents_in, plain
from core.per_example.mapped import spread_call
from core.per_example.recurrence_rules import RULES as RECURRENCE_RULES


def apply(session, function: Callable, *args) -> Any:
    """The function, mapped over the examples if an argument is a parameter or a copy."""
    return spread_call(session, function, args, {}) if contents_in(args) else function(*args)


def _linear(session, input, weight, bias=None):
    if not isinstance(weight, Parameter) or weight.value.ndim != 2:
        return NotImplemented
    y = _product(session, input, weight, "linear")
    return y if y is NotImplemented else _plus(session, y, _in_dtype_of(session, y, bias))


def _plus(session, y, bias):
    """y + bias, as an operation of its own, so that eager and compiled layers have one plan."""
    return y if bias is None else apply(session, Tensor.add, y, bias)


def _in_dtype_of(session, y, bias):
    """The bias in the dtype of the output, to which autocast would have cast it."""
    dtype = plain(y).dtype
    if bias is None or plain(bias).dtype == dtype:
        return bias
    return bias.cast(dtype) if isinstance(bias, Parameter) else apply(session, Tensor.to, bias, dtype)


def _times(session, y, weight):
    return y if weight is None else apply(session, Tensor.mul, y, weight)


def _product(session, x, weight: Parameter, what: str):
    """x W^T. x: (..., d) with the batch in any axis but the last, W: (p, d)."""
    axis = session.axis(x, weight.name, what) if isinstance(x, Tensor) and x.ndim > 1 else None
    if axis is None or axis == x.ndim - 1:
        return NotImplemented
    x = x.movedim(axis, 0)
    y = F.linear(x, session.operand(weight))  # (N, ..., p)
    p, d = weight.base.shape
    sizes = Sizes(x[0].numel() // x.shape[-1] if x.ndim > 2 else 1, 1, p, d)
    return session.record(weight, "linear", what, (weight.transposed,), sizes, y, x).movedim(0, axis)


def _matmul(session, input, other):
    if not isinstance(other, Parameter) or other.value.ndim != 2:
        return NotImplemented
    return _product(session, input, other.t(), "matmul")


def _mm(session, input, mat2):
    return _matmul(session, input, mat2)


def _transpose(session, input, dim0=0, dim1=1):
    """The transpose of a matrix is the same parameter, transposed."""
    matrix = isinstance(input, Parameter) and input.value.ndim == 2
    return input.t() if matrix and {dim0 % 2, dim1 % 2} == {0, 1} else NotImplemented


def _to(session, input, *args, **kwargs):
    """A cast to another floating-point dtype is the same parameter, cast; to integers, a constant."""
    value = plain(input).to(*(plain(x) for x in args), **kwargs)
    if isinstance(input, Tensor):
        return value
    if not isinstance(input, Parameter) or value.device != input.value.device or value.is_complex():
        return NotImplemented
    return input.cast(value.dtype) if value.is_floating_point() else value.detach()


def _cast(dtype: torch.dtype) -> Callable:
    return lambda session, input, **options: _to(session, input, dtype)


def _type_as(session, input, other):
    return _to(session, input, plain(other).dtype)


def _contiguous(session, input, **options):
    return input


def _detach(session, input):
    return input.plain.detach()


def _per_axis(value, dims: int) -> tuple:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _conv(name: str, dims: int, function: Callable) -> Callable:
    def rule(session, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        x = input
        if not isinstance(weight, Parameter) or not isinstance(x, Tensor) or x.ndim != dims + 2:
            if isinstance(weight, (Parameter, Copies)):
                return NotImplemented
            y = apply(session, function, x, weight, None, stride, padding, dilation, groups)
            return _plus(session, y, _beside(session, _in_dtype_of(session, y, bias), dims))
        if not session.batched(x, weight.name, name):
            return NotImplemented
        stride, dilation, kernel = _per_axis(stride, dims), _per_axis(dilation, dims), tuple(weight.value.shape[2:])
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            x = F.pad(x, [n for total in reversed(totals) for n in (total // 2, total - total // 2)])
            padding = 0
        padding = _per_axis(0 if padding == "valid" else padding, dims)
        y = function(x, session.operand(weight), None, stride, padding, dilation, groups)  # (N, channels, *space)
        sizes = Sizes(y[0, 0].numel(), groups, weight.value.shape[0] // groups, weight.base[0].numel())
        settings = (kernel, stride, padding, dilation, groups)
        y = session.record(weight, "conv", name, settings, sizes, y, x)
        return _plus(session, y, _beside(session, _in_dtype_of(session, y, bias), dims))

    return rule


def _conv_transpose(name: str, dims: int, function: Callable) -> Callable:
    def rule(session, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        x = input
        if not isinstance(weight, Parameter) or not isinstance(x, Tensor) or x.ndim != dims + 2:
            if isinstance(weight, (Parameter, Copies)):
                return NotImplemented
            y = apply(session, function, x, weight, None, stride, padding, output_padding, groups, dilation)
            return _plus(session, y, _beside(session, _in_dtype_of(session, y, bias), dims))
        if not session.batched(x, weight.name, name):
            return NotImplemented
        stride, padding, dilation = (_per_axis(value, dims) for value in (stride, padding, dilation))
        # (N, channels, *space)
        y = function(x, session.operand(weight), None, stride, padding, output_padding, groups, dilation)
        sizes = Sizes(x[0, 0].numel(), groups, weight.value.shape[0] // groups, weight.base[0].numel())
        settings = (tuple(weight.value.shape[2:]), stride, padding, dilation, groups)
        y = session.record(weight, "conv_transpose", name, settings, sizes, y, x)
        return _plus(session, y, _beside(session, _in_dtype_of(session, y, bias), dims))

    return rule


def _beside(session, bias, dims: int):
    """A bias per channel in the shape in which it is added: (channels,) -> (channels, 1, ...)."""
    if bias is None:
        return None
    channels = plain(bias).shape[0]
    return apply(session, Tensor.reshape, bias, (channels, *(1,) * dims))


def _embedding(
    session, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    ids = input
    if not isinstance(weight, Parameter) or weight.transposed:
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq:
        raise PerExampleError(
            f"'{weight.name}': embedding with max_norm or scale_grad_by_freq has no per-example gradient"
        )
    return _look_up(session, weight, ids, padding_idx, "embedding")


def _look_up(session, weight: Parameter, ids: Tensor, padding_idx: int | None, what: str):
    axis = session.axis(ids, weight.name, what)
    if axis is None:  # the same rows for every example
        ids = ids.unsqueeze(0).expand(session.examples, *ids.shape)  # (N, ...)
    else:
        ids = ids.movedim(axis, 0)
    padding = None if padding_idx is None else padding_idx % weight.value.shape[0]
    y = F.embedding(ids, session.operand(weight), padding)  # (N, ..., D)
    sizes = Sizes(ids[0].numel(), 1, *weight.value.shape)
    y = session.record(weight, "embedding", what, (padding,), sizes, y, ids)
    return Copies(session, weight.name, y) if axis is None else y.movedim(0, axis)


def _getitem(session, weight, index):
    integers = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and index.ndim > 0
    if not isinstance(weight, Parameter) or weight.transposed or weight.value.ndim != 2 or not integers:
        return NotImplemented
    return _look_up(session, weight, index % weight.value.shape[0], None, "indexing")


def _normalised(session, operation: str, settings: tuple, normalise: Callable, x: Any, weight: Any) -> Any:
    """weight * normalised x."""
    if not isinstance(weight, Parameter) or weight.transposed or not isinstance(x, Tensor):
        return NotImplemented
    axis = session.axis(x, weight.name, operation)
    last = 0 if operation == "group_norm" else x.ndim - len(settings[0]) - 1  # the batch may be any up to it
    if axis is None or axis > last:
        return NotImplemented
    x = x.movedim(axis, 0)
    y = normalise(x, session.operand(weight))
    sizes = Sizes(1, 1, 1, weight.base.numel())
    return session.record(weight, operation, operation, settings, sizes, y, x).movedim(0, axis)


def _layer_norm(session, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    shape = tuple(normalized_shape)
    y = _normalised(
        session, "layer_norm", (shape, eps), lambda x, w: F.layer_norm(x, shape, w, None, eps), input, weight
    )
    if y is NotImplemented:
        y = _times(session, apply(session, F.layer_norm, input, shape, None, None, eps), weight)
    return _plus(session, y, bias)


def _rms_norm(session, input, normalized_shape, weight=None, eps=None):
    shape = tuple(normalized_shape)
    y = _normalised(session, "rms_norm", (shape, eps), lambda x, w: F.rms_norm(x, shape, w, eps), input, weight)
    if y is NotImplemented:
        y = _times(session, apply(session, F.rms_norm, input, shape, None, eps), weight)
    return y


def _channels(session, y: Any, weight, bias):
    """The affine map of a norm with one weight per channel."""
    dims = plain(y).ndim - 2
    return _plus(session, _times(session, y, _beside(session, weight, dims)), _beside(session, bias, dims))


def _group_norm(session, input, num_groups, weight=None, bias=None, eps=1e-5):
    groups = num_groups
    y = _normalised(
        session, "group_norm", (groups, eps), lambda x, w: F.group_norm(x, groups, w, None, eps), input, weight
    )
    if y is NotImplemented:
        y = _channels(session, apply(session, F.group_norm, input, groups, None, None, eps), weight, None)
    return _channels(session, y, None, bias)


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
    y = apply(session, F.instance_norm, input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _channels(session, y, weight, bias)


def batch_statistics(leaf, what: str) -> PerExampleError:
    """Error for a layer in training mode that normalises by statistics of the batch."""
    where = f"'{leaf.name}'" if isinstance(leaf, (Parameter, Copies)) else "a layer without weights"
    return PerExampleError(
        f"{where}: {what} in training mode mixes the examples of a batch, so no example has a gradient of its own; "
        "use group norm, or eval mode"
    )


def _batch_norm(
    session, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    if training and isinstance(input, (Parameter, Copies)) and running_mean is None:
        y = apply(session, _standardised, input, eps)  # of a weight, in which there are no examples
    elif training:
        raise batch_statistics(weight if weight is not None else bias, "batch norm")
    else:
        y = apply(session, F.batch_norm, input, running_mean, running_var, None, None, False, momentum, eps)
    return _channels(session, y, weight, bias)


def _standardised(x: Tensor, eps: float) -> Tensor:
    """Batch norm by the statistics of x itself."""
    variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0, keepdim=True)
    return (x - mean) * (variance + eps).rsqrt()


def _batch_norm_of_torch(session, input, weight, bias, running_mean, running_var, training, momentum, eps, *rest):
    return _batch_norm(session, input, running_mean, running_var, weight, bias, training, momentum, eps)


def _of_shape(function: Callable) -> Callable:
    """A fact of a parameter, or a tensor of its shape and dtype: it depends on no value."""

    def rule(session, *args, **kwargs):
        return function(*(plain(x) for x in args), **kwargs)

    return rule


def _setitem(session, x, index, value):
    name = contents_in((index, value))[0].name
    raise PerExampleError(f"'{name}' is written into another tensor by assignment; use torch.cat, stack or where")


_OF_SHAPE = (
    *(Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros),
    *(torch.empty_like, torch.full_like, torch.ones_like, torch.zeros_like),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.stride),
    *(Tensor.is_contiguous, Tensor.element_size, Tensor.get_device, Tensor.dim_order, torch.numel),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed, torch.is_floating_point, torch.is_complex),
)

RULES: dict[Callable, Callable] = {
    **RECURRENCE_RULES,
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
    Tensor.bfloat16: _cast(torch.bfloat16),
    Tensor.contiguous: _contiguous,
    Tensor.detach: _detach,
    Tensor.double: _cast(torch.float64),
    Tensor.float: _cast(torch.float32),
    Tensor.half: _cast(torch.float16),
    Tensor.matmul: _matmul,
    Tensor.mm: _mm,
    Tensor.t: _transpose,
    Tensor.to: _to,
    Tensor.transpose: _transpose,
    Tensor.type_as: _type_as,
    torch.matmul: _matmul,
    torch.mm: _mm,
    torch.t: _transpose,
    torch.transpose: _transpose,
    torch.batch_norm: _batch_norm_of_torch,
    torch.embedding: lambda session, weight, ids, *rest: _embedding(session, ids, weight, *rest),
    **{f: _of_shape(f) for f in _OF_SHAPE},
    **{f: _conv(f"conv{n}d", n, f) for n, f in enumerate((F.conv1d, F.conv2d, F.conv3d), 1)},
    **{
        f: _conv_transpose(f"conv_transpose{n}d", n, f)
        for n, f in enumerate((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), 1)
    },
}
