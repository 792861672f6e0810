"""Rows of the experiments with recurrent networks."""

import math
from pathlib import Path

from tests.registry.experiments.experiment import Experiment
from train.run.ranks import BY_ROWS

WORDS = ("a fine and moving film", "dull and much too long", "funny from start to end", "neither funny nor moving")


def files(folder: Path) -> None:
    """reviews.tsv with a header; tables of one class, of no labels, of three columns; series: gaps, text, constant."""
    lines = [f"{WORDS[i % 4]} number {i}\t{'good' if i % 4 in (0, 2) else 'bad'}" for i in range(60)]
    (folder / "reviews.tsv").write_text("\n".join(["review\tsentiment", *lines, "no tab here", ""]), encoding="utf-8")
    (folder / "one_class.tsv").write_text("good\ta film\n" * 30, encoding="utf-8")
    (folder / "unlabelled.tsv").write_text("\ta film\n" * 30, encoding="utf-8")
    (folder / "three.tsv").write_text("1\tgood\ta film\n" * 30, encoding="utf-8")
    (folder / "empty.tsv").write_text("", encoding="utf-8")
    (folder / "other.tsv").write_text("excellent\ta film\n" * 30, encoding="utf-8")
    load = [f"{i},{3 * math.sin(i / 2) + i % 3:.3f}" for i in range(200)]
    (folder / "load.csv").write_text("\n".join(["hour,load", *load]), encoding="utf-8")
    (folder / "text.csv").write_text("\n".join(["hour,load", *load[:90], "90,much"]), encoding="utf-8")
    (folder / "constant.csv").write_text("load\n" + "5\n" * 400, encoding="utf-8")
    (folder / "gaps.csv").write_text("\n".join(["load", *["1", ""] * 50]), encoding="utf-8")


REVIEWS = ("--data", "reviews.tsv", "--epochs", "2", "--batch", "6", "--width", "4", "--embedding", "4")
FORECAST = ("--task", "forecast")

ROWS = [
    Experiment(
        "sequences",
        (*REVIEWS, "--save-every", "4", "--shapes", "2", "--dropout", "0.2"),
        16,
        pictures=("loss.png", "accuracy.png", "confusion.png", "calibration.png"),
        files=("tokenizer.json", "report.txt", "mistakes.txt"),
        inputs=files,
        baseline="bag_of_words_accuracy",
        shards=BY_ROWS,
        refusals=(
            (("--data", "nowhere"), "nowhere does not exist, expected a file with a labelled text per line"),
            (("--data", "one_class.tsv"), "one_class.tsv: all records have the label 'good'; expected at least two"),
            (("--data", "unlabelled.tsv"), "unlabelled.tsv line 1 has no label (and 29 more lines); more than a tenth"),
            (("--data", "three.tsv"), "three.tsv has 3 columns and no header that names a label and a text"),
            (("--data", "empty.tsv"), "empty.tsv is empty, expected a labelled text per line"),
            (
                ("--data", "reviews.tsv", "--test", "other.tsv"),
                "test record 1 has the unknown label 'excellent' (and 29 more records); expected bad, good",
            ),
            (("--data", "reviews.tsv", "--batch", "100"), "a batch of 100 is more than the 48 sequences to learn from"),
            (("--net", "transformer"), "--net"),
            ((*FORECAST, "--data", "text.csv", "--column", "load"), "row 92: 'much' in column 'load' is not a number"),
            (
                (*FORECAST, "--data", "constant.csv"),
                "each window to learn from is constant, the last one 5; nothing to",
            ),
            ((*FORECAST, "--data", "gaps.csv"), "49 of 99 values of 'load' are gaps, the first in row 3"),
            (
                (*FORECAST, "--data", "load.csv"),
                "load.csv has 2 columns of numbers: hour, load; name one with --column",
            ),
            ((*FORECAST, "--data", "load.csv", "--column", "price"), "no column 'price'; there are hour, load"),
            (
                (*FORECAST, "--net", "fasttext"),
                "--net fasttext classifies texts; expected rnn, gru, lstm or layer-norm",
            ),
            ((*FORECAST, "--window", "50"), "--window 50 does not divide into --patch 24"),
            (
                (*FORECAST, "--data", "load.csv", "--column", "load"),
                "200 values have no training window of 168 and a horizon of 24 without gap",
            ),
            (("--resume", "--name", "a", "--width", "8"), "with --width 8: it was started with 4"),
        ),
        commands=(
            (("predict", "a moving film", "dull"), ()),
            (("predict", "a moving film", "--checkpoint", "latest"), ()),
            (("evaluate",), ("evaluations/test/confusion.png", "evaluations/test/result.json")),
            (("evaluate", "--data", "reviews.tsv"), ("evaluations/reviews.tsv/confusion.png",)),
        ),
    ),
    Experiment(
        "gradient_flow",
        ("--time", "6", "--width", "4", "--batch", "8", "--steps", "12", "--eval-every", "3", "--save-every", "4"),
        12,
        pictures=("gradient_flow.png",),
        baseline="guessing_accuracy",
        refusals=(
            (("--time", "2"), "--time is 2 and --symbols 4; expected at least 3 and 2"),
            (("--symbols", "1"), "--time is 40 and --symbols 1; expected at least 3 and 2"),
            (("--shortest", "41"), "--shortest is 41; expected up to --time, 40"),
            (("--resume", "--name", "a", "--time", "7"), "with --time 7: it was started with 6"),
        ),
    ),
]
