"""What diffusion.py and diffusion_study.py share: the data, the net with its noising process and its loss, sampling by
one compiled step, figures by the time, and pictures along it."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core import random, tree
from core.per_example import Reports
from experiments.parts.generator import distances
from nets.generative import unet
from train import plots
from train.data.images import sets as image_sets
from train.data.images.arrays import Labelled
from train.diffusion import samplers
from train.diffusion import schedules as noising
from train.diffusion.guidance import guided_together
from train.diffusion.losses import WEIGHTS, diffusion_loss
from train.diffusion.process import PREDICTIONS, VARIANCES, heads
from train.diffusion.tables import Model, Sampler
from train.gradients import watch
from train.plots import gan as gan_plots
from train.run import Count, FromRun, Rate, command_line, open_run
from train.run.logs import read_curves
from train.run.resume import from_json, newest
from train.step import FULL_PRECISION, Policy, compiled

RUNS = Path("runs/diffusion")
BATCH = 256  # images that are drawn at once, at most
GROUPS = 5  # of times, in `watched`
SHOWN = 64  # images in a picture
LEAST = 6  # images on each side of the figures, which look at the fifth nearest neighbour


class Data(NamedTuple):
    """Images in [-1, 1], with as many grey levels; `facts` are for `understood`."""

    train: Labelled
    test: Labelled
    classes: tuple[str, ...]
    levels: int
    facts: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.images.shape[1:])


@dataclass(frozen=True)
class Process:
    """Flags of diffusion.py: the noising process, and the loss."""

    schedule: Literal[tuple(noising.SCHEDULES)] = "cosine"
    """Noise schedule."""
    timesteps: Count = 1000
    """Times of the schedule."""
    predicts: Literal[PREDICTIONS] = "velocity"
    """Prediction target of the net."""
    weight: Literal[WEIGHTS] = "simple"
    """Weight of the loss at each time."""
    variance: Literal[VARIANCES] = "small"
    """Variance of the reverse steps; learned goes with --weight hybrid or bound."""
    classes: bool = False
    """Condition the net on the class."""
    drop: Rate = 0.1
    """With --classes: probability that a label is left out, so that guidance has a net without classes."""
    flip: bool = False
    """Random horizontal flips; not for digits."""


class Diffusion(NamedTuple):
    """The net and the process that it is trained for."""

    cfg: unet.Config
    process: Process
    schedule: noising.Schedule

    @property
    def steps(self) -> int:
        return len(self.schedule.betas)


def read(data: str, size: int | None, labelled: bool) -> Data:
    images = image_sets.read_all(data, size, labelled=labelled)
    # Scikit-learn's digits have the values 0 to 16, whatever else has bytes, or is rounded to them after scaling.
    levels = 17 if images.kind == "digits" and images.train.images.shape[-1] == 8 else 256

    def signed(part: Labelled) -> Labelled:
        grey = (part.images.clamp(0, 1) * (levels - 1)).round()
        return part._replace(images=grey * (2 / (levels - 1)) - 1)

    return Data(signed(images.train), signed(images.test), images.classes, levels, image_sets.facts(images))


class Opened(NamedTuple):
    """A run of diffusion.py at a checkpoint, what it has learned, and the data that it was trained on."""

    folder: Path
    step: int
    model: Diffusion
    data: Data
    params: tree.Tree
    device: torch.device


def opened(args: FromRun) -> Opened:
    """The run that a command names, or the newest one; the net as it was made, whatever the presets are by now."""
    if args.run is None and not RUNS.is_dir():
        raise ValueError(f"there is no run in '{RUNS}'; train one with diffusion.py")
    run = open_run(newest(RUNS) if args.run is None else args.run, RUNS, args.checkpoint)
    device, cfg, stored = command_line.device(args.device), run.read("net", unet.Config), run.config["args"]
    process = from_json(Process, stored, "process", f"the configuration of '{run.folder}'")
    data = read(stored["data"], stored["size"], process.classes)
    train, test, schedule = tree.move((data.train, data.test, schedule_of(process)), device)
    params = tree.move(run.learned(unet.spec(cfg), "train"), device)
    data, model = data._replace(train=train, test=test), Diffusion(cfg, process, schedule)
    return Opened(run.folder, run.step, model, data, params, device)


def schedule_of(process: Process) -> noising.Schedule:
    return noising.make(process.schedule, process.timesteps)


def losses(params, batch, keys, model: Diffusion, levels: int, policy: Policy = FULL_PRECISION):
    """The losses (examples,) of (images, labels, time, weights), and the same without a gradient as a metric.

    weight * diffusion_loss(image, time); only the net is in half precision, as noise has few values there.
    """
    (images, labels, time, weights), process = batch, model.process
    for_noise, for_flip, for_label, for_net = random.sites(keys, 4)
    if process.flip:
        mirrored = random.bernoulli(for_flip, 0.5)[:, None, None, None]
        images = torch.where(mirrored, images.flip(-1), images)
    if process.classes:
        labels = torch.where(random.bernoulli(for_label, process.drop), model.cfg.classes, labels)
    params = policy.cast(params)

    def net(x: Tensor, time: Tensor) -> Tensor:
        given = labels if process.classes else None
        x = unet.apply(params, policy.cast(x), time, model.cfg, labels=given, key=for_net, train=True)
        return x.to(images.dtype)

    choices = {"predicts": process.predicts, "weight": process.weight, "variance": process.variance}
    values = weights * diffusion_loss(net, model.schedule, images, for_noise, time=time, levels=levels, **choices)
    return values, {"losses": values.detach()}


def predictor(model: Diffusion, params: tree.Tree, labels: Tensor | None, guidance: float = 1.0) -> Model:
    """The net as a function of x and time alone.

    labels: (batch,) of a net with classes, else None. guidance: other than 1 takes such a net.
    """

    def net(x: Tensor, time: Tensor, labels: Tensor | None = labels) -> Tensor:
        return unet.apply(params, x, time, model.cfg, labels=labels)

    if guidance == 1:
        return net
    return guided_together(net, labels, torch.full_like(labels, model.cfg.classes), guidance)


# Sampling.


def labels_of(model: Diffusion, count: int, device: torch.device) -> Tensor | None:
    """Every class in turn; None for a net without classes."""
    return torch.arange(count, device=device) % model.cfg.classes if model.cfg.classes else None


def make_sampler(model: Diffusion, name: str, steps: int, *, eta: float = 0.0, spacing: str = "trailing") -> Sampler:
    """Raises ValueError: more steps than the schedule has, eta for a sampler that has none."""
    options = {"predicts": model.process.predicts, "spacing": spacing}
    if name == "ddim":
        options["eta"] = eta
    elif eta:
        raise ValueError(f"--eta is {eta}; only ddim takes it")
    if name == "ddpm":
        options["variance"] = model.process.variance
    return samplers.make(name, model.schedule, steps, **options)


Step = Callable[..., tuple[Tensor, Tensor]]


def make_step(model: Diffusion, sampler: Sampler, guidance: float = 1.0, *, compile: bool = True) -> Step:
    """`step(params, labels, row, x, memory, noise) -> (x, memory)`: one graph for every step of the sampler, for every
    batch of one size and for any parameters; and for other numbers of steps, which differ in the rows alone."""

    def step(params, labels, row, x, memory, noise):
        return sampler.step(predictor(model, params, labels, guidance), row, x, memory, noise)

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
) -> tuple[Tensor, "Film"]:
    """(samples (count, *shape) on the CPU, their film), in batches of one size, with a bar on the terminal; sample i is
    a function of key and i. labels: (count,), or None."""
    for_start, for_steps = (random.sites(k, count) for k in random.sites(key, 2))
    batches = -(-count // BATCH)
    size, images, film = -(-count // batches), [], Film(sampler)  # as few batches as can be
    with progress(len(sampler.table) * batches, f"{count} samples") as advance:

        def callback(i: int, x: Tensor, image: Tensor) -> None:
            advance()
            film(i, x, image)

        for start in range(0, count, size):
            rows = torch.arange(start, start + size, device=key.device) % count  # the last batch is filled up
            x = random.normal(for_start[rows], shape)
            one = bound(step, params, None if labels is None else labels[rows])
            images.append(samplers.sample(sampler, None, x, for_steps[rows], step=one, callback=callback).cpu())
    return torch.cat(images)[:count], film


@contextlib.contextmanager
def progress(total: int, task: str) -> Iterator[Callable[..., None]]:
    """A bar on the terminal while the block runs; yields what is to be called after each of `total` steps."""
    from rich import progress as bars

    columns = ("{task.description}", bars.BarColumn(bar_width=24), bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
    with bars.Progress(*columns, "left", bars.TimeRemainingColumn(), transient=True) as bar:
        bar.disable = not bar.console.is_terminal
        number = bar.add_task(task, total=total)
        yield lambda *_: bar.advance(number)


# Figures.


def check_figures(data: Data, count: int, classifier: Path | None) -> None:
    """Raise ValueError now, rather than at the end, if so many of these images cannot be compared."""
    if count < LEAST:
        raise ValueError(f"--count is {count}; expected at least {LEAST}: the figures look at the fifth neighbours")
    real = real_images(data, 2 * LEAST)
    if len(real) < 2 * LEAST:
        raise ValueError(f"there are {len(real)} images; the figures take at least {2 * LEAST}")
    compared(real[:LEAST], real[LEAST:], classifier)


def real_images(data: Data, count: int) -> Tensor:
    """At most `count` images to compare samples with, from the test images on."""
    return torch.cat([data.test.images, data.train.images])[:count]


def compared(real: Tensor, fake: Tensor, classifier: Path | None) -> dict[str, float]:
    """Distances between real images and samples: of the features of a classifier, or of the pixels."""
    return distances(unit(real.cpu()), unit(fake.cpu()), classifier)


def baseline(data: Data, count: int, classifier: Path | None) -> dict[str, float]:
    """The distance without a net: between two halves of the real images, up to `count` in each."""
    halves = (real_images(data, 2 * count)[i::2] for i in range(2))
    return {"real_frechet_distance": compared(*halves, classifier)["frechet_distance"]}


def probe(model: Diffusion, data: Data, key: Tensor, rounds: int, count: int) -> Iterator[tuple[Tensor, ...]]:
    """`rounds` batches (images, labels, time, weights, keys) of the first test images, their times equally spaced over
    the schedule: all rounds together see every part of it as often."""
    images, labels = data.test.images[:count], data.test.labels[:count]
    n = len(images)
    for i in range(rounds):
        time = (torch.arange(n, device=key.device) * rounds + i) * model.steps // (n * rounds)
        yield images, labels, time, torch.ones(n, device=key.device), random.sites(random.fold_in(key, i), n)


def grouped(model: Diffusion, time: Tensor, values: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Means over groups of consecutive times: (the middle of each group, mean (groups,)), nan for an empty group."""
    group = time.cpu() * groups // model.steps
    total = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, values.detach().cpu().double())
    middle = (torch.arange(groups) + 0.5) * model.steps / groups
    return middle, total / torch.bincount(group, minlength=groups)


