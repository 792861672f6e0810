"""A classifier of texts made of an encoder, as `experiments/finetune_text.py` trains it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import tree
from core.tree import Tree
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Encoder
from train.data import DataError
from train.data.text import labelled, ragged
from train.data.text.labelled import Columns, LabelledSet, Records, Skipped
from train.data.text.ragged import Ragged
from train.losses import cross_entropy
from train.metrics import classification
from train.run import SavedRun


@dataclass(frozen=True, kw_only=True)
class Source:
    """Flags that name labelled texts."""

    data: str = "docstrings"
    """"docstrings" (of Python's library, by package), a file of labelled texts (TSV, CSV, JSON lines, or lines
    "label text"), or a folder with one training file."""
    validation: str | None = None
    """File for validation; that beside a training file, or a tenth held out, if None."""
    test: str | None = None
    """File for testing, in the same way."""
    text_column: str | None = None
    """Name of the column, or key, of the texts; what the file itself shows if None."""
    label_column: str | None = None
    """Name of the column, or key, of the labels."""

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.label_column)

    def open(self) -> LabelledSet:
        """Raises DataError as `labelled.open_labelled`."""
        return labelled.open_labelled(self.data, self.validation, self.test, self.columns)


class Classifier(NamedTuple):
    """A classifier of texts, of which the encoder sees the first `longest` tokens."""

    encoder: Encoder
    classes: tuple[str, ...]
    longest: int


class Prepared(NamedTuple):
    """A labelled set, the tokens of its parts, and what there is to say of both."""

    data: LabelledSet
    parts: dict[str, Ragged]
    facts: dict[str, Any]


def load(run: SavedRun, device: torch.device | str = "cpu") -> Classifier:
    """The classifier of a run, at its checkpoint."""
    encoder = encoders.of_finetuned(run, device)
    if "classes" not in run.config:
        raise ValueError(f"'{run.folder}' is no run of a classifier; expected one of finetune_text.py")
    return Classifier(encoder, tuple(run.config["classes"]), run.config["args"]["tuning"]["longest"])


def prepare(encoder: Encoder, data: LabelledSet, longest: int) -> Prepared:
    """Tokens of all parts. Raises DataError: a part without a usable text."""
    parts, usable, skipped = {}, {}, list(data.skipped)
    for name, records in data.parts.items():
        usable[name], parts[name], empty = encoded(encoder, records, data.classes, longest, f"{name} record")
        skipped += empty
    data = data._replace(**usable, skipped=tuple(skipped))
    return Prepared(data, parts, {**labelled.facts(data), **facts(encoder, parts, longest)})


def encoded(
    encoder: Encoder, records: Records, classes: Sequence[str], longest: int, what: str
) -> tuple[Records, Ragged, list[Skipped]]:
    """(records with tokens, these, the others). Raises DataError if there is none with tokens."""
    numbers = {name: i for i, name in enumerate(classes)}
    tokens, lengths = encoders.tokens_of(encoder, records.texts, longest)
    alone = len(encoders.encodings(encoder, [""], longest)[0].ids)  # special tokens around a text
    rows = (lengths > alone).nonzero()[:, 0]
    if not len(rows):
        raise DataError(f"no {what} has a token of the vocabulary; expected texts")
    empty = (lengths <= alone).nonzero()[:, 0].tolist()
    labels = torch.tensor([numbers[name] for name in records.labels], dtype=torch.int64)
    data = Ragged(tokens[rows], lengths[rows], labels[rows])
    return records.some(rows.tolist()), data, [(f"{what} {i + 1}", "has no tokens") for i in empty]


def facts(encoder: Encoder, parts: dict[str, Ragged], longest: int) -> dict[str, Any]:
    """Remarks on texts that the encoder does not see in full, and on unknown words."""
    out, train = {}, parts["train"]
    cut = sum(int((part.lengths == longest).sum()) for part in parts.values())
    if cut:
        out["cut"] = f"{cut:,} texts may be longer than --longest {longest}"
    unknown = next((i for i in map(encoder.tokenizer.token_id, ("[UNK]", "<unk>")) if i is not None), None)
    share = float((train.tokens == unknown).sum() / train.lengths.sum()) if unknown is not None else 0.0
    if share > 0.01:
        out["unknown"] = f"{share:.1%} of the training tokens are not in the vocabulary"
    return out


def loss_of(encoder: Encoder, whole: Callable[[Tree], Tree], *, train: bool) -> Callable:
    """`loss(params, batch, keys) -> ((examples,) cross-entropies in nats, metrics)` of the trained part."""

    def loss(params: Tree, batch: Ragged, keys: Tensor | None = None):
        mask = encoders.mask_of(batch.tokens, batch.lengths)
        options = {"mask": mask, "key": keys, "train": train}
        logits = encoder.net.apply(whole(params), batch.tokens, encoder.cfg, **options)  # (examples, classes)
        hits = classification.accuracy(logits.detach(), batch.labels)
        return cross_entropy(logits, batch.labels, reduction="none"), {"accuracy": hits}

    return loss


@torch.no_grad()
def log_probabilities(encoder: Encoder, data: Ragged) -> Tensor:
    """(texts, classes), on the CPU."""
    device, out = tree.leaves(encoder.params)[0].device, torch.empty(len(data.lengths), encoder.cfg.classes)
    for rows, (tokens, lengths) in ragged.evaluation_batches(data.tokens, data.lengths, 64):
        tokens, lengths = tokens.to(device), lengths.to(device)
        logits = encoder.net.apply(encoder.params, tokens, encoder.cfg, mask=encoders.mask_of(tokens, lengths))
        out[rows] = logits.float().log_softmax(-1).cpu()
    return out


def validate(encoder: Encoder, data: Ragged) -> dict[str, float]:
    """loss (nats), accuracy and error."""
    figures = classification.figures(log_probabilities(encoder, data), data.labels)
    return {"loss": figures["nll"], "accuracy": figures["accuracy"], "error": 1.0 - figures["accuracy"]}


def classify(model: Classifier, texts: Sequence[str]) -> Tensor:
    """Log probabilities (texts, classes)."""
    tokens, lengths = encoders.tokens_of(model.encoder, texts, model.longest)
    return log_probabilities(model.encoder, Ragged(tokens, lengths, lengths))
