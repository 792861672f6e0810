"""What an optimizer is, how optimizers chain, and how one is run on buffers that it may overwrite."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import tree
from core.tree import Tree

Predicate = Callable[[str, Any], bool]
"""`predicate(name, leaf)`: whether something applies to the leaf with this dotted path."""

Schedule = Callable[[Tensor], Tensor]
"""`schedule(count)`: 0-D count of finished steps -> 0-D float32 value."""


class Optimizer(NamedTuple):
    """A gradient transformation.

    `init(params) -> state` and `update(grads, state, params) -> (updates, state)` are pure: they work under vmap and
    torch.compile. `donated(grads, state, params) -> (params, state)`, where there is one, takes the same step and adds
    the updates, but overwrites the buffers of `params` and `state`; it is for the outermost loop, not for vmap.

    States are NamedTuples, tuples and dicts of tensors. Whatever changes from step to step is a tensor, so a compiled
    step is compiled once.
    """

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
    donated: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]] | None = None


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """`params + updates`; each leaf keeps its dtype."""
    return tree.map(lambda p, u: (p + u).to(p.dtype), params, updates)


def identity() -> Optimizer:
    """Leave the gradients as they are; keeps no state."""
    return Optimizer(lambda params: (), lambda updates, state, params: (updates, state))


def overwrite(target: Tree, source: Tree) -> None:
    """Copy the values of `source` into the buffers of `target`, a tree of the same structure."""
    for old, new in zip(tree.leaves(target), tree.leaves(source), strict=True):
        if old is not new:
            old.copy_(new)


def chain(*links: Optimizer) -> Optimizer:
    """Apply transformations one after the other; the state is the tuple of their states.

    Donates if the last link does: the links before it run as pure updates.
    """

    def init(params: Tree) -> Tree:
        return tuple(link.init(params) for link in links)

    def update(updates: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        states = []
        for link, link_state in zip(links, state, strict=True):
            updates, link_state = link.update(updates, link_state, params)
            states.append(link_state)
        return updates, tuple(states)

    def donated(updates: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        with torch.no_grad():
            for link, link_state in zip(links[:-1], state[:-1], strict=True):
                updates, new = link.update(updates, link_state, params)
                overwrite(link_state, new)
        params, last = links[-1].donated(updates, state[-1], params)
        return params, (*state[:-1], last)

    return Optimizer(init, update, donated if links and links[-1].donated else None)


def update_and_overwrite(optimizer: Optimizer) -> Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]:
    """The donated form that any optimizer has: its pure update, then a copy into the old buffers.

    Compiled, the copies disappear: inductor writes the new values where the old ones were.
    """

    def donated(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        with torch.no_grad():
            updates, new = optimizer.update(grads, state, params)
            for p, u in zip(tree.leaves(params), tree.leaves(updates), strict=True):
                p.add_(u)
            overwrite(state, new)
        return params, state

    return donated


def donated_update(optimizer: Optimizer) -> Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]:
    """`step(grads, state, params) -> (params, state)` that overwrites the buffers of `params` and `state`.

    It is the optimizer's own donated form where it has one (torch's fused kernels), otherwise its pure update followed
    by an addition in place. The gradients are only read.
    """
    return optimizer.donated or update_and_overwrite(optimizer)


def zero_count(params: Tree) -> Tensor:
    """A 0-D int32 zero on the device of the parameters."""
    values = tree.leaves(params)
    return torch.zeros((), dtype=torch.int32, device=values[0].device if values else None)


def zeros_like(params: Tree, dtype: torch.dtype | None = None) -> Tree:
    """A zero for every parameter, in its own dtype or in `dtype`."""
    return tree.map(lambda p: torch.zeros_like(p, dtype=dtype, requires_grad=False), params)


def require(ok: bool, name: str, value: Any, expected: str) -> None:
    """Raise ValueError unless `ok`."""
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {value}")
