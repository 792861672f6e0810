"""Per-example gradients while a net learns: norms, noise, signal, and which examples are easy or hard.

The train step reports on the gradient of each example at little more than its own cost (`make_step(watch=...)`). The
pictures show the histogram of the norms over time, the gradient noise scale (McCandlish et al. 2018, arXiv:1812.06162),
the signal-to-noise ratio of each layer (Liu et al. 2020, arXiv:2001.07384), the cosines between the gradients of a
batch, and the examples of least and greatest mean norm (compare Paul et al. 2021, arXiv:2107.07075):

    python experiments/gradients.py                            digits in scikit-learn; half a minute on 2 CPU cores
    python experiments/gradients.py --data FOLDER --batch 100  MNIST, or any folder of images
    python experiments/gradients.py --task text                passages of text and a small GPT; three minutes

Expected of the images: norms spread over five orders of magnitude, the mean of the hardest example is 22, of the median
one 0.7, of the easiest 0.058; the noise scale is 80 examples in the first quarter of the steps, and in the last more
than there are examples: their mean gradient is lost in the noise. Images of one class have gradients that point the
same way. Of the text: norms that grow (3.8 to 11), a noise scale from 13 to 152.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from core import random, tree
from core.per_example import Reports, reports
from core.scores import cosine_matrix, layer_snr, noise
from nets.classifiers import mlp
from nets.language import gpt2
from train import optimizers, plots
from train.data import batching
from train.data.fingerprint import fingerprint
from train.data.images import sets
from train.data.text import text
from train.data.understood import understood
from train.gradients.watch import EDGES, count_norms
from train.losses import cross_entropy
from train.optimizers import schedules
from train.plots.gradients import norms_over_time
from train.run import Common, Count, Positive, Shared, begin, command_line
from train.step import create, make_step

RUNS = Path("runs/gradients")
DECAY = 0.98  # weight of the past in the moving averages
SHOWN = 16  # easiest and hardest examples


@dataclass(frozen=True)
class Args:
    task: Literal["images", "text"] = "images"
    """Images and an MLP, or text and a small GPT."""
    data: str | None = None
    """Images: "mnist", "cifar10" ... or a folder of them; scikit-learn's digits if None. Text: a UTF-8 file, a folder
    of them, shakespeare or wikitext-2; the language reference inside Python if None."""
    examples: Count = 1000
    """Number of images or passages to learn from: the first ones."""
    steps: Count = 600
    """Training steps; the learning rate falls to 0 over all of them."""
    batch: Count = 50
    """Examples per step."""
    learning_rate: Positive = 2e-3
    """Peak learning rate."""
    common: Shared = Common(save_every=200)


class Task(NamedTuple):
    """A net and its data; in the matrix of cosines, examples are sorted by `group` (one number per example)."""

    net: Any
    spec: tree.Tree
    losses: Callable
    data: tuple[Tensor, Tensor]
    group: Tensor
    sorting: str
    draw: Callable[[Path, Tensor, Tensor], None]
    facts: dict[str, Any]


def image_task(args: Args) -> Task:
    images = sets.read_all("digits" if args.data is None else args.data, labelled=True)
    pixels, labels = (part[: args.examples] for part in images.train)
    net = mlp.Config((pixels[0].numel(), 128, 128, len(images.classes)))

    def losses(params, batch, keys):
        return cross_entropy(mlp.apply(params, batch[0], net, train=True), batch[1], reduction="none")

    def draw(folder: Path, indices: Tensor, norms: Tensor) -> None:
        titles = [f"{images.classes[labels[i]]}   {norms[i]:.2g}" for i in indices]
        about = f"easiest {len(indices) // 2}, then hardest: label and mean gradient norm"
        plots.image_grid(folder / "examples.png", pixels[indices], 8, titles, about, scale=1.0)

    return Task(net, mlp.spec(net), losses, (pixels, labels), labels, "by class", draw, sets.facts(images))


def text_task(args: Args) -> Task:
    source = text.open_text(args.data, None, cache=RUNS / "tokens")
    tokenizer, parts = source.tokenizer, text.split(source.tokens)
    net = gpt2.Config(tokenizer.vocabulary_size, 64, layers=2, heads=4, width=64, dropout=0.0, bias=False)
    passages = zip(range(args.examples), text.windows(parts[0], net.context, 1, whole=False), strict=False)
    data = tuple(torch.cat(column) for column in zip(*(pair for _, pair in passages), strict=True))

    def losses(params, batch, keys):
        return cross_entropy(gpt2.apply(params, batch[0], net, train=True), batch[1], reduction="none").mean(1)

    def draw(folder: Path, indices: Tensor, norms: Tensor) -> None:
        lines = [f"{norms[i]:8.3f}  {tokenizer.decode(data[0][i].tolist())!r}" for i in indices]
        half = len(lines) // 2
        lines = ["easiest: mean gradient norm and passage", *lines[:half], "", "hardest", *lines[half:]]
        (folder / "examples.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        with plots.panels(folder / "examples.png", 1, 1, 6.0, 0.16 * len(lines) + 0.1) as (axes,):
            axes.set_axis_off()
            style = {"family": "monospace", "fontsize": 8, "va": "top", "linespacing": 1.4}
            axes.text(0, 1, "\n".join(lines).replace("$", r"\$"), transform=axes.transAxes, **style)

    tenths = torch.arange(len(data[0])) * 10 // len(data[0])
    facts = text.facts(source, *parts)
    return Task(net, gpt2.spec(net), losses, data, tenths, "by tenth of the passages", draw, facts)


TASKS = {"images": image_task, "text": text_task}


def watch(batch: Reports) -> dict[str, Tensor]:
    """Norms of the examples and their histogram; trace, square and snr per parameter, (parameters,) each."""
    layers = {**noise.estimate(batch)._asdict(), "snr": layer_snr(batch)}
    rows = {name: torch.stack(tree.leaves(x)) for name, x in layers.items()}
    return {"norms": batch.total_norm, "counts": count_norms(batch.total_norm), **rows}


def empty_record(steps: int, examples: int, parameters: int) -> dict[str, Tensor]:
    """The record that checkpoints hold: rows per step, and per example the sum of its norms and their number."""
    rows = {name: torch.zeros(steps, parameters) for name in ("trace", "square", "snr")}
    counts = torch.zeros(steps, len(EDGES) - 1, dtype=torch.int64)
    visits = torch.zeros(examples, dtype=torch.int64)
    return {**rows, "counts": counts, "norms": torch.zeros(examples), "visits": visits}


def updated(record: dict[str, Tensor], at: int, indices: Tensor, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    row = torch.tensor([at - 1])
    rows = {n: record[n].index_copy(0, row, metrics[n].cpu()[None]) for n in ("trace", "square", "snr", "counts")}
    norms = record["norms"].index_add(0, indices, metrics["norms"].cpu())
    return {**rows, "norms": norms, "visits": record["visits"].index_add(0, indices, torch.ones_like(indices))}


def study(folder: Path, task: Task, params: tree.Tree, record: dict[str, Tensor], batch: Tensor) -> dict[str, float]:
    """Draw everything; returns the figures. `batch` are the examples whose cosines are drawn.

    Batches are drawn without replacement from M examples, so the |G|² that `noise.estimate` gives is as if these were a
    sample of more. That of their own mean gradient is larger by tr Σ / M.
    """
    trace = record["trace"].sum(1)  # (steps,)
    square = record["square"].sum(1) + trace / len(task.group)
    batch = batch[task.group[batch].argsort(stable=True)]
    examples = tree.move(tuple(part[batch] for part in task.data), tree.leaves(params)[0].device)
    gram = reports(lambda p, b: task.losses(p, b, None), params, examples, ("gram",)).total_gram
    cosines = cosine_matrix(gram).cpu()  # (batch, batch)
    mean = record["norms"] / record["visits"]
    ranked = mean.nan_to_num(-1.0).argsort()[(record["visits"] == 0).sum() :]
    half = min(SHOWN, len(ranked) // 2)
    extremes = torch.cat([ranked[:half], ranked[len(ranked) - half :].flip(0)])
    task.draw(folder, extremes, mean)
    draw(folder, task, record, torch.div(*noise.smooth((trace, square), DECAY)), cosines, task.group[batch].tolist())
    quarter = (len(trace) + 3) // 4  # of which both parts are averaged: late in training |G|² of a few steps is noise
    early, late = (trace[at].mean() / square[at].mean() for at in (slice(quarter), slice(-quarter, None)))
    figures = {
        "noise_scale_first_quarter": early,
        "noise_scale_last_quarter": late,
        "norm_easiest": mean[extremes[0]],
        "norm_hardest": mean[extremes[half]],
        "norm_median": mean[ranked].median(),
        "cosine_mean": cosines[~torch.eye(len(batch), dtype=torch.bool)].mean(),
    }
    return {name: float(value) for name, value in figures.items()}


def draw(folder: Path, task: Task, record: dict, scales: Tensor, cosines: Tensor, groups: list[int]) -> None:
    """`gradients.png`; `scales` (steps,) are smoothed noise scales, `groups` those of the examples with `cosines`."""
    names, snr = [name.removesuffix(".weight") for name in tree.names(task.spec)], noise.smooth(record["snr"], DECAY)
    matrices = [i for i, leaf in enumerate(tree.leaves(task.spec)) if len(leaf.shape) > 1]  # all would be too many
    steps, batch = len(scales), len(groups)
    xs, low, every = range(1, steps + 1), min(10, steps // 10), max(1, steps // 100)
    with plots.panels(folder / "gradients.png", 2, 2, 5.6, 4.2) as (norms, scale, ratio, cosine):
        counts = torch.stack([part.float().mean(0) for part in record["counts"].split(every)])
        norms_over_time(norms, torch.tensor([*range(0, steps, every), steps]) + 0.5, counts, EDGES)
        positive = torch.where(scales > 0, scales, torch.nan)
        plots.curves(scale, {"noise scale": (xs[low:], positive[low:])}, "step", "examples", "Noise scale", log=True)
        for style, count, label in ((":", batch, "a batch"), ("--", len(task.group), "all examples")):
            scale.axhline(count, ls=style, lw=1, color="#888888", label=label)
        scale.set_ylim(top=min(scale.get_ylim()[1], 10 * len(task.group)))  # beyond, |G|² is lost in the noise
        scale.legend(frameon=False, fontsize=9)
        lines = {names[i]: (xs[low:], snr[low:, i]) for i in matrices}
        plots.curves(ratio, lines, "step", "mean² / variance", "Signal-to-noise ratio of layers", log=True)
        ratio.axhline(1 / batch, ls="--", lw=1, color="#888888", label="no signal")
        ratio.legend(frameon=False, fontsize=9, ncols=len(lines) // 6 + 1)
        marks = [str(g) if i == 0 or g != groups[i - 1] else "" for i, g in enumerate(groups)]
        plots.matrix(cosine, cosines, marks, marks, title=f"Cosines of gradients, {task.sorting}", numbers=False)
        cosine.images[0].set(cmap="RdBu_r", clim=(-1, 1))


SUMMARY = """\
noise scale {noise_scale_first_quarter:.3g} in the first quarter of steps, {noise_scale_last_quarter:.3g} in the last
mean gradient norms from {norm_easiest:.2g} to {norm_hardest:.2g};"""


def train(args: Args) -> None:
    run = begin(RUNS, args, free=("data",))
    task = TASKS[args.task](args)
    count = len(task.data[0])
    understood(print, task.facts | {"examples to learn from": count, "net": task.net})
    if not 2 <= args.batch <= count:
        raise ValueError(f"--batch is {args.batch}; expected 2 to {count}, the number of examples")

    create_key, data_key = random.split(random.key(args.common.seed)).unbind(0)
    optimizer = optimizers.adamw(schedules.cosine(args.learning_rate, args.steps))
    state = create(create_key.to(run.device), task.spec, optimizer)
    record = empty_record(args.steps, count, len(tree.leaves(task.spec)))
    identity = {"net": task.net, "data": fingerprint(task.data)}
    state, record = run.restore((state, record), identity, args.steps)
    options = {"policy": run.policy, "donate": True, "compile": args.common.compile}
    step = make_step(task.losses, optimizer, watch=watch, want=("norm", "square"), **options)

    def batch_of(step: int) -> Tensor:
        return batching.epoch_batch(data_key, step, count, args.batch)

    with run.open({"examples": count}):
        run.log.print(f"{tree.count(task.spec):,} parameters; run in {run.folder}")
        for at, indices in run.steps(map(batch_of, run.remaining)):
            batch = tuple(part[indices] for part in task.data)
            state, metrics = step(state, tree.move(batch, run.device))
            record = updated(record, at, indices, metrics)
            scalars = {name: value for name, value in metrics.items() if value.ndim == 0}
            parts = {"noise_trace": metrics["trace"].sum(), "noise_square": metrics["square"].sum()}
            run.record(at, scalars | parts, args.batch, loss=metrics["loss"], norm=metrics["norms"].mean())
            if run.due(at, args.common.save_every):
                run.save(at, (state, record))
        figures = study(run.folder, task, state.params, record, batch_of(0))
        run.result(figures)
    print(SUMMARY.format(**figures), f"{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), root=RUNS)
