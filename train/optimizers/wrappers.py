"""Optimizers around optimizers: one per part of the tree, gradient accumulation, averaged parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import tree
from core.tree import Tree
from train.optimizers.protocol import (
    Optimizer,
    Predicate,
    apply_updates,
    check_optimizer,
    check_params,
    check_predicate,
    columns,
    donated_update,
    identity,
    overwrite,
    require,
    sharded,
    widened,
    zero_count,
    zero_moment,
)
from train.optimizers.transforms import bias_correction, set_to_zero


class PathState(NamedTuple):
    """State of each inner optimizer by its name."""

    inner: dict[str, Tree]


class AccumulateState(NamedTuple):
    """Micro-steps since the last step, the sum of their gradients / `every`, and the inner state."""

    micro_step: Tensor
    gradient: Tree
    inner: Tree


class EmaState(NamedTuple):
    """Number of steps, the average, its correction, and the inner state."""

    count: Tensor
    average: Tree
    correction: Tensor
    inner: Tree


def by_path(optimizers: dict[str, Optimizer], labeller: Callable[[str, Any], str]) -> Optimizer:
    """A different optimizer for each set of leaves: `optimizers[labeller(name, leaf)]`.

    Each optimizer sees, and keeps state for, its own leaves only. Donates.

    Raises:
        ValueError: a label that is not a plain name; from `init` and `update`, a leaf whose label is not in
            `optimizers` (it is named), and gradients that do not fit the parameters.
    """
    if not isinstance(optimizers, dict):
        raise TypeError(f"by_path: the optimizers are {type(optimizers).__name__}; expected a dict from labels to them")
    for label in optimizers:
        require(isinstance(label, str) and "." not in label and label, "a label", repr(label), "a string without dots")
        check_optimizer(optimizers[label])
    labels = sorted(optimizers)

    def assign(params: Tree) -> dict[str, str]:
        assigned = {name: labeller(name, leaf) for name, leaf in tree.items(params)}
        for name, label in assigned.items():
            if label not in optimizers:
                raise ValueError(f"'{name}' is labelled {label!r}, but the optimizers are {', '.join(labels)}")
        return assigned

    def part(whole: Tree, assigned: dict[str, str], label: str) -> Tree:
        return tree.partition(whole, lambda name, _: assigned[name] == label)[0]

    def init(params: Tree) -> PathState:
        check_params(params)
        assigned = assign(params)
        return PathState({label: optimizers[label].init(part(params, assigned, label)) for label in labels})

    def update(grads: Tree, state: PathState, params: Tree) -> tuple[Tree, PathState]:
        columns(params, grads)
        assigned = assign(params)
        named, inner = {}, {}
        for label in labels:
            own = part(grads, assigned, label), state.inner[label], part(params, assigned, label)
            updates, inner[label] = optimizers[label].update(*own)
            named.update(tree.items(updates))
        # Put together by name: `merge` would drop nodes without leaves.
        return tree.unflatten(params, [named[name] for name in assigned]), PathState(inner)

    def donated(grads: Tree, state: PathState, params: Tree) -> tuple[Tree, PathState]:
        columns(params, grads)
        assigned = assign(params)
        for label in labels:  # each overwrites the very tensors that `params` and `state` hold
            own = part(grads, assigned, label), state.inner[label], part(params, assigned, label)
            donated_update(optimizers[label])(*own)
        return params, state

    def on_pieces(over: Any) -> Optimizer:
        return by_path({label: sharded(optimizers[label], over) for label in labels}, labeller)

    return Optimizer(init, update, donated, on_pieces)


def freeze(optimizer: Optimizer, predicate: Predicate) -> Optimizer:
    """`optimizer` for all leaves but those where `predicate(name, leaf)`: these get zero updates and keep no state."""
    check_predicate("the predicate of freeze", predicate)
    return by_path(
        {"frozen": set_to_zero(), "trained": optimizer},
        lambda name, leaf: "frozen" if predicate(name, leaf) else "trained",
    )


def masked(transformation: Optimizer, predicate: Predicate) -> Optimizer:
    """`transformation` for the leaves where `predicate(name, leaf)`; the updates of the others pass unchanged."""
    check_predicate("the predicate of masked", predicate)
    parts = {"masked": identity(), "open": transformation}
    return by_path(parts, lambda name, leaf: "open" if predicate(name, leaf) else "masked")._replace(
        donated=None, sharded=lambda over: masked(sharded(transformation, over), predicate)
    )


def accumulate(optimizer: Optimizer, every: int) -> Optimizer:
    """Gradient accumulation: one step of `optimizer` per `every` calls, with the mean gradient, and zero updates else.

    The choice is by torch.where, so each call computes the inner update, and the last one keeps it. Gradients are
    summed in float32 or wider.
    """
    check_optimizer(optimizer)
    require(every >= 1, "every", every, "at least 1")

    def init(params: Tree) -> AccumulateState:
        return AccumulateState(zero_count(params), zero_moment(params), optimizer.init(params))

    def update(grads: Tree, state: AccumulateState, params: Tree) -> tuple[Tree, AccumulateState]:
        columns(params, grads)
        last = state.micro_step == every - 1
        mean = tree.map(lambda s, g: s + g.to(s.dtype) / every, state.gradient, grads)  # ḡ = sum_i g_i / every
        updates, inner = optimizer.update(mean, state.inner, params)

        def choose(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(last, new, old)

        return tree.map(lambda u: choose(u, torch.zeros_like(u)), updates), AccumulateState(
            torch.where(last, 0, state.micro_step + 1).to(state.micro_step.dtype),
            tree.map(lambda s: choose(torch.zeros_like(s), s), mean),
            tree.map(choose, inner, state.inner),
        )

    return Optimizer(init, update, sharded=lambda over: accumulate(sharded(optimizer, over), every))


def ema(optimizer: Optimizer, decay: float = 0.999, *, debias: bool = False) -> Optimizer:
    """Exponential moving average of the parameters: average = decay * average + (1 - decay) * params.

    Make it the outermost optimizer; `averaged(state)` reads the average. It starts from the initial parameters, or,
    with `debias`, from zero, and is then divided by 1 - decay^count when read. Kept in float32 or wider. Donates.
    """
    check_optimizer(optimizer)
    require(0.0 <= decay < 1.0, "decay", decay, "in [0, 1)")

    def init(params: Tree) -> EmaState:
        check_params(params)
        start = zero_moment(params) if debias else tree.map(lambda p: widened(p.detach()).clone(), params)
        count = zero_count(params)
        correction = torch.zeros_like(count, dtype=torch.float32) + (0.0 if debias else 1.0)
        return EmaState(count, start, correction, optimizer.init(params))

    def advance(state: EmaState) -> tuple[Tensor, Tensor]:
        count = state.count + 1
        return count, bias_correction(decay, count, torch.float32) if debias else state.correction

    def update(grads: Tree, state: EmaState, params: Tree) -> tuple[Tree, EmaState]:
        updates, inner = optimizer.update(grads, state.inner, params)
        new = apply_updates(params, updates)
        average = tree.map(lambda a, p: torch.lerp(a, p.to(a.dtype), 1 - decay), state.average, new)
        count, correction = advance(state)
        return updates, EmaState(count, average, correction, inner)

    def donated(grads: Tree, state: EmaState, params: Tree) -> tuple[Tree, EmaState]:
        params, inner = donated_update(optimizer)(grads, state.inner, params)
        with torch.no_grad():
            for a, p in zip(tree.leaves(state.average), tree.leaves(params), strict=True):
                a.lerp_(p.to(a.dtype), 1 - decay)
            count, correction = advance(state)
            overwrite(state, EmaState(count, state.average, correction, inner))
        return params, state

    return Optimizer(init, update, donated, lambda over: ema(sharded(optimizer, over), decay, debias=debias))


def averaged(state: EmaState) -> Tree:
    """The averaged parameters in the state of `ema`. With `debias` they are nan before the first step.

    Raises:
        TypeError: if `state` is not that of an outermost `ema`.
    """
    if not isinstance(state, EmaState):
        raise TypeError(f"averaged() needs the state of ema(...), the outermost optimizer; got {type(state).__name__}")
    return tree.map(lambda a: a / state.correction.to(a.dtype), state.average)
