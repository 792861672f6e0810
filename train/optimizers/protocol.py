"""The optimizer protocol: what an optimizer is, how optimizers chain, and how one runs on buffers it may overwrite.

updates, state' = update(g, state, θ),   θ' = θ + updates
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import is_tensor_like

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

    `sharded(over) -> optimizer`, where there is one, is the same optimizer for processes that each have pieces of the
    leaves: what looks at more than one number asks `over`, a `train.scale.distributed.Distributed`, for norms or whole
    leaves. One without it must treat every number by itself.

    States are NamedTuples, tuples and dicts of tensors. Whatever changes from step to step is a tensor, so a compiled
    step is compiled once. The arithmetic is in float32 or wider, whatever the dtype of a leaf.
    """

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
    donated: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]] | None = None
    sharded: Callable[[Any], "Optimizer"] | None = None


def sharded(optimizer: Optimizer, over: Any) -> Optimizer:
    """The optimizer for pieces of the parameters, see `Optimizer`."""
    return optimizer.sharded(over) if optimizer.sharded else optimizer


def check_optimizer(optimizer: Any) -> None:
    """Raise TypeError unless this is an Optimizer: torch's are not, nor is the function that makes one."""
    if not isinstance(optimizer, Optimizer):
        module, kind = type(optimizer).__module__, type(optimizer).__name__
        kind = f"{optimizer.__name__}, not called" if hasattr(optimizer, "__name__") else kind
        kind = f"torch.optim's {kind}" if module.startswith("torch.optim") else kind
        raise TypeError(f"optimizer: got {kind}; expected an Optimizer, such as optimizers.adamw(1e-3)")


def check_predicate(name: str, predicate: Any) -> None:
    """Raise TypeError unless this is a function, or None."""
    if predicate is not None and not callable(predicate):
        kind = type(predicate).__name__
        raise TypeError(f"{name} is {kind}; expected a function (name, leaf) -> bool of a leaf's dotted name")


def check_params(params: Tree) -> None:
    """Raise unless these are parameters, floating-point tensors without running statistics; the leaf is named.

    Raises:
        TypeError: a leaf that is not a floating-point tensor.
        ValueError: a leaf `count`, the name under which `core.stats` keeps the number of updates of Stats. Their
            gradient is an increment, which an optimizer would take for a direction.
    """
    for name, leaf in tree.items(params):
        if not is_tensor_like(leaf) or not leaf.is_floating_point():
            kind = leaf.dtype if is_tensor_like(leaf) else type(leaf).__name__
            what = f"parameter '{name}' is" if name else "the parameters are"
            raise TypeError(f"optimizer: {what} {kind}; expected a floating-point tensor{'' if name else ' or a tree'}")
        if name.rpartition(".")[2] == "count":
            raise ValueError(
                f"optimizer: '{name}' belongs to running statistics (Stats), which are not trained: split them off, "
                "`params, stats = spec.split(model, values)`, and differentiate and update `params` alone"
            )


