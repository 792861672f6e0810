"""Backward rules: the form of a parameter's gradients, from an operation's input and the cotangent of its output.

Each entry of `FORMS` takes (settings, saved input, cotangent), all with the batch leading, and returns a form of
`core.per_example.forms`. Settings are plain numbers, because they travel through `torch.compiler.allow_in_graph`.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core.compiling import allow_in_graph
from core.per_example.blocked import wide
from core.per_example.errors import FIRST_ORDER, PerExampleError
from core.per_example.forms import Dense, Form, Outer, Rows, reduce


class Sizes(NamedTuple):
    """Sizes of one use per example: T rows, groups, and p times d entries per group."""

    rows: int
    groups: int
    p: int
    d: int


def _linear(settings: tuple, x: Tensor, cotangent: Tensor) -> Form:
    """y = x W^T; with `swapped`, y = x W. x: (N, ..., d), cotangent: (N, ..., p)."""
    (swapped,) = settings
    count = x.shape[0]
    # (N, 1, T, d) and (N, 1, T, p)
    inputs, outputs = (t.reshape(count, 1, prod(t.shape[1:-1]), t.shape[-1]) for t in (x, cotangent))
    return Outer(inputs, outputs) if swapped else Outer(outputs, inputs)


def windows(x: Tensor, kernel: tuple, stride: tuple, dilation: tuple) -> Tensor:
    """All windows of a kernel over x (N, channels, *space): a view (N, channels, *positions, *kernel)."""
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    return x


def _columns(x: Tensor, kernel: tuple, stride: tuple, dilation: tuple, groups: int, positions: tuple) -> Tensor:
    """im2col: (N, groups, T, channels / groups * prod(kernel)), of the first `positions` along each axis."""
    view = windows(x, kernel, stride, dilation)
    for axis, length in enumerate(positions):
        view = view.narrow(2 + axis, 0, length)  # (N, channels, *positions, *kernel)
    count, channels = view.shape[:2]
    time = prod(positions)
    view = view.reshape(count, groups, channels // groups, time, prod(kernel))  # a copy: the windows overlap
    return view.transpose(2, 3).reshape(count, groups, time, -1)  # (N, groups, T, channels / groups * prod(kernel))


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(N, channels, *space) -> (N, groups, T, channels / groups)."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, -1).transpose(2, 3)  # (N, groups, T, channels / groups)


def _both_sides(padding: tuple) -> list[int]:
    # F.pad counts from the last axis.
    return [n for p in reversed(padding) for n in (p, p)]


def _conv(settings: tuple, x: Tensor, cotangent: Tensor) -> Form:
    kernel, stride, padding, dilation, groups = settings
    x = F.pad(x, _both_sides(padding)) if any(padding) else x
    columns = _columns(x, kernel, stride, dilation, groups, tuple(cotangent.shape[2:]))  # (N, groups, T, d)
    return Outer(_by_group(cotangent, groups), columns)


def _conv_transpose(settings: tuple, x: Tensor, cotangent: Tensor) -> Form:
    """x's cotangent is the convolution of the output's, so input and output are swapped."""
    kernel, stride, padding, dilation, groups = settings
    cotangent = F.pad(cotangent, _both_sides(padding)) if any(padding) else cotangent
    columns = _columns(cotangent, kernel, stride, dilation, groups, tuple(x.shape[2:]))  # (N, groups, T, d)
    return Outer(_by_group(x, groups), columns)


def _embedding(settings: tuple, ids: Tensor, cotangent: Tensor) -> Form:
    (padding_id,) = settings
    count = ids.shape[0]
    ids, values = ids.reshape(count, -1), cotangent.reshape(count, -1, cotangent.shape[-1])  # (N, T), (N, T, D)
    if padding_id is not None:
        values = torch.where((ids == padding_id)[:, :, None], 0, values)
    return Rows(ids, values)


def _dense(settings: tuple, saved: None, cotangent: Tensor) -> Form:
    return Dense(cotangent)


def _affine(normalised: Tensor, cotangent: Tensor, axes: range) -> Form:
    """The weight of y = weight * normalised: summed over all axes except the batch and `axes`."""
    product = wide(normalised) * wide(cotangent)
    summed = [axis for axis in range(1, product.ndim) if axis not in axes]
    return Dense(product.sum(summed) if summed else product)


def _layer_norm(settings: tuple, x: Tensor, cotangent: Tensor) -> Form:
    # Normalised again, so that the backward pass keeps x alone.
    shape, eps = settings
    return _affine(F.layer_norm(x, shape, eps=eps), cotangent, range(x.ndim - len(shape), x.ndim))


def _rms_norm(settings: tuple, x: Tensor, cotangent: Tensor) -> Form:
    shape, eps = settings
    return _affine(F.rms_norm(x, shape, eps=eps), cotangent, range(x.ndim - len(shape), x.ndim))


def _group_norm(settings: tuple, x: Tensor, cotangent: Tensor) -> Form:
    groups, eps = settings
    return _affine(F.group_norm(x, groups, eps=eps), cotangent, range(1, 2))


ELEMENTWISE = frozenset({"dense", "group_norm", "layer_norm", "rms_norm"})
"""Operations whose form is Dense, and no larger than their parameter."""

FORMS: dict[str, Callable[[tuple, Any, Tensor], Form]] = {
    "conv": _conv,
    "conv_transpose": _conv_transpose,
    "dense": _dense,
    "embedding": _embedding,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "rms_norm": _rms_norm,
}


def form(operation: str, settings: tuple, saved: Tensor | None, cotangent: Tensor) -> Form:
    """The form of the gradients of one use. Under autocast the operation saw its input in the cotangent's dtype."""
    if saved is not None and saved.is_floating_point():
        saved = saved.to(cotangent.dtype)
    return FORMS[operation](settings, saved, cotangent)


