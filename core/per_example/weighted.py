"""Weighted and clipped sums of per-example gradients, where the weights depend on the gradients' norms."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import tree
from core.compiling import assume_constant_result
from core.per_example.arguments import batch_size, check_function, check_params, sort
from core.per_example.backward_rules import once
from core.per_example.errors import PerExampleError
from core.per_example.forms import reduce, weighted_sum
from core.per_example.plan import Plan, make_plan
from core.per_example.reports import forms_of, plan_of, pull_back, quantities_of_leaf, total_norm
from core.tree import Tree

METHODS = ("auto", "kept", "twice")

KEPT = 2**30
"""Limit in bytes of the memory of "kept" under "auto"."""


class Weighted(NamedTuple):
    """N examples with gradients g_1 .. g_N."""

    losses: Tensor
    """(N,)"""
    sum: Tree
    """sum_n weights[n] g_n, like the parameters."""
    weights: Tree
    """(N,), or a tree like the parameters with (N,) at every leaf."""
    norm: Tree
    """|g_n| of each parameter, (N,) at every leaf, before they are weighted."""
    total_norm: Tensor
    """|g_n| over all parameters, (N,), before they are weighted."""
    aux: Tree = ()
    """The second output of the loss with has_aux, else ()."""


def weighted(
    loss: Callable[[Tree, Tree], Tensor],
    params: Tree,
    batch: Tree,
    weights: Callable[[Tree], Tree],
    *,
    method: str = "auto",
    has_aux: bool = False,
    plan: Plan | None = None,
    budget: int | None = None,
) -> Weighted:
    """sum_n w_n g_n, where the weights are a function of the norms of the gradients: one forward pass.

    Args:
        loss, params, batch, has_aux, budget: as in `reports`.
        weights: from the tree of norms, (N,) at every leaf, to (N,); or to a tree like it, with the weights of each
            parameter alone.
        method: "twice" pulls the same vjp twice, first for the norms, then with the weights (once more for each further
            tensor of weights in a tree). "kept" has one backward pass, keeps the inputs A and the output cotangents G
            of every operation and adds up G^T diag(w) A (Bu et al. 2023, arXiv:2210.00038, "Book-Keeping"): no second
            pass, but the memory of all A and G at once. "auto" is that of the plan if there is one, else "kept" where
            these take up to 1 GiB.
        plan: `core.per_example.plan(...)`, with keep=True for the method "kept".

    Raises:
        PerExampleError: as in `reports`; or weights that are not (N,).
    """
    if method not in METHODS:
        raise PerExampleError(f"method '{method}' is unknown; expected one of {', '.join(METHODS)}")
    check_function("weights", "a function from the tree of norms to (N,)", weights)
    params, batch = sort("the parameters", params), sort("the batch", batch)
    check_params(params)
    count, names = batch_size(batch), tree.names(params)
    if plan is None:
        plan = make_plan(loss, params, batch, names=names, keep=method != "twice", has_aux=has_aux)
        if method == "auto" and count * _kept_bytes(plan) > KEPT:
            plan = make_plan(loss, params, batch, names=names, has_aux=has_aux, compare=False)
    elif method != "auto" and plan.keep != (method == "kept"):
        raise PerExampleError(f"the plan is not for the method '{method}': plan(..., keep={method == 'kept'})")
    plan = plan_of(loss, params, batch, ("norm",), plan, names=names)
    losses, pull, inputs, aux = pull_back(loss, params, batch, plan, {}, budget, has_aux)
    sums, reported = pull(torch.ones_like(losses))
    squares, forms = {}, {}
    for name, leaf in tree.items(params):
        leaf_plan = plan.leaves[name]
        if leaf_plan.keep:
            forms[name] = forms_of(leaf_plan, reported[name], inputs[name])
            squares[name] = reduce(forms[name], leaf_plan.shape, ("norm",), leaf_plan.method, None, budget)["norm"]
        else:
            squares[name] = quantities_of_leaf(plan, name, leaf, reported, inputs, count, None, budget)["norm"]
    norm = tree.unflatten(params, [squares[name].sqrt() for name in names])
    total = torch.stack(list(squares.values())).sum(0).sqrt()  # (N,)
    factors = weights(norm)
    by_name = _checked_weights(factors, norm, count)
    if not plan.keep:
        sums = _pulled(pull, by_name, losses.dtype)

    def own_sum(name: str, g: Tensor) -> Tensor:
        """`g`, unless the uses of the parameter are reduced together; of parameters that were not used zeros."""
        leaf_plan = plan.leaves[name]
        if not (leaf_plan.keep and leaf_plan.sums):
            return g
        return weighted_sum(forms[name], by_name[name], leaf_plan.shape).to(g.dtype)

    sums = tree.map_with_names(own_sum, sums)
    return Weighted(once(losses.detach(), *tree.leaves(params)), sums, factors, norm, total, aux)


def _checked_weights(weights: Tree, norm: Tree, count: int) -> dict[str, Tensor]:
    """The weights (N,) of each parameter, by name."""
    names = tree.names(norm)
    one = isinstance(weights, Tensor) or tree.children(weights) is None
    if not one and tree.names(weights) != names:
        raise PerExampleError("the weights are a tree unlike that of the norms; expected (N,) or a tree like it")
    by_name: dict[str, Any] = dict.fromkeys(names, weights) if one else dict(tree.items(weights))
    for name, x in by_name.items():
        if not isinstance(x, Tensor) or x.shape != (count,):
            shape = tuple(getattr(x, "shape", ())) or type(x).__name__
            where = "" if one else f" of '{name}'"
            raise PerExampleError(f"the weights{where} must be one for each of the {count} examples, not {shape}")
    return by_name


def _pulled(pull: Callable, weights: dict[str, Tensor], dtype: torch.dtype) -> Tree:
    """sum_n w_n g_n by a backward pass for each tensor of weights."""
    different: list[Tensor] = []
    for x in weights.values():
        if not any(x is y for y in different):
            different.append(x)
    pulled = [(x, pull(x.to(dtype))[0]) for x in different]
    if len(pulled) == 1:
        return pulled[0][1]

    def pick(name: str, *gradients: Tensor) -> Tensor:
        return next(g for g, (x, _) in zip(gradients, pulled, strict=True) if x is weights[name])

    return tree.map_with_names(pick, *(sums for _, sums in pulled))


def _kept_bytes(plan: Plan) -> int:
    """Bytes that are kept per example, about: inputs and cotangents."""
    uses = [use for leaf in plan.leaves.values() for use in leaf.uses]
    return sum(use.dtype.itemsize * use.sizes.rows * use.sizes.groups * (use.sizes.p + use.sizes.d) for use in uses)


def clip_factor(max_norm: float | Mapping[str, float]) -> Callable[[Tree], Tree]:
    """The weights min(1, max_norm / |g_n|) over all parameters together, or over each group of them.

    Args:
        max_norm: positive, or {pattern: positive}, see `clipped`.

    Raises:
        PerExampleError: a max_norm that is not positive; from the function, a parameter that no pattern fits.
    """
    bounds = max_norm if isinstance(max_norm, Mapping) else {"*": max_norm}
    for pattern, bound in bounds.items():
        number = isinstance(bound, Real) or (isinstance(bound, Tensor) and bound.ndim == 0)
        if not number or not bound > 0:
            where = f" of '{pattern}'" if isinstance(max_norm, Mapping) else ""
            raise PerExampleError(f"max_norm{where} is {bound}; expected a positive number")

    def factor(norm: Tree, bound: float) -> Tensor:
        total = total_norm(norm)
        # Where the norm is 0 any factor gives 0.
        return (bound / total.clamp(min=torch.finfo(total.dtype).tiny)).clamp(max=1)

    def weights(norm: Tree) -> Tree:
        if not isinstance(max_norm, Mapping):
            return factor(norm, max_norm)
        patterns = {name: _first_fitting(name, tuple(bounds)) for name in tree.names(norm)}
        for name, pattern in patterns.items():
            if pattern is None:
                raise PerExampleError(f"no pattern of max_norm fits parameter '{name}': {', '.join(bounds)}")
        factors = {}
        for pattern in dict.fromkeys(patterns.values()):
            group = {name: x for name, x in tree.items(norm) if patterns[name] == pattern}
            factors[pattern] = factor(group, bounds[pattern])
        return tree.map_with_names(lambda name, _: factors[patterns[name]], norm)

    return weights


@assume_constant_result
def _first_fitting(name: str, patterns: tuple[str, ...]) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def clipped(loss: Callable, params: Tree, batch: Tree, max_norm: float | Mapping[str, float], **options) -> Weighted:
    """sum_n g_n min(1, max_norm / |g_n|): the gradient of each example is clipped to `max_norm`, over all parameters
    together (Abadi et al. 2016, arXiv:1607.00133, algorithm 1) or over each group of them.

    Args:
        max_norm: positive; or {pattern: positive} with shell patterns of parameter names, {"blocks.*": 1.0, "*": 0.1}:
            each parameter is of the group of the first pattern that fits, and the weights are a tree. An example then
            changes the sum by up to the root of the sum of their squares.
        options: of `weighted`, as the other arguments and errors.
    """
    return weighted(loss, params, batch, clip_factor(max_norm), **options)
