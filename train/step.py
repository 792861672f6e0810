"""The train step: a pure function `(state, batch) -> (state, metrics)`, compiled.

g = ∇ loss(params, batch);   updates, opt_state = optimizer(g);   params + updates

With `carry=True` a state goes from batch to batch: `(state, (batch, carry)) -> (state, metrics, carry)`.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core import random, spec, transforms, tree
from core.per_example import Reports, combine, reports
from core.stats import update as update_stats
from core.tree import Tree
from train.carry import detached
from train.compiled import compiled
from train.losses.weighted import WeightedLoss, positive
from train.optimizers import Optimizer, apply_updates, donated_update
from train.optimizers.protocol import check_optimizer

HALF = (torch.bfloat16, torch.float16)


class TrainState(NamedTuple):
    """The state of a run between two steps; checkpoints hold it whole."""

    params: Tree
    stats: Tree
    opt_state: Tree
    key: Tensor
    step: Tensor


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

    `state` is a TrainState, perhaps without its optimizer state.
    """

    part: Callable[[TrainState, Tree, Tensor], Tree]
    add: Callable[[Tree, Tree], Tree]
    result: Callable[[TrainState, Tree], tuple]


def create(key: Tensor, model: Tree, optimizer: Optimizer) -> TrainState:
    """The state before the first step.

    Args:
        key: (2,); half of it initialises the spec `model`, the other half is the run's own key.
    """
    init_key, run_key = random.split(key).unbind(0)
    return start(run_key, spec.init(init_key, model), model, optimizer)


def start(key: Tensor, values: Tree, model: Tree, optimizer: Optimizer) -> TrainState:
    """The state before the first step from given values of the spec `model`, such as published weights."""
    check_optimizer(optimizer)
    spec.check(model, values)
    params, stats = spec.split(model, values)
    return TrainState(params, stats, optimizer.init(params), key, torch.zeros((), dtype=torch.int64, device=key.device))


def step_keys(key: Tensor, step: Tensor, examples: int, first: int | Tensor = 0) -> Tensor:
    """(examples, 2): one key per example of the batch of a step, from example number `first` on."""
    indices = torch.arange(examples, dtype=torch.int32, device=key.device) + first
    return random.fold_in(random.fold_in(key, step), indices)


