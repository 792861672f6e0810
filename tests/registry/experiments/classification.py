"""Rows of the experiments with classifiers."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.registry.experiments.experiment import Experiment
from train.data.images import shards
from train.run.ranks import BY_ROWS

DIGITS = ("--net", "lenet-digits", "--batch", "100", "--epochs", "1", "--save-every", "4", "--eval-every", "8")


def tars(folder: Path) -> None:
    """Pictures of two colours, six of each to train on and two to test on, in indexed tars."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        (folder / "tars" / part).mkdir(parents=True)
        for number, name in enumerate(("blue", "red")):
            with tarfile.open(folder / "tars" / part / f"{name}.tar", "w") as file:
                for i in range(count):
                    content, pixels = io.BytesIO(), generator.integers(0, 90, (20, 20 + i, 3), np.uint8)
                    pixels[..., 2 - 2 * number] += 120
                    Image.fromarray(pixels).save(content, "PNG")
                    member = tarfile.TarInfo(f"{i}.png")
                    member.size = content.tell()
                    content.seek(0)
                    file.addfile(member, content)
    shards.write_index(folder / "tars")


ROWS = [
    Experiment(
        "classify",
        (*DIGITS, "--ema", "0.9", "--optimizer", "muon", "--flip", "--rand-augment", "9", "--mixup", "0.2"),
        15,
        pictures=("confusion.png", "calibration.png", "mistakes.png", "filters.png", "accuracy.png"),
        files=("report.txt",),
        baseline="nearest_mean_accuracy",
        shards=BY_ROWS,
        refusals=(
            (("--batch", "3", "--micro-batches", "2"), "--batch 3 does not divide into --micro-batches 2"),
            (("--data", "nowhere"), "--data 'nowhere' does not exist"),
        ),
        commands=((("evaluate",), ("evaluations/digits/report.txt", "evaluations/digits/confusion.png")),),
    ),
    Experiment(
        "ensemble",
        ("--members", "3", "--widths", "8", "--steps", "12", "--save-every", "6"),
        12,
        pictures=("ensemble.png",),
        baseline="nearest_mean_accuracy",
        refusals=(
            (("--batch", "501"), "--batch is 501, but 'digits' has 500 examples to learn from"),
            (("--data", "nowhere"), "--data 'nowhere' does not exist; expected a folder of images, or one of digits"),
            (("--net", "mlpp"), "'mlpp'"),
            (("--resume", "--name", "a", "--widths", "9"), "with --widths (9,): it was started with (8,)"),
            (("--resume", "--name", "a", "--steps", "3"), "--steps is 3, but 'runs/ensemble/a' has done 12"),
        ),
        commands=((("evaluate",), ("ensemble.png",)),),
    ),
    Experiment(
        "examine",
        ("--examples", "40", "--folds", "2", "--batch", "10", "--epochs", "2", "--sketch", "32", "--neighbours", "2")
        + ("--pairs", "2", "--save-every", "4"),
        8,
        files=("report.html", "scores.csv"),
        baseline="commonest_class_accuracy",
        refusals=(
            (("--model", "resnet188"), "no net is named 'resnet188'; close to it: resnet18"),
            (("--data", "nowhere"), "--data 'nowhere' does not exist; expected a folder of images, or one of digits"),
            (("--folds", "1"), "--folds is 1; expected 0, or 2 to 1500, the number of examples"),
            (("--flipped", "1e-9"), "--flipped is 1e-09; expected a share of 1500 labels, not none"),
            (("--batch", "1201"), "--batch is 1201, too large for 1500 examples to learn from"),
            (("--only", "head*"), "the pattern 'head*' fits no leaf"),
            (("--examples", "1501"), "--examples is 1501; the data has 1500"),
            (("--model", "gpt", "--flipped", "0.1"), "'docstrings' has no labels; expected --flipped 0 --folds 0"),
            (("--resume", "--name", "a", "--sketch", "16"), "with --sketch 16: it was started with 32"),
        ),
    ),
    Experiment(
        "gradients",
        ("--examples", "40", "--batch", "10", "--steps", "12", "--save-every", "6"),
        12,
        pictures=("gradients.png", "examples.png"),
        refusals=(
            (("--task", "sound"), "--task"),
            (("--batch", "1"), "--batch is 1; expected 2 to 1000, the number of examples"),
            (("--data", "nowhere"), "--data 'nowhere' does not exist"),
            (("--task", "text", "--data", "nowhere"), "nowhere does not exist"),
            (("--resume", "--name", "a", "--steps", "20"), "with --steps 20: it was started with 12"),
        ),
    ),
    Experiment(
        "imagenet",
        ("--data", "tars", "--net", "cifar-resnet8", "--size", "8", "--batch", "4", "--epochs", "4", "--flip")
        + ("--label-smoothing", "0.1", "--ema", "0.5", "--workers", "0", "--save-every", "4", "--warmup-epochs", "1"),
        12,
        pictures=("accuracy.png", "confusion.png", "calibration.png", "filters.png"),
        files=("report.txt",),
        inputs=tars,
        baseline="commonest_class_accuracy",
        shards=BY_ROWS,
        refusals=(
            (("--data", "digits"), "--data 'digits' is no folder of class folders or tars; classify.py learns it"),
            (("--data", "nowhere"), "--data 'nowhere' does not exist"),
            (("--data", "tars", "--batch", "64"), "--batch is 64, but 'tars' has 12 images to learn from"),
            (("--batch", "6", "--micro-batches", "4"), "--batch 6 does not divide into --micro-batches 4"),
            (("--resume", "--name", "a", "--schedule", "cosine"), "with --schedule cosine: it was started with step"),
        ),
        commands=((("evaluate", "--data", "tars", "--workers", "0"), ("evaluations/tars/report.txt",)),),
    ),
    Experiment(
        "mislabelled",
        ("--examples", "100", "--widths", "8", "--batch", "20", "--rank", "3", "--steps", "40")
        + ("--snapshot-every", "10", "--save-every", "10"),
        40,
        pictures=("precision_recall.png", "scores.png", "suspects.png"),
        files=("scores.safetensors", "snapshots/*.safetensors"),
        baseline="neighbours_average_precision",
        refusals=(
            (("--examples", "1501"), "--examples is 1501; 'digits' has 1500 to learn from"),
            (("--flipped", "nan"), "--flipped is nan; expected a number in (0, 1)"),
            (("--flipped", "1e-9"), "--flipped is 1e-09; expected a share of 1500 labels, not none or all"),
            (("--batch", "1501"), "--batch is 1501, but there are 1500 examples to learn from"),
            (("--snapshot-every", "1200"), "--snapshot-every is 1200; expected up to half of --steps 2000"),
            (("--resume", "--name", "a", "--flipped", "0.2"), "with --flipped 0.2: it was started with 0.1"),
        ),
    ),
    Experiment(
        "prune",
        ("--seeds", "2", "--kept", "0.5", "0.1", "--scorers", "2", "--early", "4", "--widths", "8", "--batch", "10")
        + ("--steps", "12", "--save-every", "6"),
        12,
        pictures=("prune.png", "el2n_early.png", "grand_early.png", "grand_at_initialisation.png"),
        files=("scores.npy",),
        baseline="nearest_mean_accuracy",
        refusals=(
            (("--seeds", "1"), "--seeds is 1; expected at least 2, for the error bars"),
            (("--kept", "0.5", "1.0"), "--kept is 1.0; expected a number in (0, 1)"),
            (("--kept", "0.5", "0.5"), "--kept is (0.5, 0.5); expected different fractions"),
            (("--early", "700"), "--early is 700; expected up to --steps, 600"),
            (("--resume", "--name", "a", "--seeds", "3"), "with --seeds 3: it was started with 2"),
        ),
    ),
    Experiment(
        "private",
        ("--batch", "30", "--physical-batch", "16", "--noise-multiplier", "2", "--steps", "8", "--eval-every", "4")
        + ("--save-every", "4"),
        8,
        pictures=("accuracy.png", "gradient_norms.png", "mistakes.png"),
        baseline="nearest_mean_accuracy",
        refusals=(
            (("--batch", "1501"), "--batch is 1501, but 'digits' has 1500 examples to learn from"),
            (("--momentum", "2"), "--momentum is 2.0; expected a number in [0, 1)"),
            (("--delta", "1"), "--delta is 1.0; expected a number in (0, 1)"),
            (("--clipping", "adaptive", "--batch", "30"), "needs more than 10 --noise-multiplier, 30"),
            (("--resume", "--name", "a", "--noise-multiplier", "1"), "1.0: it was started with 2.0"),
        ),
    ),
    Experiment(
        "spectrum",
        ("--pool", "4", "--widths", "4", "--lanczos-steps", "10", "--probes", "1", "--eval-every", "4")
        + ("--steps", "8", "--spectra", "0", "--save-every", "4"),
        8,
        pictures=("spectra.png", "sharpness.png"),
        files=("spectra/0.json", "spectra/8.json"),
        baseline="nearest_mean_accuracy",
        refusals=(
            (("--pool", "3"), "--pool"),
            (("--spectra", "-5"), "--spectra is -5; expected at least 0"),
            (("--resume", "--name", "a", "--pool", "2"), "with --pool 2: it was started with 4"),
        ),
    ),
]
