"""Differentially private training: a classifier of digits that hardly depends on any one of its examples.

Abadi et al. 2016, "Deep Learning with Differential Privacy" (arXiv:1607.00133): the gradient of every single example is
clipped, noise is added to their sum, and an accountant bounds how much a random batch reveals of any example: after T
steps the parameters are (epsilon, delta)-private. The net is the small one with tanh that Papernot et al. 2021 use
("Tempered Sigmoid Activations for Deep Learning with Differential Privacy", arXiv:2007.14191). Without a flag it learns
from 1500 of scikit-learn's 8x8 digits, offline:

    python experiments/private.py                                        about 90 seconds on a CPU core
    python experiments/private.py --non-private                          the same net and batches, unclipped, no noise
    python experiments/private.py --clipping adaptive --quantile 0.3     a clipping norm that follows a quantile
    python experiments/private.py --data FOLDER --delta 1e-5 --batch 512 --steps 1000 --physical-batch 128 \
        --noise-multiplier 1.0 --max-norm 0.5 --learning-rate 1.0        MNIST, or any folder of square grey images
    python experiments/private.py --resume                               go on with the newest run, and its accounting

It ends with the accuracy at (epsilon, delta). Only the parameters are private: the training losses, gradient norms and
pictures in the run's folder show the examples as they are, and so does the seed, which gives the noise again. Settings
that were chosen by looking at the accuracy, as here, are not accounted for either.
Expected: 87.9 % of the test digits right at epsilon 2.78, delta 5e-4.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from core import per_example, random, tree
from core.layers import conv, conv_spec, linear, linear_spec, max_pool
from train import optimizers, plots
from train.data import batching
from train.data.fingerprint import fingerprint
from train.data.images import sets
from train.data.images.arrays import Labelled
from train.data.understood import understood
from train.gradients import private
from train.gradients.watch import EDGES, count_norms
from train.losses import cross_entropy
from train.metrics.classification import accuracy
from train.plots.gradients import norms_over_time
from train.run import Common, Count, Fraction, Positive, Rate, Run, Share, Shared, begin, command_line
from train.run.logs import read_metrics
from train.step import create

RUNS = Path("runs/private")
WATCHED = 256  # examples whose gradient norms are drawn
SHOWN = 24  # misclassified images


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits" (in scikit-learn), "mnist", "fashion-mnist", or a folder of square grey images."""
    noise_multiplier: Positive = 3.0
    """Standard deviation of the noise on the sum of gradients, as a multiple of --max-norm."""
    max_norm: Positive = 1.0
    """Length to which the gradient of each example is clipped."""
    clipping: Literal["flat", "automatic", "per_layer", "groups", "adaptive"] = "flat"
    """The whole gradient (flat; automatic scales all to that length), each parameter by itself (per_layer),
    convolutions and linear layers by themselves (groups), or a max norm that follows --quantile (adaptive)."""
    quantile: Share = 0.5
    """With --clipping adaptive: share of the examples whose gradients should be shorter than the max norm."""
    sampling: Literal["poisson", "fixed"] = "poisson"
    """Batches with each example independently, or with a fixed number of examples; epsilon is then larger."""
    batch: Count = 300
    """Expected number of examples in a batch; each has the same probability to be in it."""
    steps: Count = 150
    """Training steps; each one spends some of the privacy."""
    delta: Fraction = 5e-4
    """Probability with which epsilon may not hold; choose less than 1 / examples."""
    learning_rate: Positive = 1.0
    """Learning rate of SGD, constant."""
    momentum: Rate = 0.5
    """Momentum of SGD."""
    non_private: bool = False
    """Train without clipping and noise, for comparison."""
    physical_batch: Count = 64
    """Examples that go through the net at once; changes the speed and no figure."""
    eval_every: Count = 10
    """Steps between measurements: accuracy, epsilon, gradient norms."""
    common: Shared = Common(save_every=50)


