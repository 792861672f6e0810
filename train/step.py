"""The train step: a pure function `(state, batch) -> (state, metrics)`, compiled.

g = ∇ loss(params, batch);   updates, opt_state = optimizer(g);   params + updates
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core import random, spec, stats, transforms, tree
from core.per_example import Reports, combine, reports
from core.tree import Tree
from train.optimizers import Optimizer, apply_updates, donated_update


class TrainState(NamedTuple):
    """All that a run carries from step to step, and all that a checkpoint holds."""

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


FULL_PRECISION = Policy()


def create(key: Tensor, model: Tree, optimizer: Optimizer) -> TrainState:
    """The state before the first step.

    Args:
        key: (2,); half of it initialises the spec `model`, the other half is the run's own key.
    """
    init_key, run_key = random.split(key).unbind(0)
    return start(run_key, spec.init(init_key, model), model, optimizer)


def start(key: Tensor, values: Tree, model: Tree, optimizer: Optimizer) -> TrainState:
    """The state before the first step from given values of the spec `model`, such as published weights."""
    spec.check(model, values)
    params, measured = spec.split(model, values)
    return TrainState(
        params, measured, optimizer.init(params), key, torch.zeros((), dtype=torch.int64, device=key.device)
    )


def step_keys(key: Tensor, step: Tensor, examples: int) -> Tensor:
    """(examples, 2): the key of each example of the batch of a step."""
    return random.sites(random.fold_in(key, step), examples)


def compiled(f: Callable, backend: str = "inductor", *, channels_last: bool = False) -> Callable:
    """`f` through torch.compile, one graph for each set of shapes; what `f` raises while traced keeps its words.

    channels_last: on a CPU, let inductor choose how images lie in memory. For an `f` without gradients: small U-Nets
        are 7 to 15 percent faster by it (tests/benchmarks/diffusion_sampling.py).
    """
    graph = None

    def run(*args):
        nonlocal graph
        if graph is None:
            options = _options(backend, args, channels_last)
            graph = torch.compile(f, fullgraph=True, dynamic=False, backend=backend, options=options)
        try:
            return graph(*args)
        except torch._dynamo.exc.TorchDynamoException:
            # Dynamo hides what f itself raises (a ValueError of the loss, say); uncompiled it has its own words.
            f(*args)
            raise

    return run


def _options(backend: str, args: tuple, channels_last: bool) -> dict | None:
    if backend != "inductor" or not all(
        leaf.device.type == "cpu" for leaf in tree.leaves(args) if isinstance(leaf, Tensor)
    ):
        return None
    # On a CPU, inductor lays images out with their channels last. Parameters and their gradients come and go in the
    # usual order, so in a train step the copies cost more than the layout gains (tests/benchmarks/classifiers.py);
    # and torch 2.13 loses gradients in that layout, of diffusers' U-Net at least (tests/benchmarks/diffusion_unet.py).
    # A value of more than 30 operations that is used twice it writes to a buffer; below that it copies the operations
    # into both users, which in the rounds of a Threefry doubles and doubles again. From 16 on, the step of a small
    # Transformer with dropout compiles in 91 s, not 190; from 8 on in 89 s, but in a profile of a U-Net's step the
    # generated kernels (a tenth of it) then take a quarter longer.
    return {"layout_optimization": channels_last, "realize_opcount_threshold": 16}


def _slice(batch: Tree, start: int, size: int) -> Tree:
    return tree.map(lambda x: x[start : start + size], batch)


def make_step(
    loss: Callable,
    optimizer: Optimizer,
    *,
    policy: Policy = FULL_PRECISION,
    micro_batches: int = 1,
    donate: bool = False,
    update_norm: bool = True,
    watch: Callable[[Reports], dict[str, Tensor]] | None = None,
    want: tuple[str, ...] = ("norm",),
    compile: bool = True,
    backend: str = "inductor",
) -> Callable[[TrainState, Tree], tuple[TrainState, dict[str, Tensor]]]:
    """The train step of a loss and an optimizer.

    Args:
        loss: `loss(params, batch, keys) -> scalar`, or `(scalar, metrics)` with a dict of 0-D tensors: the *mean* over
            the batch. `params` are merged with the Stats; `keys` is (examples, 2), a key an example.
        policy: see `Policy`.
        micro_batches: into how many equal parts a batch is cut, one after the other, to bound memory. The masks of
            dropout do not depend on it; the gradient is the mean of the parts'.
        donate: the step may overwrite the state it is given (parameters, optimizer state), which must then not be
            used again. Fewer allocations and torch's fused kernels; the same values to the last ulp.
        update_norm: report the norm of the change of the parameters; costs a copy of them when donating.
        watch: look at the gradient of every example on the way: `watch(reports of the whole batch) -> metrics`, tensors
            of any shape. The loss must then return (examples,), the loss of each example, and the gradient is that of
            their mean. Not for nets with Stats: batch norm mixes the examples.
        want: what is reported to `watch`, see `core.per_example.reports`.
        compile: through torch.compile, `fullgraph`; `backend` as there.

    Returns:
        `step(state, batch) -> (state, metrics)`; metrics are 0-D tensors: `loss`, `grad_norm`, `update_norm`, and the
        loss's own, or those of `watch`.

    Raises:
        ValueError: from the step: the batch does not divide into the micro-batches, its leaves disagree in size, or
            the loss is no scalar; `watch` and the net has Stats.
        PerExampleError: from the step: `watch`, and a parameter's gradients per example cannot be had; it is named.
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches is {micro_batches}; expected at least 1")

    def evaluate(params: Tree, measured: Tree, batch: Tree, keys: Tensor):
        if policy.compute is not None:
            params, batch = tree.cast(params, policy.compute), tree.cast(batch, policy.compute)
        out = loss(tree.merge(params, measured), batch, keys)
        value, metrics = out if isinstance(out, tuple) else (out, {})
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value, metrics

    def gradients(params: Tree, measured: Tree, batch: Tree, keys: Tensor):
        def objective(params: Tree, measured: Tree):
            return evaluate(params, measured, batch, keys)

        (value, metrics), (grads, increments) = transforms.value_and_grad(objective, argnums=(0, 1), has_aux=True)(
            params, measured
        )
        return grads, increments, {"loss": value, **metrics}

    def watched(params: Tree, measured: Tree, batch: Tree, keys: Tensor) -> Reports:
        if tree.leaves(measured):
            raise ValueError(f"watch: the net has Stats ('{tree.names(measured)[0]}'), so its examples are not apart")
        return reports(lambda p, inputs: evaluate(p, {}, *inputs)[0], params, (batch, keys), want)

    def watched_gradients(parts: list[Reports], measured: Tree):
        found = parts[0] if len(parts) == 1 else combine(parts)
        return found.mean, measured, {"loss": found.losses.mean(), **watch(found)}

    def whole_gradients(params: Tree, measured: Tree, key: Tensor, step: Tensor, batch: Tree):
        keys = step_keys(key, step, _size(batch))
        if watch is not None:
            return watched_gradients([watched(params, measured, batch, keys)], measured)
        grads, increments, metrics = gradients(params, measured, batch, keys)
        return grads, stats.update(measured, increments), metrics

    def mean_gradients(total: Tree, measured: Tree):
        grads, increments, metrics = total
        # Each batch-norm layer divides its increments by its own count, so only the others are divided here.
        grads, metrics = tree.map(lambda x: x / micro_batches, (grads, metrics))
        return grads, stats.update(measured, increments), metrics

    def update(state: TrainState, grads: Tree, measured: Tree, metrics: dict):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = apply_updates(state.params, updates)
        metrics = {**metrics, "grad_norm": tree.norm(grads)}
        metrics = {**metrics, "update_norm": tree.norm(updates)} if update_norm else metrics
        return TrainState(params, measured, opt_state, state.key, state.step + 1), metrics

    overwrite = donated_update(optimizer)

    def update_in_place(state: TrainState, grads: Tree, measured: Tree, metrics: dict):
        # Outside of the compiled region: inductor would fuse the norms into kernels that then run slower.
        metrics = {**metrics, "grad_norm": tree.norm(grads)}
        before = [x.clone() for x in tree.leaves(state.params)] if update_norm else []
        params, opt_state = overwrite(grads, state.opt_state, state.params)
        if update_norm:
            metrics["update_norm"] = tree.norm(torch._foreach_sub(tree.leaves(params), before))
        return TrainState(params, measured, opt_state, state.key, state.step + 1), metrics

    def maybe_compiled(f: Callable) -> Callable:
        return compiled(f, backend) if compile else f

    def whole(state: TrainState, batch: Tree):
        return update(state, *whole_gradients(state.params, state.stats, state.key, state.step, batch))

    if micro_batches == 1 and not donate:
        return maybe_compiled(whole)
    if micro_batches == 1:
        compiled_gradients = maybe_compiled(whole_gradients)

        def donating(state: TrainState, batch: Tree):
            return update_in_place(state, *compiled_gradients(state.params, state.stats, state.key, state.step, batch))

        return donating

    # Several micro-batches: one compiled region a part, so that the graph does not grow with their number.
    compiled_keys = maybe_compiled(step_keys)
    compiled_gradients = maybe_compiled(gradients if watch is None else watched)
    compiled_mean = maybe_compiled(mean_gradients if watch is None else watched_gradients)
    finish = update_in_place if donate else maybe_compiled(update)

    def in_parts(state: TrainState, batch: Tree):
        examples = _size(batch)
        if examples % micro_batches:
            raise ValueError(f"a batch of {examples} examples does not divide into {micro_batches} micro-batches")
        size, keys = examples // micro_batches, compiled_keys(state.key, state.step, examples)
        total, parts = None, []
        for i in range(0, examples, size):
            part = compiled_gradients(state.params, state.stats, _slice(batch, i, size), keys[i : i + size])
            if watch is not None:
                parts.append(part)
            else:
                total = part if total is None else tree.map(torch.add, total, part)
        return finish(state, *compiled_mean(total if watch is None else parts, state.stats))

    return in_parts


def _size(batch: Tree) -> int:
    sizes = {x.shape[0] if x.ndim else None for x in tree.leaves(batch)}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(f"'{name}' {tuple(x.shape)}" for name, x in tree.items(batch))
        raise ValueError(f"the leaves of a batch must agree in their leading axis: {shapes}")
    return sizes.pop()
