"""A row of the registry of experiments."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Experiment:
    """A script as the laws see it.

    Args:
        flags: those of a run of seconds, uncompiled, with checkpoints at half of its steps or before.
        steps: its number of steps.
        pictures: files of the run that are pictures (patterns as in a shell).
        files: other files of the run.
        inputs: writes what the flags name into a folder.
        baseline: the figure of `result.json` that a method without a net reaches; "" if there is none to compare with.
        refusals: (flags, the error they give), run in the folder of `inputs`; nothing may be written.
        shards: the ways of `--shard` that it takes on several processes; () where it trains on one.
        together: further flags of a run that is compared with one on several processes.
        commands: (sub-command and flags, files it writes into the run's folder); the run is added with `--run`.
    """

    name: str
    flags: tuple[str, ...]
    steps: int
    pictures: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    inputs: Callable[[Path], None] = lambda folder: None
    baseline: str = ""
    refusals: tuple[tuple[tuple[str, ...], str], ...] = ()
    shards: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    commands: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()

    def __str__(self) -> str:
        return self.name
