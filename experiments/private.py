"""Differentially private training: a classifier of digits that hardly depends on any one of its examples.

Abadi et al. 2016, "Deep Learning with Differential Privacy" (arXiv:1607.00133): the gradient of every single example is
clipped, noise is added to their sum, and an accountant says what a batch drawn at random then tells of any example:
after T steps the parameters are (epsilon, delta)-private. The net is the small one with tanh that Papernot et al. 2021
use ("Tempered Sigmoid Activations for Deep Learning with Differential Privacy", arXiv:2007.14191). Without a flag it
learns from 1500 of scikit-learn's 8x8 digits, offline:

    python experiments/private.py                                        about 90 seconds on a CPU core
    python experiments/private.py --non-private                          the same net and batches, unclipped, no noise
    python experiments/private.py --data FOLDER --delta 1e-5 --batch 512 --steps 1000 --physical-batch 128 \
        --noise-multiplier 1.0 --max-norm 0.5 --learning-rate 1.0           MNIST, or a set in its format
    python experiments/private.py --resume                               go on with the newest run, and its accounting

It ends with the accuracy at (epsilon, delta). Only the parameters are private: the training losses, gradient norms and
pictures in the run's folder show the examples as they are, and so does the seed, from which the noise can be drawn
again. Settings that were chosen by looking at the accuracy, as here, are not accounted for either.
Expected: 87.5 % of the test digits right at epsilon 2.78, delta 5e-4.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core import per_example, random, tree
from core.layers import conv, conv_spec, linear, linear_spec, max_pool
from train import optimizers, plots
from train.data import batching
from train.data.images import arrays
from train.files import read_json, write_json
from train.gradients import private
from train.losses import cross_entropy
from train.run import command_line
from train.run import run as runs
from train.run.logs import read_metrics
from train.step import create, make_step

RUNS = Path("runs/private")
WATCHED = 256  # examples whose gradient norms are drawn
SHOWN = 24  # misclassified images


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits" (in scikit-learn), or a folder with the four files of MNIST or of a set in its format."""
    noise_multiplier: float = 3.0
    """Standard deviation of the noise on the sum of gradients, as a multiple of --max-norm."""
    max_norm: float = 1.0
    """To what length the gradient of an example is clipped."""
    clipping: str = "flat"
    """flat, automatic or per_layer: see train.gradients.private.clipped_sum."""
    batch: int = 300
    """Expected number of examples in a batch, each of which has the same chance to be in it."""
    steps: int = 150
    """Training steps; each one spends some of the privacy."""
    delta: float = 5e-4
    """Chance with which epsilon may not hold; less than 1 / examples."""
    learning_rate: float = 1.0
    """Learning rate of SGD, constant."""
    momentum: float = 0.5
    """Momentum of SGD."""
    non_private: bool = False
    """Train without clipping and noise, to compare."""
    physical_batch: int = 64
    """Examples that go through the net at once; changes the speed and no figure."""
    every: int = 10
    """Steps between two measurements: accuracy, epsilon, gradient norms."""
    save_every: int = 50
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random: initial values, batches, noise."""
    name: str | None = None
    """Folder under runs/private; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    compile: bool = True
    """Compile the train step with torch.compile."""


