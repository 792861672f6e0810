"""A task of `experiments/clip.py`: its data and objective, as its loop takes them; batches and the optimizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from core.tree import Tree
from experiments.parts.picture_text import Clip
from train import optimizers
from train.optimizers import Optimizer, schedules


class Task(NamedTuple):
    """Data and objective of a run.

    Attributes:
        facts: what was understood of the data.
        data: what a resumed run must share, for a fingerprint.
        count: number of examples to train on.
        model: the net; its parameters are values, or from scratch their spec.
        head: spec of what is trained beside it.
        loss: as `train.step.make_step` takes it.
        batch: (numbers of examples, key) -> their batch.
        guess: loss of a guess.
        validate: (net, head) -> figures of a part of the data to test on.
        study: (folder or None, net, head) -> figures; writes pictures.
        curves: {picture: ({name in the legend: metric}, label of the axis)}.
        summary: template of the figures.
    """

    facts: dict[str, Any]
    data: tuple
    count: int
    model: Clip
    head: Tree
    loss: Callable
    batch: Callable[[Tensor, Tensor], Tree]
    guess: float
    validate: Callable[[Clip, Tree], dict[str, float]]
    study: Callable[[Path | None, Clip, Tree], dict[str, Any]]
    curves: dict[str, tuple[dict[str, str], str]]
    summary: str


def adamw(args: Any) -> Optimizer:
    """AdamW after clipping; no decay of biases, norms and the scale. The rate rises, then falls as a cosine."""
    rate = schedules.warmup_cosine(args.learning_rate, max(1, args.steps // 20), args.steps)
    rule = optimizers.adamw(rate, beta2=0.98, weight_decay=args.weight_decay, mask=lambda name, leaf: leaf.ndim >= 2)
    return optimizers.chain(optimizers.clip_by_global_norm(1.0), rule)
