"""What will be done for each parameter: every use it has, and the way its gradients are reduced."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from core import tree
from core.per_example.backward_rules import ELEMENTWISE
from core.per_example.errors import ADVICE, PerExampleError
from core.per_example.forward_rules import batch_statistics
from core.per_example.leaves import Spread, Watched
from core.per_example.trace import LeafPlan, Session, Use
from core.tree import Tree

ODD = 10007
"""The batch size while planning: a prime that no other axis has, so that the batch axis is told from the others."""

WANTED = ("norm", "dot", "gram", "square")


@dataclass(frozen=True)
class Plan:
    """The plan of `reports` for one loss and one shape of its inputs; `print` it.

    `leaves` has an entry for each parameter; `answers` is which arguments had the batch axis, in the order of the loss.
    """

    leaves: dict[str, LeafPlan]
    answers: tuple
    want: tuple[str, ...]
    inputs: tuple
    dtype: torch.dtype

    def __str__(self) -> str:
        rows = [("parameter", "shape", "used by", "T x p x d (groups)", "way")]
        for name, leaf in self.leaves.items():
            way = leaf.method + (", uses combined" if leaf.kept else "") + (", gives the gradient" if leaf.sums else "")
            for i, use in enumerate(leaf.uses):
                t, groups, p, d = use.sizes
                size = (
                    f"{t} x {p} x {d}" + (f" ({groups})" if groups > 1 else "")
                    if use.operation not in ELEMENTWISE
                    else ""
                )
                rows.append(
                    (name, str(leaf.shape), use.called, size, way) if i == 0 else ("", "", use.called, size, "")
                )
            if not leaf.uses:
                rows.append((name, str(leaf.shape), "nothing", "", "zero"))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join(
            "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        )


class _Mixing(TorchFunctionMode):
    """Sees every operation of the loss, those without a watched parameter too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # In all of these `training` is the sixth argument.
        norms = (F.batch_norm, torch.batch_norm, torch.native_batch_norm)
        if func in norms and kwargs.get("training", args[5] if len(args) > 5 else False):
            leaves = [x for x in (*args, *kwargs.values()) if isinstance(x, Watched)]
            raise batch_statistics(leaves[0] if leaves else None, "batch norm")
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], Tensor) and getattr(Tensor, name, None) is func:
            return getattr(args[0], name)(*args[1:], **kwargs)  # Dynamo does not enter methods written in Python
        return func(*args, **kwargs)


def signature(params: Tree, batch: Tree) -> tuple:
    """What a plan depends on besides the loss: names, shapes and dtypes, the batch axis left out."""
    ours = tuple((name, tuple(x.shape), x.dtype) for name, x in tree.items(params))
    theirs = tuple((name, tuple(x.shape[1:]), x.dtype) for name, x in tree.items(batch))
    return ours, theirs


def examples(batch: Tree) -> int:
    """N, the size of the leading axis that all leaves of the batch share.

    Raises:
        PerExampleError: they do not share one; or there is none.
    """
    sizes = {x.shape[0] if isinstance(x, Tensor) and x.ndim else None for x in tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        shapes = ", ".join(
            f"'{name}' {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}" for name, x in tree.items(batch)
        )
        raise PerExampleError(
            f"the leaves of a batch must be tensors that agree in their leading axis, N > 0: {shapes}"
        )
    return sizes.pop()


def check_params(params: Tree) -> None:
    for name, leaf in tree.items(params):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise PerExampleError(
                f"parameter '{name}' is {kind}; expected a floating-point tensor (Stats stay outside)"
            )


def check_losses(losses: Any, count: int) -> None:
    if isinstance(losses, (Spread, Watched)):
        raise PerExampleError("the loss is the same for every example: nothing in it came in through `batch`")
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if not isinstance(losses, Tensor) or shape != (count,):
        n = "" if isinstance(shape, str) or count not in shape else " (N is the batch)"
        shown = shape if isinstance(shape, str) else "(" + ", ".join("N" if s == count else str(s) for s in shape) + ")"
        raise PerExampleError(f"the loss must return one value an example, (N,); it returned {shown}{n}")
    if not losses.is_floating_point():
        raise PerExampleError(f"the loss must return floating-point values, found {losses.dtype}")


def watch(session: Session, params: Tree) -> Tree:
    return tree.map_with_names(lambda name, leaf: Watched(session, name, leaf), params)


def make(loss: Callable, params: Tree, batch: Tree, want: tuple[str, ...] = ("norm",), keep: bool = False) -> Plan:
    """Run the loss once on tensors without values, and see what it does with each parameter. See `per_example.plan`."""
    unknown = [name for name in want if name not in WANTED]
    if unknown:
        raise PerExampleError(f"want has '{unknown[0]}'; expected some of {', '.join(WANTED)}")
    params, batch = tree.sort(params), tree.sort(batch)
    check_params(params)
    examples(batch)
    session, losses = (
        _compiled_trace(loss, params, batch) if torch.compiler.is_compiling() else _trace(loss, params, batch)
    )
    check_losses(losses, ODD)
    leaves = {}
    for name, leaf in tree.items(params):
        uses = tuple(session.uses.get(name, ()))
        leaves[name] = _leaf_plan(tuple(leaf.shape), uses, want, keep)
    return Plan(leaves, tuple(session.answers), tuple(want), signature(params, batch), losses.dtype)


@contextmanager
def _unlogged() -> Iterator[None]:
    """torch logs a failing operation with its stack, before the error of which we make a line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _trace(loss: Callable, params: Tree, batch: Tree) -> tuple[Session, Any]:
    with _unlogged(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        # New ones, not converted: under a vmap the leaves are batched.
        params = tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device), params)
        batch = tree.map(lambda x: torch.empty((ODD, *x.shape[1:]), dtype=x.dtype, device=x.device), batch)
        session = Session(ODD)
        try:
            with _Mixing():
                losses = loss(watch(session, params), batch)
        except PerExampleError:
            raise
        except Exception as error:
            hint = "everything with a batch axis must come in through `batch`; " if f"{ODD}" in str(error) else ""
            if "does not require grad" in str(error):
                hint = f"a loss may not contain a gradient: {ADVICE}; "
            if "swap" in str(error) or "Watched" in str(error):
                hint = "modules take their parameters through core.lift.lift; "
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise PerExampleError(
                f"the loss fails on a batch of {ODD} examples without values ({type(error).__name__}: {line}); {hint}"
                "it may not look at values, nor depend on the size of the batch"
            ) from error
    return session, losses


def _compiled_trace(loss: Callable, params: Tree, batch: Tree) -> tuple[Session, Any]:
    """While compiling all tensors are without values; nothing of this is in the compiled graph, as nothing uses it."""
    params = tree.map(lambda x: x.detach(), params)
    batch = tree.map(lambda x: x.new_zeros((ODD, *x.shape[1:])), batch)  # not empty: asserts stay in the graph
    session = Session(ODD)
    with _Mixing():
        return session, loss(watch(session, params), batch)


def _leaf_plan(shape: tuple, uses: tuple[Use, ...], want: tuple[str, ...], keep: bool) -> LeafPlan:
    kept = keep or len(uses) > 1
    method = choose_method(uses, want, shared=not kept)
    # What is formed anyway is, summed, the gradient of the batch.
    sums = keep or (not kept and method in ("formed", "dense") and bool(want))
    return LeafPlan(shape, uses, method, kept and bool(uses), sums and bool(uses))


def choose_method(uses: tuple[Use, ...], want: tuple[str, ...], shared: bool) -> str:
    """By the cost of an example's norm, in operations; see `core.per_example.forms` for the ways."""
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
