"""Per-example gradients in the log of a run: noise scale, norms per parameter, and histograms of the norms.

In an experiment's loop:

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

from core import tree
from core.accumulators import histogram, log_edges
from core.per_example import Reports
from core.scores import noise
from train.plots import gradients as pictures
from train.run.logs import RunLog, read_curves, read_metrics

EDGES = log_edges(1e-6, 1e6, 240)  # of the histogram of norms
COUNTER = histogram(EDGES)
DECAY = 0.95  # weight of the past in the moving average of the noise scale
EVERY = 10  # steps between two histograms, and two records of the layers' norms
NAMES = {"trace": "gradients/trace", "square": "gradients/square"}
LAYERS = "gradients/norm/"


def count_norms(norms: Tensor) -> Tensor:
    """Histogram of the norms (N,) on `EDGES`: (bins,) counts."""
    state = COUNTER.init(norms)
    return COUNTER.result(COUNTER.update(state, norms, torch.arange(len(norms), device=norms.device))).counts


def watch(reports: Reports) -> dict[str, Tensor]:
    """Metrics of a watched step: both parts of the noise scale, the histogram of the norms, and the mean norm of each
    parameter."""
    layers = {LAYERS + name: norms.mean() for name, norms in tree.items(reports.norm)}
    return {**noise.total(noise.estimate(reports))._asdict(), "norms": count_norms(reports.total_norm), **layers}


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
    """Log the metrics of `watch` at a step: (the moving average with them, the other metrics)."""
    layers = {name: value for name, value in metrics.items() if name.startswith(LAYERS)}
    estimate = noise.Noise(*(metrics[name].cpu() for name in noise.Noise._fields))
    average = noise.update(average, estimate, DECAY)
    lines = {name: getattr(estimate, part) for part, name in NAMES.items()}
    if step % EVERY == 0:
        log.histogram(step, "gradients/norms", EDGES, metrics["norms"])
        lines = {**lines, "gradients/noise_scale": noise.scale(noise.average(average)).total, **layers}
    log.metrics(step, lines)
    own = {*noise.Noise._fields, "norms", *layers}
    return average, {name: value for name, value in metrics.items() if name not in own}


def draw(folder: Path) -> None:
    """Write `gradients.png`: the histogram of norms over time, and the noise scale.

    Nothing if the log in `folder` has no histogram.
    """
    records = [(r["step"], r["gradients/norms"]["counts"]) for r in read_metrics(folder) if "gradients/norms" in r]
    if not records:
        return
    steps, counts = np.array([step for step, _ in records]), np.array([counts for _, counts in records])
    edges = np.append(steps - EVERY / 2, steps[-1] + EVERY / 2)
    scale = read_curves(folder, "gradients/noise_scale")["gradients/noise_scale"]
    pictures.norms_and_noise_scale(folder / "gradients.png", edges, counts, EDGES, scale)
