"""A recurrence over time, by one of several routes to the same values."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from core.compiling import allow_in_graph, assume_constant_result
from core.recurrence import operators
from core.recurrence.cells import State, gru_cell, lstm_cell, relu_cell, tanh_cell
from core.recurrence.unroll import unroll

CELLS = {"tanh": tanh_cell, "relu": relu_cell, "lstm": lstm_cell, "gru": gru_cell}
METHODS = ("auto", "loop", "op")


def recurrence(kind: str, xw: Tensor, w: Tensor, b: Tensor | None, start: State, *, method: str = "auto") -> State:
    """The states of an Elman, LSTM or GRU layer after every step.

    Args:
        kind: "tanh", "relu", "lstm" or "gru"; `core.recurrence.cells` has their equations.
        xw: (batch, time, gates), the input's part of the pre-activations, W_x x + b_x; time > 0.
        w, b: (gates, width) and (gates,) or None, of the product with the hidden state.
        start: (h,), or (h, c) of an LSTM: (batch, width), before the first step.
        method: "op" is one operator in the graph, forwards and backwards, which vmap folds; "loop" is plain torch, with
            derivatives of any order and in forward mode. "auto" is the loop in forward mode, where a gradient is taken
            inside another one, for a single step and in torch.export, whose packages run without Python; else the
            operator. (Its second derivatives run the loop.)

    Returns:
        A tuple like start, each (batch, time, width).

    Raises:
        ValueError: an unknown kind or method, shapes or dtypes that do not fit.
    """
    leaves = (xw, w, *(() if b is None else (b,)), *start)
    if has_torch_function(leaves):
        return handle_torch_function(recurrence, leaves, kind, xw, w, b, start, method=method)
    check(kind, xw, w, b, start)
    if method not in METHODS:
        raise ValueError(f"recurrence: method '{method}' is unknown; expected one of {', '.join(METHODS)}")
    loop = xw.shape[1] == 1 or beyond_first_derivatives() or torch.compiler.is_exporting()
    if method == "loop" or (method == "auto" and loop):
        return unroll(CELLS[kind], {"hh": {"weight": w} if b is None else {"bias": b, "weight": w}}, xw, start)
    hs, cs, _ = _recurrence(kind, *_all_arguments(kind, xw, w, b, start))
    return (hs, cs) if kind == "lstm" else (hs,)


def _start(kind: str, start: State) -> tuple[Tensor, Tensor]:
    """(h, c), the cells of width 0 where there are none."""
    return (start[0], start[1] if kind == "lstm" else start[0][:, :0])


def _all_arguments(kind: str, xw: Tensor, w: Tensor, b: Tensor | None, start: State) -> tuple[Tensor, ...]:
    return xw, w, xw.new_zeros(len(w)) if b is None else b, *_start(kind, start)


def check(kind: str, xw: Tensor, w: Tensor, b: Tensor | None, start: State) -> None:
    """Raise ValueError unless the arguments of `recurrence` fit each other."""
    if kind not in operators.KINDS:
        raise ValueError(f"recurrence: kind '{kind}' is unknown; expected one of {', '.join(operators.KINDS)}")
    states = 2 if kind == "lstm" else 1
    if len(start) != states:
        raise ValueError(f"recurrence: the state of kind '{kind}' has {states} tensors, found {len(start)}")
    gates, width = w.shape
    if xw.ndim != 3 or not xw.shape[1] or xw.shape[2] != gates or gates != operators.KINDS[kind] * width:
        shapes = f"xw of shape {tuple(xw.shape)} and w {tuple(w.shape)}"
        raise ValueError(
            f"recurrence: expected (batch, time > 0, {operators.KINDS[kind]} width) and its last axis times width for "
            f"'{kind}', found {shapes}"
        )
    if b is not None and tuple(b.shape) != (gates,):
        raise ValueError(f"recurrence: expected b of shape ({gates},), found {tuple(b.shape)}")
    for x in start:
        if tuple(x.shape) != (xw.shape[0], width):
            raise ValueError(f"recurrence: expected a state of shape {(xw.shape[0], width)}, found {tuple(x.shape)}")
        if x.dtype != xw.dtype:
            raise ValueError(f"recurrence: the state is {x.dtype}, the input {xw.dtype}")


@assume_constant_result
def beyond_first_derivatives() -> bool:
    """True in forward mode, and in a gradient inside a gradient (of torch.func)."""
    return forward_ad._current_level >= 0 or open_transforms().count(TransformType.Grad) > 1


@assume_constant_result
def mapped_or_beyond_first_derivatives() -> bool:
    """True under vmap, in forward mode, and in a gradient inside a gradient (of torch.func)."""
    return TransformType.Vmap in open_transforms() or beyond_first_derivatives()


def open_transforms() -> list:
    """The kinds of the torch.func transforms that are active."""
    return [level.key() for level in torch._C._functorch.get_interpreter_stack() or []]


def zeros_if_none(cotangent: Tensor | None, x: Tensor) -> Tensor:
    """The cotangent of x: zeros where x is not used."""
    return torch.zeros_like(x) if cotangent is None else cotangent


class _Recurrence(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(kind: str, xw: Tensor, w: Tensor, b: Tensor, h: Tensor, c: Tensor):
        return operators.forward(kind, xw, w, b, h, c)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.kind, *tensors = inputs
        ctx.mark_non_differentiable(outputs[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *outputs)

    @staticmethod
    def backward(ctx, dhs, dcs, _):
        hs, cs, _ = ctx.saved_tensors[5:]
        dhs, dcs = zeros_if_none(dhs, hs), zeros_if_none(dcs, cs)
        return None, *_Backward.apply(ctx.kind, *ctx.saved_tensors, dhs, dcs)


class _Backward(torch.autograd.Function):
    """The backward pass, with a derivative of its own: that of the loop's backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kind, xw, w, b, h, c, hs, cs, gates, dhs, dcs):
        d_xw, d_hw, dh, dc = operators.backward(kind, w, h, c, hs, cs, gates, dhs, dcs)
        dw, db = weight_gradients(d_hw if kind == "gru" else d_xw, h, hs)
        return d_xw, dw, db, dh, dc

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.kind, xw, w, b, h, c, _, _, _, dhs, dcs = inputs
        ctx.save_for_backward(xw, w, b, h, c, dhs, dcs)

    @staticmethod
    def backward(ctx, *cotangents):
        *inputs, dhs, dcs = ctx.saved_tensors
        _, pull = torch.func.vjp(partial(_loop_backward, ctx.kind), *inputs, dhs, dcs)
        *of_inputs, of_dhs, of_dcs = pull(tuple(cotangents))
        return None, *of_inputs, None, None, None, of_dhs, of_dcs


