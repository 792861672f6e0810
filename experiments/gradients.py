"""What every example's gradient does while a net learns: norms, noise, signal, and who is easy and who is hard.

The train step reports on the gradient of each example at hardly more than its own cost (`make_step(watch=...)`). Drawn
are the histogram of the norms over time, the gradient noise scale (McCandlish et al. 2018, arXiv:1812.06162), the
signal-to-noise ratio of each layer (Liu et al. 2020, arXiv:2001.07384), the cosines between the gradients of a batch,
and the examples of least and greatest mean norm (compare Paul et al. 2021, arXiv:2107.07075):

    python experiments/gradients.py                            digits in scikit-learn; half a minute on 2 CPU cores
    python experiments/gradients.py --data FOLDER --batch 100  MNIST, or a set in its format
    python experiments/gradients.py --task text                passages of text and a small GPT; three minutes

Expected of the images: norms spread over five orders of magnitude, the mean of the hardest example is 21, of the median
one 0.6, of the easiest 0.036; the noise scale is 96 examples in the first quarter of the steps, and in the last more
than there are examples, which is to say that their mean gradient is lost in the noise; images of one class have
gradients that point the same way. Of the text: norms that grow (4.1 to 10), a noise scale from 9 to 184.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random, tree
from core.per_example import Reports, reports
from core.scores import cosine_matrix, layer_snr, noise
from nets.classifiers import mlp
from nets.language import gpt2
from train import optimizers, plots
from train.data import batching
from train.data.images import arrays
from train.data.text import text, token_files
from train.gradients import watch as watching
from train.losses import cross_entropy
from train.optimizers import schedules
from train.run import command_line
from train.run import run as runs
from train.step import create, make_step

RUNS = Path("runs/gradients")
DECAY = 0.98  # of the moving average behind the noise scale
SHOWN = 16  # easiest and hardest examples


@dataclass(frozen=True)
class Args:
    task: str = "images"
    """images, or text."""
    data: str | None = None
    """Images: a folder with the files of MNIST (or a set in its format) instead of scikit-learn's digits. Text: a UTF-8
    file instead of the language reference inside Python."""
    examples: int = 1000
    """How many images or passages to learn from: the first ones."""
    steps: int = 600
    """Training steps; the learning rate falls to 0 over all of them."""
    batch: int = 50
    """Examples a step."""
    learning_rate: float = 2e-3
    """Learning rate at the beginning."""
    save_every: int = 200
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random: initial values and the order of the data."""
    name: str | None = None
    """Folder under runs/gradients; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    compile: bool = True
    """Compile the train step with torch.compile."""


class Task(NamedTuple):
    """A net and what it learns from; in the matrix of cosines, examples are sorted by `group` (one number each)."""

    net: Any
    spec: tree.Tree
    losses: Callable
    data: tuple[Tensor, Tensor]
    group: Tensor
    sorting: str
    draw: Callable[[Path, Tensor, Tensor], None]


def image_task(args: Args) -> Task:
    learn, _ = arrays.digits() if args.data is None else arrays.mnist(args.data)
    pixels, labels = learn.images[: args.examples], learn.labels[: args.examples]
    net = mlp.Config((pixels[0].numel(), 128, 128, int(learn.labels.max()) + 1))

    def losses(params, batch, keys):
        return cross_entropy(mlp.apply(params, batch[0], net, train=True), batch[1], reduction="none")

    def draw(folder: Path, chosen: Tensor, norms: Tensor) -> None:
        titles = [f"{labels[i]}   {norms[i]:.2g}" for i in chosen]
        about = f"easiest {len(chosen) // 2}, then hardest: label and mean gradient norm"
        plots.image_grid(folder / "examples.png", pixels[chosen], 8, titles, about, scale=1.0)

    return Task(net, mlp.spec(net), losses, (pixels, labels), labels, "by class", draw)


def text_task(args: Args) -> Task:
    tokens, tokenizer = token_files.tokens_of(args.data and Path(args.data), None, cache=RUNS / "tokens")
    net = gpt2.Config(tokenizer.vocabulary_size, 64, layers=2, heads=4, width=64, dropout=0.0, bias=False)
    passages = [batch for batch, _ in zip(text.windows(tokens, 64, 1, whole=False), range(args.examples), strict=False)]
    data = tuple(torch.cat(part) for part in zip(*passages, strict=True))

    def losses(params, batch, keys):
        return cross_entropy(gpt2.apply(params, batch[0], net, train=True), batch[1], reduction="none").mean(1)

    def draw(folder: Path, chosen: Tensor, norms: Tensor) -> None:
        lines = [f"{norms[i]:8.3f}  {tokenizer.decode(data[0][i].tolist())!r}" for i in chosen.tolist()]
        half = len(lines) // 2
        lines = ["easiest: mean gradient norm and passage", *lines[:half], "", "hardest", *lines[half:]]
        (folder / "examples.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        with plots.panels(folder / "examples.png", 1, 1, 6.0, 0.16 * len(lines) + 0.1) as (axes,):
            axes.set_axis_off()
            shown = "\n".join(lines).replace("$", r"\$")
            axes.text(0, 1, shown, family="monospace", fontsize=8, va="top", linespacing=1.4, transform=axes.transAxes)

    tenths = torch.arange(len(data[0])) * 10 // len(data[0])
    return Task(net, gpt2.spec(net), losses, data, tenths, "by tenth of the text", draw)


TASKS = {"images": image_task, "text": text_task}


def watch(found: Reports) -> dict[str, Tensor]:
    """What the step says of the gradients of its examples; a row of (parameters,) for what is said of each layer."""
    layers, norms = {**noise.estimate(found)._asdict(), "snr": layer_snr(found)}, found.total_norm
    rows = {name: torch.stack(tree.leaves(x)) for name, x in layers.items()}
    return {"norms": norms, "counts": watching.count_norms(norms), **rows}


def nothing_seen(steps: int, examples: int, parameters: int) -> dict[str, Tensor]:
    """The record of a run, which its checkpoints hold: by step, and by example the sum of norms and their number."""
    rows = {name: torch.zeros(steps, parameters) for name in ("trace", "square", "snr")}
    counts = torch.zeros(steps, len(watching.EDGES) - 1, dtype=torch.int64)
    return {**rows, "counts": counts, "norms": torch.zeros(examples), "times": torch.zeros(examples, dtype=torch.int64)}


def record(seen: dict[str, Tensor], at: int, chosen: Tensor, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    place = torch.tensor([at - 1])
    rows = {n: seen[n].index_copy(0, place, metrics[n].cpu()[None]) for n in ("trace", "square", "snr", "counts")}
    norms = seen["norms"].index_add(0, chosen, metrics["norms"].cpu())
    return {**rows, "norms": norms, "times": seen["times"].index_add(0, chosen, torch.ones_like(chosen))}


def study(folder: Path, task: Task, params: tree.Tree, seen: dict[str, Tensor], batch: Tensor) -> dict[str, float]:
    """Draw everything; returns the figures. `batch` are the examples whose cosines are drawn.

    Batches are drawn without replacement from M examples, so the |G|² that `noise.estimate` finds is as if these were a
    sample of more. That of their own mean gradient is larger by tr Σ / M.
    """
    steps, names = len(seen["trace"]), [name.removesuffix(".weight") for name in tree.names(task.spec)]
    trace = seen["trace"].sum(1)
    square = seen["square"].sum(1) + trace / len(task.group)
    whole = torch.div(*noise.smooth((trace, square), DECAY))
    snr = noise.smooth(seen["snr"], DECAY)
    largest = [i for i, leaf in enumerate(tree.leaves(task.spec)) if len(leaf.shape) > 1]  # a curve each would be many
    xs, low, every = list(range(1, steps + 1)), min(10, steps // 10), max(1, steps // 100)

    ordered = batch[task.group[batch].argsort(stable=True)]
    groups = task.group[ordered].tolist()
    marks = [str(g) if i == 0 or g != groups[i - 1] else "" for i, g in enumerate(groups)]
    part = tree.map(lambda x: x[ordered].to(tree.leaves(params)[0].device), task.data)
    gram = reports(lambda p, b: task.losses(p, b, None), params, part, ("gram",)).total_gram
    cosines = cosine_matrix(gram)
    with plots.panels(folder / "gradients.png", 2, 2, 5.6, 4.2) as (norms, scale, ratio, cosine):
        counts = torch.stack([part.float().mean(0) for part in seen["counts"].split(every)])
        edges = torch.tensor([*range(0, steps, every), steps]) + 0.5
        watching.draw_norms(norms, edges, counts)
        positive = torch.where(whole > 0, whole, torch.nan)
        plots.curves(scale, {"noise scale": (xs[low:], positive[low:])}, "step", "examples", "Noise scale", log=True)
        for style, count, label in ((":", len(batch), "a batch"), ("--", len(task.group), "all examples")):
            scale.axhline(count, ls=style, lw=1, color="#888888", label=label)
        scale.set_ylim(top=min(scale.get_ylim()[1], 10 * len(task.group)))  # beyond, |G|² is lost in the noise
        scale.legend(frameon=False, fontsize=9)
        lines = {names[i]: (xs[low:], snr[low:, i]) for i in largest}
        plots.curves(ratio, lines, "step", "mean² / variance", "Signal-to-noise ratio of layers", log=True)
        ratio.axhline(1 / len(batch), ls="--", lw=1, color="#888888", label="no signal")
        ratio.legend(frameon=False, fontsize=9, ncols=len(lines) // 6 + 1)
        plots.matrix(cosine, cosines.cpu(), marks, marks, title=f"Cosines of gradients, {task.sorting}", numbers=False)
        cosine.images[0].set(cmap="RdBu_r", clim=(-1, 1))
    mean = seen["norms"] / seen["times"]
    ranked = mean.nan_to_num(-1.0).argsort()[(seen["times"] == 0).sum() :]
    half = min(SHOWN, len(ranked) // 2)
    chosen = torch.cat([ranked[:half], ranked[len(ranked) - half :].flip(0)])
    task.draw(folder, chosen, mean)
    different = ~torch.eye(len(batch), dtype=torch.bool)
    quarter = (steps + 3) // 4  # of which both parts are averaged: late in training |G|² of a few steps is all noise
    early, late = (trace[at].mean() / square[at].mean() for at in (slice(quarter), slice(-quarter, None)))
    figures = {
        "noise_scale_first_quarter": early,
        "noise_scale_last_quarter": late,
        "norm_easiest": mean[chosen[0]],
        "norm_hardest": mean[chosen[half]],
        "norm_median": mean[ranked].median(),
        "cosine_mean": cosines.cpu()[different].mean(),
    }
    return {name: float(value) for name, value in figures.items()}


def train(args: Args) -> None:
    origin, args = runs.begin(RUNS, args, free=("save_every", "device", "compile"))
    command_line.at_least_one(examples=args.examples, steps=args.steps, save_every=args.save_every)
    command_line.positive(learning_rate=args.learning_rate)
    device, task = command_line.device(args.device), TASKS[command_line.choice("--task", args.task, TASKS)](args)
    count = len(task.data[0])
    if not 2 <= args.batch <= count:
        raise ValueError(f"--batch is {args.batch}; expected 2 to {count}, the number of examples")

    key, optimizer = random.key(args.seed, device), optimizers.adamw(schedules.cosine(args.learning_rate, args.steps))
    order_key = random.fold_in(random.key(args.seed), 2)  # `create` uses numbers 0 and 1
    held = (create(key, task.spec, optimizer), nothing_seen(args.steps, count, len(tree.leaves(task.spec))))
    identity = {"net": task.net, "examples": count}
    state, seen = runs.restore(origin, held, identity, args.steps)
    seen = tree.move(seen, "cpu")
    step = make_step(task.losses, optimizer, watch=watch, want=("norm", "square"), donate=True, compile=args.compile)
    config = {"args": args, **identity, "torch": torch.__version__}
    with runs.opened(origin, config, total=args.steps) as run:
        run.log.print(f"{tree.count(task.spec):,} parameters, {count} examples; run in {run.folder}")
        at = run.first
        for at in range(run.first + 1, args.steps + 1):
            chosen = batching.epoch_batch(order_key, at - 1, count, args.batch)
            inputs, targets = (part[chosen] for part in task.data)
            state, metrics = step(state, tree.move((inputs, targets), device))
            scalars = {name: value for name, value in metrics.items() if value.ndim == 0}
            runs.check_finite(run, at, scalars)
            seen = record(seen, at, chosen, metrics)
            last = at == args.steps or run.stop.requested
            run.log.progress(at, args.batch, loss=metrics["loss"], norm=metrics["norms"].mean())
            if at % 10 == 0 or last:
                parts = {"noise_trace": metrics["trace"].sum(), "noise_square": metrics["square"].sum()}
                run.log.metrics(at, {f"train/{name}": value for name, value in {**scalars, **parts}.items()})
            if at % args.save_every == 0 or last:
                runs.save(run, at, (state, seen))
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        batch = batching.epoch_batch(order_key, 0, count, args.batch)
        figures = study(run.folder, task, state.params, seen, batch)
        run.log.result({**figures, "steps": at, "seconds": seconds})
    easy, hard = figures["norm_easiest"], figures["norm_hardest"]
    first, final = figures["noise_scale_first_quarter"], figures["noise_scale_last_quarter"]
    print(f"noise scale {first:.3g} in the first quarter of the steps, {final:.3g} in the last")
    print(f"mean gradient norms from {easy:.2g} to {hard:.2g}; {at} steps in {seconds:.0f} s; files in {run.folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train))
