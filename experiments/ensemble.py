"""Sixteen classifiers of handwritten digits trained at once, and what their average is worth.

Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles". A train step
is a pure function, so `compile(vmap(step))` trains all members in one compiled call; each has its own initial values
and its own order of the data. Without a flag they learn from 500 of scikit-learn's 8x8 digits, offline:

    python experiments/ensemble.py                                       about 20 seconds on 2 CPU cores
    python experiments/ensemble.py --data FOLDER --widths 512 512 --steps 20000    MNIST, or a set in its format
    python experiments/ensemble.py --net cifar-resnet8 --members 8                 with batch norm
    python experiments/ensemble.py evaluate --run runs/ensemble/NAME     the figures of a run again

It ends with the spread of the members' accuracy, how well their confidence is calibrated, and what averaging gains.
Expected: 96.6 % right (a member) and 96.8 % (averaged), NLL 0.137 and 0.117, calibration error 1.5 % and 0.7 %.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random, spec, tree
from nets.classifiers import by_name, mlp
from train import optimizers, plots
from train.data import batching
from train.data.images import arrays
from train.data.images import sets as image_sets
from train.losses import accuracy, cross_entropy, nll
from train.metrics.calibration import expected_calibration_error, reliability_bins
from train.optimizers import schedules
from train.run import checkpoints, command_line
from train.run import run as runs
from train.step import compiled, create, make_step

RUNS = Path("runs/ensemble")
TEST_DIGITS = 1297  # of 1797: with fewer, chance would hide how well confidence is calibrated
BINS = 10  # of confidence


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits" (in scikit-learn), "mnist", "cifar10" ... (downloaded once), or a folder with their files."""
    members: int = 16
    """How many classifiers."""
    net: str = "mlp"
    """"mlp", or a preset of nets.classifiers such as cifar-resnet8 or lenet5-relu (a wrong name lists some)."""
    widths: tuple[int, ...] = (128, 128)
    """Widths of the hidden layers of the mlp."""
    steps: int = 1000
    """Training steps; the learning rate falls to 0 over all of them."""
    batch: int = 50
    """Examples a step and member."""
    learning_rate: float = 3e-3
    """Learning rate at the beginning."""
    save_every: int = 500
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random: initial values and the order of the data."""
    name: str | None = None
    """Folder under runs/ensemble; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    compile: bool = True
    """Compile the train step with torch.compile: about 10 seconds the first time, later a few."""


class Net(NamedTuple):
    module: ModuleType
    cfg: Any


@dataclass(frozen=True)
class EvaluateArgs:
    run: Path
    """Folder of a run, such as runs/ensemble/NAME."""


def read(args: Args) -> tuple[arrays.Labelled, arrays.Labelled, Net]:
    """(train, test, the net that fits them)."""
    if args.data == "digits":
        (train, test), classes = arrays.digits(TEST_DIGITS), 10
    else:
        _, train, test, names = image_sets.in_memory(args.data)
        classes = len(names)
    _, channels, _, size = train.images.shape
    if args.net == "mlp":
        return train, test, Net(mlp, mlp.Config((train.images[0].numel(), *args.widths, classes)))
    return train, test, Net(*by_name.configured(args.net, channels=channels, classes=classes, size=size))


