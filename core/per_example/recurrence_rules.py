"""Rules of recurrences: each weight is used once, with a row per step, in place of once per step.

The cotangent a_t of a step's pre-activations, all later steps included, gives the gradient of its weights: sum_t a_t
h_{t-1}ᵀ. So the states are computed first, without a graph. Then all steps are taken at once, each from its known state
before ("teacher-forced"), and these products carry the reports. What is left is to let the cotangents run back through
time, past weights that need no gradient there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core import tree
from core.compiling import allow_in_graph
from core.per_example.backward_rules import Sizes
from core.per_example.leaves import Parameter, contents_in, plain, watched
from core.recurrence.routes import recurrence, states_before, teacher_forced, without_graph
from core.recurrence.unroll import unroll
from core.tree import Tree


def recurrence_rule(session, kind: str, xw: Any, w: Any, b: Any, start: Any, method: str = "auto") -> Any:
    """`core.recurrence.recurrence`: w and b are used in one linear map of all steps."""
    if not _steps_are_batched(session, (w, b), xw, start):
        return NotImplemented
    known = without_graph(kind, xw, plain(w), None if b is None else plain(b), start)
    before = states_before(start[0], known.states[0]).detach()  # (N, time, width)
    if isinstance(w, Parameter):
        hw = _product(session, before, w)  # (N, time, gates)
        hw = hw if b is None else session.call(Tensor.add, (hw, b), {}) if isinstance(b, Parameter) else hw + b
    else:
        hw = session.call(F.linear, (before, w, b), {})
    return teacher_forced(kind, xw, hw, plain(w).detach(), start, known)


def _product(session, x: Tensor, w: Parameter) -> Tensor:
    """Stands for x Wᵀ, whose value nobody needs: the states are known. x: (N, time, d)."""
    p, d = w.base.shape
    y = _without_value(x, session.operand(w))
    return session.record(w, "linear", "recurrence", (w.transposed,), Sizes(x.shape[1], 1, p, d), y, x)


class _WithoutValue(torch.autograd.Function):
    """The gradient of x Wᵀ by W; its value is 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], len(w))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, cotangent):
        return None, torch.einsum("btp,btd->pd", cotangent, *ctx.saved_tensors)


@allow_in_graph
def _without_value(x: Tensor, w: Tensor) -> Tensor:
    return _WithoutValue.apply(x, w)


def unroll_rule(session, cell: Callable, p: Tree, xw: Any, start: Any) -> Any:
    """`core.recurrence.unroll`: the cell takes all steps at once."""
    if not _steps_are_batched(session, p, xw, start):
        return NotImplemented
    fixed = tree.map(lambda leaf: plain(leaf).detach(), p)
    known = unroll(cell, fixed, xw.detach(), tuple(x.detach() for x in start))
    before = tuple(states_before(x, states).detach() for x, states in zip(start, known, strict=True))
    leaves = tree.map(lambda leaf: leaf if isinstance(leaf, Tensor) else watched(leaf), p)
    new = cell(leaves, xw, before)  # (N, time, n) each
    # The values are those of the states; the cotangent of a step goes to `new`, and back to the step before.
    states, state = [], start
    for x, *steps in zip(xw.detach().unbind(1), *(y.unbind(1) for y in new), strict=True):
        state = tuple(out + (step - step.detach()) for out, step in zip(cell(fixed, x, state), steps, strict=True))
        states.append(state)
    return tuple(torch.stack(steps, 1) for steps in zip(*states, strict=True))


def _steps_are_batched(session, p: Tree, xw: Any, start: Any) -> bool:
    contents = contents_in(p)
    if contents_in((xw, start)) or not all(isinstance(leaf, Parameter) for leaf in contents):
        return False
    return session.batched(xw, contents[0].name, "recurrence")


RULES: dict[Callable, Callable] = {recurrence: recurrence_rule, unroll: unroll_rule}
