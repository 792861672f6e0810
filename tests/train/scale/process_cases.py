"""Cases that the processes of a test run: `python process_cases.py FOLDER CASE,CASE`; `tests.launched.together` starts
them.

Each case writes what its process has to `FOLDER/<case>-<rank>.pt`.
"""

import functools
import sys
from pathlib import Path

import torch

from core import collectives, random, spec, tree
from core.layers import batch_norm_spec, dropout, linear, linear_spec
from core.layers import normalization as layers
from core.layers.split import Split, vocabulary_cross_entropy
from nets.classifiers import resnet
from nets.language import gpt2
from train import optimizers
from train.losses import WeightedLoss, cross_entropy
from train.objective import evaluation, mean_gradient
from train.scale import launch
from train.scale.distributed import distribute
from train.scale.mesh import open_mesh
from train.step import create, make_step, step_keys

CFG = gpt2.Config(vocabulary=48, context=16, layers=2, heads=4, width=32, dropout=0.2)
STEPS = 20
UNLIKE = torch.tensor([0.0, 0, 0, 0, 3, 1, 0, 2])
"""Weights of eight examples."""


def losses(params, batch, keys, cfg, by_vocabulary=True):
    tokens, targets = batch
    if by_vocabulary and isinstance(params["tokens"]["weight"], Split):
        x = gpt2.features(params, tokens, cfg, key=keys, train=True)
        return vocabulary_cross_entropy(params["tokens"]["weight"], x, targets).mean(1)
    logits = gpt2.apply(params, tokens, cfg, key=keys, train=True)
    return cross_entropy(logits, targets, reduction="none").mean(1)


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = random.randint(random.fold_in(random.key(7), step), (8, 17), 0, CFG.vocabulary)
    return tokens[:, :-1], tokens[:, 1:]


def optimizer(name: str = "adamw"):
    rule = optimizers.adamw(1e-3, weight_decay=0.1)
    if name == "muon":
        rule = optimizers.muon(1e-3, rule, dtype=torch.float32)
    return optimizers.chain(optimizers.clip_by_global_norm(0.5), rule)


def train(over, *, steps=range(STEPS), state=None, optimizer_name="adamw", by_vocabulary=True, **options):
    """(losses and norms of each step, the last state, whole)."""
    rule = optimizer(optimizer_name)
    state = create(random.key(0), gpt2.spec(CFG), rule) if state is None else state
    loss = functools.partial(losses, cfg=CFG, by_vocabulary=by_vocabulary)
    step = make_step(loss, rule, distributed=over, **{"compile": False, **options})
    state, curve = state if over is None else over.cut(state), []
    for i in steps:
        state, metrics = step(state, batch_of(i))
        curve.append(torch.stack([metrics[name] for name in ("loss", "grad_norm", "update_norm")]))
    return torch.stack(curve), state if over is None else over.whole(state)


def curves(processes, way="replicate", sizes=None, **options):
    over = distribute(gpt2.spec(CFG), open_mesh(sizes or {"data": processes.ranks}), way)
    curve, state = train(over, **options)
    return {"curve": curve, "state": tree.flatten(state)}


def watched(processes, way="fsdp"):
    """Norms of the gradient of each example, of a step on cut parameters."""
    over = distribute(gpt2.spec(CFG), open_mesh({"data": processes.ranks}), way)
    return watch_of(over)


def watch_of(over):
    def look(out):
        return {"norms": out.total_norm, "moment": tree.norm(out.second_moment)}

    state = create(random.key(0), gpt2.spec(CFG), optimizer())
    options = {"watch": look, "want": ("norm", "square"), "distributed": over, "compile": False}
    step = make_step(functools.partial(losses, cfg=CFG), optimizer(), **options)
    state, metrics = step(state if over is None else over.cut(state), batch_of(0))
    return metrics


def batch_norm(processes, local_norm=False):
    """The gradient, increments and metrics of a residual net on this process's rows, reduced."""
    cfg = resnet.PRESETS["cifar-resnet8"]
    model = resnet.spec(cfg)
    over = distribute(model, open_mesh({"data": processes.ranks}), "replicate", local_norm)
    return gradient_of(cfg, over)