class _FirstOrder(torch.autograd.Function):
    """Identity whose backward raises: a report, and the gradient that comes with it, is differentiated once only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        raise PerExampleError(FIRST_ORDER)

    jvp = backward


class _Once(torch.autograd.Function):
    """`x`, unchanged, which cannot be differentiated by the parameters."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *params: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = jvp = _FirstOrder.backward


@allow_in_graph
def once(x: Tensor, *params: Tensor) -> Tensor:
    """`x`, for a pull-back that may not be differentiated again: where a report brings a parameter's gradient, the
    operation's own graph does not know the parameter, and a second derivative would lack it silently."""
    return _Once.apply(x, *params)


class _Report(torch.autograd.Function):
    """The output of an operation, unchanged; its backward reduces the parameter's gradients and hands the wanted
    quantities to the sinks, as their cotangents (see `core.tap`), and to a weight the gradient of the sum.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(spec: tuple, y: Tensor, weight: Tensor | None, saved: Tensor | None, direction, *sinks) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.spec, _, ctx.weight_dtype = inputs[0], None, None if inputs[2] is None else inputs[2].dtype
        ctx.sink_dtypes = [sink.dtype for sink in inputs[5:]]
        ctx.save_for_backward(inputs[3], inputs[4])

    @staticmethod
    def backward(ctx, cotangent):
        operation, settings, shape, want, method, budget = ctx.spec
        saved, direction = ctx.saved_tensors
        passed = _FirstOrder.apply(cotangent)
        if want == ("keep",):
            # Reading `saved` above raises where it was changed in place since.
            return None, passed, None, None, None, passed
        quantities = reduce([form(operation, settings, saved, cotangent)], shape, want, method, direction, budget)
        total = quantities.pop("sum", None)
        if total is not None:
            total = _FirstOrder.apply(total.to(ctx.weight_dtype))
        reports = [_FirstOrder.apply(x.to(t)) for x, t in zip(quantities.values(), ctx.sink_dtypes, strict=True)]
        return None, passed, total, None, None, *reports

    jvp = _FirstOrder.backward


# As in core.tap: through allow_in_graph, so that Dynamo neither refuses the Function nor drops its backward.
@allow_in_graph
def report(spec: tuple, y: Tensor, weight, saved, direction, *sinks) -> Tensor:
    """`y` itself.

    Args:
        spec: (operation, settings, the parameter's shape, want, method, budget); the last three as in `forms.reduce`,
            or want ("keep",) to hand the cotangent itself to the only sink.
        weight: the parameter, for "sum"; y must not depend on it otherwise.
        saved: the operation's input.
        direction: of the parameter's shape, for "dot".
        sinks: one for each of `want` except "sum", of the shape of the quantity.
    """
    return _Report.apply(spec, y, weight, saved, direction, *sinks)