def make_step(
    loss: Callable,
    optimizer: Optimizer,
    *,
    policy: Policy = FULL_PRECISION,
    micro_batches: int = 1,
    carry: bool = False,
    donate: bool = False,
    update_norm: bool = True,
    watch: Callable[[Reports], dict[str, Tensor]] | None = None,
    want: tuple[str, ...] = ("norm",),
    compile: bool = True,
    backend: str = "inductor",
) -> Callable[[TrainState, Tree], tuple]:
    """The train step of a loss and an optimizer.

    Args:
        loss: `loss(params, batch, keys) -> value`, or `(value, metrics)` with a dict of 0-D tensors. `params` are
            merged with the Stats; `keys` is (examples, 2), one key per example. The value is one of

            - (examples,), a loss per example: their mean is minimised;
            - `train.losses.WeightedLoss`, minimised is sum(values) / sum(weights): for means over tokens;
            - a scalar, the mean over the batch.
        policy: see `Policy`.
        micro_batches: number of equal parts that a batch is cut into, one after the other, to bound memory (gradient
            accumulation). The masks of dropout do not depend on it. Losses per example, weighted or not, give the
            gradient of the whole batch; metrics of the loss are averaged by the same weights. A scalar carries no
            weight: its result is the mean of the parts' means, another one where the parts differ in their numbers of
            tokens (`ignore_id`).
        carry: truncated back-propagation through time. The loss is `loss(params, (batch, carry), keys) -> (value,
            metrics, carry)`, where the carry is any tree of tensors with the examples leading, such as the state of a
            recurrent net after the text so far. It has no gradient, and the policy casts neither: the new one must have
            the shapes and dtypes of the old one. It is not donated. Not with `watch`.
        donate: the step may overwrite the state it is given (parameters, optimizer state), which must then not be
            used again. Fewer allocations and torch's fused kernels; the same values to the last ulp.
        update_norm: report the norm of the change of the parameters; costs a copy of them when donating.
        watch: look at the per-example gradients on the way: `watch(reports of the whole batch) -> metrics`, tensors of
            any shape. The loss must return (examples,); its own metrics are left out. Not for nets with Stats: batch
            norm mixes the examples.
        want: what is reported to `watch`, see `core.per_example.reports`.
        compile: through torch.compile, `fullgraph`; `backend` as there.

    Returns:
        `step(state, batch) -> (state, metrics)`; metrics are 0-D tensors, in float32 or wider: `loss`, `grad_norm`,
        `update_norm`, and the loss's own, or those of `watch`. With `carry`: `step(state, (batch, carry)) -> (state,
        metrics, carry)`, the new carry a copy without gradient, which shares no memory.

    Raises:
        TypeError: a loss, optimizer or policy of another form; from the step: a state or a leaf of the batch.
        ValueError: from the step: the batch does not divide into the micro-batches, its leaves disagree in size, the
            loss has another shape; Stats among the parameters, which would be trained; `watch` and the net has Stats;
            a leaf of the new carry has another shape or dtype than before, which is named.
        PerExampleError: from the step: `watch`, and a parameter has no exact per-example gradients; it is named.
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches is {micro_batches}; expected at least 1")

    if carry and watch is not None:
        raise ValueError("make_step: carry and watch exclude each other; expected one of them")

    def part_size(examples: int) -> int:
        if examples % micro_batches:
            raise ValueError(f"a batch of {examples} examples does not divide into {micro_batches} micro-batches")
        return examples // micro_batches

    evaluate = evaluation(loss, policy, carry)
    gradient = mean_gradient(evaluate) if watch is None else per_example_gradient(evaluate, watch, want)
    size = None if micro_batches == 1 else part_size
    options = {"donate": donate, "update_norm": update_norm, "compile": compile, "backend": backend}
    return step_of_gradient(gradient, optimizer, size, **options)


def step_of_gradient(
    gradient: Gradient,
    optimizer: Optimizer,
    part_size: Callable[[int], int] | None = None,
    *,
    donate: bool = False,
    update_norm: bool = True,
    compile: bool = True,
    backend: str = "inductor",
) -> Callable[[TrainState, Tree], tuple]:
    """The train step of a gradient and an optimizer.

    Args:
        part_size: from the number of examples of a batch to that of a micro-batch, which divides it. None: the whole
            batch in one compiled region, with the update unless it is donated.
        donate, update_norm, compile, backend: as in `make_step`.
    """

    def maybe_compiled(f: Callable) -> Callable:
        return compiled(f, backend) if compile else f

    def part(state: TrainState, batch: Tree, first: int | Tensor = 0):
        return gradient.part(state, batch, step_keys(state.key, state.step, _size(batch), first))

    def whole(state: TrainState, batch: Tree):
        return gradient.result(state, part(state, batch))

    def update(state: TrainState, grads: Tree, stats: Tree, metrics: dict, *carry: Tree):
        state, updates = advance(optimizer, state, grads, stats)
        metrics = {**metrics, "grad_norm": tree.norm(grads)}
        return state, {**metrics, "update_norm": tree.norm(updates)} if update_norm else metrics, *carry

    overwrite = donated_update(optimizer)

    def update_in_place(state: TrainState, grads: Tree, stats: Tree, metrics: dict, *carry: Tree):
        # Outside of the compiled region: inductor would fuse the norms into kernels that then run slower.
        metrics = {**metrics, "grad_norm": tree.norm(grads)}
        before = [x.clone() for x in tree.leaves(state.params)] if update_norm else []
        params, opt_state = overwrite(grads, state.opt_state, state.params)
        if update_norm:
            metrics["update_norm"] = tree.norm(torch._foreach_sub(tree.leaves(params), before))
        return TrainState(params, stats, opt_state, state.key, state.step + 1), metrics, *carry

    def finish(compute: Callable) -> Callable:
        """`(state, x) -> (state, metrics, *carry)`; `compute(state, x)` gives gradient, Stats, metrics, *carry."""
        if not donate:
            return maybe_compiled(lambda state, x: update(state, *compute(state, x)))
        run = maybe_compiled(compute)
        return lambda state, x: update_in_place(state, *run(_lean(state), x))

    # One compiled region per part, so that the graph does not grow with their number.
    run_part, finish_parts = maybe_compiled(part), finish(gradient.result)

    def in_parts(state: TrainState, batch: Tree):
        examples, total = _size(batch), None
        size = part_size(examples)
        for i in range(0, examples, size):
            first = torch.tensor(i, dtype=torch.int32, device=state.key.device)
            contribution = run_part(_lean(state), _slice(batch, i, size), first)
            total = contribution if total is None else gradient.add(total, contribution)
        return finish_parts(state, total)

    run = finish(whole) if part_size is None else in_parts

    def step(state: TrainState, batch: Tree):
        if not isinstance(state, TrainState):
            raise TypeError(f"step: the state is {type(state).__name__}; expected a TrainState, as `create` returns")
        return run(state, batch)

    return step


def _lean(state: TrainState) -> TrainState:
    """The state without that of the optimizer, which a compiled gradient would check at each call."""
    return state._replace(opt_state=())


def advance(optimizer: Optimizer, state: TrainState, grads: Tree, stats: Tree) -> tuple[TrainState, Tree]:
    """(the next state, the updates of the parameters)."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = apply_updates(state.params, updates)
    return TrainState(params, stats, opt_state, state.key, state.step + 1), updates


