"""A run that watches the gradients of its examples: noise scale and histogram of norms, in its log and as a picture.

step = make_step(losses, optimizer, watch=watching.watch)
average = watching.begin(run.folder)                        # of a resumed run as it was left
state, metrics = step(state, batch)
average, metrics = watching.record(run.log, at, metrics, average)
watching.draw(run.folder)
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.accumulators import histogram, log_edges
from core.per_example import Reports
from core.scores import noise
from train import plots
from train.logs import RunLog, read_curves, read_metrics

EDGES = log_edges(1e-6, 1e6, 120)  # of the histogram of norms
DECAY = 0.95  # weight of the past in the moving average of the noise scale
EVERY = 10  # steps between two histograms
NAMES = {"trace": "gradients/trace", "square": "gradients/square"}


def watch(found: Reports) -> dict[str, Tensor]:
    """What a train step reports besides its own metrics: both parts of the noise scale, and the counts of norms."""
    parts, counted, norms = noise.total(noise.estimate(found)), histogram(EDGES), found.total_norm
    counts = counted.update(counted.init(norms), norms, torch.arange(len(norms), device=norms.device))
    return {**parts._asdict(), "norms": counts[1:-2]}


def begin(folder: Path) -> noise.Smoothed:
    """The moving average after the steps that the log in `folder` holds."""
    average = noise.init(torch.zeros(()))
    lines = read_curves(folder, *NAMES.values())
    for trace, square in zip(*(lines[name][1] for name in NAMES.values()), strict=True):
        average = noise.update(average, noise.Noise(torch.tensor(trace), torch.tensor(square)), DECAY)
    return average


def record(
    log: RunLog, step: int, metrics: dict[str, Tensor], average: noise.Smoothed
) -> tuple[noise.Smoothed, dict[str, Tensor]]:
    """Log what `watch` saw at a step; returns the moving average with it, and the metrics without it."""
    found = noise.Noise(*(metrics[name].cpu() for name in noise.Noise._fields))
    average = noise.update(average, found, DECAY)
    said = {name: getattr(found, part) for part, name in NAMES.items()}
    if step % EVERY == 0:
        log.histogram(step, "gradients/norms", EDGES, metrics["norms"])
        said["gradients/noise_scale"] = noise.scale(noise.average(average)).total
    log.metrics(step, said)
    return average, {name: value for name, value in metrics.items() if name not in ("trace", "square", "norms")}


def draw(folder: Path) -> None:
    """`gradients.png`: the histogram of norms over time, and the noise scale; nothing if the log has no histogram."""
    records = [(r["step"], r["gradients/norms"]["counts"]) for r in read_metrics(folder) if "gradients/norms" in r]
    if not records:
        return
    steps, counts = np.array([step for step, _ in records]), np.array([counts for _, counts in records])
    used = np.flatnonzero(counts.sum(0))
    first, last = (used[0], used[-1] + 1) if len(used) else (0, len(EDGES) - 1)
    lines = read_curves(folder, "gradients/noise_scale")["gradients/noise_scale"]
    scale = np.where(np.array(lines[1]) > 0, lines[1], np.nan)
    with plots.panels(folder / "gradients.png", 1, 2, 5.8, 4.0) as (norms, noises):
        edges = np.concatenate([steps - EVERY / 2, steps[-1:] + EVERY / 2])
        cells, ys = counts.T[first:last], EDGES[first : last + 1]
        plots.heat_map(
            norms, cells, edges, ys, "step", "gradient norm", "Norms of single examples", "examples", log_y=True
        )
        plots.curves(noises, {"": (lines[0], scale)}, "step", "examples", "Gradient noise scale", log=True)