def groups_of(model: Diffusion, most: int = 20) -> int:
    return min(most, model.steps)


@torch.no_grad()
def loss_by_time(
    model: Diffusion, params: tree.Tree, data: Data, key: Tensor, count: int, rounds: int = 10
) -> tuple[Tensor, Tensor, float]:
    """(middle of groups of times, mean squared error in each, and over all) on `count` test images."""
    times, errors = [], []
    for images, labels, time, _, keys in probe(model, data, key, rounds, count):
        net = predictor(model, params, labels if model.cfg.classes else None)

        def prediction(x: Tensor, time: Tensor, net: Model = net) -> Tensor:
            return heads(net(x, time), x)[0]  # without a learned variance

        options = {"time": time, "predicts": model.process.predicts}
        errors.append(diffusion_loss(prediction, model.schedule, images, keys, **options))
        times.append(time)
    errors = torch.cat(errors)
    return *grouped(model, torch.cat(times), errors, groups_of(model)), float(errors.mean())


def watched(reports: Reports) -> dict[str, Tensor]:
    """Metrics of a train step with `--watch-gradients`."""
    return {**watch.watch(reports), "losses": reports.losses, "example_norms": reports.total_norm}


def norms_by_time(model: Diffusion, time: Tensor, norms: Tensor) -> dict[str, float]:
    """For the log: the mean norm of the gradients of a batch's examples, in groups of times."""
    _, means = grouped(model, time, norms, GROUPS)
    return {name: float(mean) for name, mean in zip(group_names(model), means, strict=True) if mean == mean}


