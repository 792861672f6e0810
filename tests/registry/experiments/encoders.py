"""Rows of the experiments that fine-tune an encoder."""

import json
from pathlib import Path

from tests.registry.experiments import sequences
from tests.registry.experiments.experiment import Experiment
from train.run.ranks import BY_ROWS


def labelled(folder: Path) -> None:
    """The files of sequences.py; reviews.jsonl with other keys, a line that is no JSON, a text of no tokens; a folder
    with the configuration of another net."""
    sequences.files(folder)
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    lines = [{"id": i, "body": f"{sequences.WORDS[i % 4]} number {i}", "stars": i % 2} for i in range(60)]
    broken = ['{"id": 60, "body": ', json.dumps({"id": 61, "body": "\u200b", "stars": 1})]
    (folder / "reviews.jsonl").write_text("\n".join([*map(json.dumps, lines), *broken]), encoding="utf-8")


SMALL = ("--layers", "1", "--width", "32", "--vocabulary", "100", "--longest", "16", "--batch", "6", "--epochs", "2")
COLUMNS = ("--text-column", "body", "--label-column", "stars")

ROWS = [
    Experiment(
        "finetune_text",
        ("--data", "reviews.jsonl", *COLUMNS, *SMALL, "--shapes", "2", "--save-every", "4"),
        16,
        pictures=("loss.png", "accuracy.png", "confusion.png", "calibration.png", "attributions.png"),
        files=("tokenizer.json", "report.txt", "mistakes.txt", "attributions.html"),
        inputs=labelled,
        baseline="tf_idf_accuracy",
        shards=BY_ROWS,
        refusals=(
            (("--data", "nowhere"), "nowhere does not exist, expected a file with a labelled text per line"),
            (("--data", "one_class.tsv"), "one_class.tsv: all records have the label 'good'; expected at least two"),
            (("--data", "unlabelled.tsv"), "unlabelled.tsv line 1 has no label (and 29 more lines); more than a tenth"),
            (("--data", "reviews.jsonl"), "reviews.jsonl has the columns id, body, stars; name those of texts and"),
            (
                ("--data", "reviews.jsonl", "--text-column", "text"),
                "reviews.jsonl has no column 'text'; there are id, body, stars",
            ),
            (
                ("--data", "reviews.tsv", "--test", "other.tsv"),
                "test record 1 has the unknown label 'excellent' (and 29 more records); expected bad, good",
            ),
            (("--data", "reviews.tsv", "--batch", "100"), "a batch of 100 is more than the 48 sequences to learn from"),
            (("--data", "reviews.tsv", "--width", "40"), "--width is 40; expected a multiple of 32"),
            (("--data", "reviews.tsv", "--lora", "2"), "--lora adapts trained weights; name them with --weights"),
            (
                ("--data", "reviews.tsv", "--weights", "llama"),
                "model_type 'llama', expected one of bert, distilbert, roberta",
            ),
            (("--resume", "--name", "a", "--width", "64"), "with --width 64: it was started with 32"),
        ),
        commands=(
            (("predict", "a moving film", "dull", "--count", "2"), ()),
            (("predict", "a moving film", "--checkpoint", "latest"), ()),
            (("evaluate",), ("evaluations/test/confusion.png", "evaluations/test/result.json")),
            (("evaluate", "--data", "reviews.jsonl"), ("evaluations/reviews.jsonl/calibration.png",)),
            (("explain", "a moving film"), ("explanations/influence/explanation.html",)),
            (
                ("explain", "a moving film", "--score", "cosine", "--leaves", "trained"),
                ("explanations/cosine/explanation.png", "explanations/cosine/explanation.txt"),
            ),
        ),
    ),
]
