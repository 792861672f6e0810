"""Uses of a trained or published CLIP for `experiments/clip.py`: search by text, zero-shot classes, linear probes."""

import csv
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from core import random
from experiments.parts.caption_scenes import PROMPTS, thumbnails
from experiments.parts.picture_text import Clip, class_embeddings, cut, embed_pictures, embed_texts
from train import plots
from train.data.file_tree import Skipped
from train.data.images import captions, folders
from train.data.text.files import lines_of
from train.data.understood import understood
from train.files import replacing, shown
from train.metrics.classification import linear_probe
from train.plots import retrieval as pictures

SHOWN = 6
"""Queries in search.png."""
DRAWN = 24
"""Pictures in predictions.png."""
HELD = 5
"""Without a part to test on, every fifth picture, in a fixed random order, is held out."""
SUMMARY = """\
zero-shot: {zero_shot_accuracy:.1%} of {pictures} pictures (the commonest class {majority_accuracy:.1%})
linear probe: {probe_accuracy:.1%}; on pixels {pixel_probe_accuracy:.1%}"""


class Found(NamedTuple):
    """The pictures of a query: their numbers and cosines, best first."""

    query: str
    numbers: list[int]
    cosines: list[float]


def read(inputs: Sequence[Path], model: Clip) -> tuple[Tensor, list[str]]:
    """(pictures as the net takes them, bytes, their names); others are named on standard output.

    Raises DataError: none can be read.
    """
    paths, skipped = folders.picture_paths(inputs)
    images, rows, bad = captions.read_pictures(paths, *model.pictures)
    understood(print, {"skipped": [*skipped, *bad]})
    return images, [shown(paths[i]) for i in rows.tolist()]


def nearest(model: Clip, images: Tensor, names: Sequence[str], queries: Iterable[str], count: int) -> list[Found]:
    """Prints the `count` pictures nearest to each query that has a word: cosine and name."""
    items, out = embed_pictures(model, images), []
    for query in queries:
        query = " ".join(query.split())
        if not captions.WORD.search(query):
            print(f"'{shown(query)}' has no word; it is skipped", file=sys.stderr)
            continue
        if note := cut(model, [query]):
            print(f"{note}; the rest does not count", file=sys.stderr)
        cosines, numbers = (items @ embed_texts(model, [query])[0]).topk(min(count, len(items)))
        out.append(Found(query, numbers.tolist(), cosines.tolist()))
        print(f"> {shown(query)}")
        for number, cosine in zip(*out[-1][1:], strict=True):
            print(f"{cosine:.4f}\t{names[number]}", flush=True)
    return out


def draw(path: Path, rows: Sequence[Found], images: Tensor) -> None:
    """The pictures of the first queries."""
    rows = rows[:SHOWN]
    labels = [[f"{cosine:.2f}" for cosine in row.cosines] for row in rows]
    pictures.sheet(path, [shown(row.query) for row in rows], [images[row.numbers] for row in rows], labels)


def classes_of(classes: str | None) -> list[str]:
    """The names of --labels: separated by commas, or the lines of a file; those of the scenes if None.

    Raises ValueError: there are fewer than two, or one twice.
    """
    if classes is None:
        return list(PROMPTS)
    is_file = "," not in classes and Path(classes).is_file()
    lines = lines_of((), classes) if is_file else classes.split(",")
    names = [" ".join(name.split()) for name in lines if name.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        problem = f"has '{shown(twice[0])}' twice" if twice else f"has {len(names)} class{'es' * (len(names) != 1)}"
        raise ValueError(f"--labels {problem}; expected at least two names separated by commas, or a file of them")
    return names


def write_predictions(
    folder: Path, model: Clip, images: Tensor, names: Sequence[str], classes: Sequence[str], prompt: str
) -> None:
    """predictions.csv, a row per picture, with the probabilities exp(scale cosine) / sum; predictions.png."""
    texts = class_embeddings(model, classes, prompt)
    scale = float(model.params["scale"].exp())
    shares, numbers = (scale * embed_pictures(model, images) @ texts.T).softmax(1).topk(min(3, len(classes)))
    with replacing(folder / "predictions.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["picture", *(f"{word}_{i + 1}" for i in range(shares.shape[1]) for word in ("class", "share"))])
        for name, row, best in zip(names, shares.tolist(), numbers.tolist(), strict=True):
            pairs = [(classes[i], f"{share:.4f}") for i, share in zip(best, row, strict=True)]
            table.writerow([name, *(cell for pair in pairs for cell in pair)])
            print("\t".join([name, *(f"{shown(label)} {share}" for label, share in pairs)]))
    titles = [
        f"{shown(classes[best])}\n{share:.0%}"
        for best, share in zip(numbers[:DRAWN, 0].tolist(), shares[:DRAWN, 0].tolist(), strict=True)
    ]
    plots.image_grid(folder / "predictions.png", images[:DRAWN].numpy(), titles=titles)


def probe(model: Clip, data: str, prompt: str) -> tuple[dict[str, Any], dict[str, float]]:
    """(facts, figures) of a folder of classes: zero-shot, and linear probes of embeddings and of pixels.

    Raises DataError: no such folder, no classes.
    """
    layout = folders.layout(data)
    train = folders.listing(layout.train)
    skipped: list[Skipped] = [*layout.skipped, *train.skipped]
    learn, labels = _read(train, model, skipped)
    if layout.test is not None:
        test = folders.listing(layout.test, train.classes)
        skipped += test.skipped
        look, expected = _read(test, model, skipped)
    else:
        order = random.permutation(random.key(0), len(labels))
        held = max(1, len(labels) // HELD)
        look, expected, learn, labels = (
            learn[order[:held]],
            labels[order[:held]],
            learn[order[held:]],
            labels[order[held:]],
        )
    if len(labels.unique()) < 2:
        raise ValueError(f"{data} has pictures of {len(labels.unique())} class to learn from; expected at least two")
    texts = class_embeddings(model, train.classes, prompt)
    own, others = embed_pictures(model, look), embed_pictures(model, learn)
    figures = {
        "zero_shot_accuracy": float(((own @ texts.T).argmax(1) == expected).float().mean()),
        "majority_accuracy": float((expected == labels.mode().values).float().mean()),
        "probe_accuracy": linear_probe(others, own, labels, expected),
        "pixel_probe_accuracy": linear_probe(thumbnails(learn), thumbnails(look), labels, expected),
        "pictures": len(look),
    }
    facts = {"classes": list(train.classes), "pictures": {"train": len(learn), "test": len(look)}, "skipped": skipped}
    return facts, figures


def _read(files: folders.Files, model: Clip, skipped: list[Skipped]) -> tuple[Tensor, Tensor]:
    """(pictures, labels); adds those that cannot be read to `skipped`."""
    images, rows, bad = captions.read_pictures(files.paths, *model.pictures)
    skipped += bad
    return images, files.labels[rows]
