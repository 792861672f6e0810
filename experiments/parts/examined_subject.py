"""A model and the examples that `experiments/examine.py` examines it on, and the losses of both."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random
from core.tree import Tree
from experiments.parts import encoder as encoders
from experiments.parts import examined_data
from experiments.parts.encoder import Encoder
from experiments.parts.examined_data import Examples, Preparation
from train.data.text import labelled, ragged
from train.losses import cross_entropy


class Subject(NamedTuple):
    """A model and what it is examined on.

    loss: `loss(params, batch) -> (losses (N,), {"logits": (N, classes)} or {})`, of a batch like `data`.
    params: its parameters; None for a net that has still to learn.
    data: a tree of tensors with leading axis N.
    model, learn: of a net that has still to learn, its spec and `learn(params, batch, keys) -> losses (N,)`.
    stats: running statistics, which the loss takes merged with the parameters.
    pictures: (N, channels, height, width), and `texts`: what a page shows of the examples.
    test: a tree like data, for the accuracy of what has learned; None if there is none.
    """

    kind: str
    loss: Callable
    params: Tree | None
    data: Tree
    examples: Examples
    model: Tree | None = None
    learn: Callable | None = None
    stats: Tree = {}
    pictures: Tensor | None = None
    texts: tuple[str, ...] | None = None
    test: Tree | None = None

    @property
    def labels(self) -> Tensor | None:
        return self.examples.labels


class Source(NamedTuple):
    """The flags that say which examples: see `experiments/examine.py`."""

    data: str
    columns: labelled.Columns
    count: int | None
    key: Tensor
    size: int | None
    longest: int
    workers: int
    weights: str | None

    @property
    def is_python(self) -> bool:
        return self.data.startswith("python:")

    def images(self, preparation: Preparation, classes: tuple[str, ...] | None = None, test: bool = False) -> Examples:
        if self.is_python:
            return self._of_python(texts=False)
        preparation = preparation if self.size is None else preparation._replace(size=self.size, resize=None)
        return examined_data.images(self.data, preparation, self.count, self.key, self.workers, classes, test)

    def texts(self, classes: tuple[str, ...] | None = None) -> tuple[Examples, labelled.Records | None]:
        if self.is_python:
            return self._of_python(texts=True), None
        return examined_data.labelled_texts(self.data, self.columns, self.count, self.key, classes)

    def lines(self) -> Examples:
        if self.is_python:
            return self._of_python(texts=True)
        return examined_data.lines(self.data, self.columns, self.count, self.key)

    def _of_python(self, texts: bool) -> Examples:
        out = examined_data.of_function(examined_data.called(self.data), self.data, self.count, self.key)
        if out.are_texts != texts:
            kind = "texts" if out.are_texts else "tensors"
            raise ValueError(f"--data {self.data} returns {kind}; the model takes {'texts' if texts else 'tensors'}")
        return out


def classification(apply: Callable[[Tree, Any], Tensor]) -> Callable:
    """The loss of logits = apply(params, inputs)."""

    def loss(params: Tree, batch: Tree):
        logits = apply(params, batch["inputs"])  # (N, classes)
        return cross_entropy(logits, batch["labels"], reduction="none"), {"logits": logits}

    return loss


def next_tokens(apply: Callable[[Tree, Any], Tensor]) -> Callable:
    """The mean loss of each text's next tokens, in nats, of logits (N, time, vocabulary) = apply(params, inputs)."""

    def loss(params: Tree, batch: Tree):
        tokens, lengths = batch["inputs"]["tokens"], batch["inputs"]["lengths"]
        logits = apply(params, {"tokens": tokens[:, :-1], "lengths": lengths - 1})
        losses = cross_entropy(logits, tokens[:, 1:], reduction="none")  # (N, time)
        live = torch.arange(losses.shape[1], device=tokens.device) < lengths[:, None] - 1
        return (losses * live).sum(1) / live.sum(1).clamp(min=1), {}

    return loss


def of_tokens(examples: Examples, rows: list[list[int]], apply: Callable, params: Tree | None = None) -> Subject:
    """The subject of a language model, of the tokens of each text; less than two have no next one."""
    live = torch.tensor([i for i, row in enumerate(rows) if len(row) > 1], dtype=torch.int64)
    if not len(live):
        raise ValueError("no text has two tokens, so there is no next one to predict")
    short = len(rows) - len(live)
    facts = examples.facts | {"texts left out, of less than two known tokens": short or None}
    examples = examples.some(live)._replace(skipped=examples.skipped + short, facts=facts)
    tokens, lengths = ragged.padded([rows[i] for i in live.tolist()])
    data = {"inputs": {"tokens": tokens, "lengths": lengths}}
    return Subject("language", next_tokens(apply), params, data, examples, texts=examples.inputs)


def of_encoder(encoder: Encoder, examples: Examples, longest: int) -> Subject:
    inputs = dict(zip(("tokens", "lengths"), encoders.tokens_of(encoder, examples.inputs, longest), strict=True))

    def apply(params: Tree, x: Tree) -> Tensor:
        mask = encoders.mask_of(x["tokens"], x["lengths"])
        return encoder.net.apply(params, x["tokens"], encoder.cfg, mask=mask)

    data = {"inputs": inputs, "labels": examples.labels}
    return Subject("texts", classification(apply), encoder.params, data, examples, texts=examples.inputs)


def of_classifier(apply: Callable, params: Tree, examples: Examples, stats: Tree | None = None) -> Subject:
    if examples.labels is None:
        raise ValueError("the data have no labels, which a classifier's loss needs")
    pictures = examples.inputs if examples.inputs.ndim == 4 and examples.inputs.shape[1] in (1, 3) else None
    data = {"inputs": examples.inputs, "labels": examples.labels}
    return Subject("images", classification(apply), params, data, examples, stats=stats or {}, pictures=pictures)


def keyed(seed: int) -> tuple[Tensor, Tensor]:
    """(key of the choice of examples, key of the initial values)."""
    choice, initial = random.split(random.key(seed)).unbind(0)
    return choice, initial
