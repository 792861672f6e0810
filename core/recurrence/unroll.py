"""A recurrence as a loop of plain operations."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from core import tree
from core.recurrence.cells import State
from core.tree import Tree


def unroll(cell: Callable, p: Tree, xw: Tensor, start: State) -> State:
    """The states after every step of a loop over time, `state = cell(p, xw[:, t], state)`.

    A graph of torch.compile holds every step, and takes as long to build: where there is one, use `recurrence`.

    Args:
        cell: see `core.recurrence.cells`.
        xw: (batch, time, gates); time > 0.
        start: the tensors (batch, n) before the first step.

    Returns:
        A tuple like start, each (batch, time, n).
    """
    leaves = tree.leaves(p)
    if has_torch_function(leaves):  # in a loss of core.per_example
        return handle_torch_function(unroll, leaves, cell, p, xw, start)
    states, state = [], start
    for x in xw.unbind(1):  # slices xw[:, t] would make the backward pass quadratic in time
        state = cell(p, x, state)
        states.append(state)
    return tuple(torch.stack(steps, 1) for steps in zip(*states, strict=True))  # (batch, time, n)
