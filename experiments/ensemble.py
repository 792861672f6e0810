"""Sixteen classifiers of handwritten digits trained at once, and the gain from averaging them.

Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles". A train step
is a pure function, so `compile(vmap(step))` trains all members in one compiled call; each has its own initial values
and its own order of the data. Without a flag they learn from 500 of scikit-learn's 8x8 digits, offline:

    python experiments/ensemble.py                                       about 20 seconds on 2 CPU cores
    python experiments/ensemble.py --data FOLDER --widths 512 512 --steps 20000    MNIST, or any folder of images
    python experiments/ensemble.py --net cifar-resnet8 --members 8                 with batch norm
    python experiments/ensemble.py evaluate --run runs/ensemble/NAME     the figures of a run again

It ends with the spread of the members' accuracy, the calibration of their confidence, and the gain from averaging.
Expected: 96.6 % right (a member) and 96.9 % (averaged), NLL 0.139 and 0.118, calibration error 1.5 % and 0.8 %.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
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
from train.data.fingerprint import fingerprint
from train.data.images import sets
from train.data.images.arrays import Labelled
from train.data.understood import understood
from train.losses import cross_entropy, nll
from train.metrics.calibration import expected_calibration_error, reliability_bins
from train.metrics.classification import accuracy
from train.optimizers import schedules
from train.run import Common, Count, FromRun, Positive, Shared, begin, command_line, open_run
from train.step import compiled, create, make_step

RUNS = Path("runs/ensemble")
TEST_DIGITS = 1297  # of 1797: with fewer, calibration would be lost in the noise
BINS = 10  # of confidence


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits" (in scikit-learn), "mnist", "cifar10" ... (downloaded once), or a folder of images."""
    members: Count = 16
    """Number of classifiers."""
    net: str = "mlp"
    """"mlp", or a preset of nets.classifiers such as cifar-resnet8 or lenet5-relu (a wrong name lists some)."""
    widths: tuple[Count, ...] = (128, 128)
    """Widths of the hidden layers of the mlp."""
    steps: Count = 1000
    """Training steps; the learning rate falls to 0 over all of them."""
    batch: Count = 50
    """Examples per step and member."""
    learning_rate: Positive = 3e-3
    """Peak learning rate."""
    common: Shared = Common()


class Net(NamedTuple):
    module: ModuleType
    cfg: Any


def read(data: str) -> sets.ImageSet:
    return sets.digits(TEST_DIGITS) if data == "digits" else sets.read_all(data, labelled=True)


def net_of(args: Args, images: sets.ImageSet) -> Net:
    _, channels, _, size = images.train.images.shape
    classes = len(images.classes)
    if args.net == "mlp":
        return Net(mlp, mlp.Config((images.train.images[0].numel(), *args.widths, classes)))
    return Net(*by_name.configured(args.net, channels=channels, classes=classes, size=size))