@dataclass(frozen=True)
class Config:
    """Side of the square grey images, and number of classes."""

    side: int = 28
    classes: int = 10

    def __post_init__(self):
        if self.side < 8:
            raise ValueError(f"images of {self.side} x {self.side} pixels are too small; expected 8 x 8 or more")

    @property
    def kernels(self) -> tuple[int, int]:
        """Sides of the two kernels: 8 and 4 for MNIST, 4 and 2 for images of 8 x 8 to 15 x 15."""
        return (8, 4) if self.side >= 16 else (4, 2)

    @property
    def flat(self) -> int:
        """Size of the convolutions' output, 32 channels."""
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
    """(batch, 1, side, side) -> (batch, classes). Table 1 of the paper; tanh bounds the gradients."""
    first, second = params["convs"]
    # Comments: the sizes of MNIST.
    x = torch.tanh(conv(first, 2 * x - 1, stride=2, padding=cfg.kernels[0] // 2 - 1))  # (batch, 16, 14, 14)
    x = max_pool(x, 2, stride=1)  # (batch, 16, 13, 13)
    x = max_pool(torch.tanh(conv(second, x, stride=cfg.kernels[1] // 2)), 2, stride=1)  # (batch, 32, 4, 4)
    hidden, last = params["linears"]
    return linear(last, torch.tanh(linear(hidden, x.flatten(1))))


def losses(params: tree.Tree, batch: Labelled, cfg: Config) -> Tensor:
    pixels, labels = batch
    return cross_entropy(apply(params, pixels, cfg), labels, reduction="none")


@torch.no_grad()
def logits_of(params: tree.Tree, pixels: Tensor, cfg: Config) -> Tensor:
    """(examples, classes)."""
    return torch.cat([apply(params, pixels[part], cfg) for part in batching.evaluation_batches(len(pixels), 1000)])


def clipping_of(args: Args) -> dict:
    """The arguments `max_norm`, `noise_multiplier` and `clipping` of the private step."""
    norm, clipping = args.max_norm, args.clipping
    if args.non_private:
        return {"max_norm": 1e9, "noise_multiplier": 0.0, "clipping": "flat"}  # longer than any gradient
    if clipping == "adaptive":
        norm, clipping = private.AdaptiveNorm(args.max_norm, args.quantile), "flat"
    if clipping == "groups":
        norm, clipping = {name: args.max_norm / 2**0.5 for name in ("convs.*", "linears.*")}, "flat"
    return {"max_norm": norm, "noise_multiplier": args.noise_multiplier, "clipping": clipping}


@functools.cache  # half a second
def spent(args: Args, count: int, step: int) -> dict[str, float]:
    """The epsilon after a step; nothing without privacy."""
    if args.non_private:
        return {}
    rate, sampling = args.batch / count, args.sampling
    return {"epsilon": private.spent_epsilon(args.noise_multiplier, rate, step, args.delta, sampling=sampling)}


def read(args: Args) -> tuple[sets.ImageSet, Config]:
    """(images, the net that fits them), checked."""
    images = sets.read_all(args.data, labelled=True)
    count, channels, *sides = images.train.images.shape
    if channels != 1 or sides[0] != sides[1]:
        raise ValueError(f"'{args.data}' has images {channels} x {sides[0]} x {sides[1]}; expected square grey ones")
    if args.batch > count:
        raise ValueError(f"--batch is {args.batch}, but '{args.data}' has {count} examples to learn from")
    least = 10 * args.noise_multiplier  # the share of shorter gradients has noise of its own, a twentieth of the batch
    if args.clipping == "adaptive" and not args.non_private and args.batch <= least:
        raise ValueError(
            f"--batch is {args.batch}; --clipping adaptive needs more than 10 --noise-multiplier, {least:g}"
        )
    return images, Config(sides[0], len(images.classes))


def train(args: Args) -> None:
    run = begin(RUNS, args, free=("data", "steps", "physical_batch", "eval_every"))
    images, cfg = read(args)
    understood(print, sets.facts(images) | {"net": cfg})
    learn, test = tree.move((images.train, images.test), run.device)
    count, clipping = len(learn.labels), clipping_of(args)

    create_key, batch_key = random.split(random.key(args.common.seed)).to(run.device).unbind(0)
    model, optimizer = spec(cfg), optimizers.sgd(args.learning_rate, momentum=args.momentum)
    state = create(create_key, model, optimizer)
    if isinstance(clipping["max_norm"], private.AdaptiveNorm):
        state = private.with_norm(state, clipping["max_norm"])
    state = run.restore(state, {"net": cfg, "data": fingerprint(learn, test)}, args.steps)
    options = {"physical_batch": args.physical_batch, "policy": run.policy, "compile": args.common.compile}
    options |= {"expected_batch": args.batch, **clipping}
    step = private.make_private_step(lambda params, batch, keys: losses(params, batch, cfg), optimizer, **options)

    def sample(t: int) -> private.Sample:
        if args.sampling == "fixed":
            return private.fixed_sample(batch_key, t, count, args.batch, args.physical_batch)
        return private.poisson_sample(batch_key, t, count, args.batch / count, args.physical_batch)

    def measure(at: int) -> None:
        watched = tree.map(lambda x: x[:WATCHED], learn)
        norms = per_example.reports(lambda p, b: losses(p, b, cfg), state.params, watched).total_norm
        values = {"accuracy": float(accuracy(logits_of(state.params, test.images, cfg), test.labels))}
        values |= spent(args, count, at)
        run.log.histogram(at, "gradients/norms", EDGES, count_norms(norms))
        run.log.metrics(at, {f"test/{name}": value for name, value in values.items()})
        run.log.print(f"after step {at}: " + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))

    with run.open({"examples": {"train": count, "test": len(test.labels)}}):
        run.log.print(f"{tree.count(model):,} parameters; run in {run.folder}")
        if run.first == 0:
            measure(0)
        for at, (indices, mask) in run.steps(map(sample, run.remaining)):
            batch = Labelled(learn.images[indices], learn.labels[indices])
            state, metrics = step(state, batch, mask)
            run.record(at, metrics, args.batch)
            if run.due(at, args.eval_every):
                measure(at)
            if run.due(at, args.common.save_every):
                run.save(at, state)
        report(run, logits_of(state.params, test.images, cfg).cpu(), images)


def report(run: Run, logits: Tensor, images: sets.ImageSet) -> None:
    """The final figures and pictures."""
    args, epsilon = run.args, spent(run.args, len(images.train.labels), run.at).get("epsilon")
    right, baselines = float(accuracy(logits, images.test.labels)), sets.baselines(images)
    privacy = {"epsilon": epsilon, "delta": None if args.non_private else args.delta}
    run.result({"accuracy": right, **baselines, **privacy})
    draw(run.folder, args, images.test, logits.argmax(-1))
    about = "without privacy" if args.non_private else f"at epsilon {epsilon:.2f}, delta {args.delta:g}"
    about += f" (nearest class mean, not private: {baselines['nearest_mean_accuracy']:.2%})"
    print(f"{right:.2%} right {about} after {run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def draw(folder: Path, args: Args, test: Labelled, predicted: Tensor) -> None:
    """`accuracy.png`, `gradient_norms.png` and `mistakes.png`."""
    records = read_metrics(folder)
    points = [record for record in records if "test/accuracy" in record]
    steps, accuracies = zip(*((record["step"], 100 * record["test/accuracy"]) for record in points), strict=True)
    if args.non_private:
        plots.curves(folder / "accuracy.png", {"test": (steps, accuracies)}, "step", "accuracy (%)", "Without privacy")
    else:
        epsilons = [record["test/epsilon"] for record in points]
        with plots.panels(folder / "accuracy.png", 1, 2) as (left, right):
            title = f"Test accuracy, delta {args.delta:g}"
            plots.curves(left, {"test": (epsilons, accuracies)}, "epsilon spent", "accuracy (%)", title)
            plots.curves(right, {"epsilon": (steps, epsilons)}, "step", "epsilon spent", "Privacy spent")
    counts = [record["gradients/norms"]["counts"] for record in records if "gradients/norms" in record]
    with plots.panels(folder / "gradient_norms.png", 1, 1, width=6.4) as (axes,):
        edges = [*(step - args.eval_every / 2 for step in steps), steps[-1] + args.eval_every / 2]
        norms_over_time(axes, edges, counts, EDGES)
        if not args.non_private:
            label = "max norm at first" if args.clipping == "adaptive" else "max norm"
            axes.axhline(args.max_norm, color="black", ls="--", lw=1, label=label)
            axes.legend(frameon=False, fontsize=9, loc="lower left")
    wrong = (predicted != test.labels).nonzero().squeeze(1)
    if len(wrong):
        titles = [f"{int(test.labels[i])} read as {int(predicted[i])}" for i in wrong[:SHOWN]]
        title = f"Misclassified: {len(wrong)} of {len(predicted)} test images"
        plots.image_grid(folder / "mistakes.png", test.images[wrong[:SHOWN]], 8, titles, title)


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), root=RUNS)
