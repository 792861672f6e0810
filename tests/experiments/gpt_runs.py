"""Shared parts of the tests of experiments/gpt.py: how they start it, its text, its state."""

import functools
from pathlib import Path

from core import random
from nets.language import gpt2
from tests.experiments import runs
from train import optimizers
from train.run import checkpoints
from train.step import TrainState, create

call, start, refused, completed = (
    functools.partial(function, "gpt") for function in (runs.call, runs.start, runs.refused, runs.completed)
)
# Small enough for milliseconds a step.
QUICK = ("--text", "text.txt", "--batch", "2", "--no-compile")
TEXT = "".join(f"The {n} quick brown foxes jump over {n * n} lazy dogs, and café owners laugh.\n" for n in range(40))


def state_of(run: Path, step: int | None = None) -> TrainState:
    """Everything in a checkpoint of a run."""
    cfg = gpt2.Config(**checkpoints.read_config(run / "checkpoints", step)["net"])
    optimizer = optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.adamw(lambda count: 0.0))
    return checkpoints.restore(run / "checkpoints", create(random.key(0), gpt2.spec(cfg), optimizer), step)
