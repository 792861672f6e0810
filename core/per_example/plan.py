"""The plan of each parameter: every use it has, and the way its gradients are reduced."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from core import tree
from core.per_example.agreement import compare_losses, have_values
from core.per_example.arguments import check_losses, split_aux
from core.per_example.backward_rules import ELEMENTWISE
from core.per_example.custom_functions import CustomFunction
from core.per_example.errors import ADVICE, PerExampleError
from core.per_example.leaves import watch
from core.per_example.observer import Counter, Observer
from core.per_example.trace import LeafPlan, Planning, Use, inside_vjp
from core.tree import Tree

ODD = 10007
"""The batch size while planning: a prime that no other axis has, which tells the batch axis from the others."""

ODD_COMPILED = 1009
"""The same while compiling, where a loop over the examples is unrolled before it can be refused."""


@dataclass(frozen=True)
class Plan:
    """The plan of `reports` for one loss and one shape of its inputs; `print` it.

    `leaves` has an entry for each parameter that is reported on; `answers` tells which arguments had the batch axis,
    in the order of the loss, and which lifted layers run whole; `layers` why the others do not; `tuples` whether a
    function is given a tuple with a parameter in it.
    """

    leaves: dict[str, LeafPlan]
    answers: tuple
    want: tuple[str, ...]
    keep: bool
    inputs: tuple
    layers: dict[str, str] = field(default_factory=dict)
    tuples: bool = False

    def __str__(self) -> str:
        rows = [("parameter", "shape", "used by", "T x p x d (groups)", "way")]
        for name, leaf in self.leaves.items():
            way = leaf.method + (", uses combined" if leaf.keep else "") + (", gives the gradient" if leaf.sums else "")
            for i, use in enumerate(leaf.uses):
                t, groups, p, d = use.sizes
                size = f"{t} x {p} x {d}" + (f" ({groups})" if groups > 1 else "")
                size = "" if use.operation in ELEMENTWISE else size
                first = (name, str(leaf.shape)) if i == 0 else ("", "")
                rows.append((*first, use.called, size, way if i == 0 else ""))
            if not leaf.uses:
                rows.append((name, str(leaf.shape), "nothing", "", "zero"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(
            [*lines, *(f"layer {name} is mapped over the examples: {why}" for name, why in self.layers.items())]
        )


def signature(params: Tree, batch: Tree) -> tuple:
    """Names, shapes (without the batch axis) and dtypes, on which a plan depends besides the loss."""
    ours = tuple((name, tuple(x.shape), x.dtype) for name, x in tree.items(params))
    theirs = tuple((name, tuple(x.shape[1:]), x.dtype) for name, x in tree.items(batch))
    return ours, theirs


def make_plan(
    loss: Callable,
    params: Tree,
    batch: Tree,
    want: tuple[str, ...] = ("norm",),
    *,
    names: list[str],
    keep: bool = False,
    has_aux: bool = False,
    compare: bool = True,
) -> Plan:
    """Run the loss once on tensors without values and record every use of each parameter.

    Args:
        params, batch: sorted and checked.
        names: parameters that are reported on.
        keep: keep inputs and cotangents of every use, for `weighted`.
        compare: compare the losses of two examples, computed as planned, with those of the loss itself.
    """
    planning, losses = (_compiled_trace if torch.compiler.is_compiling() else _trace)(
        loss, params, batch, names, has_aux
    )
    check_losses(losses, planning.examples)
    leaves = {
        name: _leaf_plan(tuple(leaf.shape), tuple(planning.uses.get(name, ())), want, keep)
        for name, leaf in tree.items(params)
        if name in names
    }
    answers = tuple(planning.answers)
    if compare and have_values(params, batch):
        eps = max(
            [planning.observer.eps, *(torch.finfo(use.dtype).eps for leaf in leaves.values() for use in leaf.uses)]
        )
        lifted = any(answer is True for _, answer in answers)
        compare_losses(loss, params, batch, leaves, answers, planning.mapped, lifted, eps, has_aux)
    return Plan(leaves, answers, want, keep, signature(params, batch), planning.layers, planning.observer.tuples)


@contextmanager
def _unlogged() -> Iterator[None]:
    """torch logs a failing operation with its stack, before the error of which we make a line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _count_calls(loss: Callable, params: Tree, batch: Tree) -> int:
    """Number of operations of the loss."""
    counter = Counter()
    with counter:
        loss(params, batch)
    return counter.calls


