"""A task of `experiments/sequences.py`: its data and objective, as its loop takes them."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from core import tree
from nets.language import fasttext, sequence_classifier, text_cnn

NetConfig = sequence_classifier.Config | fasttext.Config | text_cnn.Config
OF_TEXTS = {"fasttext": fasttext, "text_cnn": text_cnn}
"""Nets of tokens alone, by their names; every other name is a cell of `sequence_classifier`."""
CHOICES = {"fasttext": ("buckets", "dropout", "ngrams"), "text_cnn": ("dropout", "width", "windows")}
"""Fields of their configurations that are flags of the same name."""


class Task(NamedTuple):
    """Data and objective of a run.

    Attributes:
        facts: what was understood of the data.
        identity: what a resumed run must share.
        config: entries of the run's configuration.
        per_epoch: steps.
        members: nets that are trained at once, stacked; 0 for a single one.
        batch: (key, step) -> the batch of the step.
        loss: as `train.step.make_step` takes it.
        validate: parameters -> figures of the validation part.
        best: that of them which is least in the best checkpoint.
        study: (folder, model) -> figures of the test part; writes pictures.
        files: as `train.run.run.Run.open` takes them.
    """

    facts: dict[str, Any]
    identity: dict[str, Any]
    config: dict[str, Any]
    cfg: NetConfig
    per_epoch: int
    members: int
    batch: Callable[[Tensor, int], tree.Tree]
    loss: Callable
    validate: Callable[[tree.Tree], dict[str, float]]
    best: str
    study: Callable[[Path, Any], dict[str, float]]
    files: dict[str, Callable[[Path], Any]]


def module_of(name: str) -> ModuleType:
    """The module of the net of `--net`."""
    return OF_TEXTS.get(name, sequence_classifier)


def net_of(args: Any, **sizes: Any) -> NetConfig:
    """The net of the flags of sequences.py. Raises ValueError: it takes tokens, and the sizes have no vocabulary."""
    if args.net in OF_TEXTS:
        if "vocabulary" not in sizes:
            raise ValueError(f"--net {args.net} classifies texts; expected rnn, gru, lstm or layer-norm-lstm")
        return OF_TEXTS[args.net].Config(**{name: getattr(args, name) for name in CHOICES[args.net]}, **sizes)
    kind, choices = args.net.replace("-", "_"), ("width", "layers", "bidirectional", "pooling", "dropout")
    return sequence_classifier.Config(kind=kind, **{name: getattr(args, name) for name in choices}, **sizes)
