"""Pairs of pictures and captions for `experiments/clip.py`: data, loss, retrieval both ways and its pictures."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core import random
from core.tree import Tree
from experiments.parts import caption_scenes
from experiments.parts.caption_scenes import TRAINING, thumbnails
from experiments.parts.picture_task import Task
from experiments.parts.picture_text import Clip, cut, embed_pictures, embed_texts, normalised, scratch
from nets.multimodal import clip
from train.data.images import captions
from train.data.text import clip_pairs
from train.files import shown
from train.losses.contrastive import in_batch_negatives
from train.metrics import retrieval
from train.plots import retrieval as pictures

AT = (1, 5, 10)
"""Ranks of the recalls."""
MOST = 5000
"""Pictures that the linear baseline learns from."""
SHOWN = 12
"""Pictures in similarity.png; a third as many queries in retrieval.png."""
HELD_SHOWN = 40
"""Pictures of held-out pairs that are searched too."""
VALIDATED = 200
"""Pictures that are evaluated while a net learns."""
SUMMARY = """\
caption of an unseen picture: recall at 1 {image_to_text_recall_at_1:.1%}, 5 {image_to_text_recall_at_5:.1%}, \
10 {image_to_text_recall_at_10:.1%}; picture of a caption: {text_to_image_recall_at_1:.1%}, \
{text_to_image_recall_at_5:.1%}, {text_to_image_recall_at_10:.1%}
among {pictures} pictures and {captions} captions; linear, without a net: {linear_image_to_text_recall_at_1:.1%} and \
{linear_text_to_image_recall_at_1:.1%} at 1; chance: {chance_image_to_text_recall_at_1:.1%}"""
SCENES = """
held-out pairs of colour and digit, zero-shot: {held_out_accuracy:.1%} among all 60 (chance {chance_accuracy:.1%}), \
{held_out_accuracy_among_held_out:.1%} among those held out ({chance_accuracy_among_held_out:.1%}); \
other pairs {other_pairs_accuracy:.1%}
linear probe of the digit: {probe_accuracy:.1%}; on pixels {pixel_probe_accuracy:.1%}"""


class Pairs(NamedTuple):
    """Pictures, bytes (count, 3, size, size), the captions of each, and a name to show."""

    images: Tensor
    captions: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]


class Data(NamedTuple):
    """Pairs to train on and to test on; `scenes` is True for generated ones. `facts`: what was understood of them."""

    train: Pairs
    test: Pairs
    scenes: bool
    facts: dict[str, Any]


def _of_scenes(images: Tensor, texts: Sequence[str]) -> Pairs:
    return Pairs(images, tuple((text,) for text in texts), tuple(f"scene {i + 1}" for i in range(len(texts))))


def open_data(data: str, size: int, whole: bool, *, learn: bool = True) -> Data:
    """The pairs of `--data`: "scenes", or files as `captions.open_captions` reads them.

    Args:
        learn: False leaves out the training pictures.

    Raises ValueError: scenes of another size; DataError as `open_captions`.
    """
    if data == "scenes" and not Path(data).exists():
        if not 32 <= size <= 64:
            raise ValueError(f"scenes have 32 to 64 pixels per side; those of the net are {size}")
        train, test = (
            _of_scenes(*caption_scenes.training(size, TRAINING if learn else 1)),
            _of_scenes(*caption_scenes.testing(size)),
        )
        held = [f"{colour} {digit}" for colour, digit in caption_scenes.HELD]
        facts = {
            "pictures": {"train": len(train.images), "test": len(test.images)},
            "different captions": {"train": len(set(train.captions)), "test": len(set(test.captions))},
            "to test on": "scenes of digits by other hands",
            "held out": held,
        }
        return Data(train, test, True, facts)
    files = captions.open_captions(data)
    parts, skipped = [], list(files.skipped)
    for part in (files.train if learn else (), files.test):
        images, rows, bad = torch.empty(0, 3, size, size), torch.empty(0, dtype=torch.int64), []
        if part:
            images, rows, bad = captions.read_pictures([one.path for one in part], size, whole)
        skipped += bad
        rows = rows.tolist()
        parts.append(Pairs(images, tuple(part[i].captions for i in rows), tuple(shown(part[i].path) for i in rows)))
    return Data(*parts, False, captions.facts(files._replace(skipped=tuple(skipped))))


def to_search(data: Data) -> tuple[Tensor, list[str]]:
    """(pictures, names) to test on; of scenes, also those of single digits in held-out pairs."""
    images, names = data.test.images, list(data.test.names)
    if not data.scenes:
        return images, names
    held = caption_scenes.singles(images.shape[-1], 2, HELD_SHOWN, True, True).images
    return torch.cat([images, held]), names + [f"held-out scene {i + 1}" for i in range(len(held))]


# Training.


class Table(NamedTuple):
    """Captions as tokens (captions, longest); the numbers (pictures, most) of each picture's, filled up with -1."""

    tokens: Tensor
    own: Tensor


