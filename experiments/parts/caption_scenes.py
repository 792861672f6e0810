"""Scenes of coloured digits for `experiments/clip.py`, pairs of a colour and a digit that no training picture shows,
how well a net names them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import random
from experiments.parts.picture_text import Clip, class_embeddings, embed_pictures
from train.data.images import scenes
from train.data.images.arrays import Labelled, digits
from train.metrics.classification import linear_probe

HELD = tuple((colour, digit) for colour in ("red", "blue") for digit in (2, 7))
"""Pairs that are held out: neither the colour nor the digit alone tells one from all others."""
PROMPTS = tuple(f"a {colour} {number}" for colour in scenes.COLOURS for number in scenes.NUMBERS)
"""Captions of all pictures of a single digit."""
TRAINING, TESTING, SINGLES = 20000, 500, 500
KEY = random.key(0)


Pairs = tuple[tuple[str, int], ...]


class Singles(NamedTuple):
    """Pictures of one digit, bytes (count, 3, size, size), and their numbers (count,) in `PROMPTS`."""

    images: Tensor
    numbers: Tensor


def _drawn(
    number: int, size: int, count: int, pool: Labelled, most: int, without: Pairs = HELD
) -> tuple[scenes.Scenes, Tensor]:
    """Scenes of up to `most` digits, each between 3/8 and 1/2 of the side, and their pictures as bytes."""
    digit_sizes = {"sizes": (3 * size // 8, size // 2), "side": size, "overlap": 0.0}
    out = scenes.scenes(random.fold_in(KEY, number), count, pool, most=most, without=without, **digit_sizes)
    return out, (255 * out.images).round().to(torch.uint8)


def training(size: int, count: int = TRAINING) -> tuple[Tensor, list[str]]:
    """Pictures (count, 3, size, size) of one or two digits, without the held-out pairs, and their captions."""
    content, images = _drawn(0, size, count, digits()[0], 2)
    return images, scenes.captions(content)


def testing(size: int, count: int = TESTING) -> tuple[Tensor, list[str]]:
    """Pictures of digits by other hands, of which no two have the same caption."""
    content, images = _drawn(1, size, 4 * count, digits()[1], 2)
    first: dict[str, int] = {}
    for i, caption in enumerate(scenes.captions(content)):
        first.setdefault(caption, i)
    return images[list(first.values())[:count]], list(first)[:count]


def singles(size: int, number: int, count: int, held: bool, test: bool) -> Singles:
    """Pictures of one digit each: of the held-out pairs alone, or of all others; of digits by other hands or not.

    number: tells sets apart.
    """
    pool, without = digits()[int(test)], HELD
    if held:
        own = {digit for _, digit in HELD}
        rows = torch.tensor([int(label) in own for label in pool.labels])
        pool = Labelled(*(part[rows] for part in pool))
        without = tuple((colour, digit) for colour in scenes.COLOURS for digit in own if (colour, digit) not in HELD)
    content, images = _drawn(number, size, count, pool, 1, without)
    return Singles(images, 10 * content.colours[:, 0] + content.labels[:, 0])


def figures(model: Clip) -> dict[str, Any]:
    """Zero-shot accuracies on held-out and on other pairs; a linear probe of the digit, beside one on pixels."""
    texts = class_embeddings(model, PROMPTS, "{}")  # (60, width)
    held, seen = singles(model.cfg.image, 2, SINGLES, True, True), singles(model.cfg.image, 3, SINGLES, False, True)
    own = torch.tensor(sorted(PROMPTS.index(f"a {colour} {scenes.NUMBERS[digit]}") for colour, digit in HELD))
    cosines = embed_pictures(model, held.images) @ texts.T  # (pictures, 60)
    out = {
        "held_out_accuracy": _accuracy(cosines.argmax(1), held.numbers),
        "held_out_accuracy_among_held_out": _accuracy(own[cosines[:, own].argmax(1)], held.numbers),
        "other_pairs_accuracy": _accuracy((embed_pictures(model, seen.images) @ texts.T).argmax(1), seen.numbers),
        "chance_accuracy": 1 / len(PROMPTS),
        "chance_accuracy_among_held_out": 1 / len(own),
    }
    learn = singles(model.cfg.image, 4, 2 * SINGLES, False, False)
    labels = learn.numbers % 10, seen.numbers % 10
    out["probe_accuracy"] = linear_probe(*(embed_pictures(model, part.images) for part in (learn, seen)), *labels)
    out["pixel_probe_accuracy"] = linear_probe(*(thumbnails(part.images) for part in (learn, seen)), *labels)
    return out


def _accuracy(predictions: Tensor, labels: Tensor) -> float:
    return float((predictions == labels).float().mean())


def thumbnails(images: Tensor, side: int = 32) -> Tensor:
    """Pixels of bytes (count, channels, size, size) at a smaller size, as (count, channels side side) numbers."""
    return F.adaptive_avg_pool2d(images.float() / 255, min(side, images.shape[-1])).flatten(1)