def batches(data: Labelled, keys: Tensor, steps: range, size: int) -> Iterator[Labelled]:
    """images (members, size, ...), labels (members, size) of each step: member i meets the examples in the order of
    its own `train.data.batching.epoch_batch(keys[i], step, ...)`."""
    count = len(data.labels)
    for step in steps:
        epoch, position = divmod(step, count // size)
        if position == 0 or step == steps.start:
            orders = torch.vmap(random.permutation, in_dims=(0, None))(random.fold_in(keys, epoch), count)
        indices = orders[:, position * size : (position + 1) * size]
        yield Labelled(data.images[indices], data.labels[indices])


def loss(params: tree.Tree, batch: Labelled, keys: Tensor, net: Net) -> Tensor:
    """(examples,)."""
    heads = by_name.weighted_logits(net.module, net.module.apply(params, batch.images, net.cfg, key=keys, train=True))
    return sum(weight * cross_entropy(logits, batch.labels, reduction="none") for weight, logits in heads)


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
        mean = total - math.log(k)  # (members, examples, classes)
        rows.append(torch.stack([torch.vmap(score, in_dims=(0, None))(mean, labels) for score in (accuracy, nll)]))
        total = torch.logaddexp(total, log_probs.roll(-k, 0))
    return torch.stack(rows, 1).unbind(0)


def study(folder: Path, values: tree.Tree, test: Labelled, net: Net) -> dict[str, float]:
    """The figures of the ensemble on the test examples; draws them into `ensemble.png`."""
    log_probs, labels = log_probabilities(values, test.images, net), test.labels
    averaged = log_probs.logsumexp(0) - math.log(len(log_probs))  # (examples, classes)
    accuracies, nlls = by_size(log_probs, labels)
    errors = expected_calibration_error(log_probs.exp(), labels, BINS)  # (members,)
    draw(folder, accuracies, nlls, log_probs, averaged, labels, int(errors.argsort()[len(errors) // 2]))
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


def draw(folder: Path, accuracies: Tensor, nlls: Tensor, log_probs: Tensor, averaged: Tensor, labels, median: int):
    """`ensemble.png`; `median` is the number of the member with the median calibration error."""
    sizes, (blue, orange, *_) = range(1, len(log_probs) + 1), plots.COLOURS
    with plots.panels(folder / "ensemble.png", 2, 2) as (left, right, lower_left, lower_right):
        for axes, values, name in ((left, 100 * accuracies, "accuracy (%)"), (right, nlls, "NLL (nats)")):
            plots.curves(axes, {"mean": (sizes, values.mean(1))}, "members averaged", name, f"Test {name}")
            low, high = values.amin(1).tolist(), values.amax(1).tolist()
            axes.fill_between(sizes, low, high, color=blue, alpha=0.15, lw=0, label="least to greatest")
            axes.scatter([1] * len(sizes), values[0].tolist(), s=14, color=orange, zorder=3, label="a member")
            axes.legend(frameon=False, fontsize=9)
        plots.reliability(lower_left, *reliability_bins(log_probs[median].exp(), labels, BINS), f"Member {median}")
        title = f"{len(sizes)} members averaged"
        plots.reliability(lower_right, *reliability_bins(averaged.exp(), labels, BINS), title)


SUMMARY = """\
a member  {member_accuracy_mean:.2%} ± {member_accuracy_std:.2%} right, NLL {member_nll:.4f}, ECE {member_ece:.2%} \
(from {member_accuracy_min:.2%} to {member_accuracy_max:.2%} right)
averaged  {ensemble_accuracy:.2%}         right, NLL {ensemble_nll:.4f}, ECE {ensemble_ece:.2%}"""


def train(args: Args) -> None:
    run = begin(RUNS, args, free=("data", "steps", "batch", "learning_rate"))
    images = read(args.data)
    net = net_of(args, images)
    understood(print, sets.facts(images) | {"net": net.cfg})
    if args.batch > len(images.train.labels):
        available = f"'{args.data}' has {len(images.train.labels)} examples to learn from"
        raise ValueError(f"--batch is {args.batch}, but {available}")

    create_key, data_key = random.split(random.key(args.common.seed)).unbind(0)
    create_keys, data_keys = (random.split(key, args.members) for key in (create_key, data_key))
    learn, test = tree.move((images.train, images.test), run.device)
    model, optimizer = net.module.spec(net.cfg), optimizers.adamw(schedules.cosine(args.learning_rate, args.steps))
    start = functools.partial(create, model=model, optimizer=optimizer)
    states = torch.vmap(start)(create_keys.to(run.device))
    states = tree.map(torch.Tensor.contiguous, states)  # vmap repeats what the members share, such as the step
    identity = {"net": net.cfg, "members": args.members, "data": fingerprint(learn, test)}
    states = run.restore(states, identity, args.steps)
    step = torch.vmap(make_step(functools.partial(loss, net=net), optimizer, policy=run.policy, compile=False))
    step = compiled(step) if args.common.compile else step

    parameters, steps = tree.count(states.params), run.remaining
    with run.open({"examples": {"train": len(learn.labels), "test": len(test.labels)}}):
        each = f"{parameters // args.members:,} parameters each"
        run.log.print(f"{args.members} members of {each}; run in {run.folder}")
        for at, batch in run.steps(batches(learn, data_keys.to(run.device), steps, args.batch)):
            states, metrics = step(states, batch)
            run.record(at, metrics, args.members * args.batch, loss=metrics["loss"].mean())
            if run.due(at, args.common.save_every):
                run.save(at, states)
        figures = study(run.folder, tree.merge(states.params, states.stats), test, net)
        baselines = sets.baselines(images)
        run.result({**figures, **baselines, "parameters": parameters})
    print(f"{SUMMARY.format(**figures)}\nnearest class mean {baselines['nearest_mean_accuracy']:.2%} right;", end=" ")
    print(f"{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def evaluate(args: FromRun) -> None:
    """Figures of a run's members, and of their average, on the test images."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    trained = run.read("args", Args)
    images = read(trained.data)
    net = net_of(trained, images)
    understood(print, sets.facts(images) | {"net": net.cfg})
    model = net.module.spec(net.cfg)
    like = tree.stack([spec.abstract(model)] * trained.members)
    parts = zip(("params", "stats"), spec.split(model, like), strict=True)
    values = tree.merge(*(run.restore(part, name) if tree.leaves(part) else part for name, part in parts))
    values, test = tree.move((values, images.test), device)
    print(SUMMARY.format(**study(args.run, values, test, net)))
    print(f"after {run.step} steps; figure in {args.run / 'ensemble.png'}")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), root=RUNS, evaluate=(FromRun, evaluate))
