"""Scenes of coloured digits for `experiments/clip.py`, pairs of a colour and a digit that no training picture shows,
how well a net names them."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import random
from experiments.parts.picture_text import Clip, class_embeddings, embed_pictures
from train.data.images import scenes
from train.data.images.arrays import Labelled, digits
from train.metrics.classification import linear_probe

BLOCKS = ((("red", "blue"), (2, 7)), (("green", "purple"), (4, 9)))
HELD = tuple((colour, digit) for colours, numbers in BLOCKS for colour in colours for digit in numbers)
"""Pairs that are held out: neither the colour nor the digit alone tells one from all others."""
PROMPTS = tuple(f"a {colour} {number}" for colour in scenes.COLOURS for number in scenes.NUMBERS)
"""Captions of all pictures of a single digit."""
TRAINING, TESTING, SINGLES = 8000, 500, 500
MOST = 3
"""Digits in a scene."""
KEY = random.key(0)


class Singles(NamedTuple):
    """Pictures of one digit, bytes (count, 3, 64, 64), and their numbers (count,) in `PROMPTS`."""

    images: Tensor
    numbers: Tensor


def _bytes(images: Tensor) -> Tensor:
    return (255 * images).round().to(torch.uint8)


def training(count: int = TRAINING) -> tuple[Tensor, list[str]]:
    """Pictures of up to three digits, without the held-out pairs, and their captions."""
    content = scenes.scenes(random.fold_in(KEY, 0), count, digits()[0], most=MOST, without=HELD)
    return _bytes(content.images), scenes.captions(content)


def testing(count: int = TESTING) -> tuple[Tensor, list[str]]:
    """Pictures of digits by other hands, of which no two have the same caption."""
    content = scenes.scenes(random.fold_in(KEY, 1), 2 * count, digits()[1], most=MOST, without=HELD)
    first: dict[str, int] = {}
    for i, caption in enumerate(scenes.captions(content)):
        first.setdefault(caption, i)
    rows = list(first.values())[:count]
    return _bytes(content.images[rows]), list(first)[:count]


@functools.cache
def singles(number: int, count: int, held: bool, test: bool) -> Singles:
    """Pictures of one digit each: of the held-out pairs alone, or of all others; of digits by other hands or not.

    number: tells sets apart.
    """
    pool, without = digits()[int(test)], HELD
    if held:
        own = {digit for _, digit in HELD}
        rows = torch.tensor([int(label) in own for label in pool.labels])
        pool = Labelled(*(part[rows] for part in pool))
        without = tuple((colour, digit) for colour in scenes.COLOURS for digit in own if (colour, digit) not in HELD)
    content = scenes.scenes(random.fold_in(KEY, number), count, pool, most=1, without=without)
    return Singles(_bytes(content.images), 10 * content.colours[:, 0] + content.labels[:, 0])


def figures(model: Clip) -> dict[str, Any]:
    """Zero-shot accuracies on held-out and on other pairs; a linear probe of the digit, beside one on pixels."""
    texts = class_embeddings(model, PROMPTS, "{}")  # (60, width)
    held, seen = singles(2, SINGLES, True, True), singles(3, SINGLES, False, True)
    own = torch.tensor(sorted(PROMPTS.index(f"a {colour} {scenes.NUMBERS[digit]}") for colour, digit in HELD))
    cosines = embed_pictures(model, held.images) @ texts.T  # (pictures, 60)
    out = {
        "held_out_accuracy": _accuracy(cosines.argmax(1), held.numbers),
        "held_out_accuracy_among_held_out": _accuracy(own[cosines[:, own].argmax(1)], held.numbers),
        "other_pairs_accuracy": _accuracy((embed_pictures(model, seen.images) @ texts.T).argmax(1), seen.numbers),
        "chance_accuracy": 1 / len(PROMPTS),
        "chance_accuracy_among_held_out": 1 / len(own),
    }
    learn = singles(4, 2 * SINGLES, False, False)
    labels = learn.numbers % 10, seen.numbers % 10
    out["probe_accuracy"] = linear_probe(*(embed_pictures(model, part.images) for part in (learn, seen)), *labels)
    out["pixel_probe_accuracy"] = linear_probe(*(thumbnails(part.images) for part in (learn, seen)), *labels)
    return out


def _accuracy(predictions: Tensor, labels: Tensor) -> float:
    return float((predictions == labels).float().mean())


def thumbnails(images: Tensor, side: int = 32) -> Tensor:
    """Pixels of bytes (count, channels, size, size) at a smaller size, as (count, channels side side) numbers."""
    return F.adaptive_avg_pool2d(images.float() / 255, min(side, images.shape[-1])).flatten(1)
