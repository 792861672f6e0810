"""Trained nets out of Python: packages for AOTInductor, onnxruntime and TorchScript, and what each form costs.

Without a flag a ResNet-8 learns scikit-learn's digits and leaves in every form, also as 8-bit integers (Jacob et al.
2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877).
Runs of classify, gpt, translate, superres, segment, detect and embed leave by the sub-commands:

    python experiments/ship.py                                               half a minute on one CPU core
    python experiments/ship.py export --run runs/gpt/NAME --forms onnx aoti --batch 1 16
    python experiments/ship.py compare --run runs/classify/NAME
    python experiments/ship.py bench --run runs/gpt/NAME --sizes 1 8

A package is a folder with one file and manifest.json, whose names, dtypes and ranges our loader checks at every call
(train/README.md). It needs pip install "functree[ship]", and a C++ compiler for AOTInductor. The table has, for each
form, the largest error relative to the largest output, the share of equal argmaxes, size, and time per call.
Expected without a flag: 98.99 % of the digits right in every form, where the nearest mean has 90.91 %.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core import random, tree
from experiments.parts import classifier, packages, shipped
from experiments.parts.packages import EAGER, Built, Form
from experiments.parts.shipped import Subject
from train import optimizers
from train.data import batching
from train.data.images import sets as image_sets
from train.data.understood import understood
from train.files import write_json
from train.losses import cross_entropy
from train.optimizers import schedules
from train.run import Count, FromRun, Integer, Positive, command_line
from train.run.run import check_name, new_folder, unused
from train.ship import Axis, compare
from train.step import create, make_step

RUNS = Path("runs/ship")


@dataclass(frozen=True)
class Args:
    net: str = "cifar-resnet8"
    """Net, any preset of nets.classifiers (a wrong name lists them)."""
    data: str = "digits"
    """Images: "digits" (embedded), "mnist", "fashion-mnist", "cifar10", or a folder, file or archive of images."""
    steps: Count = 200
    """Training steps."""
    batch: Count = 100
    """Images per step."""
    learning_rate: Positive = 1e-2
    """Peak learning rate."""
    forms: tuple[Form, ...] | None = None
    """Packages to write; all whose libraries are installed if None."""
    most: Count = 64
    """Images that a package takes at once, at most."""
    rounds: Count = 20
    """Calls that are timed, of a whole batch."""
    seed: Integer = 0
    """Seed of the initial values and of the order of the images."""
    name: str | None = None
    """Folder under runs/ship; the date and time if None."""


@dataclass(frozen=True, kw_only=True)
class RunArgs(FromRun):
    """Flags of the sub-commands."""

    forms: tuple[Form, ...] | None = None
    """Packages to write, or to use if they are there; all whose libraries are installed if None."""
    batch: tuple[Count, Count] = (1, 64)
    """Examples that a package takes at once, from and to."""
    examples: Count = 256
    """Examples of the run's test data to compare, at most."""
    out: Path | None = None
    """Folder of the packages; RUN/packages if None."""


@dataclass(frozen=True, kw_only=True)
class CompareArgs(RunArgs):
    size: Count = 8
    """Examples per call."""
    rounds: Count = 20
    """Calls that are timed."""


@dataclass(frozen=True, kw_only=True)
class BenchArgs(RunArgs):
    sizes: tuple[Count, ...] = (1, 8, 64)
    """Examples per call."""
    rounds: Count = 30
    """Calls that are timed, of each size."""


# The default: a small classifier.


