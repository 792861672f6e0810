"""A run that watches the gradients of its examples: noise scale, norms of layers and histogram of norms, in its log.

step = make_step(losses, optimizer, watch=watching.watch)
average = watching.begin(run.folder)                        # of a resumed run as it was left
state, metrics = step(state, batch)
average, metrics = watching.record(run.log, at, metrics, average)
watching.draw(run.folder)
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core import tree
from core.accumulators import histogram, log_edges
from core.per_example import Reports
from core.scores import noise
from train import plots
from train.run.logs import RunLog, read_curves, read_metrics

EDGES = log_edges(1e-6, 1e6, 240)  # of the histogram of norms
COUNTED = histogram(EDGES)
DECAY = 0.95  # weight of the past in the moving average of the noise scale
EVERY = 10  # steps between two histograms, and two records of the layers' norms
NAMES = {"trace": "gradients/trace", "square": "gradients/square"}
LAYERS = "gradients/norm/"


def count_norms(norms: Tensor) -> Tensor:
    """(N,) -> (bins,): how many norms lie between two `EDGES`."""
    state = COUNTED.init(norms)
    return COUNTED.result(COUNTED.update(state, norms, torch.arange(len(norms), device=norms.device))).counts


def watch(found: Reports) -> dict[str, Tensor]:
    """What a train step reports besides its own metrics: both parts of the noise scale, the counts of the norms, and
    for each parameter the mean over the examples of its norm."""
    layers = {LAYERS + name: norms.mean() for name, norms in tree.items(found.norm)}
    return {**noise.total(noise.estimate(found))._asdict(), "norms": count_norms(found.total_norm), **layers}


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
    layers = {name: value for name, value in metrics.items() if name.startswith(LAYERS)}
    found = noise.Noise(*(metrics[name].cpu() for name in noise.Noise._fields))
    average = noise.update(average, found, DECAY)
    said = {name: getattr(found, part) for part, name in NAMES.items()}
    if step % EVERY == 0:
        log.histogram(step, "gradients/norms", EDGES, metrics["norms"])
        said = {**said, "gradients/noise_scale": noise.scale(noise.average(average)).total, **layers}
    log.metrics(step, said)
    seen = {*noise.Noise._fields, "norms", *layers}
    return average, {name: value for name, value in metrics.items() if name not in seen}


def draw_norms(axes: Any, steps: Any, counts: Any) -> None:
    """A histogram of norms over time.

    Args:
        axes: one of `plots.panels`.
        steps: (columns + 1,), where the columns begin and end.
        counts: (columns, bins), of `count_norms`.
    """
    values = np.asarray(counts)
    used = np.flatnonzero(values.sum(0))
    first, last = (used[0], used[-1] + 1) if len(used) else (0, values.shape[1])
    cells, edges, title = values.T[first:last], EDGES[first : last + 1], "Norms of single examples"
    plots.heat_map(axes, cells, steps, edges, "step", "gradient norm", title, "examples", log_y=True, log_colour=True)


def draw(folder: Path) -> None:
    """`gradients.png`: the histogram of norms over time, and the noise scale; nothing if the log has no histogram."""
    records = [(r["step"], r["gradients/norms"]["counts"]) for r in read_metrics(folder) if "gradients/norms" in r]
    if not records:
        return
    steps, counts = np.array([step for step, _ in records]), np.array([counts for _, counts in records])
    lines = read_curves(folder, "gradients/noise_scale")["gradients/noise_scale"]
    scale = np.where(np.array(lines[1]) > 0, lines[1], np.nan)
    with plots.panels(folder / "gradients.png", 1, 2, 5.8, 4.0) as (norms, noises):
        draw_norms(norms, np.append(steps - EVERY / 2, steps[-1] + EVERY / 2), counts)
        plots.curves(noises, {"": (lines[0], scale)}, "step", "examples", "Gradient noise scale", log=True)
