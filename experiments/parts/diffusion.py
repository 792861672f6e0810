"""What the commands of diffusion.py share: the data, the net with its noising process, sampling by one compiled step,
figures by the time, and pictures along it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core import random, tree
from core.per_example import Reports
from nets.generative import unet
from train import plots
from train.data.images import sets as image_sets
from train.data.images.arrays import Labelled
from train.diffusion import samplers
from train.diffusion.guidance import guided_together
from train.diffusion.losses import diffusion_loss
from train.diffusion.process import heads
from train.diffusion.schedules import Schedule
from train.diffusion.tables import Model, Sampler
from train.gradients import watch
from train.plots import gan as gan_plots
from train.run.logs import read_curves
from train.step import compiled

BATCH = 256  # images that are drawn at once, at most
GROUPS = 5  # of times, in `watched`


class Data(NamedTuple):
    """Images in [-1, 1], with as many grey levels."""

    train: Labelled
    test: Labelled
    classes: tuple[str, ...]
    levels: int
    kind: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.images.shape[1:])


class Diffusion(NamedTuple):
    """The net and the process that it is trained for."""

    cfg: unet.Config
    schedule: Schedule
    predicts: str
    variance: str

    @property
    def steps(self) -> int:
        return len(self.schedule.betas)


def read(data: str, size: int | None) -> Data:
    found = image_sets.read_all(data, size)
    # Scikit-learn's digits have the values 0 to 16, whatever else has bytes, or is rounded to them after scaling.
    levels = 17 if found.kind == "digits" and found.train.images.shape[-1] == 8 else 256

    def signed(part: Labelled) -> Labelled:
        grey = (part.images.clamp(0, 1) * (levels - 1)).round()
        return part._replace(images=grey * (2 / (levels - 1)) - 1)

    return Data(signed(found.train), signed(found.test), found.classes, levels, found.kind)


def model_of(who: Diffusion, params: tree.Tree, labels: Tensor | None, guidance: float = 1.0) -> Model:
    """The net as a function of x and time alone.

    labels: (batch,) of a net with classes, else None. guidance: other than 1 takes such a net.
    """

    def net(x: Tensor, time: Tensor, labels: Tensor | None = labels) -> Tensor:
        return unet.apply(params, x, time, who.cfg, labels=labels)

    if guidance == 1:
        return net
    return guided_together(net, labels, torch.full_like(labels, who.cfg.classes), guidance)


# Sampling.


def make_sampler(who: Diffusion, name: str, steps: int, *, eta: float = 0.0, spacing: str = "trailing") -> Sampler:
    """Raises ValueError: an unknown sampler, more steps than the schedule has, eta for a sampler that has none."""
    options = {"predicts": who.predicts, "spacing": spacing}
    if name == "ddim":
        options["eta"] = eta
    elif eta:
        raise ValueError(f"--eta is {eta}; only ddim takes it")
    if name == "ddpm":
        options["variance"] = who.variance
    return samplers.make(name, who.schedule, steps, **options)


Step = Callable[..., tuple[Tensor, Tensor]]


def make_step(who: Diffusion, sampler: Sampler, guidance: float = 1.0, *, compile: bool = True) -> Step:
    """`step(params, labels, row, x, memory, noise) -> (x, memory)`: one graph for every step of the sampler, for every
    batch of one size and for any parameters; and for other numbers of steps, which differ in the rows alone."""

    def step(params, labels, row, x, memory, noise):
        return sampler.step(model_of(who, params, labels, guidance), row, x, memory, noise)

    return compiled(step, channels_last=True) if compile else step


def bound(step: Step, params: tree.Tree, labels: Tensor | None) -> Callable:
    """The step as `train.diffusion.samplers.sample` calls it."""
    return lambda _, *rest: step(params, labels, *rest)


@torch.no_grad()
def generate(
    params: tree.Tree,
    sampler: Sampler,
    step: Step,
    key: Tensor,
    shape: tuple[int, ...],
    labels: Tensor | None,
    count: int,
    film: "Film | None" = None,
) -> Tensor:
    """(count, *shape) on the CPU, in batches of one size, with a bar on the terminal; image i is a function of key and
    i. labels: (count,), or None. film: sees each step.
    """
    for_start, for_steps = (random.sites(k, count) for k in random.sites(key, 2))
    size, found = batch_size(count), []
    with progress(len(sampler.table) * -(-count // size), f"{count} samples") as advance:

        def callback(i: int, x: Tensor, image: Tensor) -> None:
            advance()
            if film is not None:
                film(i, x, image)

        for start in range(0, count, size):
            rows = torch.arange(start, start + size, device=key.device) % count  # the last batch is filled up
            x = random.normal(for_start[rows], shape)
            given = bound(step, params, None if labels is None else labels[rows])
            found.append(samplers.sample(sampler, None, x, for_steps[rows], step=given, callback=callback).cpu())
    return torch.cat(found)[:count]


def batch_size(count: int) -> int:
    """Of as few batches of one size as hold so many images."""
    return -(-count // -(-count // BATCH))


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[..., None]]:
    """A bar on the terminal while the block runs; yields what is to be called after each of `total` steps."""
    from rich import progress as bars

    columns = ("{task.description}", bars.BarColumn(bar_width=24), bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
    with bars.Progress(*columns, "left", bars.TimeRemainingColumn(), transient=True) as bar:
        bar.disable = not bar.console.is_terminal
        task = bar.add_task(what, total=total)
        yield lambda *_: bar.advance(task)


# Figures.


def probe(who: Diffusion, data: Data, key: Tensor, rounds: int, count: int) -> Iterator[tuple[Tensor, ...]]:
    """`rounds` batches (images, labels, time, weights, keys) of the first test images, their times equally spaced over
    the schedule: all rounds together see every part of it as often."""
    images, labels = data.test.images[:count], data.test.labels[:count]
    n = len(images)
    for i in range(rounds):
        time = (torch.arange(n, device=key.device) * rounds + i) * who.steps // (n * rounds)
        yield images, labels, time, torch.ones(n, device=key.device), random.sites(random.fold_in(key, i), n)


def grouped(who: Diffusion, time: Tensor, values: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Means over groups of consecutive times: (the middle of each group, mean (groups,)), nan for an empty group."""
    group = time.cpu() * groups // who.steps
    total = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, values.detach().cpu().double())
    middle = (torch.arange(groups) + 0.5) * who.steps / groups
    return middle, total / torch.bincount(group, minlength=groups)


