"""A task of `experiments/sequences.py`: its data and objective, as its loop takes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from core import tree
from nets.language import sequence_classifier as net


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
    cfg: net.Config
    per_epoch: int
    members: int
    batch: Callable[[Tensor, int], tree.Tree]
    loss: Callable
    validate: Callable[[tree.Tree], dict[str, float]]
    best: str
    study: Callable[[Path, Any], dict[str, float]]
    files: dict[str, Callable[[Path], Any]]


def net_of(args: Any, **sizes: Any) -> net.Config:
    """The net of the flags of sequences.py."""
    kind, choices = args.net.replace("-", "_"), ("width", "layers", "bidirectional", "pooling", "dropout")
    return net.Config(kind=kind, **{name: getattr(args, name) for name in choices}, **sizes)