def _loop_backward(kind: str, xw, w, b, h, c, dhs, dcs):
    """The first derivatives by the loop."""

    def states(xw, w, b, h, c):
        start = (h, c) if kind == "lstm" else (h,)
        out = unroll(CELLS[kind], {"hh": {"bias": b, "weight": w}}, xw, start)
        return out if kind == "lstm" else (*out, c.unsqueeze(1).expand_as(dcs))

    return torch.func.vjp(states, xw, w, b, h, c)[1]((dhs, dcs))


def weight_gradients(d: Tensor, h: Tensor, hs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of w and b from the cotangents d (batch, time, gates) of w h + b, all steps in one product."""
    return torch.einsum("btg,bth->gh", d, states_before(h, hs)), d.sum((0, 1))


def states_before(start: Tensor, states: Tensor) -> Tensor:
    """The state before each step, from those after each. start: (batch, n), states: (batch, time, n)."""
    return torch.cat([start.unsqueeze(1), states[:, :-1]], 1)  # (batch, time, n)


# One opaque node, whose backward Dynamo does not lose: see core/tap.py.
@allow_in_graph
def _recurrence(kind: str, xw: Tensor, w: Tensor, b: Tensor, h: Tensor, c: Tensor):
    return _Recurrence.apply(kind, xw, w, b, h, c)


class Known(NamedTuple):
    """All states of a recurrence, and what the operator's backward pass needs besides."""

    states: tuple[Tensor, Tensor]
    gates: Tensor


def without_graph(kind: str, xw: Tensor, w: Tensor, b: Tensor | None, start: State) -> Known:
    """The states of `recurrence` as constants."""
    check(kind, xw, w, b, start)
    arguments = _all_arguments(kind, xw, w, b, start)
    hs, cs, gates = (x.detach() for x in _recurrence(kind, *(x.detach() for x in arguments)))
    return Known((hs, cs), gates)


def teacher_forced(kind: str, xw: Tensor, hw: Tensor, w: Tensor, start: State, known: Known) -> State:
    """The known states; their cotangents run back through time to xw, to hw and to start.

    hw: (batch, time, gates), the product w h + b of every known state with the weights, from which these get their
    gradients. First derivatives only.
    """
    h, c = _start(kind, start)
    states = _teacher_forced(kind, xw, hw, w, h, c, *known.states, known.gates)
    return states if kind == "lstm" else states[:1]


class _TeacherForced(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(kind, xw, hw, w, h, c, hs, cs, gates):
        return hs.view_as(hs), cs.view_as(cs)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.kind, _, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dhs, dcs):
        d_xw, d_hw, dh, dc = _Cotangents.apply(ctx.kind, *ctx.saved_tensors, dhs, dcs)
        return None, d_xw, d_hw if ctx.kind == "gru" else d_xw, None, dh, dc, None, None, None


class _Cotangents(torch.autograd.Function):
    """`operators.backward`, which torch.func takes inside a backward pass only so."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kind, w, h, c, hs, cs, gates, dhs, dcs):
        return operators.backward(kind, w, h, c, hs, cs, gates, dhs, dcs)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError("the reports of a recurrence have first derivatives only")


@allow_in_graph
def _teacher_forced(kind, xw, hw, w, h, c, hs, cs, gates):
    return _TeacherForced.apply(kind, xw, hw, w, h, c, hs, cs, gates)
