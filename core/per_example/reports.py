"""Reports on every example's gradient from one forward and one backward pass."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core import tree
from core.per_example import plan as planning
from core.per_example.backward_rules import FORMS, once
from core.per_example.errors import PerExampleError
from core.per_example.forms import Form, reduce
from core.per_example.plan import Plan, check_losses, check_params, watch
from core.per_example.trace import LeafPlan, Session, Use
from core.tree import Tree


class Reports(NamedTuple):
    """What `reports` found; N examples with gradients g_1 .. g_N. What was not wanted is None."""

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

    @property
    def mean(self) -> Tree:
        """The gradient of the mean loss, like the parameters."""
        return tree.map(lambda x: x / self.losses.shape[-1], self.sum)

    @property
    def total_norm(self) -> Tensor:
        """|g_n| over all parameters, (N,)."""
        return total_norm(self.norm)

    @property
    def total_dot(self) -> Tensor:
        """<g_n, direction> over all parameters, (N,)."""
        return torch.stack(tree.leaves(self.dot)).sum(0)

    @property
    def total_gram(self) -> Tensor:
        """<g_n, g_m> over all parameters, (N, N)."""
        return sum(tree.leaves(self.gram))

    @property
    def second_moment(self) -> Tree:
        """mean_n g_n^2, like the parameters."""
        return tree.map(lambda x: x / self.losses.shape[-1], self.square)

    @property
    def variance(self) -> Tree:
        """The unbiased variance of g_n over the examples, entry by entry, like the parameters; needs N > 1."""
        n = self.losses.shape[-1]
        return tree.map(lambda s, m: ((s - n * m.to(s.dtype).square()) / (n - 1)).clamp(min=0), self.square, self.mean)


def total_norm(norm: Tree) -> Tensor:
    """|g_n| over all parameters, (N,), from the norms of each, (N,) at every leaf."""
    return torch.stack(tree.leaves(norm)).square().sum(0).sqrt()


def plan(loss: Callable, params: Tree, batch: Tree, want: tuple[str, ...] = ("norm",)) -> Plan:
    """How `reports` would cover each parameter: print it. Nothing is computed.

    `reports` makes one itself at each call, which takes about as long as the loss on tensors without values; a loop
    that is not compiled spares that by making it once and passing it on. Arguments and errors as in `reports`.
    """
    return planning.make(loss, params, batch, want)


def reports(
    loss: Callable[[Tree, Tree], Tensor],
    params: Tree,
    batch: Tree,
    want: tuple[str, ...] = ("norm",),
    *,
    direction: Tree | None = None,
    plan: Plan | None = None,
    budget: int | None = None,
) -> Reports:
    """Losses, the gradient of their sum, and what is wanted of each example's gradient, exactly.

    One forward and one backward pass; no gradient of an example is kept. Works under torch.compile(fullgraph=True) and
    under vmap over an ensemble of parameters.

    Args:
        loss: `loss(params, batch) -> (N,)`, the loss of each example, which no other example may change (`verify` sees
            whether that holds). Everything that has a batch axis must come in through `batch`, keys of dropout too.
        params: a tree of floating-point tensors.
        batch: a tree of tensors with leading axis N.
        want: of "norm", "dot", "gram", "square"; see `Reports`.
        direction: like the parameters, for "dot".
        plan: of the same loss, params, batch and want, whatever N.
        budget: bytes of gradients of examples that are formed at once; by default 4 MiB on a CPU, else 64 MiB.

    Raises:
        PerExampleError: a parameter cannot be covered exactly (an axis of the batch that is folded or not leading, an
            operation on it that cannot be mapped over examples, batch norm in training mode, a gradient inside of the
            loss); the loss is not (N,); the leaves of the batch disagree; the direction is another tree than params.
            It names the parameter.
    """
    params, batch = tree.sort(params), tree.sort(batch)
    made = plan_of(loss, params, batch, tuple(want), plan)
    directions = check_direction(params, direction, "dot" in want)
    count = planning.examples(batch)
    losses, pull, kept = pull_back(loss, params, batch, made, directions, budget)
    sums, reported = pull(once(torch.ones_like(losses), *tree.leaves(params)))
    quantities: dict[str, dict[str, Tensor]] = {name: {} for name in made.want}
    for name, leaf in tree.items(params):
        found = quantities_of_leaf(made, name, leaf, reported, kept, count, directions.get(name), budget)
        for quantity, value in found.items():
            quantities[quantity][name] = value
    trees = {name: tree.unflatten(params, [by[leaf] for leaf in tree.names(params)]) for name, by in quantities.items()}
    if "norm" in trees:
        trees["norm"] = tree.map(torch.sqrt, trees["norm"])
    return Reports(once(losses.detach(), *tree.leaves(params)), sums, **trees)


def plan_of(loss: Callable, params: Tree, batch: Tree, want: tuple[str, ...], made: Plan | None) -> Plan:
    if made is None:
        return planning.make(loss, params, batch, want)
    check_params(params)
    if made.inputs != planning.signature(params, batch) or made.want != want:
        raise PerExampleError("the plan was made for parameters, a batch or a want of other names, shapes or dtypes")
    return made


def check_direction(params: Tree, direction: Tree | None, wanted: bool) -> dict[str, Tensor]:
    if not wanted:
        if direction is not None:
            raise PerExampleError('a direction is only used if want has "dot"')
        return {}
    if direction is None:
        raise PerExampleError('want has "dot", which needs a direction like the parameters')
    found, expected = dict(tree.items(direction)), dict(tree.items(params))
    for name in sorted(found.keys() ^ expected.keys()):
        raise PerExampleError(f"the direction {'lacks' if name in expected else 'has no parameter for'} '{name}'")
    for name, leaf in expected.items():
        if not isinstance(found[name], Tensor) or found[name].shape != leaf.shape:
            shape = tuple(getattr(found[name], "shape", ()))
            raise PerExampleError(f"the direction's '{name}' has shape {shape}, expected {tuple(leaf.shape)}")
    return found


def pull_back(loss: Callable, params: Tree, batch: Tree, made: Plan, directions: dict, budget: int | None):
    """The vjp of the losses, with everything reported on the way.

    Returns:
        losses (N,); the function weights (N,) -> (gradients, what the sinks received, by parameter and use); and the
        inputs of the operations whose cotangents are kept, by parameter and use.
    """
    count = planning.examples(batch)
    sinks = {
        name: [_sinks(made, leaf, use, count) for use in made.leaves[name].uses] for name, leaf in tree.items(params)
    }

    def watched_loss(params: Tree, sinks: dict):
        session = Session(count, made.leaves, made.answers, made.want, sinks, directions, budget)
        losses = loss(watch(session, params), batch)
        check_losses(losses, count)
        session.check_complete()
        return losses, session.kept

    return torch.func.vjp(watched_loss, params, sinks, has_aux=True)


def _sinks(made: Plan, leaf: Tensor, use: Use, count: int) -> list[Tensor]:
    """Zeros that take no memory, for what a use reports."""
    zero = torch.zeros((), dtype=torch.promote_types(leaf.dtype, torch.float32), device=leaf.device)
    plan = made.leaves[use.parameter]
    if plan.kept:
        return [zero.to(use.dtype).expand(count, *use.output)]
    shapes = {"norm": (count,), "dot": (count,), "gram": (count, count), "square": plan.shape}
    return [zero.expand(shapes[quantity]) for quantity in made.want]


def forms_of(plan: LeafPlan, cotangents: list[list[Tensor]], inputs: list) -> list[Form]:
    """The forms of all uses of a parameter whose cotangents were kept."""
    return [
        FORMS[use.operation](use.settings, x, g[0]) for use, x, g in zip(plan.uses, inputs, cotangents, strict=True)
    ]


def quantities_of_leaf(
    made: Plan, name: str, leaf: Tensor, reported, kept, count: int, direction, budget: int | None
) -> dict:
    """{quantity: value} of one parameter."""
    plan = made.leaves[name]
    if plan.kept:
        forms = forms_of(plan, reported[name], kept[name])
        return reduce(forms, plan.shape, made.want, plan.method, direction, budget)
    if plan.uses:
        return dict(zip(made.want, reported[name][0], strict=True))
    shapes = {"norm": (count,), "dot": (count,), "gram": (count, count), "square": plan.shape}
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    return {quantity: torch.zeros(shapes[quantity], dtype=dtype, device=leaf.device) for quantity in made.want}


def combine(parts: list[Reports]) -> Reports:
    """The Reports of a batch from those of its micro-batches: sums are added, what is by example is concatenated.

    Raises:
        PerExampleError: there is a Gram matrix, whose entries between micro-batches nobody has computed.
    """
    if any(part.gram is not None for part in parts):
        raise PerExampleError("a Gram matrix is of one batch: it cannot be combined from micro-batches")

    def added(*xs: Tensor) -> Tensor:
        return sum(xs[1:], xs[0])

    def joined(*xs: Tensor) -> Tensor:
        return torch.cat(xs)

    def over(f: Callable, field: str) -> Tree:
        trees = [getattr(part, field) for part in parts]
        return None if trees[0] is None else tree.map(f, *trees)

    return Reports(
        joined(*(part.losses for part in parts)),
        over(added, "sum"),
        norm=over(joined, "norm"),
        dot=over(joined, "dot"),
        square=over(added, "square"),
    )
