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
from core.per_example.leaves import Parameter, contents_in, plain, watched
from core.recurrence.routes import recurrence, states_before, teacher_forced, unroll, without_graph
from core.tree import Tree


def recurrence_rule(session, kind: str, xw: Any, w: Any, b: Any, start: Any, method: str = "auto") -> Any:
    """`core.recurrence.recurrence`: w and b are used in one linear map of all steps."""
    if not _steps_are_batched(session, (w, b), xw, start):
        return NotImplemented
    known = without_graph(kind, xw, plain(w), None if b is None else plain(b), start)
    hw = session.call(F.linear, (states_before(start[0], known.states[0]), w, b), {})  # (N, time, gates)
    return teacher_forced(kind, xw, hw, plain(w).detach(), start, known)


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