def learned(args: Args, data: image_sets.ImageSet, model: Callable, trained: classifier.Trained) -> tree.Tree:
    """The parameters and Stats of a classifier after `--steps`."""
    net, cfg = classifier.net_of(trained)
    optimizer = optimizers.adamw(schedules.warmup_cosine(args.learning_rate, args.steps // 10, args.steps))
    create_key, data_key = random.split(random.key(args.seed), 2).unbind(0)
    state = create(create_key, model(cfg), optimizer)

    def losses(params: tree.Tree, batch: tuple[Tensor, Tensor], keys: Tensor) -> Tensor:
        pixels, labels = batch
        logits = net.apply(params, classifier.normalised(pixels, trained), cfg, key=keys, train=True)
        return cross_entropy(logits, labels, reduction="none")  # (examples,)

    step = make_step(losses, optimizer, donate=True, compile=False)
    began = time.perf_counter()
    for t in range(args.steps):
        rows = batching.epoch_batch(data_key, t, len(data.train.labels), args.batch)
        state, metrics = step(state, (data.train.images[rows], data.train.labels[rows]))
        if (t + 1) % max(1, args.steps // 4) == 0:
            spent = time.perf_counter() - began
            print(f"step {t + 1} of {args.steps}, loss {float(metrics['loss']):.4f}, {spent:.0f} s", flush=True)
    return tree.merge(state.params, state.stats)


def ship(args: Args) -> None:
    """Train a small classifier, write it in every form, and compare them."""
    check_name(RUNS, args.name)
    data = image_sets.read_all(args.data)
    std, mean = torch.std_mean(data.train.images, (0, 2, 3))  # each (channels,)
    size = data.train.images.shape[-1]
    statistics = tuple(mean.tolist()), tuple(std.clamp(min=1e-3).tolist())
    trained = classifier.Trained(args.net, data.channels, size, size, data.classes, *statistics)
    net, cfg = classifier.net_of(trained)
    if args.batch > len(data.train.labels):
        raise ValueError(
            f"--batch is {args.batch}, but '{args.data}' has {len(data.train.labels)} examples to learn from"
        )
    forms, left_out = packages.usable(args.forms)
    understood(print, image_sets.facts(data) | {"net": cfg, "forms": list(forms), "left out": left_out})
    values = learned(args, data, net.spec, trained)
    subject = shipped.of_classifier(trained, values, data.test.images, Axis("batch", 1, args.most))
    some = batching.epoch_batch(random.key(args.seed), 0, len(data.train.labels), min(args.batch, shipped.CALIBRATION))
    subject = subject._replace(calibration={"pixels": data.train.images[some]})
    folder = new_folder(RUNS, args.name)
    write_json(folder / "config.json", {"experiment": RUNS.name, "args": args, "net": cfg, "torch": torch.__version__})
    print(f"{tree.count(values):,} numbers; run in {folder}")
    built = packages.build(subject, folder / "packages", forms)
    labels = data.test.labels
    figures = finish(folder, subject, built, min(args.most, len(labels)), len(labels), args.rounds, labels)
    best = ", ".join(f"{form} {figures[form]['accuracy']:.2%}" for form in (EAGER, *built.packages))
    share = image_sets.baselines(data)["nearest_mean_accuracy"]
    print(f"right: {best} (nearest mean {share:.2%}); files in {folder}/")


def finish(
    folder: Path, subject: Subject, built: Built, batch: int, count: int, rounds: int, labels: Tensor | None = None
) -> dict[str, dict]:
    """Compare, print the table, and write result.json and ship.png; {form: figures}."""
    rows = packages.compared(subject, built, batch, count, rounds)
    ends = packages.errors_at_the_ends(subject, built)
    figures = {row.form: row._asdict() | {"error_at_ends": ends.get(row.form)} for row in rows}
    calls = {name: call for name, (call, _) in packages.own_forms(subject).items()} | built.packages
    for name in figures if labels is not None else ():
        logits = packages.outputs(calls[name], subject, batch, count)[0]
        figures[name]["accuracy"] = float((logits.argmax(1) == labels[:count]).float().mean())
    print(compare.table(rows))
    print("error at both ends of the ranges:", ", ".join(f"{form} {error:.1e}" for form, error in ends.items()))
    write_json(folder / "result.json", {"examples": count, "batch": batch, "forms": figures})
    packages.draw(folder / "ship.png", rows, subject.kind)
    return figures


# Of a run.


def opened(args: RunArgs) -> tuple[Subject, Built]:
    """The net of a run, and its packages, in --out or RUN/packages."""
    if args.device != "cpu":
        raise ValueError(f"--device is {args.device}; packages are written for the CPU")
    low, high = args.batch
    if not low <= high or high < 2:
        raise ValueError(f"--batch is {low} {high}; expected two sizes, from and to, the second at least 2")
    subject = shipped.subject(args.run, args.checkpoint, args.batch, args.examples)
    forms, left_out = packages.usable(args.forms)
    packages.show(subject, forms, left_out)
    return subject, packages.build(subject, args.out or args.run / "packages", forms)


def export(args: RunArgs) -> None:
    """Write a run's net as packages, and check each at both ends of its ranges."""
    subject, built = opened(args)
    for form, error in packages.errors_at_the_ends(subject, built).items():
        one = built.packages[form].manifest
        print(f"{form}: {one['bytes'] / 1e6:.2f} MB in {one['build_seconds']:.1f} s, error at the ends {error:.1e}")
    print(f"files in {args.out or args.run / 'packages'}/")


def compare_forms(args: CompareArgs) -> None:
    """Error, agreement, size and time of a run's net in each form, on its test data."""
    check_sizes(args, (args.size,))
    subject, built = opened(args)
    number = len(next(iter(subject.inputs.values())))
    out = unused(None, args.run / "comparison")
    out.mkdir(parents=True)
    finish(out, subject, built, args.size, number, args.rounds)
    print(f"files in {out}/")


def bench(args: BenchArgs) -> None:
    """Time per call of a run's net in each form, at several batch sizes."""
    check_sizes(args, args.sizes)
    subject, built = opened(args)
    calls = {name: call for name, (call, _) in packages.own_forms(subject).items()} | built.packages
    print(f"{'':14}" + "".join(f"{f'batch {n}':>22}" for n in args.sizes))
    columns = [packages.timings(subject, calls, n, args.rounds) for n in args.sizes]
    for name in calls:
        cells = (
            f"{1000 * sorted(c[name])[len(c[name]) // 2]:.2f} ms, {compare.ratio(c[name], c[EAGER]):.2f}"
            for c in columns
        )
        print(f"{name:14}" + "".join(f"{cell:>22}" for cell in cells))
    print(f"median time per call, and over that of {EAGER}; {torch.get_num_threads()} threads")


def check_sizes(args: RunArgs, calls: tuple[int, ...]) -> None:
    """Raise ValueError unless the packages take calls of these sizes."""
    low, high = args.batch
    if wrong := [n for n in calls if not low <= n <= high]:
        raise ValueError(f"{wrong[0]} examples per call; expected {low} to {high}, as --batch says")


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, ship),
        root=RUNS,
        export=(RunArgs, export),
        compare=(CompareArgs, compare_forms),
        bench=(BenchArgs, bench),
    )