def groups_of(who: Diffusion, most: int = 20) -> int:
    return min(most, who.steps)


def squared_error(who: Diffusion, params: tree.Tree, images: Tensor, labels: Tensor, time: Tensor, keys: Tensor):
    """The simple loss (examples,) of a net with or without a learned variance."""
    model = model_of(who, params, labels if who.cfg.classes else None)
    return diffusion_loss(
        lambda x, t: heads(model(x, t), x)[0], who.schedule, images, keys, time=time, predicts=who.predicts
    )


@torch.no_grad()
def loss_by_time(
    who: Diffusion, params: tree.Tree, data: Data, key: Tensor, count: int, rounds: int = 10
) -> tuple[Tensor, Tensor, float]:
    """(middle of groups of times, mean squared error in each, and over all) on `count` test images."""
    times, found = [], []
    for images, labels, time, _, keys in probe(who, data, key, rounds, count):
        found.append(squared_error(who, params, images, labels, time, keys))
        times.append(time)
    losses = torch.cat(found)
    return *grouped(who, torch.cat(times), losses, groups_of(who)), float(losses.mean())


def watched(found: Reports) -> dict[str, Tensor]:
    """What a train step with `--watch-gradients` reports."""
    return {**watch.watch(found), "losses": found.losses, "example_norms": found.total_norm}