def columns(params: Tree, grads: Tree, *rest: Tree) -> list[list]:
    """The leaves of `params`, `grads` and moments as lists of equal length, checked to fit.

    Raises:
        ValueError: gradients of another structure or shape than the parameters, or None among them; it names the leaf.
    """
    try:
        out = tree.aligned(params, grads, *rest)
    except ValueError as error:
        raise ValueError(f"optimizer: parameters and gradients: {error}") from None
    if not all(is_tensor_like(g) and g.shape == p.shape for p, g in zip(out[0], out[1], strict=True)):
        for name, p, g in zip(tree.names(params), out[0], out[1], strict=True):
            if not is_tensor_like(g) or g.shape != p.shape:
                kind = f"has shape {tuple(g.shape)}" if is_tensor_like(g) else f"is {type(g).__name__}"
                kind = "is None" if g is None else kind
                expected = f"a tensor of shape {tuple(p.shape)}"
                raise ValueError(f"optimizer: the gradient or update of '{name}' {kind}; expected {expected}")
    return out


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """`params + updates`; each leaf keeps its dtype.

    Raises:
        TypeError, ValueError: as `check_params` and `columns`.
    """
    if not torch.compiler.is_compiling():
        check_params(params)
    return tree.unflatten(params, [(p + u).to(p.dtype) for p, u in zip(*columns(params, updates), strict=True)])


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

    Donates if the last link does: the links before it run as pure updates. Its `init` and `update` raise TypeError or
    ValueError on parameters or gradients that do not fit, see `check_params` and `columns`.
    """

    for link in links:
        check_optimizer(link)

    def init(params: Tree) -> Tree:
        check_params(params)
        return tuple(link.init(params) for link in links)

    def update(updates: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        columns(params, updates)
        states = []
        for link, link_state in zip(links, state, strict=True):
            updates, link_state = link.update(updates, link_state, params)
            states.append(link_state)
        return updates, tuple(states)

    def donated(updates: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        columns(params, updates)
        with torch.no_grad():
            for link, link_state in zip(links[:-1], state[:-1], strict=True):
                updates, new = link.update(updates, link_state, params)
                overwrite(link_state, new)
        params, last = links[-1].donated(updates, state[-1], params)
        return params, (*state[:-1], last)

    def on_pieces(over: Any) -> Optimizer:
        return chain(*(sharded(link, over) for link in links))

    any_sharded = any(link.sharded for link in links)
    return Optimizer(init, update, donated if links and links[-1].donated else None, on_pieces if any_sharded else None)


def update_and_overwrite(optimizer: Optimizer) -> Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]:
    """The donated form that any optimizer has: its pure update, then a copy into the old buffers.

    Compiled, the copies disappear: inductor writes the new values where the old ones were.
    """

    def donated(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        with torch.no_grad():
            updates, new = optimizer.update(grads, state, params)
            for p, u in zip(*columns(params, updates), strict=True):
                p.add_(u)
            overwrite(state, new)
        return params, state

    return donated


def donated_update(optimizer: Optimizer) -> Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]:
    """`step(grads, state, params) -> (params, state)` that overwrites the buffers of `params` and `state`.

    It is the optimizer's own donated form where it has one (torch's fused kernels), otherwise its pure update followed
    by an addition in place. The gradients are only read.
    """
    check_optimizer(optimizer)
    return optimizer.donated or update_and_overwrite(optimizer)


def zero_count(params: Tree) -> Tensor:
    """A 0-D int32 zero on the device of the parameters."""
    check_params(params)
    values = tree.leaves(params)
    return torch.zeros((), dtype=torch.int32, device=values[0].device if values else None)


def widened(x: Tensor) -> Tensor:
    """`x` in float32 or wider, the precision of the arithmetic.

    In float16 an epsilon of 1e-8 is 0, and so is a learning rate of 1e-8 or the square of 1e-4.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def zero_moment(params: Tree, dtype: torch.dtype | None = None) -> Tree:
    """A zero per parameter in `dtype`; by default in the parameter's own, but in float32 at least.

    In float16 the mean of squares vanishes, and in bfloat16 it does not decay: 0.999 v rounds to v.
    """

    def zero(p: Tensor) -> Tensor:
        wide = torch.promote_types(p.dtype, torch.float32)
        return torch.zeros_like(p, dtype=wide if dtype is None else dtype, requires_grad=False)

    check_params(params)
    return tree.map(zero, params)


def require_number(name: str, value: Any) -> None:
    """Raise TypeError unless this is a number, which may be a 0-D tensor."""
    if not hasattr(value, "__float__"):
        hint = "; parameters go to optimizer.init" if name == "learning_rate" else ""
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{hint}")


def require(ok: bool, name: str, value: Any, expected: str) -> None:
    """Raise ValueError unless `ok`."""
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {value}")
