"""The row of the experiment with captions."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.registry.experiments.experiment import Experiment
from train.run.ranks import BY_ROWS

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230)}


def files(folder: Path) -> None:
    """squares/ with captions.tsv: two captions per picture, one of no words, one of a picture that is not there, a
    picture without a caption, a garbled one; empty/ without a table; wordless/ with captions of no words."""
    rng = np.random.default_rng(0)
    (folder / "squares").mkdir()
    lines = ["picture\tcaption"]
    for i in range(15):
        name = list(COLOURS)[i % 3]
        pixels = rng.integers(0, 60, (24, 32, 3), np.uint8)
        left, top = rng.integers(0, 14, 2)
        pixels[top : top + 8, left : left + 9] = COLOURS[name]
        Image.fromarray(pixels).save(folder / "squares" / f"{i}.png")
        lines += [f"{i}.png\ta {name} square", f"{i}.png\tone square, {name}"] if i else ["0.png\t!", "99.png\tnone"]
    (folder / "squares" / "garbled.png").write_bytes(b"no picture")
    Image.fromarray(pixels).save(folder / "squares" / "alone.png")
    lines.append("garbled.png\ta square")
    (folder / "squares" / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "wordless").mkdir()
    Image.fromarray(pixels).save(folder / "wordless" / "0.png")
    (folder / "wordless" / "captions.tsv").write_text("picture\tcaption\n0.png\t...\n", encoding="utf-8")


SMALL = (
    "--data",
    "squares",
    "--preset",
    "tiny",
    "--size",
    "16",
    "--vocabulary",
    "30",
    "--longest",
    "8",
    "--shift",
    "1",
)
SMALL += ("--tokenizer", "words", "--steps", "8", "--batch", "4", "--eval-every", "4")

ROWS = [
    Experiment(
        "caption",
        (*SMALL, "--save-every", "4", "--dropout", "0.1"),
        8,
        pictures=("captions.png", "attention_1.png", "curves.png"),
        files=("mistakes.txt", "tokenizer.json"),
        inputs=files,
        baseline="nearest_exact_match",
        shards=BY_ROWS,
        refusals=(
            (("--data", "nowhere"), "nowhere does not exist; expected a folder with pictures and captions.tsv"),
            (("--data", "empty"), "empty has none of captions.tsv, captions.csv, captions.jsonl; expected a folder"),
            (
                ("--data", "wordless"),
                "no picture with a caption can be used; wordless/captions.tsv: line 2 has a capti",
            ),
            ((*SMALL, "--batch", "80"), "--batch is 80, but there are "),
            ((*SMALL, "--longest", "2"), "tokens, expected less than 3"),
            ((*SMALL, "--size", "20"), "captioner: image 20 is not divisible by patch 8"),
            ((*SMALL, "--vocabulary", "3"), "a vocabulary of 3 is too small: expected at least 5"),
            (("--resume", "--name", "a", "--preset", "small"), "with --preset small: it was started with tiny"),
        ),
        commands=(
            (("predict", "squares", "--beam", "2"), ()),
            (("evaluate",), ("evaluations/test/captions.png", "evaluations/test/result.json")),
            (("evaluate", "--data", "squares", "--temperature", "1"), ("evaluations/squares/attention_1.png",)),
        ),
    ),
]