def _trace(loss: Callable, params: Tree, batch: Tree, names: list[str], has_aux: bool) -> tuple[Planning, Any]:
    # New ones, not converted: under a vmap the leaves are batched.
    def batch_of(examples: int) -> Tree:
        return tree.map(lambda x: torch.empty((examples, *x.shape[1:]), dtype=x.dtype, device=x.device), batch)

    def run() -> tuple[Planning, Any]:
        planning = Planning(ODD, Observer(ODD, lambda examples: _count_calls(loss, params, batch_of(examples))))
        with torch.enable_grad(), planning.observer:
            return planning, split_aux(loss(watch(planning, params, names), batch_of(ODD)), has_aux)[0]

    with _unlogged(), FakeTensorMode(allow_non_fake_inputs=True):
        params = tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device), params)
        try:
            try:
                return run()
            except CustomFunction:
                return inside_vjp(run)
        except PerExampleError:
            raise
        except Exception as error:
            hint = "everything with a batch axis must come in through `batch`; " if f"{ODD}" in str(error) else ""
            if "does not require grad" in str(error):
                hint = f"a loss may not contain a gradient: {ADVICE}; "
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise PerExampleError(
                f"the loss fails on a batch of {ODD} examples without values ({type(error).__name__}: {line}); {hint}"
                "it may not look at values, nor depend on the size of the batch"
            ) from error


def _compiled_trace(loss: Callable, params: Tree, batch: Tree, names: list[str], has_aux: bool) -> tuple[Planning, Any]:
    """While compiling all tensors are without values; nothing of this is in the compiled graph, as nothing uses it."""
    params = tree.map(lambda x: x.detach(), params)

    def batch_of(examples: int) -> Tree:
        return tree.map(lambda x: x.new_zeros((examples, *x.shape[1:])), batch)  # not empty: asserts stay in the graph

    observer = Observer(ODD_COMPILED, lambda examples: _count_calls(loss, params, batch_of(examples)))
    planning = Planning(ODD_COMPILED, observer)
    with torch.enable_grad(), planning.observer:
        return planning, split_aux(loss(watch(planning, params, names), batch_of(ODD_COMPILED)), has_aux)[0]


def _leaf_plan(shape: tuple, uses: tuple[Use, ...], want: tuple[str, ...], keep: bool) -> LeafPlan:
    together = keep or len(uses) > 1
    method = choose_method(uses, want, shared=not keep)
    # The gradients that are formed anyway, summed, are the gradient of the batch.
    sums = keep or (method in ("formed", "dense") and bool(want))
    return LeafPlan(shape, uses, method, together and bool(uses), sums and bool(uses))


def choose_method(uses: tuple[Use, ...], want: tuple[str, ...], shared: bool) -> str:
    """The cheapest way by the operations of one example's norm; see `core.per_example.forms` for the ways."""
    if all(use.operation in ELEMENTWISE for use in uses):
        return "dense"
    if any(use.operation in ELEMENTWISE for use in uses):
        return "formed"
    tables = [use for use in uses if use.operation == "embedding"]
    outers = [use for use in uses if use.operation != "embedding"]
    if not outers:
        return "compressed"
    time = sum(use.sizes.rows for use in outers)
    if len(uses) == 1 and time == 1:
        return "closed"
    groups, p, d = outers[0].sizes[1:]
    looked_up = sum(use.sizes.rows for use in tables)
    # In float64, which counts twice; the cross term with a table is a matrix product of its own.
    ghost = 4 * groups * time**2 * (p + d) + 8 * time * looked_up * d + 4 * looked_up**2 * d
    # 8 operations take about as long as writing and reading an entry that does not stay in the cache.
    formed = groups * p * d * (8 + (0 if shared else 2 * (time + looked_up)))
    formed_anyway = "gram" in want or "square" in want
    mixed_groups = len({use.sizes.groups for use in outers}) > 1
    return "formed" if formed_anyway or mixed_groups or formed <= ghost else "ghost"
