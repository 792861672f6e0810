"""Runs of experiments: folders, logs, checkpoints, resuming, command lines."""

from train.run.flags import (
    Common,
    Count,
    Fraction,
    FromBest,
    FromRun,
    Integer,
    Natural,
    NonNegative,
    Number,
    Positive,
    Rate,
    Share,
    Shared,
)
from train.run.resume import SavedRun, open_run
from train.run.run import Run, begin

__all__ = [
    "Common",
    "Count",
    "Fraction",
    "FromBest",
    "FromRun",
    "Integer",
    "Natural",
    "NonNegative",
    "Number",
    "Positive",
    "Rate",
    "Run",
    "SavedRun",
    "Share",
    "Shared",
    "begin",
    "open_run",
]