def tabled(model: Clip, pairs: Pairs) -> Table:
    numbers: dict[str, int] = {}
    rows = [[numbers.setdefault(text, len(numbers)) for text in texts] for texts in pairs.captions]
    most = max(map(len, rows))
    tokens, _ = clip_pairs.encode(model.tokenizer, list(numbers), model.cfg.context)
    return Table(tokens, torch.tensor([row + [-1] * (most - len(row)) for row in rows]))


def loss(params: Tree, batch: tuple, keys: Tensor, cfg: clip.Config):
    """CLIP's loss; a caption that another picture of the batch has too is no negative of either."""
    images, tokens, own, numbers = batch
    params = params["clip"]
    out, scale = clip.apply(params, (images, tokens), cfg, train=True), params["scale"].exp()
    fits = (own[:, :, None] == numbers).any(1)  # (pictures, captions)
    values = in_batch_negatives(out["image"], out["text"], scale=scale, matches=fits)
    best = (out["image"] @ out["text"].T).argmax(1, keepdim=True)  # (pictures, 1)
    return values, {"accuracy": fits.gather(1, best).float().mean(), "scale": scale}


def task(args: Any, data: Data, model: Clip) -> Task:
    """The task of clip.py's flags, on these data, from this net."""
    table, train = tabled(model, data.train), data.train

    def batch(rows: Tensor, key: Tensor) -> tuple:
        own = table.own[rows]  # (batch, most)
        share = random.uniform(key, (len(rows),))
        place = (share * (own >= 0).sum(1)).long()  # one of its captions
        numbers = own.gather(1, place[:, None])[:, 0]  # (batch,)
        return normalised(train.images[rows], model.pixels), table.tokens[numbers], own, numbers

    def validate(model: Clip, head: Tree) -> dict[str, float]:
        few = Pairs(*(part[:VALIDATED] for part in data.test))
        return {name: value for name, value in figures(model, few).items() if name.endswith("at_1")}

    summary = SUMMARY + SCENES * data.scenes
    ways = {"captions of pictures": "image_to_text", "pictures of captions": "text_to_image"}
    curves = {name: f"validation/{way}_recall_at_1" for name, way in ways.items()}
    return Task(
        data.facts | {"cut": cut(model, [text for texts in train.captions for text in texts])},
        (train.images, train.captions),
        len(train.images),
        model,
        {},
        functools.partial(loss, cfg=model.cfg),
        batch,
        math.log(args.batch),
        validate,
        lambda folder, model, head: study(folder, model, data),
        {
            "loss": ({"loss": "train/loss"}, "nats"),
            "scale": ({"scale": "train/scale"}, "scale of the cosines"),
            "recall": (curves, f"recall at 1 among {min(VALIDATED, len(data.test.images))}"),
        },
        summary,
    )


def from_scratch(args: Any, data: Data) -> Clip:
    return scratch(args, [text for texts in data.train.captions for text in texts], data.train.images)


# Figures.


class Scored(NamedTuple):
    """Cosines (pictures, texts), the texts, and `fits` (pictures, texts), True where a picture has the caption."""

    cosines: Tensor
    texts: list[str]
    fits: Tensor