def unlike_weights(processes):
    """The same of a loss whose weights differ: the first of two processes has none."""
    cfg = resnet.PRESETS["cifar-resnet8"]
    over = distribute(resnet.spec(cfg), open_mesh({"data": processes.ranks}), "replicate")
    return gradient_of(cfg, over, UNLIKE)


def gradient_of(cfg, over=None, weights=None):
    state = create(random.key(0), resnet.spec(cfg), optimizers.sgd(0.1))
    images = random.normal(random.key(1), (8, 3, 8, 8))
    batch = images, torch.arange(8) % 10, torch.ones(8) if weights is None else weights

    def loss(params, batch, keys):
        values = cross_entropy(resnet.apply(params, batch[0], cfg, train=True), batch[1], reduction="none")
        return values if weights is None else WeightedLoss(values, batch[2])

    prepared = () if over is None else (over.prepared,)
    evaluate = evaluation(loss, make_step.__kwdefaults__["policy"], False, *prepared)
    gradient = mean_gradient(evaluate, together=over is not None)
    batch = batch if over is None else over.rows(batch)
    part = gradient.part(state, batch, step_keys(state.key, state.step, len(batch[1])))
    part = part if over is None else gradient.reduce(over, part)
    _, (grads, loss), (increments, _), _ = part
    return {"grads": tree.flatten(grads), "increments": tree.flatten(increments), "loss": loss}


MODEL = {"hidden": linear_spec(8, 8), "inputs": linear_spec(8, 8), "out": linear_spec(8, 5)}


def read_on(over, micro_batches=1):
    """(losses of each step, the loss of each example of the last, the state of the examples, parameters) of a net that
    carries a state, whole."""
    rule = optimizers.adamw(1e-2)

    def loss(params, inputs, keys):
        (x, y), carry = inputs
        h = torch.tanh(linear(params["inputs"], x) + linear(params["hidden"], carry))
        values = cross_entropy(linear(params["out"], dropout(h, 0.2, keys, True)), y, reduction="none")
        return values, {"each": values, "mean": values.mean()}, h

    step = make_step(loss, rule, carry=True, distributed=over, micro_batches=micro_batches, compile=False)
    state, carry, curve = create(random.key(0), MODEL, rule), torch.zeros(8, 8), []
    state = state if over is None else over.cut(state)
    for i in range(6):
        key = random.fold_in(random.key(1), i)
        batch = random.normal(key, (8, 8)), random.randint(random.fold_in(key, 1), (8,), 0, 5, dtype=torch.int64)
        state, metrics, carry = step(state, (batch, carry))
        curve.append(torch.stack([metrics["loss"], metrics["mean"]]))
    params = state.params if over is None else over.whole(state.params)
    return {"curve": torch.stack(curve), "each": metrics["each"], "carry": carry, "out": params["out"]["weight"]}


def carried(processes, micro_batches=1):
    return read_on(distribute(MODEL, open_mesh({"data": processes.ranks}), "fsdp"), micro_batches)


def transforms(processes):
    """Values and derivatives of the collectives of this process, eager and compiled."""
    group, ways, rank = torch.distributed.group.WORLD.group_name, processes.ranks, processes.rank
    x, out = torch.arange(3.0) + rank, {}
    functions = {
        "sum_over": lambda x: (collectives.sum_over(x, group) ** 3).sum() * (rank + 1),
        "stack_over": lambda x: (collectives.stack_over(x, group, ways) ** 3).sum() * (rank + 1),
        "enter": lambda x: (collectives.enter(x, group) ** 3 * (rank + 1)).sum(),
        "leave": lambda x: (collectives.leave(x, group) ** 3).sum(),
        "join": lambda x: (collectives.join(x, -1, group, rank, ways) ** 3).sum(),
    }
    for name, f in functions.items():
        grad = torch.func.grad(f)
        compiled = torch.compile(grad, backend="aot_eager", fullgraph=True)
        out[name] = {
            "value": f(x),
            "grad": grad(x),
            "compiled": compiled(x),
            "second": torch.func.grad(lambda x, grad=grad: grad(x).sum())(x),
            "vmapped": torch.vmap(grad)(torch.stack([x, x + 1])),
            "tangent": torch.func.jvp(f, (x,), (torch.ones(3),))[1],
        }
    for name, f in {
        "sum_all": lambda x: collectives.sum_all([x], group)[0],
        "gather": lambda x: collectives.gather([x], [0], group, ways)[0],
        "scatter_sum": lambda x: collectives.scatter_sum([x], [0], group, ways)[0],
    }.items():
        for transform in (torch.vmap(f), torch.func.grad(lambda x, f=f: f(x).sum())):
            try:
                transform(torch.ones(2, 2))
            except RuntimeError as error:
                out.setdefault("refused", []).append(f"{name}: {error}")
    pieces = torch.arange(24.0).reshape(2, 4, 3) * (rank + 1)
    out["scattered"] = collectives.scatter_sum([pieces, pieces], [0, 1], group, ways)
    out["gathered"] = collectives.gather(out["scattered"], [0, 1], group, ways)
    return out


