"""The row of the experiment with pictures and texts."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.registry.experiments.experiment import Experiment

COLOURS, PLACES = ("red", "green", "blue"), ("top left", "top right", "bottom left", "bottom right")


def square(i: int) -> tuple[np.ndarray, str]:
    """A coloured square at one of four places, and its caption."""
    pixels = np.random.default_rng(i).integers(0, 60, (30, 40, 3), np.uint8)
    row, column = 15 * (i % 4 // 2), 20 * (i % 2)
    pixels[row : row + 15, column : column + 20, i % 3] = 220
    return pixels, f"a {COLOURS[i % 3]} square, {PLACES[i % 4]}"


def files(folder: Path) -> None:
    """things/ with captions and bad records; classes/; nlvr/ with two parts; bare/ without captions; words.tsv."""
    lines = ["picture\tcaption"]
    for i in range(20):
        pixels, caption = square(i)
        for name in (f"things/{i}.png", f"classes/{COLOURS[i % 3]}/{i}.png"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name)
        lines += [f"{i}.png\t{caption}", f"{i}.png\tsomething {COLOURS[i % 3]}"]
    (folder / "things/bad.png").write_text("no picture")
    (folder / "things/lonely.png").write_bytes((folder / "things/0.png").read_bytes())
    lines += ["bad.png\ta picture that cannot be read", "3.png\t...", "nowhere.png\ta square"]
    (folder / "things/captions.tsv").write_text("\n".join(lines), encoding="utf-8")
    (folder / "bare").mkdir()
    (folder / "bare/0.png").write_bytes((folder / "things/0.png").read_bytes())
    (folder / "words.tsv").write_text("a\tb\tc\n", encoding="utf-8")
    statements(folder / "nlvr")


def statements(folder: Path) -> None:
    """NLVR's files: whether a square is red; a sentence of no words, and a label that is none."""
    for part, count in (("dev", 16), ("test", 6)):
        (folder / part / "images" / "2").mkdir(parents=True)
        records = []
        for i in range(count):
            for k in range(2):
                Image.fromarray(square(i)[0]).save(folder / part / "images/2" / f"{part}-{i}-0-{k}.png")
            label = "true" if i % 3 == 0 else "false"
            records.append({"sentence": "The square is red.", "label": label, "identifier": f"{i}-0", "directory": "2"})
        records += [records[0] | {"sentence": "?"}, records[1] | {"label": "maybe"}, records[2] | {"identifier": "99"}]
        lines = [*map(json.dumps, records), "{"]
        (folder / part / f"{part}.json").write_text("\n".join(lines), encoding="utf-8")


SMALL = ("--data", "things", "--net", "vit", "--size", "32", "--batch", "8", "--steps", "8", "--eval-every", "4")

ROWS = [
    Experiment(
        "clip",
        (*SMALL, "--save-every", "4", "--vocabulary", "560"),
        8,
        pictures=("loss.png", "scale.png", "recall.png", "similarity.png", "retrieval.png"),
        files=("tokenizer.json",),
        inputs=files,
        baseline="linear_text_to_image_recall_at_1",
        refusals=(
            (("--data", "nowhere"), "nowhere does not exist; expected a folder with pictures and captions.tsv"),
            (("--data", "bare"), "bare has none of captions.tsv, captions.csv, captions.jsonl; expected"),
            (("--data", "words.tsv"), "words.tsv: no columns of pictures and captions; there are a, b, c"),
            ((*SMALL, "--batch", "40"), "--batch is 40, but there are 16 pictures to learn from"),
            (("--size", "96"), "scenes have 32 to 64 pixels per side; those of the net are 96"),
            (("--data", "things", "--longest", "2"), "--longest is 2; expected at least 3"),
            (
                ("--data", "things", "--size", "40"),
                "for images of 40; expected four stages of at least one block, and a multiple of 32",
            ),
            (("--data", "things", "--vocabulary", "100"), "a vocabulary of 100 is too small: expected at least 514"),
            (("--task", "true-false"), "needs sentences that are true or false; name NLVR's folder with --data"),
            (("--task", "true-false", "--data", "things"), "things has no part of NLVR; expected two of"),
            (("--weights", "bare"), "bare"),
            (("--resume", "--name", "a", "--net", "resnet"), "with --net resnet: it was started with vit"),
        ),
        commands=(
            (("evaluate",), ("evaluations/test/similarity.png", "evaluations/test/result.json")),
            (("evaluate", "--data", "things"), ("evaluations/things/retrieval.png",)),
            (("search", "a red square"), ("search.png",)),
            (("search", "--folder", "classes", "something blue", "--count", "2"), ("search_2.png",)),
            (("predict", "things", "--labels", "red,green,blue", "--prompt", "a {} square"), ()),
            (("probe", "--data", "classes"), ()),
        ),
    ),
]