def scored(model: Clip, pairs: Pairs) -> Scored:
    texts = list(dict.fromkeys(text for own in pairs.captions for text in own))
    cosines = embed_pictures(model, pairs.images) @ embed_texts(model, texts).T
    return Scored(cosines, texts, _fits(pairs, texts))


def _fits(pairs: Pairs, texts: Sequence[str]) -> Tensor:
    numbers = {text: i for i, text in enumerate(texts)}
    fits = torch.zeros(len(pairs.captions), len(texts), dtype=torch.bool)
    for row, own in zip(fits, pairs.captions, strict=True):
        row[[numbers[text] for text in own]] = True
    return fits


def recalls(cosines: Tensor, fits: Tensor, prefix: str = "") -> dict[str, float]:
    ways = {"image_to_text": (cosines, fits), "text_to_image": (cosines.T, fits.T)}
    return {
        f"{prefix}{way}_{name}": value
        for way, values in ways.items()
        for name, value in retrieval.figures(*values, AT).items()
    }


def figures(model: Clip, pairs: Pairs) -> dict[str, float]:
    """Recalls at 1, 5 and 10 and mean reciprocal ranks, both ways."""
    cosines, _, fits = scored(model, pairs)
    return recalls(cosines, fits)


def linear(train: Pairs, test: Pairs, texts: Sequence[str]) -> Tensor:
    """Cosines (pictures, texts) without a net: ridge regression from thumbnails to the words of captions, by TF-IDF."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    words = TfidfVectorizer(token_pattern=retrieval.WORD, max_features=2000)
    targets = words.fit_transform([" ".join(own) for own in train.captions[:MOST]]).toarray().astype(np.float32)
    model = Ridge(alpha=10.0).fit(thumbnails(train.images[:MOST], 16).numpy(), targets)
    guesses = torch.from_numpy(model.predict(thumbnails(test.images, 16).numpy()))  # (pictures, words)
    return F.normalize(guesses, dim=1) @ torch.from_numpy(words.transform(texts).toarray().astype(np.float32)).T


def study(folder: Path | None, model: Clip, data: Data) -> dict[str, Any]:
    """`figures` beside those of `linear` and chance; of scenes, of held-out pairs and a probe too. Writes
    similarity.png and retrieval.png."""
    test = data.test
    cosines, texts, fits = scored(model, test)
    out: dict[str, Any] = recalls(cosines, fits)
    if len(data.train.images):
        out |= recalls(linear(data.train, test, texts), fits, "linear_")
    for way, table in (("image_to_text", fits), ("text_to_image", fits.T)):
        out |= {f"chance_{way}_{name}": value for name, value in retrieval.chance(table, AT).items()}
    out |= {"pictures": len(test.images), "captions": len(texts)}
    if data.scenes:
        out |= caption_scenes.figures(model)
    if folder:
        draw(folder, test, cosines, texts, fits)
    return out


def draw(folder: Path, test: Pairs, cosines: Tensor, texts: Sequence[str], fits: Tensor) -> None:
    first = {int(own.float().argmax()): i for i, own in reversed(list(enumerate(fits)))}  # each caption once
    columns = sorted(first)[:: -(-len(first) // SHOWN)]
    some = [first[j] for j in columns]
    labels = [clipped(texts[j]) for j in columns]
    title = "cosines of captions and pictures"
    pictures.similarities(folder / "similarity.png", test.images[some], labels, cosines[some][:, columns].T, title)
    queries = columns[: SHOWN // 3]
    rows = [cosines[:, j].topk(min(5, len(cosines))) for j in queries]
    pictures.sheet(
        folder / "retrieval.png",
        [shown(texts[j]) for j in queries],
        [test.images[row.indices] for row in rows],
        [[f"{value:.2f}" for value in row.values.tolist()] for row in rows],
        [[bool(fits[i, j]) for i in row.indices.tolist()] for row, j in zip(rows, queries, strict=True)],
        "Captions, and the nearest pictures",
    )


def clipped(text: str, most: int = 44) -> str:
    return shown(text if len(text) <= most else text[: most - 3] + "...")