def group_names(model: Diffusion) -> list[str]:
    edges = [-(-i * model.steps // GROUPS) for i in range(GROUPS + 1)]
    return [f"gradients/time/{a:04}-{b - 1:04}" for a, b in zip(edges[:-1], edges[1:], strict=True)]


# Pictures.


def unit(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return ((images.float() + 1) / 2).clamp(0, 1)


def draw_watched(folder: Path, model: Diffusion) -> None:
    """`gradients_by_time.png`: per-example gradient norms while the net learns, by the time."""
    names, smooth = group_names(model), {}
    lines = read_curves(folder, *names)
    for name in (name for name in names if lines[name][0]):
        steps, values = (np.array(part, float) for part in lines[name])
        width = max(1, len(values) // 40)  # the mean of so many neighbours: a group has few examples in a batch
        kernel = np.ones(width) / width
        smooth[f"t {name[-9:]}"] = (np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid"))
    title = "Per-example gradients, by the time"
    plots.curves(folder / "gradients_by_time.png", smooth, ylabel="mean norm", title=title, log=True)


class Film:
    """Callback of a sampler that holds what the first batch looks like on the way."""

    def __init__(self, sampler: Sampler):
        self.times = sampler.table[:, 0].long().tolist()
        self.noisy: list[Tensor] = []
        self.predicted: list[Tensor] = []

    def __call__(self, i: int, x: Tensor, image: Tensor) -> None:
        if len(self.noisy) < len(self.times):
            self.noisy.append(unit(x[:SHOWN].cpu()))
            self.predicted.append(unit(image[:SHOWN].cpu()))

    def moments(self, most: int) -> list[int]:
        """The numbers of up to `most` steps, at equal distances."""
        count = len(self.times)
        return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()

    def draw(self, folder: Path, samples: Tensor, rows: int = 8, columns: int = 10) -> None:
        """`samples.png`, the first of them; `film.png`, images as they lose their noise; `film_predicted.png`, the
        image that the net predicts at that time; `sampling.gif`."""
        plots.image_grid(folder / "samples.png", unit(samples[:SHOWN]), 8, scale=0.6)
        moments = self.moments(columns)
        labels = [f"t = {self.times[i]}" for i in moments]
        for name, frames, title in (
            ("film", self.noisy, "x after the step at time t"),
            ("film_predicted", self.predicted, "Image predicted at time t"),
        ):
            table = torch.stack([frames[i][:rows] for i in moments], 1)  # (rows, columns, channels, height, width)
            gan_plots.image_table(folder / f"{name}.png", table, None, labels, title)
        moments, zoom = self.moments(60), max(1, 48 // self.noisy[0].shape[-1])
        pictures = [gan_plots.tile(self.noisy[i], 8, zoom=zoom) for i in moments]
        gan_plots.animation(folder / "sampling.gif", pictures, 0.08, [f"t = {self.times[i]}" for i in moments])
