"""Private training beside Opacus: the same net, data, batches, clipping and noise; time of a step and accuracy.

MNIST, the convolutional net of experiments/private.py (26,010 parameters), SGD. Ours is the compiled step; Opacus runs
with its hooks and with ghost clipping. First the clipped sum without noise must be the same. The accuracy is that after
a few epochs on the same Poisson samples, with noise from each library's own generator; epsilon by both accountants.

    python tests/benchmarks/private.py --data FOLDER [--rounds 20] [--threads 2] [--batch 512] [--steps 200]

FOLDER holds the four files of MNIST; by default that of FUNCTREE_DATA. Needs opacus:
pip install --no-deps opacus opt_einsum.
"""

import argparse
import os
import warnings
from pathlib import Path

import torch
from timing import interleaved, report
from torch import nn

from core import random, tree
from experiments.private import Config, apply, losses, spec
from train import optimizers
from train.data.images import arrays
from train.gradients import private
from train.step import create

CFG, MAX_NORM, DELTA, LEARNING_RATE = Config(), 1.0, 1e-5, 0.5


def as_module(params: tree.Tree) -> nn.Module:
    """The net in torch.nn, with these values."""
    module = nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )
    layers = [layer for layer in module if list(layer.parameters())]
    for layer, values in zip(layers, [*params["convs"], *params["linears"]], strict=True):
        layer.load_state_dict(values)
    return module


class Opacus:
    """A training step of Opacus on a batch of any size; `step(x, y)`."""

    def __init__(self, params: tree.Tree, noise: float, expected_batch: int, ghost: bool):
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping

        self.ghost = ghost
        options = {"noise_multiplier": noise, "max_grad_norm": MAX_NORM, "expected_batch_size": expected_batch}
        self.criterion = nn.CrossEntropyLoss()
        if ghost:
            from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

            self.module = GradSampleModuleFastGradientClipping(
                as_module(params), max_grad_norm=MAX_NORM, use_ghost_clipping=True
            )
            plain = torch.optim.SGD(self.module.parameters(), LEARNING_RATE)
            self.optimizer = DPOptimizerFastGradientClipping(plain, **options)
            self.criterion = DPLossFastGradientClipping(self.module, self.optimizer, self.criterion, "mean")
        else:
            self.module = GradSampleModule(as_module(params))
            self.optimizer = DPOptimizer(torch.optim.SGD(self.module.parameters(), LEARNING_RATE), **options)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.module(2 * x - 1), y).backward()
        self.optimizer.step()

    def values(self) -> list[torch.Tensor]:
        return [value.detach() for value in self.module.parameters()]


def in_module_order(params: tree.Tree) -> list[torch.Tensor]:
    return [layer[name] for layer in [*params["convs"], *params["linears"]] for name in ("weight", "bias")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ["FUNCTREE_DATA"]) / "mnist" if "FUNCTREE_DATA" in os.environ else None
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--physical-batch", type=int, default=128)
    parser.add_argument("--noise-multiplier", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=200, help="0: only the equality and the times")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data or FUNCTREE_DATA must name the folder of MNIST")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    torch.set_num_threads(args.threads)
    learn, test = arrays.mnist(args.data)
    count, noise = len(learn.labels), args.noise_multiplier
    optimizer = optimizers.sgd(LEARNING_RATE)
    beginning = create(random.key(0), spec(CFG), optimizer)

    def ours(noise: float):
        return private.make_private_step(
            lambda params, batch, keys: losses(params, batch, CFG),
            optimizer,
            max_norm=MAX_NORM,
            noise_multiplier=noise,
            expected_batch=args.batch,
            physical_batch=args.physical_batch,
            compile=not args.no_compile,
        )

    def sampled(step: int) -> tuple[private.Sample, tuple, tuple]:
        """The sample of a step, filled up for us and as it is for Opacus."""
        sample = private.poisson_sample(random.key(1), step, count, args.batch / count, args.physical_batch)
        batch = learn.images[sample.indices], learn.labels[sample.indices]
        return sample, batch, tuple(x[sample.mask] for x in batch)

    sample, batch, alone = sampled(0)
    changed, _ = ours(0.0)(beginning, batch, sample.mask)
    for ghost in (False, True):
        other = Opacus(beginning.params, 0.0, args.batch, ghost)
        other.step(*alone)
        before = in_module_order(beginning.params)
        updates = [
            torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
            for after in (in_module_order(changed.params), other.values())
        ]
        error = float((updates[0] - updates[1]).norm() / updates[1].norm())
        print(f"clipped gradient without noise, {'ghost' if ghost else 'hooks'}: relative difference {error:.1e}")
        if not error < 1e-4:
            raise SystemExit("the clipped gradients differ")

    step = ours(noise)
    contestants = {"functree": lambda: step(beginning, batch, sample.mask)}
    for name, ghost in (("opacus, hooks", False), ("opacus, ghost clipping", True)):
        other = Opacus(beginning.params, noise, args.batch, ghost)
        contestants[name] = lambda other=other: other.step(*alone)
    size = f"{len(alone[1])} examples ({len(sample.mask)} with padding)"
    medians = interleaved(contestants, args.rounds)
    report(
        f"one private step, {size}, {args.threads} threads",
        medians,
        "functree",
        {name: 1.0 for name in contestants if name != "functree"},
    )
    if not args.steps:
        return

    from opacus.accountants import PRVAccountant

    state, other = beginning, Opacus(beginning.params, noise, args.batch, ghost=False)
    torch.manual_seed(0)
    for at in range(1, args.steps + 1):
        sample, batch, alone = sampled(at)
        state, _ = step(state, batch, sample.mask)
        other.step(*alone)
    with torch.no_grad():
        guesses = {
            "functree": apply(state.params, test.images, CFG),
            "opacus": other.module(2 * test.images - 1),
        }
    accountant = PRVAccountant()
    accountant.history = [(noise, args.batch / count, args.steps)]
    epsilons = {
        "functree": private.spent_epsilon(noise, args.batch / count, args.steps, DELTA),
        "opacus": accountant.get_epsilon(DELTA),
    }
    for name, logits in guesses.items():
        right = float((logits.argmax(-1) == test.labels).float().mean())
        print(f"{name:<10} {right:.2%} right after {args.steps} steps, epsilon {epsilons[name]:.3f} at delta {DELTA:g}")


if __name__ == "__main__":
    main()