def evaluation(loss: Callable, policy: Policy, carry: bool = False) -> Callable[[Tree, Tree, Tree, Tensor], tuple]:
    """`(params, stats, batch, keys) -> (value, metrics, carries)` of a loss under a policy.

    Value and metrics are in float32 or wider; `carries` is [] or, if the batch is (batch, carry), [the new carry].
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
        out, carries = loss(tree.merge(policy.cast(params), stats), inputs, keys), []
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
            if not isinstance(metric, Tensor):
                kind = type(metric).__name__
                raise TypeError(f"the loss's metric '{name}' is {kind}; expected a 0-D tensor")
        return *tree.map(widen, (value, metrics)), carries

    return evaluate


def mean_gradient(evaluate: Callable) -> Gradient:
    """The gradient of a mean, by one backward pass per part; the mean over two parts is that of both by weight:

    g <- g_1 + w_2 / (w_1 + w_2) (g_2 - g_1),  so too the metrics and the increments of the Stats

    The states that the parts carry are those of different examples, one part after the other.
    """

    def part(state: TrainState, batch: Tree, keys: Tensor):
        check_split(state)

        def objective(params: Tree, stats: Tree):
            value, metrics, carries = evaluate(params, stats, batch, keys)
            mean, weight = _mean(value, len(keys))
            return mean, (metrics, weight, carries)

        (value, (metrics, weight, carries)), (grads, increments) = transforms.value_and_grad(
            objective, argnums=(0, 1), has_aux=True
        )(state.params, state.stats)
        return weight, (grads, increments, {"loss": value, **metrics}), carries

    def add(one: Tree, other: Tree):
        (first, means, carries), (second, others, after) = one, other
        weight = first + second
        share = second / positive(weight)
        means = tree.map(lambda x, y: torch.lerp(x, y, share.to(x.dtype)), means, others)
        return weight, means, tree.map(lambda x, y: torch.cat([x, y]), carries, after)

    def result(state: TrainState, contribution: Tree):
        _, (grads, increments, metrics), carries = contribution
        return grads, update_stats(state.stats, increments), metrics, *carries

    return Gradient(part, add, result)


def per_example_gradient(evaluate: Callable, watch: Callable, want: tuple[str, ...]) -> Gradient:
    """The gradient of the mean, and reports on the per-example gradients for `watch`."""
    losses = losses_of(evaluate)

    def part(state: TrainState, batch: Tree, keys: Tensor):
        check_split(state)
        if tree.leaves(state.stats):
            name = tree.names(state.stats)[0]
            raise ValueError(f"watch: the net has Stats ('{name}'), so its examples are not apart")
        return reports(losses, state.params, (batch, keys), want)

    def result(state: TrainState, contribution: Reports):
        return contribution.mean, state.stats, {"loss": contribution.losses.mean(), **watch(contribution)}

    return Gradient(part, lambda one, other: combine([one, other]), result)


def losses_of(evaluate: Callable) -> Callable[[Tree, tuple], Tensor]:
    """`(params, (batch, keys)) -> (examples,)`, as `core.per_example` takes it, of a net without Stats."""

    def losses(params: Tree, inputs: tuple) -> Tensor:
        value, *_ = evaluate(params, {}, *inputs)
        if isinstance(value, WeightedLoss):
            raise ValueError("the loss has weights; per-example gradients are of (examples,), one loss per example")
        return value

    return losses


def check_split(state: TrainState) -> None:
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


def _slice(batch: Tree, start: int, size: int) -> Tree:
    return tree.map(lambda x: x[start : start + size], batch)


def _size(batch: Tree) -> int:
    for name, x in tree.items(batch):
        if not isinstance(x, Tensor):
            what = f"'{name}' of the batch" if name else "the batch"
            raise TypeError(f"step: {what} is {type(x).__name__}; expected a tensor, such as torch.as_tensor(array)")
    sizes = {x.shape[0] if x.ndim else None for x in tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(f"'{name}' {tuple(x.shape)}" for name, x in tree.items(batch))
        raise ValueError(f"the leaves of a batch must agree in their leading axis: {shapes or 'no leaf'}")
    return sizes.pop()
