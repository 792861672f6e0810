"""Sentences about pictures, true or false, for `experiments/clip.py`: a head on the two embeddings of a CLIP."""

import functools
import math
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core.layers import linear
from core.tree import Tree
from experiments.parts.picture_task import Task
from experiments.parts.picture_text import Clip, embed_pictures, embed_texts, head_spec, normalised
from nets.multimodal import clip
from train import plots
from train.data.images import captions, nlvr
from train.data.images.nlvr import Statements
from train.data.text import clip_pairs
from train.files import shown

SHOWN = 6
SUMMARY = """\
{accuracy:.1%} of {statements} statements right; the majority {majority_accuracy:.1%}, the words alone \
{words_accuracy:.1%}; of those trained on {train_accuracy:.1%}"""


class Judged(NamedTuple):
    """Pictures, bytes (count, 3, size, size), with the statement about each."""

    images: Tensor
    about: Statements


class Data(NamedTuple):
    train: Judged
    test: Judged
    facts: dict[str, Any]


def open_data(data: str, size: int, whole: bool) -> Data:
    """The statements of `nlvr.open_statements`, with their pictures. Raises DataError as it does."""
    files = nlvr.open_statements(data)
    parts, skipped = [], list(files.skipped)
    for part in (files.train, files.test):
        images, rows, bad = captions.read_pictures(part.paths, size, whole)
        parts.append(Judged(images, part.some(rows.tolist())))
        skipped += bad
    return Data(*parts, nlvr.facts(files._replace(skipped=tuple(skipped))))


def logits(head: Tree, image: Tensor, text: Tensor) -> Tensor:
    """Embeddings of norm 1, (batch, width) both -> (batch,): log odds that the text is true of the picture."""
    u, v = (x * x.shape[1] ** 0.5 for x in (image, text))
    hidden = F.gelu(linear(head["hidden"], torch.cat([u, v, u * v, (u - v).abs()], 1)))  # (batch, 2 width)
    return linear(head["out"], hidden).squeeze(1)


def loss(params: Tree, batch: tuple, keys: Tensor, cfg: clip.Config):
    images, tokens, labels = batch
    out = clip.apply(params["clip"], (images, tokens), cfg, train=True)
    odds = logits(params["head"], out["image"], out["text"])
    values = F.binary_cross_entropy_with_logits(odds.float(), labels.float(), reduction="none")
    return values, {"accuracy": ((odds > 0) == labels.bool()).float().mean()}


def task(args: Any, data: Data, model: Clip) -> Task:
    """The task of clip.py's flags, on these data, from this net."""
    train = data.train
    sentences = list(dict.fromkeys(train.about.sentences))
    tokens, _ = clip_pairs.encode(model.tokenizer, sentences, model.cfg.context)
    numbers = {text: i for i, text in enumerate(sentences)}
    own = torch.tensor([numbers[text] for text in train.about.sentences])

    def batch(rows: Tensor, key: Tensor) -> tuple:
        return normalised(train.images[rows], model.pixels), tokens[own[rows]], train.about.labels[rows]

    return Task(
        data.facts,
        (train.images, train.about.sentences, train.about.labels),
        len(train.images),
        model,
        head_spec(model.cfg),
        functools.partial(loss, cfg=model.cfg),
        batch,
        math.log(2),
        lambda model, head: {"accuracy": accuracy(model, head, data.test)},
        lambda folder, model, head: study(folder, model, head, data),
        {
            "loss": ({"loss": "train/loss"}, "nats"),
            "accuracy": ({"trained on": "train/accuracy", "tested on": "validation/accuracy"}, "accuracy"),
        },
        SUMMARY,
    )


def odds(model: Clip, head: Tree, images: Tensor, sentences: tuple[str, ...]) -> Tensor:
    """Log odds (count,) that each sentence is true of its picture."""
    texts = list(dict.fromkeys(sentences))
    numbers = torch.tensor([texts.index(text) for text in sentences])
    with torch.no_grad():
        device = head["out"]["weight"].device
        image, text = embed_pictures(model, images), embed_texts(model, texts)[numbers]
        return logits(head, image.to(device), text.to(device)).cpu()


def accuracy(model: Clip, head: Tree, part: Judged) -> float:
    right = (odds(model, head, part.images, part.about.sentences) > 0) == part.about.labels.bool()
    return float(right.float().mean())


def words_alone(train: Statements, test: Statements) -> float:
    """Accuracy of a logistic regression on the words, which does not see the picture."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(ngram_range=(1, 2))
    model = LogisticRegression(max_iter=2000).fit(words.fit_transform(train.sentences), train.labels.numpy())
    return float(model.score(words.transform(test.sentences), test.labels.numpy()))


def study(folder: Path | None, model: Clip, head: Tree, data: Data) -> dict[str, Any]:
    """Accuracy beside those of the majority and of the words alone; writes statements.png."""
    majority = int(data.train.about.labels.float().mean() >= 0.5)
    out = {
        "accuracy": accuracy(model, head, data.test),
        "majority_accuracy": float((data.test.about.labels == majority).float().mean()),
        "words_accuracy": words_alone(data.train.about, data.test.about),
        "train_accuracy": accuracy(model, head, data.train),
        "statements": len(data.test.images),
    }
    if folder:
        rows = list(range(0, len(data.test.images), -(-len(data.test.images) // SHOWN)))
        about = data.test.about.some(rows)
        shares = odds(model, head, data.test.images[rows], about.sentences).sigmoid().tolist()
        rights = [(share > 0.5) == bool(label) for share, label in zip(shares, about.labels.tolist(), strict=True)]
        titles = [
            f"{textwrap.fill(shown(text), 30)}\n{share:.0%} true: {'right' if right else 'wrong'}"
            for text, share, right in zip(about.sentences, shares, rights, strict=True)
        ]
        images = data.test.images[rows].numpy()
        plots.image_grid(folder / "statements.png", images, 3, titles, "Statements about pictures", scale=2.2)
    return out
