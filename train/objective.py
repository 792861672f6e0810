"""From a loss to the gradient of a batch: what a train step differentiates, in parts that can be added up.

g = ∇ loss(params, batch), cut into micro-batches or among processes
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import transforms, tree
from core.per_example import Reports, combine, reports
from core.stats import update as update_stats
from core.tree import Tree
from train.carry import detached
from train.losses.weighted import WeightedLoss, positive

HALF = (torch.bfloat16, torch.float16)


class Policy(NamedTuple):
    """Mixed precision: the dtype that parameters and the batch's floating-point leaves are cast to inside the loss.

    Parameters, their gradients, optimizer states and Stats stay as they are (float32).
    """

    compute: torch.dtype | None = None

    def cast(self, values: Tree) -> Tree:
        """The floating-point leaves in the dtype to compute in."""
        return values if self.compute is None else tree.cast(values, self.compute)


FULL_PRECISION = Policy()


class Gradient(NamedTuple):
    """A way from a batch to a gradient, as pure functions; a batch may be cut into micro-batches.

    part: `(state, batch, keys) -> contribution` of some examples, a tree. `keys` is (examples, 2).
    add: `(contribution, contribution) -> contribution` of both.
    result: `(state, contribution of the whole batch) -> (gradient, stats, metrics)`; a fourth value, a carried state,
        comes out of the step after its metrics.
    reduce: `(Distributed, contribution of this process's rows) -> contribution of all processes'`, where there is one.

    `state` is a TrainState, perhaps without its optimizer state.
    """

    part: Callable[[Any, Tree, Tensor], Tree]
    add: Callable[[Tree, Tree], Tree]
    result: Callable[[Any, Tree], tuple]
    reduce: Callable[[Any, Tree], Tree] | None = None


def evaluation(
    loss: Callable, policy: Policy, carry: bool = False, prepared: Callable[[Tree], Tree] = lambda params: params
) -> Callable[[Tree, Tree, Tree, Tensor], tuple]:
    """`(params, stats, batch, keys) -> (value, metrics, carries)` of a loss under a policy.

    Value and metrics are in float32 or wider; `carries` is [] or, if the batch is (batch, carry), [the new carry].
    `prepared` is applied to parameters and Stats before the loss.
    """
    if not isinstance(policy, Policy) or not isinstance(policy.compute, torch.dtype | None):
        raise TypeError(f"the policy is {policy!r}; expected one such as Policy(torch.bfloat16)")
    if not callable(loss):
        raise TypeError(f"the loss is {type(loss).__name__}; expected a function, loss(params, batch, keys)")
    try:
        inspect.signature(loss).bind("params", "batch", "keys")
    except TypeError as error:
        raise TypeError(f"the loss must take (params, batch, keys): {error}") from None

    def evaluate(params: Tree, stats: Tree, batch: Tree, keys: Tensor):
        if carry and not (isinstance(batch, tuple) and len(batch) == 2):
            raise TypeError(f"step: the batch is {type(batch).__name__}; with a carried state expected (batch, carry)")
        inputs = (policy.cast(batch[0]), batch[1]) if carry else policy.cast(batch)
        out, carries = loss(prepared(tree.merge(policy.cast(params), stats)), inputs, keys), []
        if carry:
            if not isinstance(out, tuple) or len(out) != 3:
                kinds = ", ".join(type(x).__name__ for x in out) if isinstance(out, tuple) else type(out).__name__
                raise TypeError(f"the loss returned ({kinds}); expected (value, dict of metrics, carry)")
            *out, after = out
            out, carries = tuple(out), [detached(batch[1], after)]
        value, metrics = out if isinstance(out, tuple) and not isinstance(out, WeightedLoss) else (out, {})
        if not isinstance(metrics, dict):
            kinds = f"({type(value).__name__}, {type(metrics).__name__})"
            raise TypeError(f"the loss returned {kinds}; expected its value, or (value, dict of metrics)")
        for name, metric in metrics.items():
            if not isinstance(metric, Tensor | WeightedLoss):
                kind = type(metric).__name__
                raise TypeError(f"the loss's metric '{name}' is {kind}; expected a 0-D tensor")
        return *tree.map(widen, (value, metrics)), carries

    return evaluate


def mean_gradient(evaluate: Callable, together: bool = False) -> Gradient:
    """The gradient of a mean, by one backward pass per part. Of two parts with sums of values v and of weights w, the
    whole has the loss, and so the gradient,

    (v_1 + v_2) / (w_1 + w_2),  1 in place of a sum of weights that is 0

    and the means by weight of the metrics and of the increments of the Stats. What the parts have per example, metrics
    and carried states, is that of different examples, one part after the other.

    Args:
        together: the batch norms join the rows of several processes. Then each differentiates its v and not v / w: what
            it sends to the others through the statistics must be in one unit.
    """

    def part(state: Any, batch: Tree, keys: Tensor):
        check_split(state)

        def objective(params: Tree, stats: Tree):
            value, metrics, carries = evaluate(params, stats, batch, keys)
            mean, weight = _mean(value, len(keys))
            return mean * positive(weight) if sums else mean, (mean, metrics, weight, carries)

        sums = together and bool(tree.leaves(state.stats))
        (_, (value, metrics, weight, carries)), (grads, increments) = transforms.value_and_grad(
            objective, argnums=(0, 1), has_aux=True
        )(state.params, state.stats)
        if sums:
            grads = tree.map(lambda g: g / positive(weight).to(g.dtype), grads)
        each = {name: x for name, x in metrics.items() if isinstance(x, WeightedLoss) or x.ndim}
        means = {name: x for name, x in metrics.items() if name not in each}
        return weight, (grads, value), (increments, means), (each, carries)

    def add(one: Tree, other: Tree):
        (first, losses, means, rows), (second, other_losses, other_means, other_rows) = one, other
        weight = first + second
        a, b, total = positive(first), positive(second), positive(weight)
        losses = _lerp(losses, other_losses, b / (a + b))
        losses = tree.map(lambda x: x * ((a + b) / total).to(x.dtype), losses)  # 1 unless a part has no weight
        means = _lerp(means, other_means, second / total)
        return weight, losses, means, tree.map(lambda x, y: torch.cat([x, y]), rows, other_rows)

    def result(state: Any, contribution: Tree):
        _, (grads, loss), (increments, metrics), (each, carries) = contribution
        each = {name: x.mean if isinstance(x, WeightedLoss) else x for name, x in each.items()}
        return grads, update_stats(state.stats, increments), {"loss": loss, **metrics, **each}, *carries

    def reduce(over: Any, contribution: Tree):
        weight, losses, means, rows = contribution
        return *over.mean(weight, losses, means), over.joined(rows)

    return Gradient(part, add, result, reduce)


def _lerp(one: Tree, other: Tree, share: Tensor) -> Tree:
    return tree.map(lambda x, y: torch.lerp(x, y, share.to(x.dtype)), one, other)


def per_example_gradient(evaluate: Callable, watch: Callable, want: tuple[str, ...]) -> Gradient:
    """The gradient of the mean, and reports on the per-example gradients for `watch`."""
    losses = losses_of(evaluate)

    def part(state: Any, batch: Tree, keys: Tensor):
        check_split(state)
        if tree.leaves(state.stats):
            name = tree.names(state.stats)[0]
            raise ValueError(f"watch: the net has Stats ('{name}'), so its examples are not apart")
        return reports(losses, state.params, (batch, keys), want)

    def result(state: Any, contribution: Reports):
        return contribution.mean, state.stats, {"loss": contribution.losses.mean(), **watch(contribution)}

    def reduce(over: Any, contribution: Reports) -> Reports:
        sums, squares = over.summed((contribution.sum, contribution.square))
        losses, norms, dots = over.joined((contribution.losses, contribution.norm, contribution.dot))
        return Reports(losses, sums, norm=norms, dot=dots, square=squares)

    return Gradient(part, lambda one, other: combine([one, other]), result, None if "gram" in want else reduce)


def losses_of(evaluate: Callable) -> Callable[[Tree, tuple], Tensor]:
    """`(params, (batch, keys)) -> (examples,)`, as `core.per_example` takes it, of a net without Stats."""

    def losses(params: Tree, inputs: tuple) -> Tensor:
        value, *_ = evaluate(params, {}, *inputs)
        if isinstance(value, WeightedLoss):
            raise ValueError("the loss has weights; per-example gradients are of (examples,), one loss per example")
        return value

    return losses


def check_split(state: Any) -> None:
    """Raise ValueError if there are Stats among the parameters: their gradient is an increment, and no gradient."""
    for name, leaf in tree.items(state.params):
        if name.split(".")[-1] == "count" and leaf.ndim == 0:
            raise ValueError(f"'{name}' is a Stat among the parameters; make the state by `create` or `start`")


def _mean(value: Tensor | WeightedLoss, examples: int) -> tuple[Tensor, Tensor]:
    """(the mean, its weight), both 0-D."""
    if isinstance(value, WeightedLoss):
        for name, x in zip(value._fields, value, strict=True):
            if x.shape != (examples,):
                raise ValueError(f"the loss's {name} have shape {tuple(x.shape)}; expected ({examples},)")
        return value.mean, value.weights.detach().sum().to(value.values.dtype)
    if not isinstance(value, Tensor) or value.shape not in ((), (examples,)):
        output = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss returned {output}; expected a scalar, or one loss per example, ({examples},)")
    return value if value.ndim == 0 else value.mean(), torch.full((), examples, dtype=value.dtype, device=value.device)


def widen(x: Tensor) -> Tensor:
    """A value to be logged: float32 in place of half precision, integers and booleans."""
    return x.float() if isinstance(x, Tensor) and (x.dtype in HALF or not x.is_floating_point()) else x