def batches(data: arrays.Labelled, keys: Tensor, steps: range, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(images (members, size, ...), labels (members, size)) of each step: member i meets the examples in the order of
    its own `train.data.batching.epoch_batch(keys[i], step, ...)`."""
    count = len(data.labels)
    for step in steps:
        epoch, place = divmod(step, count // size)
        if place == 0 or step == steps.start:
            orders = torch.vmap(random.permutation, in_dims=(0, None))(random.fold_in(keys, epoch), count)
        chosen = orders[:, place * size : (place + 1) * size]
        yield data.images[chosen], data.labels[chosen]


def loss(params: tree.Tree, batch: tuple[Tensor, Tensor], keys: Tensor, net: Net) -> Tensor:
    pixels, labels = batch
    heads = by_name.weighted_logits(net.module, net.module.apply(params, pixels, net.cfg, key=keys, train=True))
    return sum(weight * cross_entropy(logits, labels) for weight, logits in heads)


@torch.no_grad()
def log_probabilities(values: tree.Tree, pixels: Tensor, net: Net) -> Tensor:
    """(members, examples, classes)."""
    members = torch.vmap(functools.partial(net.module.apply, cfg=net.cfg), in_dims=(0, None))
    parts = [members(values, pixels[part]) for part in batching.evaluation_batches(len(pixels), 1000)]
    return torch.cat(parts, 1).log_softmax(-1)


def by_size(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(accuracy, negative log-likelihood) of averaged predictions, each (members, members): entry (k - 1, i) averages
    the k members from number i on, after the last comes the first. So row 0 is the members, the last row all of them.

    The average is that of the probabilities, p(y | x) = 1/M sum_m p_m(y | x) (section 2.4 of the paper).
    """
    total, rows = log_probs, []
    for k in range(1, len(log_probs) + 1):
        mean = total - math.log(k)
        rows.append(torch.stack([torch.vmap(score, in_dims=(0, None))(mean, labels) for score in (accuracy, nll)]))
        total = torch.logaddexp(total, log_probs.roll(-k, 0))
    return torch.stack(rows, 1).unbind(0)


def study(folder: Path, values: tree.Tree, test: arrays.Labelled, net: Net) -> dict[str, float]:
    """The figures of the ensemble on the test examples; draws them into `ensemble.png`."""
    log_probs = log_probabilities(values, test.images, net)
    members, labels = len(log_probs), test.labels
    averaged = log_probs.logsumexp(0) - math.log(members)
    accuracies, nlls = by_size(log_probs, labels)
    errors = expected_calibration_error(log_probs.exp(), labels, BINS)
    median = int(errors.argsort()[members // 2])

    sizes, (blue, orange, *_) = list(range(1, members + 1)), plots.COLOURS
    with plots.panels(folder / "ensemble.png", 2, 2) as (left, right, lower_left, lower_right):
        for axes, values, name in ((left, 100 * accuracies, "accuracy (%)"), (right, nlls, "NLL (nats)")):
            plots.curves(axes, {"mean": (sizes, values.mean(1))}, "members averaged", name, f"Test {name}")
            low, high = values.amin(1).tolist(), values.amax(1).tolist()
            axes.fill_between(sizes, low, high, color=blue, alpha=0.15, lw=0, label="least to greatest")
            axes.scatter([1] * members, values[0].tolist(), s=14, color=orange, zorder=3, label="a member")
            axes.legend(frameon=False, fontsize=9)
        plots.reliability(lower_left, *reliability_bins(log_probs[median].exp(), labels, BINS), f"Member {median}")
        plots.reliability(lower_right, *reliability_bins(averaged.exp(), labels, BINS), f"{members} members averaged")
    figures = {
        "member_accuracy_mean": accuracies[0].mean(),
        "member_accuracy_std": accuracies[0].std(correction=0),
        "member_accuracy_min": accuracies[0].min(),
        "member_accuracy_max": accuracies[0].max(),
        "member_nll": nlls[0].mean(),
        "member_ece": errors.mean(),
        "ensemble_accuracy": accuracy(averaged, labels),
        "ensemble_nll": nll(averaged, labels),
        "ensemble_ece": expected_calibration_error(averaged.exp(), labels, BINS),
    }
    return {name: float(value) for name, value in figures.items()}


SUMMARY = """\
a member  {member_accuracy_mean:.2%} ± {member_accuracy_std:.2%} right, NLL {member_nll:.4f}, ECE {member_ece:.2%} \
(from {member_accuracy_min:.2%} to {member_accuracy_max:.2%} right)
averaged  {ensemble_accuracy:.2%}         right, NLL {ensemble_nll:.4f}, ECE {ensemble_ece:.2%}"""


def train(args: Args) -> None:
    origin, args = runs.begin(RUNS, args, free=("steps", "save_every", "device", "compile"))
    command_line.at_least_one(members=args.members, steps=args.steps, batch=args.batch, save_every=args.save_every)
    command_line.at_least_one(widths=min(args.widths, default=1))
    command_line.positive(learning_rate=args.learning_rate)
    device, (learn, test, net) = command_line.device(args.device), read(args)
    if args.batch > len(learn.labels):
        raise ValueError(f"--batch is {args.batch}, but '{args.data}' has {len(learn.labels)} examples to learn from")
    learn, test = tree.move((learn, test), device)

    model, optimizer = net.module.spec(net.cfg), optimizers.adamw(schedules.cosine(args.learning_rate, args.steps))
    keys = random.split(random.key(args.seed, device), args.members)
    states = torch.vmap(functools.partial(create, model=model, optimizer=optimizer))(keys)
    states = tree.map(torch.Tensor.contiguous, states)  # vmap repeats what the members share, such as the step
    order_keys = random.fold_in(keys, 2)  # `create` has used numbers 0 and 1
    identity = {
        "net": net.cfg,
        "members": args.members,
        "examples": {"train": len(learn.labels), "test": len(test.labels)},
    }
    states = runs.restore(origin, states, identity, args.steps)
    step = torch.vmap(make_step(functools.partial(loss, net=net), optimizer, compile=False))
    if args.compile:
        step = compiled(step)

    parameters = tree.count(states.params)
    config = {"args": args, **identity, "torch": torch.__version__}
    with runs.opened(origin, config, total=args.steps) as run:
        run.log.print(f"{args.members} members of {parameters // args.members:,} parameters each; run in {run.folder}")
        if args.compile and run.first < args.steps:
            run.log.print("compiling the train step ...")
        at, steps = run.first, range(run.first, args.steps)
        for at, batch in enumerate(batches(learn, order_keys, steps, args.batch), run.first + 1):
            states, metrics = step(states, batch)
            runs.check_finite(run, at, metrics)
            last = at == args.steps or run.stop.requested
            run.log.progress(at, args.members * args.batch, loss=metrics["loss"].mean())
            if at % 10 == 0 or last:
                run.log.metrics(at, {f"train/{name}": values.mean() for name, values in metrics.items()})
            if at % args.save_every == 0 or last:
                runs.save(run, at, states)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        figures = study(run.folder, tree.merge(states.params, states.stats), test, net)
        run.log.result({**figures, "steps": at, "seconds": seconds, "parameters": parameters})
    print(f"{SUMMARY.format(**figures)}\n{at} steps in {seconds:.0f} s; files in {run.folder}/")


def evaluate(args: EvaluateArgs) -> None:
    trained, saved = runs.read_config(args.run, "args", Args), args.run / "checkpoints"
    _, test, net = read(trained)
    model = net.module.spec(net.cfg)
    template = tree.map(lambda leaf: leaf.expand(trained.members, *leaf.shape), spec.abstract(model))
    parts = [
        checkpoints.restore(saved, part, part=name) if tree.leaves(part) else part
        for name, part in zip(("params", "stats"), spec.split(model, template), strict=True)
    ]
    print(SUMMARY.format(**study(args.run, tree.merge(*parts), test, net)))
    print(f"after {checkpoints.latest(saved)} steps; figure in {args.run / 'ensemble.png'}")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), evaluate=(EvaluateArgs, evaluate))
