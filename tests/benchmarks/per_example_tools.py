"""Per-example gradients and what is made of them: functree, a loop, vmap(grad) and the tools that are installed.

`cnn` is the net of torch's tutorial on per-sample gradients (two 3x3 convolutions of 32 and 64 channels, pooling, 9216
to 128 to 10) on 64 images of 28x28; `mlp` is 784, 512, 512, 10 on 128 of them; float32. For each: every example's norm,
its whole gradient, and the sum of squares over examples; for the CNN the Gram matrix as well. All answers are first
compared with the loop's.

    python tests/benchmarks/per_example_tools.py [--rounds 20] [--threads 2] [--nets cnn mlp] [--wants norms gram ...]
"""

import argparse
import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timing import interleaved, report
from torch import Tensor, nn

from core import per_example, random, tree
from core.layers import conv, linear, max_pool

WANTS = ("norms", "gradients", "squares", "gram")


class Problem(NamedTuple):
    module: nn.Module
    function: Callable
    x: Tensor
    labels: Tensor

    def losses(self, params: dict, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.function(params, batch[0]), batch[1], reduction="none")

    @property
    def params(self) -> dict:
        return tree.nest({name: p.detach() for name, p in self.module.named_parameters()})


def cnn() -> Problem:
    layers = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    module = nn.Sequential(*layers, nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10))

    def function(p, x):
        x = max_pool(F.relu(conv(p["2"], F.relu(conv(p["0"], x)))), 2)
        return linear(p["8"], F.relu(linear(p["6"], x.flatten(1))))

    return _problem(module, function, (64, 1, 28, 28))


def mlp() -> Problem:
    module = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def function(p, x):
        return linear(p["4"], F.relu(linear(p["2"], F.relu(linear(p["0"], x)))))

    return _problem(module, function, (128, 784))


def _problem(module: nn.Module, function: Callable, shape: tuple[int, ...]) -> Problem:
    keys = random.split(random.key(0), 3)
    for i, p in enumerate(module.parameters()):
        p.data = random.normal(random.fold_in(keys[0], i), p.shape) / max(1, p[0].numel()) ** 0.5
    labels = random.randint(keys[2], (shape[0],), 0, 10).long()
    return Problem(module, function, random.normal(keys[1], shape), labels)


# What is wanted, from whole gradients: a list of (batch, *shape) in the order of the module's parameters.


def gradients(grads: list[Tensor]) -> list[Tensor]:
    return grads


def norms(grads: list[Tensor]) -> list[Tensor]:
    return [sum(g.flatten(1).square().sum(1) for g in grads).sqrt()]


def squares(grads: list[Tensor]) -> list[Tensor]:
    return [g.square().sum(0) for g in grads]


def gram(grads: list[Tensor]) -> list[Tensor]:
    return [sum(g.flatten(1) @ g.flatten(1).T for g in grads)]


REDUCE = {"norms": norms, "gradients": gradients, "squares": squares, "gram": gram}


# Contestants: (problem, want) -> a call that returns the answer as a list of tensors, or None for another want.


def loop(about: Problem, want: str):
    parameters = list(about.module.parameters())

    def run():
        rows = []
        for x, label in zip(about.x.split(1), about.labels.split(1), strict=True):
            rows.append(torch.autograd.grad(F.cross_entropy(about.module(x), label), parameters))
        return REDUCE[want]([torch.stack(column) for column in zip(*rows, strict=True)])

    return run


def functree(about: Problem, want: str, compiled: bool = False):
    batch, params = (about.x, about.labels), about.params
    names = [name for name, _ in about.module.named_parameters()]

    def call(params, batch):
        if want == "gradients":
            gradients = tree.flatten(per_example.each(about.losses, params, batch))
            return [gradients[name] for name in names]
        quantity = {"norms": "norm", "squares": "square", "gram": "gram"}[want]
        out = per_example.reports(about.losses, params, batch, want=(quantity,))
        if want == "norms":
            return [out.total_norm]
        leaves = tree.flatten(getattr(out, quantity))
        return [sum(leaves.values())] if want == "gram" else [leaves[name] for name in names]

    call = torch.compile(call, fullgraph=True, dynamic=False) if compiled else call
    return lambda: call(params, batch)


def functree_compiled(about: Problem, want: str):
    return functree(about, want, compiled=True)


def vmap_grad(about: Problem, want: str, compiled: bool = False):
    params = {name: p.detach() for name, p in about.module.named_parameters()}

    def loss(params, x, label):
        return F.cross_entropy(torch.func.functional_call(about.module, params, (x[None],)), label[None])

    def call(params, x, labels):
        grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, labels)
        return REDUCE[want](list(grads.values()))

    call = torch.compile(call, fullgraph=True, dynamic=False) if compiled else call
    return lambda: call(params, about.x, about.labels)


