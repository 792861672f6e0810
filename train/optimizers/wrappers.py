"""Optimizers around optimizers: a part of the tree each, gradient accumulation, averaged parameters."""

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
    donated_update,
    identity,
    overwrite,
    require,
    zero_count,
    zeros_like,
)
from train.optimizers.transforms import bias_correction, set_to_zero


class PathState(NamedTuple):
    inner: dict[str, Tree]


class AccumulateState(NamedTuple):
    micro_step: Tensor
    gradient: Tree
    inner: Tree


class EmaState(NamedTuple):
    count: Tensor
    average: Tree
    correction: Tensor
    inner: Tree


def by_path(optimizers: dict[str, Optimizer], labeller: Callable[[str, Any], str]) -> Optimizer:
    """A different optimizer for each set of leaves: that of `optimizers[labeller(name, leaf)]`.

    Each optimizer sees, and keeps state for, its own leaves only. Donates.

    Raises:
        ValueError: when a leaf's label is not in `optimizers`, naming the leaf; or for a label that is no plain name.
    """
    labels = sorted(optimizers)
    for label in labels:
        require(isinstance(label, str) and "." not in label and label, "a label", repr(label), "a string without dots")

    def assign(params: Tree) -> dict[str, str]:
        assigned = {name: labeller(name, leaf) for name, leaf in tree.items(params)}
        for name, label in assigned.items():
            if label not in optimizers:
                raise ValueError(f"'{name}' is labelled {label!r}, but the optimizers are {', '.join(labels)}")
        return assigned

    def part(whole: Tree, assigned: dict[str, str], label: str) -> Tree:
        return tree.partition(whole, lambda name, _: assigned[name] == label)[0]

    def init(params: Tree) -> PathState:
        assigned = assign(params)
        return PathState({label: optimizers[label].init(part(params, assigned, label)) for label in labels})

    def update(grads: Tree, state: PathState, params: Tree) -> tuple[Tree, PathState]:
        assigned = assign(params)
        found, inner = {}, {}
        for label in labels:
            mine = part(grads, assigned, label), state.inner[label], part(params, assigned, label)
            updates, inner[label] = optimizers[label].update(*mine)
            found.update(tree.items(updates))
        # Put together by name: `merge` would drop nodes that hold no leaf.
        return tree.unflatten(params, [found[name] for name in assigned]), PathState(inner)

    def donated(grads: Tree, state: PathState, params: Tree) -> tuple[Tree, PathState]:
        assigned = assign(params)
        for label in labels:  # each overwrites the very tensors that `params` and `state` hold
            mine = part(grads, assigned, label), state.inner[label], part(params, assigned, label)
            donated_update(optimizers[label])(*mine)
        return params, state

    return Optimizer(init, update, donated)


def freeze(optimizer: Optimizer, predicate: Predicate) -> Optimizer:
    """`optimizer` for all leaves but those where `predicate(name, leaf)`: these get zero updates and keep no state."""
    return by_path(
        {"frozen": set_to_zero(), "trained": optimizer},
        lambda name, leaf: "frozen" if predicate(name, leaf) else "trained",
    )


def masked(transformation: Optimizer, predicate: Predicate) -> Optimizer:
    """A link of a chain that works on the leaves where `predicate(name, leaf)`; the others' updates pass unchanged."""
    parts = {"masked": identity(), "open": transformation}
    return by_path(parts, lambda name, leaf: "open" if predicate(name, leaf) else "masked")._replace(donated=None)


def accumulate(optimizer: Optimizer, every: int) -> Optimizer:
    """One step of `optimizer` for every `every` calls, with the mean of their gradients; zero updates in between.

    The choice is by torch.where, so each call computes the inner update, and keeps it at the last. Gradients are
    summed in float32 or wider.
    """
    require(every >= 1, "every", every, "at least 1")

    def init(params: Tree) -> AccumulateState:
        sums = tree.map(
            lambda p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False),
            params,
        )
        return AccumulateState(zero_count(params), sums, optimizer.init(params))

    def update(grads: Tree, state: AccumulateState, params: Tree) -> tuple[Tree, AccumulateState]:
        last = state.micro_step == every - 1
        mean = tree.map(lambda s, g: s + g / every, state.gradient, grads)
        updates, inner = optimizer.update(tree.map(lambda s, g: s.to(g.dtype), mean, grads), state.inner, params)

        def choose(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(last, new, old)

        return tree.map(choose, updates, zeros_like(updates)), AccumulateState(
            torch.where(last, 0, state.micro_step + 1).to(state.micro_step.dtype),
            tree.map(choose, zeros_like(mean), mean),
            tree.map(choose, inner, state.inner),
        )

    return Optimizer(init, update)


def ema(optimizer: Optimizer, decay: float = 0.999, *, debias: bool = False) -> Optimizer:
    """Keep an exponential moving average of the parameters: average = decay * average + (1 - decay) * params.

    Make it the outermost optimizer; `averaged(state)` reads the average. It starts from the initial parameters, or,
    with `debias`, from zero, and is then divided by 1 - decay^count when read. Kept in float32 or wider. Donates.
    """
    require(0.0 <= decay < 1.0, "decay", decay, "in [0, 1)")

    def init(params: Tree) -> EmaState:
        wide = tree.map(lambda p: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True), params)
        start = zeros_like(wide) if debias else wide
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

    return Optimizer(init, update, donated)


def averaged(state: EmaState) -> Tree:
    """The averaged parameters in the state of `ema`. With `debias` there is nothing to read before the first step: nan.

    Raises:
        TypeError: if `state` is not that of an outermost `ema`.
    """
    if not isinstance(state, EmaState):
        raise TypeError(f"averaged() needs the state of ema(...), the outermost optimizer; got {type(state).__name__}")
    return tree.map(lambda a: a / state.correction.to(a.dtype), state.average)