@dataclass(frozen=True)
class Config:
    """Side of the square grey images, and how many classes."""

    side: int = 28
    classes: int = 10

    def __post_init__(self):
        if self.side < 8:
            raise ValueError(f"images of {self.side} x {self.side} pixels are too small; expected 8 x 8 or more")

    @property
    def kernels(self) -> tuple[int, int]:
        """Of the two convolutions: 8 and 4 for MNIST, 4 and 2 for images of 8 x 8 to 15 x 15."""
        return (8, 4) if self.side >= 16 else (4, 2)

    @property
    def flat(self) -> int:
        """How many numbers the convolutions leave of an image: 32 channels."""
        first, second = self.kernels
        side = (self.side + 2 * (first // 2 - 1) - first) // 2 + 1
        side = (side - 1 - second) // (second // 2) + 1
        return 32 * (side - 1) ** 2


def spec(cfg: Config) -> tree.Tree:
    first, second = cfg.kernels
    return {
        "convs": [conv_spec(1, 16, first), conv_spec(16, 32, second)],
        "linears": [linear_spec(cfg.flat, 32), linear_spec(32, cfg.classes)],
    }


def apply(params: tree.Tree, x: Tensor, cfg: Config) -> Tensor:
    """(batch, 1, side, side) -> (batch, classes). Table 1 of the paper; tanh bounds what a gradient can be."""
    first, second = params["convs"]
    x = max_pool(torch.tanh(conv(first, 2 * x - 1, stride=2, padding=cfg.kernels[0] // 2 - 1)), 2, stride=1)
    x = max_pool(torch.tanh(conv(second, x, stride=cfg.kernels[1] // 2)), 2, stride=1)
    hidden, last = params["linears"]
    return linear(last, torch.tanh(linear(hidden, x.flatten(1))))


def losses(params: tree.Tree, batch: tuple[Tensor, Tensor], cfg: Config) -> Tensor:
    return cross_entropy(apply(params, batch[0], cfg), batch[1], reduction="none")


@torch.no_grad()
def predicted(params: tree.Tree, pixels: Tensor, cfg: Config) -> Tensor:
    """(examples,) classes."""
    parts = batching.evaluation_batches(len(pixels), 1000)
    return torch.cat([apply(params, pixels[part], cfg).argmax(-1) for part in parts])


def make_any_step(args: Args, cfg: Config, optimizer: optimizers.Optimizer):
    """`step(state, batch, mask)`, private or not."""
    if not args.non_private:
        return private.make_private_step(
            lambda params, batch, keys: losses(params, batch, cfg),
            optimizer,
            max_norm=args.max_norm,
            noise_multiplier=args.noise_multiplier,
            expected_batch=args.batch,
            clipping=args.clipping,
            physical_batch=args.physical_batch,
            compile=args.compile,
        )

    def loss(params: tree.Tree, batch: tuple[Tensor, Tensor, Tensor], keys: Tensor) -> Tensor:
        return (losses(params, batch[:2], cfg) * batch[2]).sum() / args.batch

    plain = make_step(loss, optimizer, compile=False)  # batches differ in size
    return lambda state, batch, mask: plain(state, (*batch, mask))


def draw(folder: Path, args: Args, norms: dict[str, list[float]], test: arrays.Labelled, guesses: Tensor) -> None:
    """curves.png, gradient_norms.png and mistakes.png."""
    points = [record for record in read_metrics(folder) if "test/accuracy" in record]
    accuracies = [100 * record["test/accuracy"] for record in points]
    steps = [record["step"] for record in points]
    if args.non_private:
        plots.curves(folder / "accuracy.png", {"test": (steps, accuracies)}, "step", "accuracy (%)", "Without privacy")
    else:
        spent = [record["privacy/epsilon"] for record in points]
        with plots.panels(folder / "accuracy.png", 1, 2) as (left, right):
            title = f"Test accuracy, delta {args.delta:g}"
            plots.curves(left, {"test": (spent, accuracies)}, "epsilon spent", "accuracy (%)", title)
            plots.curves(right, {"epsilon": (steps, spent)}, "step", "epsilon spent", "Privacy spent")
    shown = list(norms)[:: max(1, (len(norms) - 1) // 3)]  # about four moments
    with plots.panels(folder / "gradient_norms.png", 1, 1, width=6.4) as (axes,):
        title = f"Gradients of {len(norms[shown[0]])} training examples"
        lengths = {f"step {step}": torch.tensor(norms[step]).log10() for step in shown}
        plots.histogram(axes, lengths, 40, "log10 of the norm before clipping", title)
        if not args.non_private:
            axes.axvline(math.log10(args.max_norm), color="black", ls="--", lw=1, label="max norm")
            axes.legend(frameon=False, fontsize=9)
    wrong = (guesses != test.labels).nonzero().squeeze(1)[:SHOWN]
    if len(wrong):
        titles = [f"{int(test.labels[i])} read as {int(guesses[i])}" for i in wrong]
        title = f"Misclassified: {int((guesses != test.labels).sum())} of {len(guesses)} test images"
        plots.image_grid(folder / "mistakes.png", test.images[wrong], 8, titles, title)


def train(args: Args) -> None:
    origin, args = runs.begin(RUNS, args, free=("steps", "physical_batch", "every", "save_every", "device", "compile"))
    counts = ("batch", "steps", "physical_batch", "every", "save_every")
    command_line.at_least_one(**{name: getattr(args, name) for name in counts})
    numbers = ("noise_multiplier", "max_norm", "learning_rate")
    command_line.positive(**{name: getattr(args, name) for name in numbers})
    command_line.choice("--clipping", args.clipping, private.CLIPPING)
    device = command_line.device(args.device)
    learn, test = arrays.digits(297) if args.data == "digits" else arrays.mnist(args.data)
    count = len(learn.labels)
    if args.batch > count:
        raise ValueError(f"--batch is {args.batch}, but '{args.data}' has {count} examples to learn from")
    if not 0 < args.delta < 1:
        raise ValueError(f"--delta is {args.delta}; expected a number between 0 and 1")
    cfg = Config(learn.images.shape[-1], int(torch.cat([learn.labels, test.labels]).max()) + 1)
    learn, test = tree.move((learn, test), device)

    def spent(step: int) -> float:
        return private.spent_epsilon(args.noise_multiplier, args.batch / count, step, args.delta)

    key, model = random.key(args.seed, device), spec(cfg)
    optimizer = optimizers.sgd(args.learning_rate, momentum=args.momentum)
    identity = {"net": cfg, "examples": {"train": count, "test": len(test.labels)}}
    state = runs.restore(origin, create(key, model, optimizer), identity, args.steps)
    step = make_any_step(args, cfg, optimizer)

    config = {"args": args, **identity, "torch": torch.__version__}
    with runs.opened(origin, config, total=args.steps) as run:
        run.log.print(f"{tree.count(model):,} parameters, {count:,} examples; run in {run.folder}")
        if args.compile and not args.non_private and run.first < args.steps:
            run.log.print("compiling the train step ...")
        kept, at = run.folder / "gradient_norms.json", run.first
        norms = {n: x for n, x in (read_json(kept) if kept.exists() else {}).items() if int(n) <= at}

        def measured(at: int, params: tree.Tree) -> dict[str, float]:
            found = per_example.reports(lambda p, b: losses(p, b, cfg), params, tree.map(lambda x: x[:WATCHED], learn))
            norms[str(at)] = found.total_norm.tolist()
            right = (predicted(params, test.images, cfg) == test.labels).float().mean()
            return {"test/accuracy": float(right)} | ({} if args.non_private else {"privacy/epsilon": spent(at)})

        if at == 0:
            run.log.metrics(0, measured(0, state.params))
        for at in range(run.first + 1, args.steps + 1):
            # `create` has used numbers 0 and 1 of the key.
            sample = private.poisson_sample(
                random.fold_in(key, 2), at, count, args.batch / count, 1 if args.non_private else args.physical_batch
            )
            chosen = learn.images[sample.indices], learn.labels[sample.indices]
            state, metrics = step(state, chosen, sample.mask)
            runs.check_finite(run, at, metrics)
            last = at == args.steps or run.stop.requested
            values = {f"train/{name}": value for name, value in metrics.items()}
            if at % args.every == 0 or last:
                shown = measured(at, state.params)
                run.log.metrics(at, values | shown)
                names = {"accuracy": "test/accuracy", "epsilon": "privacy/epsilon"}
                figures = "  ".join(f"{name} {shown[key]:.3f}" for name, key in names.items() if key in shown)
                run.log.print(f"after step {at}: {figures}")
            run.log.progress(at, args.batch, loss=metrics["loss"])
            if at % args.save_every == 0 or last:
                write_json(kept, norms)
                runs.save(run, at, state)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        guesses = predicted(state.params, test.images, cfg)
        figures = {
            "accuracy": float((guesses == test.labels).float().mean()),
            "epsilon": None if args.non_private else spent(at),
            "delta": None if args.non_private else args.delta,
            "steps": at,
            "seconds": seconds,
        }
        draw(run.folder, args, norms, test, guesses)
        run.log.result(figures)
    privacy = "without privacy" if args.non_private else f"at epsilon {figures['epsilon']:.2f}, delta {args.delta:g}"
    print(f"{figures['accuracy']:.2%} right {privacy} after {at} steps in {seconds:.0f} s; files in {run.folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train))
