"""Backward rules: the form of a parameter's gradients, from an operation's input and the cotangent of its output.

Each entry of `FORMS` takes (settings, saved input, cotangent), all with the batch leading, and returns a form of
`core.per_example.forms`. Settings are plain numbers, because they travel through `torch.compiler.allow_in_graph`.
"""

import itertools
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core.compiling import allow_in_graph
from core.per_example.blocked import wide
from core.per_example.errors import FIRST_ORDER, PerExampleError
from core.per_example.forms import Dense, Form, Outer, Rows, Shifted, reduce


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


def _shifted(x: Tensor, positions: tuple, settings: tuple) -> tuple[Tensor, list[int], list[int]]:
    """Input of a convolution, laid out so that a step of its kernel is a shift along one flat axis.

    The flat axis has a cell for each position, and to the right of each row of positions as many as the kernel reaches
    over; with a stride, one such plane for each remainder (phase) of an index by the stride.

    Args:
        x: (N, channels, *space), not padded.
        positions: of the windows, along each axis.
        settings: (kernel, stride, padding, dilation, groups).

    Returns:
        (N, channels, L), the number of cells along each axis of a plane, and the offset of each entry of the kernel.
    """
    kernel, stride, padding, dilation, _ = settings
    steps = [[k * d for k in range(size)] for size, d in zip(kernel, dilation, strict=True)]
    cells = [n + at[-1] // s for n, at, s in zip(positions, steps, stride, strict=True)]
    phases = [1 + max(i % s for i in at) for at, s in zip(steps, stride, strict=True)]
    ends = [n * s - p - size for n, s, p, size in zip(cells, stride, padding, x.shape[2:], strict=True)]
    if any(padding) or any(ends):
        x = F.pad(x, [n for p, end in zip(reversed(padding), reversed(ends), strict=True) for n in (p, end)])
    if max(stride) > 1:
        x = x.reshape(*x.shape[:2], *(n for pair in zip(cells, stride, strict=True) for n in pair))
        for axis, n in enumerate(phases):
            x = x.narrow(3 + 2 * axis, 0, n)  # (N, channels, cells, phases, cells, phases, ...)
        dims = len(cells)
        x = x.permute(0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2))  # phases first
    strides = [prod(cells[axis + 1 :]) for axis in range(len(cells))]
    planes = [prod(phases[axis + 1 :]) * prod(cells) for axis in range(len(phases))]
    offsets = [
        sum((i % s) * plane + (i // s) * flat for i, s, plane, flat in zip(at, stride, planes, strides, strict=True))
        for at in itertools.product(*steps)
    ]
    return x.flatten(2), cells, offsets


def _on_cells(x: Tensor, cells: list[int]) -> Tensor:
    """(N, channels, *positions) -> (N, channels, T): each position on its cell of the flat axis, 0 between them."""
    positions = x.shape[2:]
    ends = [n - size for n, size in zip(cells[1:], positions[1:], strict=True)]
    if not any(ends):
        return x.flatten(2)
    time = 1 + sum((n - 1) * prod(cells[axis + 1 :]) for axis, n in enumerate(positions))  # up to the last position
    return F.pad(x, [n for end in reversed(ends) for n in (0, end)]).flatten(2)[..., :time]


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(N, channels, L) -> (N, groups, L, channels / groups)."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, x.shape[2]).transpose(2, 3)


def _windowed(settings: tuple, x: Tensor, rows: Tensor) -> Form:
    """rows (N, channels, *positions) times the windows of x (N, channels, *space)."""
    flat, cells, offsets = _shifted(x, tuple(rows.shape[2:]), settings)
    groups = settings[-1]
    form = Shifted(_by_group(_on_cells(rows, cells), groups), _by_group(flat, groups), tuple(offsets))
    return Outer(form.rows, form.columns) if offsets == [0] else form


def _conv(settings: tuple, x: Tensor, cotangent: Tensor) -> Form:
    return _windowed(settings, x, cotangent)


def _conv_transpose(settings: tuple, x: Tensor, cotangent: Tensor) -> Form:
    """x's cotangent is the convolution of the output's, so input and output are swapped."""
    return _windowed(settings, cotangent, x)


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
