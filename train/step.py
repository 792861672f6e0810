"""The train step: a pure function `(state, batch) -> (state, metrics)`, compiled.

g = ∇ loss(params, batch);   updates, opt_state = optimizer(g);   params + updates

With `carry=True` a state goes from batch to batch: `(state, (batch, carry)) -> (state, metrics, carry)`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core import random, spec, tree
from core.per_example import Reports
from core.tree import Tree
from train.compiled import compiled
from train.objective import FULL_PRECISION, Gradient, Policy, evaluation, mean_gradient, per_example_gradient
from train.optimizers import Optimizer, apply_updates, donated_update
from train.optimizers.protocol import check_optimizer
from train.scale.distributed import Distributed, reduced


class TrainState(NamedTuple):
    """The state of a run between two steps; checkpoints hold it whole."""

    params: Tree
    stats: Tree
    opt_state: Tree
    key: Tensor
    step: Tensor


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
    distributed: Distributed | None = None,
    own_rows: bool = False,
    compile: bool = True,
    backend: str = "inductor",
) -> Callable[[TrainState, Tree], tuple]:
    """The train step of a loss and an optimizer.

    Args:
        loss: `loss(params, batch, keys) -> value`, or `(value, metrics)`. `params` are merged with the Stats; `keys` is
            (examples, 2), one key per example. The value is one of

            - (examples,), a loss per example: their mean is minimised;
            - `train.losses.WeightedLoss`, minimised is sum(values) / sum(weights): for means over tokens;
            - a scalar, the mean over the batch.

            The metrics are a dict of 0-D tensors, averaged over micro-batches and processes by the weights of the loss;
            of `WeightedLoss`, whose mean over the batch is reported; or of (examples,), which are joined.
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
        distributed: mesh and plan of a run on several processes. The state has this process's pieces
            (`Distributed.cut`); the batch and a carry are those of all of them, each takes its rows, and the result is
            that of one process with the whole batch, the new carry too. The loss must be a mean over examples or a
            `WeightedLoss`: one that compares the examples of a batch sees this process's rows alone.
        own_rows: the batch has only this process's rows already.
        compile: through torch.compile, `fullgraph`; `backend` as there.

    Returns:
        `step(state, batch) -> (state, metrics)`; metrics are tensors in float32 or wider: `loss`, `grad_norm`,
        `update_norm`, all 0-D, and the loss's own, or those of `watch`. With `carry`: `step(state, (batch, carry)) ->
        (state, metrics, carry)`, the new carry a copy without gradient, which shares no memory.

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

    if distributed is not None and watch is not None and distributed.mesh.sizes["model"] > 1:
        raise ValueError("make_step: layers cut along model have no per-example gradients; expected no watch with them")

    evaluate = evaluation(loss, policy, carry, *([] if distributed is None else [distributed.prepared]))
    if watch is None:
        gradient = mean_gradient(evaluate, together=distributed is not None and distributed.mesh.rows > 1)
    else:
        gradient = per_example_gradient(evaluate, watch, want)
    size = None if micro_batches == 1 else part_size
    options = {"donate": donate, "update_norm": update_norm, "compile": compile, "backend": backend}
    options |= {"distributed": distributed, "own_rows": own_rows}
    return step_of_gradient(gradient, optimizer, size, **options)


def step_of_gradient(
    gradient: Gradient,
    optimizer: Optimizer,
    part_size: Callable[[int], int] | None = None,
    *,
    donate: bool = False,
    update_norm: bool = True,
    distributed: Distributed | None = None,
    own_rows: bool = False,
    compile: bool = True,
    backend: str = "inductor",
) -> Callable[[TrainState, Tree], tuple]:
    """The train step of a gradient and an optimizer.

    Args:
        part_size: from the number of examples of a batch to that of a micro-batch, which divides it. None: the whole
            batch in one compiled region, with the update unless it is donated.
        donate, update_norm, distributed, own_rows, compile, backend: as in `make_step`.

    Raises ValueError: `distributed`, and the gradient does not say how those of several processes are reduced.
    """
    norm, result = tree.norm, gradient.result
    if distributed is not None:
        norm, result = distributed.norm, reduced(gradient, distributed)
        optimizer = distributed.optimizer(optimizer)

    def maybe_compiled(f: Callable) -> Callable:
        return compiled(f, backend) if compile else f

    def part(state: TrainState, batch: Tree, first: int | Tensor):
        if distributed is not None:
            state = state._replace(params=distributed.gathered(state.params))
        return gradient.part(state, batch, step_keys(state.key, state.step, _size(batch), first))

    def whole(state: TrainState, batch_and_first: tuple):
        return result(state, part(state, *batch_and_first))

    def update(state: TrainState, grads: Tree, stats: Tree, metrics: dict, *carry: Tree):
        metrics = {**metrics, "grad_norm": norm(grads)}
        state, updates = advance(optimizer, state, grads, stats)
        return state, {**metrics, "update_norm": norm(updates)} if update_norm else metrics, *carry

    overwrite = donated_update(optimizer)

    def update_in_place(state: TrainState, grads: Tree, stats: Tree, metrics: dict, *carry: Tree):
        # Outside of the compiled region: inductor would fuse the norms into kernels that then run slower.
        metrics = {**metrics, "grad_norm": norm(grads)}
        before = [x.clone() for x in tree.leaves(state.params)] if update_norm else []
        params, opt_state = overwrite(grads, state.opt_state, state.params)
        if update_norm:
            change = torch._foreach_sub(tree.leaves(params), before)
            metrics["update_norm"] = norm(tree.unflatten(params, list(change)))
        return TrainState(params, stats, opt_state, state.key, state.step + 1), metrics, *carry

    def finish(compute: Callable) -> Callable:
        """`(state, x) -> (state, metrics, *carry)`; `compute(state, x)` gives gradient, Stats, metrics, *carry."""
        if not donate:
            return maybe_compiled(lambda state, x: update(state, *compute(state, x)))
        run = maybe_compiled(compute)
        return lambda state, x: update_in_place(state, *run(_lean(state), x))

    # One compiled region per part, so that the graph does not grow with their number.
    run_whole, run_part, finish_parts = finish(whole), maybe_compiled(part), finish(result)

    def in_parts(state: TrainState, batch: Tree, offset: int):
        examples, total = _size(batch), None
        size = part_size(examples)
        for i in range(0, examples, size):
            contribution = run_part(_lean(state), _slice(batch, i, size), _number(offset + i, state))
            total = contribution if total is None else gradient.add(total, contribution)
        return finish_parts(state, total)

    def step(state: TrainState, batch: Tree):
        if not isinstance(state, TrainState):
            raise TypeError(f"step: the state is {type(state).__name__}; expected a TrainState, as `create` returns")
        first: int | Tensor = 0
        if distributed is not None:
            batch = batch if own_rows or not _size(batch) else distributed.rows(batch)
            first = distributed.mesh.row * _size(batch)
        if part_size is not None:
            return in_parts(state, batch, first)
        # As a tensor where processes differ in it, so that all of them compile one graph.
        return run_whole(state, (batch, 0 if distributed is None else _number(first, state)))

    return step


def _number(value: int, state: TrainState) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device=state.key.device)


def _lean(state: TrainState) -> TrainState:
    """The state without that of the optimizer, which a compiled gradient would check at each call."""
    return state._replace(opt_state=())


def advance(optimizer: Optimizer, state: TrainState, grads: Tree, stats: Tree) -> tuple[TrainState, Tree]:
    """(the next state, the updates of the parameters)."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = apply_updates(state.params, updates)
    return TrainState(params, stats, opt_state, state.key, state.step + 1), updates


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
