"""Parts of diffusion.py and diffusion_study.py: the data, the net with its noising process and its loss, sampling by
one compiled step, and the figures."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from core import random, tree
from experiments.parts.generator import distance_of_halves, distances, some_of
from nets import weights
from nets.generative import unet
from train import plots
from train.data.images import sets as image_sets
from train.data.images.arrays import Labelled
from train.data.understood import understood
from train.diffusion import by_time, samplers, scheduler_config
from train.diffusion import schedules as noising
from train.diffusion.film import Film, unit
from train.diffusion.guidance import guided_together
from train.diffusion.losses import WEIGHTS, diffusion_loss
from train.diffusion.process import PREDICTIONS, VARIANCES, heads
from train.diffusion.tables import Model, Sampler
from train.run import FromRun, Rate, command_line, open_run
from train.run.flags import Range
from train.run.progress import progress
from train.run.resume import from_json, newest
from train.step import FULL_PRECISION, Policy, compiled

RUNS = Path("runs/diffusion")
BATCH = 256  # images that are drawn at once, at most
SHOWN = 64  # images in a picture
SCHEDULERS = ("scheduler/scheduler_config.json", "scheduler_config.json")
LEAST = 6  # images on each side of the figures, which look at the fifth nearest neighbour
Compared = Annotated[int, Range(LEAST), tyro.conf.arg(metavar=f"INT>={LEAST}")]


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

    noise_schedule: Literal[tuple(noising.SCHEDULES)] = "cosine"
    """Noise schedule."""
    timesteps: Annotated[int, Range(2), tyro.conf.arg(metavar="INT>=2")] = 1000
    """Times of the schedule."""
    predicts: Literal[PREDICTIONS] = "velocity"
    """Prediction target of the net."""
    loss_weight: Literal[WEIGHTS] = "simple"
    """Weight of the loss at each time."""
    variance: Literal[VARIANCES] = "small"
    """Variance of the reverse steps; learned goes with --loss-weight hybrid or bound."""
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
    if args.run is None and not any(RUNS.glob("*/config.json")):
        raise ValueError(f"there is no run in '{RUNS}'; train one with diffusion.py")
    run = open_run(newest(RUNS) if args.run is None else args.run, RUNS, args.checkpoint)
    device, cfg, stored = command_line.device(args.device), run.read("net", unet.Config), run.config["args"]
    process = from_json(Process, stored, "process", f"the configuration of '{run.folder}'")
    data = read(stored["data"], stored["size"], process.classes)
    understood(print, {"run": run.folder, "checkpoint": f"step {run.step}", **data.facts, "net": cfg})
    train, test, schedule = tree.move((data.train, data.test, schedule_of(process)), device)
    params = tree.move(run.learned(unet.spec(cfg), "train"), device)
    data, model = data._replace(train=train, test=test), Diffusion(cfg, process, schedule)
    return Opened(run.folder, run.step, model, data, params, device)


class Generator(NamedTuple):
    """A net to sample from, that of a run or a published one; `name` is the run's folder or the source of the weights,
    `shape` that of an image; `clip` and `spacing` are for its sampler."""

    name: str
    model: Diffusion
    params: tree.Tree
    device: torch.device
    shape: tuple[int, ...]
    clip: bool = True
    spacing: str = "trailing"


def from_run(args: FromRun) -> Generator:
    run = opened(args)
    return Generator(str(run.folder), run.model, run.params, run.device, run.data.shape)


def published(source: str, device: str) -> Generator:
    """The net of a pipeline that diffusers has written, a folder or a hub repository, with its scheduler.

    Raises ValueError naming what is missing, or what is not computed here.
    """
    place = command_line.device(device)
    parts = weights.read_config(source, "model_index.json", optional=True)  # a net and a scheduler alone will do
    for name, part in parts.items():
        if isinstance(part, list) and any(part) and name not in ("unet", "scheduler"):
            raise ValueError(f"'{source}' is a pipeline with a part '{name}'; expected unet and scheduler alone")
    side, path = unet.published_config(source).get("sample_size"), weights.locate(weights.beside(source), SCHEDULERS)
    sides = [side, side] if isinstance(side, int) else side
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"'{source}': sample_size is {side!r}; expected the pixels per side of an image")
    scheduler = scheduler_config.read(weights.read_config(str(path.parent), path.name), f"'{source}'")
    params, cfg = unet.from_pretrained(source)
    if cfg.learned_variance != (scheduler.variance == "learned"):
        outputs = f"'{source}': the net has {cfg.outputs} output channels"
        raise ValueError(f"{outputs}, which do not go with a {scheduler.variance} variance")
    steps = len(scheduler.schedule.betas)
    process = Process(timesteps=steps, predicts=scheduler.predicts, variance=scheduler.variance)
    facts = {"weights": source, "images": "x".join(map(str, (cfg.channels, *sides))), "times": steps}
    understood(print, facts | {"predicts": process.predicts, "variance": process.variance, "net": cfg})
    model = Diffusion(cfg, process, tree.move(scheduler.schedule, place))
    params, shape = tree.move(params, place), (cfg.channels, *sides)
    return Generator(source, model, params, place, shape, scheduler.clip, scheduler.spacing)


def schedule_of(process: Process) -> noising.Schedule:
    return noising.make(process.noise_schedule, process.timesteps)


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
        classes = labels if process.classes else None
        x = unet.apply(params, policy.cast(x), time, model.cfg, labels=classes, key=for_net, train=True)
        return x.to(images.dtype)

    choices = {"predicts": process.predicts, "weight": process.loss_weight, "variance": process.variance}
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


def make_sampler(
    model: Diffusion,
    name: str,
    steps: int,
    guidance: float = 1.0,
    *,
    eta: float = 0.0,
    spacing: str = "trailing",
    clip: bool = True,
    compile: bool = True,
) -> Sampler:
    """A sampler with `with_net`. Raises ValueError: more steps than the schedule has, eta for one that has none."""
    options = {"predicts": model.process.predicts, "spacing": spacing, "clip": clip}
    if name == "ddim":
        options["eta"] = eta
    elif eta:
        raise ValueError(f"--eta is {eta}; only ddim takes it")
    if name == "ddpm":
        options["variance"] = model.process.variance
    return with_net(samplers.make(name, model.schedule, steps, **options), model, guidance, compile=compile)


def with_net(sampler: Sampler, model: Diffusion, guidance: float = 1.0, *, compile: bool = True) -> Sampler:
    """The sampler whose step takes (params, labels or None) for its model: one graph for every step, for every batch of
    one size and for any parameters; and for other numbers of steps, which differ in the table alone."""

    def step(inputs, row, x, memory, noise):
        return sampler.step(predictor(model, *inputs, guidance), row, x, memory, noise)

    return sampler._replace(step=compiled(step, channels_last=True) if compile else step)


def generate(
    sampler: Sampler, params: tree.Tree, labels: Tensor | None, key: Tensor, shape: tuple[int, ...], count: int
) -> tuple[Tensor, Film]:
    """(samples (count, *shape) on the CPU, their film), with a bar on the terminal. labels: (count,), or None."""
    film = Film(sampler, SHOWN)

    def inputs(rows: Tensor) -> tuple[tree.Tree, Tensor | None]:
        return params, None if labels is None else labels[rows]

    with progress(len(sampler.table) * -(-count // BATCH), f"{count} samples") as advance:

        def callback(i: int, x: Tensor, image: Tensor) -> None:
            advance()
            film(i, x, image)

        return samplers.sample_many(sampler, inputs, key, shape, count, BATCH, callback), film


def draw(folder: Path, samples: Tensor, film: Film) -> None:
    """`samples.png`, the first of them, and the film."""
    plots.image_grid(folder / "samples.png", unit(samples[:SHOWN]), 8, scale=0.6)
    film.draw(folder)


# Figures.


def check_figures(data: Data, classifier: Path | None) -> None:
    """Raise ValueError now, rather than at the end, if these images cannot be compared."""
    real = real_images(data, 2 * LEAST)
    if len(real) < 2 * LEAST:
        raise ValueError(f"there are {len(real)} images; the figures take at least {2 * LEAST}")
    compared(real[:LEAST], real[LEAST:], classifier)


def real_images(data: Data, count: int) -> Tensor:
    """At most `count` images to compare samples with, drawn at random: test images before the others."""
    return some_of(count, data.test.images, data.train.images)


def compared(real: Tensor, fake: Tensor, classifier: Path | None) -> dict[str, float]:
    """Distances between real images and samples: of the features of a classifier, or of the pixels."""
    return distances(unit(real.cpu()), unit(fake.cpu()), classifier)


def baseline(data: Data, count: int, classifier: Path | None) -> dict[str, float]:
    """The distance without a net: between two halves of the real images, up to `count` in each."""
    images = some_of(2 * count, real_images(data, 2 * count))  # test images and others in both halves
    return distance_of_halves(unit(images.cpu()), classifier)


def probe(model: Diffusion, data: Data, key: Tensor, rounds: int, count: int) -> Iterator[tuple[Tensor, ...]]:
    """`rounds` batches (images, labels, time, weights, keys) of the first test images, times spread over all."""
    images, labels = data.test.images[:count], data.test.labels[:count]
    n = len(images)
    for i in range(rounds):
        time = by_time.spread(n, i, rounds, model.steps, key.device)
        yield images, labels, time, torch.ones(n, device=key.device), random.sites(random.fold_in(key, i), n)


@torch.no_grad()
def errors_of(
    model: Diffusion, params: tree.Tree, data: Data, key: Tensor, count: int, rounds: int = 10
) -> tuple[Tensor, Tensor]:
    """(times, mean squared errors) of the prediction for `count` test images, (rounds * count,) each."""
    times, errors = [], []
    for images, labels, time, _, keys in probe(model, data, key, rounds, count):
        net = predictor(model, params, labels if model.cfg.classes else None)

        def prediction(x: Tensor, time: Tensor, net: Model = net) -> Tensor:
            return heads(net(x, time), x)[0]  # without a learned variance

        options = {"time": time, "predicts": model.process.predicts}
        errors.append(diffusion_loss(prediction, model.schedule, images, keys, **options))
        times.append(time)
    return torch.cat(times), torch.cat(errors)
