"""Losses and gradient norms by the time: means over groups of consecutive times, in a run's log and as a picture."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.per_example import Reports
from train import plots
from train.gradients import watch
from train.run.logs import read_curves

GROUPS = 5  # of times, in the log


def spread(count: int, i: int, rounds: int, steps: int, device: torch.device | None = None) -> Tensor:
    """Times (count,) int64 of round i, equally spaced over the schedule: all rounds together see every part of it as
    often."""
    return (torch.arange(count, device=device) * rounds + i) * steps // (count * rounds)


def grouped(time: Tensor, values: Tensor, steps: int, groups: int = 20) -> tuple[Tensor, Tensor]:
    """Means over groups of times, at most one group per time.

    Args:
        time, values: (examples,).
        steps: of the schedule.

    Returns:
        (the middle of each group, mean), each (groups,) float64 on the CPU; nan for an empty group.
    """
    groups = min(groups, steps)
    group = time.cpu() * groups // steps
    total = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, values.detach().cpu().double())
    middle = (torch.arange(groups) + 0.5) * steps / groups
    return middle, total / torch.bincount(group, minlength=groups)


def watched(reports: Reports) -> dict[str, Tensor]:
    """For a train step: the metrics of `train.gradients.watch.watch`, `losses` and `example_norms` (examples,)."""
    return {**watch.watch(reports), "losses": reports.losses, "example_norms": reports.total_norm}


def names(steps: int) -> list[str]:
    """Metrics' names, one per group of times of a schedule of `steps`."""
    edges = [-(-i * steps // GROUPS) for i in range(GROUPS + 1)]
    return [f"gradients/time/{a:04}-{b - 1:04}" for a, b in zip(edges[:-1], edges[1:], strict=True)]


def norms(time: Tensor, norms: Tensor, steps: int) -> dict[str, float]:
    """For the log: the mean gradient norm of a batch's examples (examples,) in each group of times that has any."""
    _, means = grouped(time, norms, steps, GROUPS)
    return {name: float(mean) for name, mean in zip(names(steps), means, strict=False) if mean == mean}


def draw(folder: Path, steps: int) -> None:
    """`gradients_by_time.png`: the mean norms of the log in `folder`, smoothed."""
    lines, smooth = read_curves(folder, *names(steps)), {}
    for name, (at, values) in lines.items():
        if at:
            width = max(1, len(values) // 40)  # the mean of this many neighbours: a group has few examples in a batch
            kernel = np.ones(width) / width
            smooth[f"t {name[-9:]}"] = tuple(np.convolve(np.array(x, float), kernel, "valid") for x in (at, values))
    title = "Per-example gradients, by the time"
    plots.curves(folder / "gradients_by_time.png", smooth, ylabel="mean norm", title=title, log=True)
