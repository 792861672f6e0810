"""Weighted and clipped sums of the gradients of examples, where the weights depend on the gradients' norms."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core import tree
from core.per_example import plan as planning
from core.per_example.backward_rules import once
from core.per_example.errors import PerExampleError
from core.per_example.forms import reduce, weighted_sum
from core.per_example.plan import Plan
from core.per_example.reports import forms_of, plan_of, pull_back, quantities_of_leaf, total_norm
from core.tree import Tree

METHODS = ("auto", "kept", "twice")

KEPT = 2**30
"""Bytes that "auto" lets "kept" use."""


class Weighted(NamedTuple):
    """N examples with gradients g_1 .. g_N."""

    losses: Tensor
    """(N,)"""
    sum: Tree
    """sum_n weights[n] g_n, like the parameters."""
    weights: Tensor
    """(N,)"""
    norm: Tree
    """|g_n| of each parameter, (N,) at every leaf, before they are weighted."""
    total_norm: Tensor
    """|g_n| over all parameters, (N,), before they are weighted."""


def weighted(
    loss: Callable[[Tree, Tree], Tensor],
    params: Tree,
    batch: Tree,
    weights: Callable[[Tree], Tensor],
    *,
    method: str = "auto",
    plan: Plan | None = None,
    budget: int | None = None,
) -> Weighted:
    """sum_n w_n g_n, where the weights are a function of the norms of the gradients: one forward pass.

    Args:
        loss, params, batch, budget: as in `reports`.
        weights: from the tree of norms, (N,) at every leaf, to (N,).
        method: "twice" pulls the same vjp twice, first for the norms, then with the weights. "kept" has one backward
            pass, keeps the inputs A and the output cotangents G of every operation and adds up G^T diag(w) A (Bu et al.
            2023, arXiv:2210.00038, "Book-Keeping"): no second pass, but the memory of all A and G at once. "auto" is
            "kept" where these take at most 1 GiB.
        plan: of `plan_weighted` for the same method.

    Raises:
        PerExampleError: as in `reports`; or weights that are not (N,).
    """
    if method not in METHODS:
        raise PerExampleError(f"method '{method}' is unknown; expected one of {', '.join(METHODS)}")
    params, batch = tree.sort(params), tree.sort(batch)
    count = planning.examples(batch)
    if method == "auto":
        made = plan or planning.make(loss, params, batch, ("norm",), keep=True)
        method = "kept" if all(leaf.sums or not leaf.uses for leaf in made.leaves.values()) else "twice"
        if method == "kept" and count * _kept_bytes(made) > KEPT:
            method, plan = "twice", None
        elif plan is None:
            plan = made
    if plan is None:
        plan = planning.make(loss, params, batch, ("norm",), keep=method == "kept")
    made = plan_of(loss, params, batch, ("norm",), plan)
    losses, pull, kept = pull_back(loss, params, batch, made, {}, budget)
    leaves = tree.leaves(params)
    sums, reported = pull(once(torch.ones_like(losses), *leaves))
    squares, forms = {}, {}
    for name, leaf in tree.items(params):
        if method == "kept" and made.leaves[name].uses:
            forms[name] = forms_of(made.leaves[name], reported[name], kept[name])
            leaf_plan = made.leaves[name]
            squares[name] = reduce(forms[name], leaf_plan.shape, ("norm",), leaf_plan.method, None, budget)["norm"]
        else:
            squares[name] = quantities_of_leaf(made, name, leaf, reported, kept, count, None, budget)["norm"]
    norm = tree.unflatten(params, [squares[name].sqrt() for name in tree.names(params)])
    total_norm = torch.stack(list(squares.values())).sum(0).sqrt()
    factors = weights(norm)
    if not isinstance(factors, Tensor) or factors.shape != (count,):
        shape = tuple(getattr(factors, "shape", ())) or type(factors).__name__
        raise PerExampleError(f"the weights must be one for each of the {count} examples, found {shape}")
    if method == "twice":
        sums, _ = pull(once(factors.to(losses.dtype), *leaves))
    else:
        # What was not used keeps the zeros of `sums`.
        totals = {name: weighted_sum(parts, factors, made.leaves[name].shape) for name, parts in forms.items()}
        sums = tree.map_with_names(lambda name, g: totals[name].to(g.dtype) if name in totals else g, sums)
    return Weighted(once(losses.detach(), *leaves), sums, factors, norm, total_norm)


def _kept_bytes(made: Plan) -> int:
    """Of what is kept of one example, about: inputs and cotangents."""
    uses = [use for leaf in made.leaves.values() for use in leaf.uses]
    return sum(use.dtype.itemsize * use.sizes.rows * use.sizes.groups * (use.sizes.p + use.sizes.d) for use in uses)


def clip_factor(max_norm: float) -> Callable[[Tree], Tensor]:
    """The weights min(1, max_norm / |g_n|) over all parameters together."""

    def weights(norm: Tree) -> Tensor:
        total = total_norm(norm)
        # Where the norm is 0 any factor gives 0.
        return (max_norm / total.clamp(min=torch.finfo(total.dtype).tiny)).clamp(max=1)

    return weights


def clipped(loss: Callable, params: Tree, batch: Tree, max_norm: float, **options) -> Weighted:
    """sum_n g_n min(1, max_norm / |g_n|): each example's gradient is shortened to at most `max_norm`, over all
    parameters together (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).

    Arguments and errors as in `weighted`; max_norm must be positive.
    """
    if not max_norm > 0:
        raise PerExampleError(f"max_norm is {max_norm}; expected a positive number")
    return weighted(loss, params, batch, clip_factor(max_norm), **options)
