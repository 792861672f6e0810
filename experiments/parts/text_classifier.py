"""A classifier of texts that `experiments/sequences.py` has trained: its predictions, figures and pictures."""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import tree
from experiments.parts.sequence_task import Task, net_of
from nets.language import sequence_classifier as net
from train.data.fingerprint import fingerprint
from train.data.text import labelled, ragged, tokenizers
from train.data.text.files import decoded_lines, unpacked
from train.data.text.ragged import Ragged
from train.data.text.tokenizers import SentenceTokenizer
from train.files import replacing, shown
from train.losses import cross_entropy
from train.metrics import classification
from train.plots import classification as pictures
from train.run import SavedRun


class TextClassifier(NamedTuple):
    """`kind` is that of the tokenizer; of a longer text the net sees the first `longest` tokens."""

    params: tree.Tree
    cfg: net.Config
    classes: tuple[str, ...]
    tokenizer: SentenceTokenizer
    kind: str
    longest: int


def load(run: SavedRun, device: torch.device | str = "cpu") -> TextClassifier:
    """The classifier of a run, at its checkpoint."""
    cfg, args = run.read("net", net.Config), run.config["args"]
    params = tree.move(run.restore(net.spec(cfg), "params"), device)
    tokenizer = tokenizers.load(run.folder / "tokenizer.json")
    return TextClassifier(params, cfg, tuple(run.config["classes"]), tokenizer, args["tokenizer"], args["longest"])


def losses(params: tree.Tree, batch: Ragged, keys: Tensor, cfg: net.Config):
    """(examples,): cross-entropy in nats."""
    logits = net.apply(params, (batch.tokens, batch.lengths), cfg, key=keys, train=True)
    hits = classification.accuracy(logits.detach(), batch.labels)
    return cross_entropy(logits, batch.labels, reduction="none"), {"accuracy": hits}


def task_of(args: Any, resumed_from: Path | None) -> Task:
    """The task of the flags of sequences.py; a resumed run keeps its tokenizer. Raises ValueError: they do not fit."""
    data, kind = labelled.open_labelled(args.data, args.validation, args.test), args.tokenizer
    if resumed_from:
        tokenizer = tokenizers.load(resumed_from / "tokenizer.json")
    else:
        tokenizer = ragged.learn_tokenizer(data.train.texts, args.vocabulary, kind, args.min_count)
    size = tokenizer.vocabulary_size
    parts = {
        name: ragged.encoded(part, data.classes, tokenizer, kind, args.longest) for name, part in data.parts.items()
    }
    learn, validation, test = parts.values()
    sizes = {"d_in": args.embedding, "embedding_std": args.embedding_std, "outputs": len(data.classes)}
    cfg = net_of(args, vocabulary=size, **sizes)
    buckets = ragged.make_buckets(learn.lengths, args.shapes, args.batch)
    baselines = ragged.baselines(learn, test, size)
    lower = ", of lower-case texts" if tokenizer.tokenizer.normalizer else ""
    facts = {"tokenizer": kind + lower, "vocabulary": size, "widths of batches": [bucket.width for bucket in buckets]}
    long = sum(int((part.lengths == args.longest).sum()) for part in parts.values())
    facts |= {"cut": f"{long:,} texts may be longer than --longest {args.longest}"} if long else {}

    def batch(key: Tensor, step: int) -> Ragged:
        return ragged.batch_at(learn, buckets, key, step, args.batch)

    def validate(params: tree.Tree) -> dict[str, float]:
        log_probs = log_probabilities(params, cfg, validation.tokens, validation.lengths)
        figures = classification.figures(log_probs, validation.labels)
        return {"loss": figures["nll"], "accuracy": figures["accuracy"], "error": 1.0 - figures["accuracy"]}

    def study_of(folder: Path, model: TextClassifier) -> dict[str, float]:
        return {**study(folder, model, data.test.texts, test), **baselines, "skipped": len(data.skipped)}

    return Task(
        facts={**labelled.facts(data), **facts},
        identity={"net": cfg, "data": fingerprint(*parts.values())},
        config={"classes": data.classes},
        cfg=cfg,
        per_epoch=ragged.steps_per_epoch(buckets, args.batch),
        members=0,
        batch=batch,
        loss=functools.partial(losses, cfg=cfg),
        validate=validate,
        best="error",
        study=study_of,
        files={"tokenizer.json": tokenizer.save},
    )


@torch.no_grad()
def log_probabilities(params: tree.Tree, cfg: net.Config, tokens: Tensor, lengths: Tensor) -> Tensor:
    """(texts, classes), on the CPU."""
    device, out = tree.leaves(params)[0].device, torch.empty(len(lengths), cfg.outputs)
    for rows, batch in ragged.evaluation_batches(tokens, lengths):
        out[rows] = net.apply(params, tree.move(batch, device), cfg).float().log_softmax(-1).cpu()
    return out


def classify(model: TextClassifier, texts: Sequence[str]) -> Tensor:
    """Log probabilities (texts, classes)."""
    tokens, lengths = ragged.encode(texts, model.tokenizer, model.kind, model.longest)
    return log_probabilities(model.params, model.cfg, tokens, lengths)


def study(folder: Path, model: TextClassifier, texts: Sequence[str], data: Ragged) -> dict[str, float]:
    """Accuracy, NLL and calibration error; writes confusion.png, report.txt and mistakes.txt.

    Args:
        texts: those of `data`.
    """
    log_probs = log_probabilities(model.params, model.cfg, data.tokens, data.lengths)
    pictures.confusion(folder / "confusion.png", classification.confusion(log_probs, data.labels), model.classes)
    with replacing(folder / "report.txt") as path:
        path.write_text(classification.report(log_probs, data.labels, model.classes), encoding="utf-8")
    lines = ["class\tprobability\tpredicted\ttext"]
    for i in classification.worst_mistakes(log_probs, data.labels, 50).tolist():
        label, best = int(data.labels[i]), int(log_probs[i].argmax())
        lines.append(f"{model.classes[label]}\t{log_probs[i, label].exp():.4f}\t{model.classes[best]}\t{texts[i]}")
    with replacing(folder / "mistakes.txt") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return classification.figures(log_probs, data.labels)


def print_classes(model: TextClassifier, texts: Sequence[str], file: Path | None) -> None:
    """A line `class<TAB>probability<TAB>text` for each text, or each line of the file or of standard input.

    Empty lines are left out, and counted on standard error.
    """
    if texts and file:
        raise ValueError("there are texts and a --file; expected one of them")
    if texts:
        lines = [list(texts)]
    elif file:
        with unpacked(file) as content:
            lines = [decoded_lines(content.read())[0]]
    else:
        lines = ([line.decode("utf-8", "replace")] for line in sys.stdin.buffer)
    empty = 0
    for part in lines:
        whole = [stripped for text in part if (stripped := text.strip().removeprefix("\ufeff"))]
        empty += len(part) - len(whole)
        for text, log_probs in zip(whole, classify(model, whole) if whole else (), strict=True):
            best = int(log_probs.argmax())
            print(f"{shown(model.classes[best])}\t{log_probs[best].exp():.4f}\t{shown(text)}", flush=True)
    if empty:
        print(f"{empty} empty line{'s are' if empty > 1 else ' is'} left out", file=sys.stderr)