def far_from_zero(processes):
    """A synchronised batch norm of values around 1000, and that of all rows at once."""
    p = {**spec.init(random.key(0), batch_norm_spec(3))}
    x = 1000 + random.normal(random.key(1), (8, 3, 4, 4))
    group, rows = torch.distributed.group.WORLD.group_name, slice(4 * processes.rank, 4 * processes.rank + 4)
    together = layers.batch_norm(layers.synchronise_batch_norms(p, group, processes.ranks), x[rows], train=True)
    return {"together": together, "all": layers.batch_norm(p, x, train=True)[rows]}


def resumed(processes, state, way):
    over = distribute(gpt2.spec(CFG), open_mesh({"data": processes.ranks}), way)
    template = create(random.key(0), gpt2.spec(CFG), optimizer())
    curve, _ = train(over, steps=range(10, STEPS), state=tree.nest(torch.load(state), like=template))
    return {"curve": curve}


def half(processes, way="fsdp"):
    over = distribute(gpt2.spec(CFG), open_mesh({"data": processes.ranks}), way)
    curve, state = train(over, steps=range(10))
    return {"curve": curve, "state": tree.flatten(state)}


CASES = {
    "replicate": curves,
    "micro": functools.partial(curves, way="fsdp", micro_batches=2),
    "donated": functools.partial(curves, way="fsdp", donate=True),
    "fsdp": functools.partial(curves, way="fsdp"),
    "muon": functools.partial(curves, way="fsdp", optimizer_name="muon"),
    "hsdp": functools.partial(curves, way="hsdp", sizes={"replica": 2, "data": 2}),
    "tensor": functools.partial(curves, way="tensor", sizes={"model": 2}),
    "tensor_joined": functools.partial(curves, way="tensor", sizes={"model": 2}, by_vocabulary=False),
    "tensor_and_data": functools.partial(curves, way="tensor", sizes={"data": 2, "model": 2}),
    "compiled": functools.partial(curves, way="fsdp", steps=range(3), compile=True, backend="aot_eager"),
    "compiled_tensor": functools.partial(
        curves, way="tensor", sizes={"model": 2}, steps=range(3), compile=True, backend="aot_eager"
    ),
    "half": half,
    "watched": watched,
    "batch_norm": batch_norm,
    "unlike_weights": unlike_weights,
    "carried": carried,
    "carried_in_parts": functools.partial(carried, micro_batches=2),
    "local_norm": functools.partial(batch_norm, local_norm=True),
    "far_from_zero": far_from_zero,
    "transforms": transforms,
}


def main(cases: list[str], folder: Path) -> None:
    torch.set_num_threads(1)
    processes = launch.current()
    processes.open_group("cpu")
    for case in cases:
        name, _, state = case.partition("@")
        out = resumed(processes, state, name) if state else CASES[name](processes)
        name = f"{name}_resumed" if state else name
        torch.save(out, folder / f"{name}-{processes.rank}.pt")
    processes.close()


if __name__ == "__main__":
    main(sys.argv[2].split(","), Path(sys.argv[1]))
