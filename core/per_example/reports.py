"""Reports on per-example gradients from one forward and one backward pass."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from core import tree
from core.per_example.arguments import (
    WANTED,
    Predicate,
    batch_size,
    check_direction,
    check_losses,
    check_params,
    check_want,
    selected,
    sort,
    split_aux,
)
from core.per_example.backward_rules import form, once
from core.per_example.custom_functions import refuse_custom_functions
from core.per_example.errors import MissingError, PerExampleError
from core.per_example.forms import Form, reduce
from core.per_example.leaves import Invoked, contents, plain, watch
from core.per_example.plan import Plan, make_plan, signature
from core.per_example.trace import Following, LeafPlan, Use
from core.tree import Tree


class Reports(NamedTuple):
    """The results of `reports`; N examples with gradients g_1 .. g_N. Quantities that were not wanted are None."""

    losses: Tensor
    """(N,)"""
    sum: Tree
    """sum_n g_n, like the parameters."""
    norm: Tree = None
    """|g_n| of each parameter, (N,) at every leaf."""
    dot: Tree = None
    """<g_n, direction> of each parameter, (N,) at every leaf."""
    gram: Tree = None
    """<g_n, g_m> of each parameter, (N, N) at every leaf."""
    square: Tree = None
    """sum_n g_n^2, entry by entry, like the parameters."""
    aux: Tree = ()
    """The second output of the loss with has_aux, else ()."""

    @property
    def mean(self) -> Tree:
        """The gradient of the mean loss, like the parameters."""
        return tree.map(lambda x: x / self.losses.shape[-1], self.sum)

    @property
    def total_norm(self) -> Tensor:
        """|g_n| over all parameters, (N,)."""
        return total_norm(_present(self, "norm", "total_norm"))

    @property
    def total_dot(self) -> Tensor:
        """<g_n, direction> over all parameters, (N,)."""
        return torch.stack(tree.leaves(_present(self, "dot", "total_dot"))).sum(0)  # (N,)

    @property
    def total_gram(self) -> Tensor:
        """<g_n, g_m> over all parameters, (N, N)."""
        return sum(tree.leaves(_present(self, "gram", "total_gram")))

    @property
    def second_moment(self) -> Tree:
        """mean_n g_n^2, like the parameters."""
        return tree.map(lambda x: x / self.losses.shape[-1], _present(self, "square", "second_moment"))

    @property
    def variance(self) -> Tree:
        """The unbiased variance of g_n over the examples, entry by entry, like the parameters; needs N > 1."""
        n, squares = self.losses.shape[-1], dict(tree.items(_present(self, "square", "variance")))
        means = dict(tree.items(self.mean))  # of all parameters, also of those without a report
        # (sum_n g_n^2 - N mean^2) / (N - 1)
        values = [((s - n * means[name].to(s.dtype).square()) / (n - 1)).clamp(min=0) for name, s in squares.items()]
        return tree.unflatten(self.square, values)


def _present(out: Reports, quantity: str, name: str) -> Tree:
    """A quantity of the reports.

    Raises:
        MissingError: it is not among those of `want`.
    """
    values = getattr(out, quantity)
    if values is None:
        raise MissingError(f'{name} needs "{quantity}", which was not asked for: reports(..., want=("{quantity}",))')
    return values


def total_norm(norm: Tree) -> Tensor:
    """|g_n| over all parameters, (N,), from the norms of each, (N,) at every leaf."""
    return torch.stack(tree.leaves(norm)).square().sum(0).sqrt()  # (parameters, N) -> (N,)


def plan(
    loss: Callable,
    params: Tree,
    batch: Tree,
    want: str | tuple[str, ...] = ("norm",),
    *,
    keep: bool = False,
    only: Predicate | None = None,
    has_aux: bool = False,
) -> Plan:
    """The plan by which `reports` covers each parameter: print it.

    `reports` makes one itself at each call, which takes about as long as the loss on tensors without values; a loop
    that is not compiled spares that by making it once and passing it on. Outside compiled regions and transforms the
    losses of two examples, computed as planned, are compared with those of the loss itself.

    Args:
        keep: for `weighted` and `clipped` with method "kept".

    Other arguments and errors as in `reports`.
    """
    params, batch, names = _checked(params, batch, only)
    return make_plan(loss, params, batch, check_want(want), names=names, keep=keep, has_aux=has_aux)


def reports(
    loss: Callable[[Tree, Tree], Tensor],
    params: Tree,
    batch: Tree,
    want: str | tuple[str, ...] = ("norm",),
    *,
    direction: Tree | None = None,
    only: Predicate | None = None,
    has_aux: bool = False,
    plan: Plan | None = None,
    budget: int | None = None,
) -> Reports:
    """Losses, the gradient of their sum, and the wanted quantities of the gradient of every example, exactly.

    One forward and one backward pass; no gradient of an example is kept. Works under torch.compile(fullgraph=True) and
    under vmap over an ensemble of parameters.

    Args:
        loss: `loss(params, batch) -> (N,)`, the loss of each example, which no other example may change (`verify` sees
            whether that holds). Everything that has a batch axis must come in through `batch`, keys of dropout too.
        params: a tree of floating-point tensors.
        batch: a tree of tensors with leading axis N.
        want: some of "norm", "dot", "gram", "square"; see `Reports`.
        direction: like the parameters, for "dot".
        only: predicate `(name, leaf) -> bool`: parameters that are reported on; the others only get their gradient in
            `sum`, and may be used in any way.
        has_aux: the loss returns `(losses, aux)`, aux a tree of tensors, which comes back as `Reports.aux`.
        plan: of the same loss, params, batch, want, only and has_aux, whatever N.
        budget: bytes of gradients of examples that are formed at once; by default 4 MiB on a CPU, else 64 MiB.

    Raises:
        PerExampleError: a parameter cannot be covered exactly (an axis of the batch that is folded or not leading, an
            operation on it that cannot be mapped over examples, batch norm in training mode, a gradient inside the
            loss, while compiling a custom autograd.Function); the loss is not (N,), or its values as planned differ;
            the leaves of the batch disagree; the direction is another tree than params. It names the parameter.
    """
    params, batch, names = _checked(params, batch, only)
    plan = plan_of(loss, params, batch, check_want(want), plan, names=names, has_aux=has_aux)
    directions = check_direction(params, names, direction, "dot" in plan.want)
    losses, pull, inputs, aux = pull_back(loss, params, batch, plan, directions, budget, has_aux)
    sums, reported = pull(torch.ones_like(losses))
    quantities: dict[str, list[Tensor]] = {quantity: [] for quantity in plan.want}
    own_sums = {}
    for name, leaf in tree.items(params):
        if name not in plan.leaves:
            continue
        values = quantities_of_leaf(plan, name, leaf, reported, inputs, len(losses), directions.get(name), budget)
        if "sum" in values:
            own_sums[name] = values.pop("sum").to(leaf.dtype)
        for quantity, value in values.items():
            quantities[quantity].append(value.sqrt() if quantity == "norm" else value)
    if own_sums:
        sums = tree.map_with_names(lambda name, g: own_sums.get(name, g), sums)
    like = params if only is None else tree.partition(params, lambda name, _: name in plan.leaves)[0]
    trees = {quantity: tree.unflatten(like, values) for quantity, values in quantities.items()}
    return Reports(once(losses.detach(), *tree.leaves(params)), sums, **trees, aux=aux)


def _checked(params: Tree, batch: Tree, only: Predicate | None) -> tuple[Tree, Tree, list[str]]:
    """(params and batch with sorted keys, names of the parameters that are reported on)."""
    params, batch = sort("the parameters", params), sort("the batch", batch)
    check_params(params)
    batch_size(batch)
    return params, batch, selected(params, only)


def plan_of(
    loss: Callable, params: Tree, batch: Tree, want: tuple[str, ...], plan: Plan | None, *, names: list[str], **options
) -> Plan:
    """`plan`, if it fits, or a new one."""
    if plan is not None and not isinstance(plan, Plan):
        raise PerExampleError(f"plan is {type(plan).__name__}; expected per_example.plan(loss, params, batch), or None")
    if plan is None:
        return make_plan(loss, params, batch, want, names=names, **options)
    if plan.inputs != signature(params, batch) or plan.want != want or list(plan.leaves) != names:
        raise PerExampleError("the plan was made for parameters, a batch or a want of other names, shapes or dtypes")
    return plan


def pull_back(
    loss: Callable, params: Tree, batch: Tree, plan: Plan, directions: dict, budget: int | None, has_aux: bool
):
    """The vjp of the losses, with everything reported on the way.

    Returns:
        losses (N,); the function weights (N,) -> (gradients like the parameters, cotangents of the sinks by parameter
        and use); the inputs of the operations whose cotangents are kept, by parameter and use; aux.
    """
    count, leaves, structure = batch_size(batch), tree.leaves(params), []
    sinks = {
        name: [_sinks(plan, leaf, use, count) for use in plan.leaves[name].uses]
        for name, leaf in tree.items(params)
        if name in plan.leaves
    }

    def watched_loss(leaves: list[Tensor], sinks: dict):
        following = Following(count, plan.leaves, plan.answers, plan.want, sinks, directions, budget)
        watched = watch(following, tree.unflatten(params, leaves), plan.leaves)
        with Invoked() if plan.tuples and torch.compiler.is_compiling() else nullcontext():
            losses, aux = split_aux(refuse_custom_functions(loss)(watched, batch), has_aux)
        check_losses(losses, count)
        following.check_complete()
        structure.append(aux)
        return losses, (following.inputs, [plain(contents(x)).detach() for x in tree.leaves(aux)])

    losses, pull, (inputs, values) = torch.func.vjp(  # type: ignore[misc]  # torch's stub allows for no aux
        watched_loss, leaves, sinks, has_aux=True
    )
    values = [once(x, *leaves) if x.is_floating_point() else x for x in values]

    def gradients(weights: Tensor) -> tuple[Tree, dict]:
        sums, reported = pull(once(weights, *leaves))
        return tree.unflatten(params, sums), reported

    return losses, gradients, inputs, tree.unflatten(structure[0], values)


def _sinks(plan: Plan, leaf: Tensor, use: Use, count: int) -> list[Tensor]:
    """Zeros that take no memory, for the reports of one use."""
    zero = torch.zeros((), dtype=torch.promote_types(leaf.dtype, torch.float32), device=leaf.device)
    leaf_plan = plan.leaves[use.parameter]
    if leaf_plan.keep:
        return [zero.to(use.dtype).expand(count, *use.output)]  # (N, *output)
    shapes = {"norm": (count,), "dot": (count,), "gram": (count, count), "square": leaf_plan.shape}
    return [zero.expand(shapes[quantity]) for quantity in plan.want]


def forms_of(plan: LeafPlan, cotangents: list[list[Tensor]], inputs: list) -> list[Form]:
    """The forms of all uses of a parameter whose cotangents were kept."""
    return [form(use.operation, use.settings, x, g[0]) for use, x, g in zip(plan.uses, inputs, cotangents, strict=True)]


def quantities_of_leaf(
    plan: Plan, name: str, leaf: Tensor, reported, inputs, count: int, direction, budget: int | None
) -> dict[str, Tensor]:
    """{quantity: value} of one parameter; with "sum" where its uses are reduced together and give the gradient."""
    leaf_plan = plan.leaves[name]
    if leaf_plan.keep:
        forms = forms_of(leaf_plan, reported[name], inputs[name])
        want = (*plan.want, "sum") if leaf_plan.sums else plan.want
        return reduce(forms, leaf_plan.shape, want, leaf_plan.method, direction, budget)
    if leaf_plan.uses:
        return dict(zip(plan.want, reported[name][0], strict=True))
    shapes = {"norm": (count,), "dot": (count,), "gram": (count, count), "square": leaf_plan.shape}
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    return {quantity: torch.zeros(shapes[quantity], dtype=dtype, device=leaf.device) for quantity in plan.want}


def combine(parts: list[Reports]) -> Reports:
    """The Reports of a batch from those of its micro-batches: sums are added, quantities per example are concatenated.

    Of aux, leaves with a value per example are concatenated, others averaged, weighted by the number of examples.

    Raises:
        PerExampleError: no parts, parts that differ in their quantities, or a Gram matrix, whose entries between
            micro-batches nobody has computed.
    """
    parts = [parts] if isinstance(parts, Reports) else list(parts)
    if not parts:
        raise PerExampleError("combine: there are no reports to combine")
    for part in parts:
        if not isinstance(part, Reports):
            raise PerExampleError(f"combine: expected Reports, got {type(part).__name__}")
    wants = [", ".join(name for name in WANTED if getattr(part, name) is not None) for part in parts]
    if len(set(wants)) > 1:
        raise PerExampleError(f"combine: the parts have different quantities: {' and '.join(dict.fromkeys(wants))}")
    if any(part.gram is not None for part in parts):
        raise PerExampleError("a Gram matrix is of one batch: it cannot be combined from micro-batches")
    counts = [len(part.losses) for part in parts]

    def add(*xs: Tensor) -> Tensor:
        return sum(xs[1:], xs[0])

    def join(*xs: Tensor) -> Tensor:
        return torch.cat(xs)

    def join_aux(*xs: Tensor) -> Tensor:
        if all(x.ndim and len(x) == n for x, n in zip(xs, counts, strict=True)):
            return torch.cat(xs)
        return sum(x * (n / sum(counts)) for x, n in zip(xs, counts, strict=True))  # type: ignore[return-value]  # not 0

    def over(f: Callable, field: str) -> Tree:
        trees = [getattr(part, field) for part in parts]
        return None if trees[0] is None else tree.map(f, *trees)

    return Reports(
        join(*(part.losses for part in parts)),
        over(add, "sum"),
        norm=over(join, "norm"),
        dot=over(join, "dot"),
        square=over(add, "square"),
        aux=over(join_aux, "aux"),
    )