def norms_by_time(who: Diffusion, time: Tensor, norms: Tensor) -> dict[str, float]:
    """For the log: the mean norm of the gradients of a batch's examples, in groups of times."""
    _, means = grouped(who, time, norms, GROUPS)
    return {name: float(mean) for name, mean in zip(group_names(who), means, strict=True) if mean == mean}


def group_names(who: Diffusion) -> list[str]:
    edges = [-(-i * who.steps // GROUPS) for i in range(GROUPS + 1)]
    return [f"gradients/time/{a:04}-{b - 1:04}" for a, b in zip(edges[:-1], edges[1:], strict=True)]


# Pictures.


def unit(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return ((images.float() + 1) / 2).clamp(0, 1)


def draw_watched(folder: Path, who: Diffusion) -> None:
    """`gradients_by_time.png`: the norms of single examples' gradients while the net learns, by the time."""
    names = group_names(who)
    lines = read_curves(folder, *names)
    smooth = {}
    for name in (name for name in names if lines[name][0]):
        steps, values = (np.array(part, float) for part in lines[name])
        width = max(1, len(values) // 40)  # the mean of so many neighbours: a group has few examples in a batch
        kernel = np.ones(width) / width
        smooth[f"t {name[-9:]}"] = (np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid"))
    title = "Gradients of single examples, by the time"
    plots.curves(folder / "gradients_by_time.png", smooth, ylabel="mean norm", title=title, log=True)


class Film:
    """The callback of a sampler that keeps what the first batch looks like on the way."""

    def __init__(self, sampler: Sampler, shown: int = 64):
        self.times, self.shown = sampler.table[:, 0].long().tolist(), shown
        self.noisy: list[Tensor] = []
        self.predicted: list[Tensor] = []

    def __call__(self, i: int, x: Tensor, image: Tensor) -> None:
        if len(self.noisy) < len(self.times):
            self.noisy.append(unit(x[: self.shown].cpu()))
            self.predicted.append(unit(image[: self.shown].cpu()))

    def draw(self, folder: Path, rows: int = 8, columns: int = 10) -> None:
        """`film.png`, images as they lose their noise; `film_predicted.png`, what the net took them for at that time;
        `sampling.gif`."""
        rows = min(rows, len(self.noisy[0]))
        chosen = np.linspace(0, len(self.times) - 1, min(columns, len(self.times))).round().astype(int).tolist()
        labels = [f"t = {self.times[i]}" for i in chosen]
        for name, frames, title in (
            ("film", self.noisy, "x after the step at time t"),
            ("film_predicted", self.predicted, "What x is taken for at time t"),
        ):
            table = torch.stack([frames[i][:rows] for i in chosen], 1)
            gan_plots.image_table(folder / f"{name}.png", table, None, labels, title)
        kept = np.linspace(0, len(self.times) - 1, min(60, len(self.times))).round().astype(int).tolist()
        zoom = max(1, 48 // self.noisy[0].shape[-1])
        pictures = [gan_plots.tile(self.noisy[i], 8, zoom=zoom) for i in kept]
        gan_plots.animation(folder / "sampling.gif", pictures, 0.08, [f"t = {self.times[i]}" for i in kept])


def mask_of(mask: str, shape: tuple[int, ...]) -> Tensor:
    """(height, width), True where an image is known: "half" leaves the right half free, "box" the middle, a PNG what is
    dark in it.

    Raises ValueError or OSError: a picture of another size, or none.
    """
    _, height, width = shape
    known = torch.ones(height, width, dtype=torch.bool)
    if mask == "half":
        known[:, width // 2 :] = False
        return known
    if mask == "box":
        known[height // 4 : -(height // 4), width // 4 : -(width // 4)] = False
        return known
    from PIL import Image

    with Image.open(mask) as picture:
        pixels = np.asarray(picture.convert("L"))
    if pixels.shape != (height, width):
        found = f"{pixels.shape[0]} x {pixels.shape[1]}"
        raise ValueError(f"--mask '{mask}' has {found} pixels; expected those of the images, {height} x {width}")
    return torch.from_numpy(pixels >= 128)
