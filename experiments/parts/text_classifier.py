"""A classifier of texts that `experiments/sequences.py` has trained: its predictions, figures and pictures."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import spec, tree
from experiments.parts import labelled_texts
from experiments.parts.sequence_task import NetConfig, Task, module_of, net_of
from train.data.fingerprint import fingerprint
from train.data.text import labelled, ragged, tf_idf, tokenizers
from train.data.text.ragged import Ragged
from train.data.text.tokenizers import SentenceTokenizer
from train.losses import cross_entropy
from train.metrics import classification
from train.run import SavedRun

MOST_TEXTS = 20_000
"""Training texts up to which TF-IDF is fitted, in seconds."""


class TextClassifier(NamedTuple):
    """`net` is the module of the net, `kind` that of the tokenizer; of a longer text the net sees the first `longest`
    tokens. `params` of several `members` have them as their leading axis; their probabilities are averaged."""

    net: ModuleType
    params: tree.Tree
    cfg: NetConfig
    classes: tuple[str, ...]
    tokenizer: SentenceTokenizer
    kind: str
    longest: int
    members: int = 1


def load(run: SavedRun, device: torch.device | str = "cpu") -> TextClassifier:
    """The classifier of a run, at its checkpoint."""
    args, members = run.config["args"], run.config.get("members", 1)
    net = module_of(args["net"])
    cfg = run.read("net", net.Config)
    like = spec.abstract(net.spec(cfg))
    if members > 1:
        like = tree.stack([like] * members)
    params = tree.move(run.restore(like, "params"), device)
    tokenizer, classes = tokenizers.load(run.folder / "tokenizer.json"), tuple(run.config["classes"])
    return TextClassifier(net, params, cfg, classes, tokenizer, args["tokenizer"], args["longest"], members)


def losses(params: tree.Tree, batch: Ragged, keys: Tensor, net: ModuleType, cfg: NetConfig):
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
    net, cfg = module_of(args.net), net_of(args, vocabulary=size, **sizes)
    buckets = ragged.make_buckets(learn.lengths, args.shapes, args.batch)
    baselines = ragged.baselines(learn, test, size)
    lower = ", of lower-case texts" if tokenizer.tokenizer.normalizer else ""
    facts = {"tokenizer": kind + lower, "vocabulary": size, "widths of batches": [bucket.width for bucket in buckets]}
    long = sum(int((part.lengths == args.longest).sum()) for part in parts.values())
    beside = len(data.train.texts) <= MOST_TEXTS and tf_idf.has_letters(data.train.texts)
    facts |= {"TF-IDF beside it": f"of {tf_idf.unit_of(data.train.texts)}"} if beside else {}
    facts |= {"cut": f"{long:,} texts may be longer than --longest {args.longest}"} if long else {}

    def batch(key: Tensor, step: int) -> Ragged:
        out = ragged.batch_at(learn, buckets, key, step, args.batch)
        # Members differ by their initial values and dropout.
        return tree.stack([out] * args.members) if args.members > 1 else out

    def validate(params: tree.Tree) -> dict[str, float]:
        model = TextClassifier(net, params, cfg, data.classes, tokenizer, kind, args.longest, args.members)
        log_probs = log_probabilities(model, validation.tokens, validation.lengths)
        figures = classification.figures(log_probs, validation.labels)
        return {"loss": figures["nll"], "accuracy": figures["accuracy"], "error": 1.0 - figures["accuracy"]}

    def study_of(folder: Path, model: TextClassifier) -> dict[str, float]:
        figures = {**study(folder, model, data.test.texts, test), **baselines}
        if beside:
            figures["tf_idf_accuracy"] = tf_idf.baselines(data).tf_idf
        return {**figures, "skipped": len(data.skipped)}

    return Task(
        facts={**labelled.facts(data), **facts},
        identity={"net": cfg, "data": fingerprint(*parts.values())},
        config={"classes": data.classes, "members": args.members},
        cfg=cfg,
        per_epoch=ragged.steps_per_epoch(buckets, args.batch),
        members=args.members if args.members > 1 else 0,
        batch=batch,
        loss=functools.partial(losses, net=net, cfg=cfg),
        validate=validate,
        best=args.best_by,
        study=study_of,
        files={"tokenizer.json": tokenizer.save},
    )


@torch.no_grad()
def log_probabilities_of_members(model: TextClassifier, tokens: Tensor, lengths: Tensor) -> Tensor:
    """(members, texts, classes), on the CPU."""
    device = tree.leaves(model.params)[0].device
    out = torch.empty(model.members, len(lengths), model.cfg.outputs)
    apply = functools.partial(model.net.apply, cfg=model.cfg)
    for rows, batch in ragged.evaluation_batches(tokens, lengths):
        batch = tree.move(batch, device)
        logits = torch.vmap(apply, (0, None))(model.params, batch) if model.members > 1 else apply(model.params, batch)
        out[:, rows] = logits.float().log_softmax(-1).cpu()
    return out


def log_mean(log_probs: Tensor) -> Tensor:
    """Logarithms of the members' mean probabilities, (members, texts, classes) -> (texts, classes)."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def log_probabilities(model: TextClassifier, tokens: Tensor, lengths: Tensor) -> Tensor:
    """(texts, classes), on the CPU."""
    return log_mean(log_probabilities_of_members(model, tokens, lengths))


def classify(model: TextClassifier, texts: Sequence[str]) -> Tensor:
    """Log probabilities (texts, classes)."""
    tokens, lengths = ragged.encode(texts, model.tokenizer, model.kind, model.longest)
    return log_probabilities(model, tokens, lengths)


def study(folder: Path, model: TextClassifier, texts: Sequence[str], data: Ragged) -> dict[str, float]:
    """Figures and pictures of `labelled_texts.study`; texts are those of `data`."""
    members = log_probabilities_of_members(model, data.tokens, data.lengths)  # (members, texts, classes)
    figures = labelled_texts.study(folder, log_mean(members), data.labels, texts, model.classes)
    if model.members > 1:
        figures["member_accuracy"] = float((members.argmax(-1) == data.labels).float().mean())
    return figures


def print_classes(model: TextClassifier, texts: Sequence[str], file: Path | None) -> None:
    """Lines of `labelled_texts.print_classes`."""
    labelled_texts.print_classes(functools.partial(classify, model), model.classes, texts, file)