def vmap_grad_compiled(about: Problem, want: str):
    return vmap_grad(about, want, compiled=True)


def expanded_weights(about: Problem, want: str):
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    def run():
        _forget(about.module, "grad_sample")
        logits = call_for_per_sample_grads(about.module, batch_size=len(about.x), loss_reduction="sum")(about.x)
        F.cross_entropy(logits, about.labels, reduction="sum").backward()
        return REDUCE[want]([p.grad_sample for p in about.module.parameters()])

    return run


def opacus_hooks(about: Problem, want: str):
    from opacus import GradSampleModule

    module = GradSampleModule(about.module, loss_reduction="sum")

    def run():
        module.zero_grad(set_to_none=True)  # of the examples' gradients too
        F.cross_entropy(module(about.x), about.labels, reduction="sum").backward()
        return REDUCE[want]([p.grad_sample for p in module.parameters()])

    return run


def opacus_ghost(about: Problem, want: str):
    if want != "norms":
        return None
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    module = GradSampleModuleFastGradientClipping(about.module, loss_reduction="sum")

    def run():
        module.zero_grad(set_to_none=True)
        F.cross_entropy(module(about.x), about.labels, reduction="sum").backward()
        return [module.get_norm_sample()]

    return run


def backpack(about: Problem, want: str):
    if want == "gram":
        return None
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import BatchGrad, BatchL2Grad, SumGradSquared

    extension, name = {
        "norms": (BatchL2Grad, "batch_l2"),
        "gradients": (BatchGrad, "grad_batch"),
        "squares": (SumGradSquared, "sum_grad_squared"),
    }[want]
    module, criterion = extend(about.module), extend(nn.CrossEntropyLoss(reduction="sum"))

    def run():
        module.zero_grad(set_to_none=True)
        with extensions(extension()):
            criterion(module(about.x), about.labels).backward()
        leaves = [getattr(p, name) for p in module.parameters()]
        return [sum(leaves).sqrt()] if want == "norms" else leaves

    return run


def torchjd(about: Problem, want: str):
    if want != "gram":
        return None
    from torchjd.autogram import Engine

    engine = Engine(about.module, batch_dim=0)

    def run():
        losses = F.cross_entropy(about.module(about.x), about.labels, reduction="none")
        return [engine.compute_gramian(losses)]

    return run


def _forget(module: nn.Module, name: str) -> None:
    module.zero_grad(set_to_none=True)
    for p in module.parameters():
        if hasattr(p, name):
            delattr(p, name)


OURS = "functree, compiled"
TARGETS = {"norms": 1.0, "gradients": 1.0, "squares": 1.0, "gram": 0.7}
# The package that a contestant needs, and the contestant.
CONTESTANTS = {
    OURS: ("torch", functree_compiled),
    "functree, eager": ("torch", functree),
    "vmap(grad), compiled": ("torch", vmap_grad_compiled),
    "vmap(grad), eager": ("torch", vmap_grad),
    "ExpandedWeights": ("torch", expanded_weights),
    "Opacus, hooks": ("opacus", opacus_hooks),
    "Opacus, ghost": ("opacus", opacus_ghost),
    "BackPACK": ("backpack", backpack),
    "TorchJD": ("torchjd", torchjd),
    "loop": ("torch", loop),
}


def contestants(about: Problem, want: str) -> dict[str, Callable]:
    runs = {}
    for name, (package, make) in CONTESTANTS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{name}: not installed")
            continue
        # A copy each: tools leave hooks and attributes in a module.
        run = make(about._replace(module=copy.deepcopy(about.module)), want)
        if run is not None:
            runs[name] = run
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nets", nargs="+", default=["cnn", "mlp"], choices=["cnn", "mlp"])
    parser.add_argument("--wants", nargs="+", default=list(WANTS), choices=WANTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    for net in args.nets:
        about = {"cnn": cnn, "mlp": mlp}[net]()
        for want in args.wants:
            if want == "gram" and net != "cnn":
                continue
            runs = contestants(about, want)
            expected = runs["loop"]()
            for name, run in runs.items():
                for actual, right in zip(run(), expected, strict=True):
                    worst = (actual - right).abs().max() / right.abs().max()
                    assert actual.shape == right.shape and worst < 1e-4, f"{name}, {want}: off by {worst:.1e}"
            title = f"{net}, {want}, batch {len(about.x)}, {args.threads} threads"
            medians = interleaved(runs, args.rounds, warmup=1)
            report(title, medians, OURS, {name: TARGETS[want] for name in medians if name != OURS})


if __name__ == "__main__":
    main()
