"""Diffusion models of images, trained and sampled.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), and its successors: other schedules,
predictions, weights and samplers. Without a flag a small U-Net learns scikit-learn's 8x8 digits, offline:

    python experiments/diffusion.py                                          under 4 minutes on 2 CPU cores
    python experiments/diffusion.py --data FOLDER --classes                  the files of MNIST; any folder of pictures
    python experiments/diffusion.py --variance learned --loss-weight hybrid --noise-schedule cosine --importance
    python experiments/diffusion.py sample --run runs/diffusion/NAME --sampler-steps 50 --guidance 2 --label 3
    python experiments/diffusion.py sample --weights google/ddpm-cifar10-32 --sampler-steps 100

diffusion_study.py compares samplers, interpolates, inpaints, and shows which times the gradient comes from.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from core import random, tree
from experiments.parts import diffusion
from experiments.parts.diffusion import Compared, Data, Diffusion, Process
from nets.generative import unet
from train import optimizers, plots
from train.data import batching
from train.data.fingerprint import fingerprint
from train.data.images import sets as image_sets
from train.data.understood import understood
from train.diffusion import by_time, importance
from train.diffusion.film import unit
from train.diffusion.process import draw_time
from train.diffusion.samplers import SAMPLERS
from train.diffusion.tables import SPACINGS, Sampler
from train.gradients import watch
from train.optimizers import schedules
from train.run import Run, begin, command_line
from train.run.flags import Common, Count, FromRun, Natural, NonNegative, Positive, Rate, Share, Shared, check_source
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS
from train.run.run import LOG_EVERY, format_figures, unused
from train.step import TrainState, compiled, create, make_step

RUNS = Path("runs/diffusion")


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits", "mnist", "fashion-mnist", "cifar10" (downloaded once), or a folder of MNIST, CIFAR or pictures."""
    size: Count | None = None
    """Pixels per side that images are scaled to; None keeps the size of sets like MNIST, and is 64 for pictures."""
    preset: Literal[tuple(unet.PRESETS)] = "digits"
    """Net, and defaults of what follows; it fits the images of --data and --size (this help shows the preset of those
    on its command line)."""
    process: Annotated[Process, tyro.conf.OmitArgPrefixes] = Process()
    dropout: Rate = 0.0
    """Dropout rate of the net."""
    steps: Count = 1500
    """Training steps; the learning rate falls to 0 over all of them."""
    batch: Count = 64
    """Images per step."""
    learning_rate: Positive = 2e-3
    """Peak learning rate."""
    ema: Rate = 0.995
    """Decay of the moving average of the parameters, which samples are drawn with."""
    importance: bool = False
    """Draw times in proportion to the size of their losses."""
    watch_gradients: bool = False
    """Log per-example gradients, by their times; both are drawn at the end."""
    sampler: Literal[tuple(SAMPLERS)] = "ddim"
    """Sampler of the samples at the end."""
    sampler_steps: Count = 50
    """Steps of the sampler."""
    count: Compared = 10_000
    """Number of samples that the figures compare with as many images, or with all if there are fewer."""
    classifier: Path | None = None
    """Run of classify.py on the same data, whose features the figures compare; the pixels if None."""
    common: Shared = Common()


PRESETS = {
    "digits": Args(),
    "mnist": Args(preset="mnist", steps=2300),  # 21 minutes on 2 CPU cores
    "small": Args(preset="small", steps=20_000, batch=128, learning_rate=5e-4, ema=0.9995),
    "cifar": Args(preset="cifar", dropout=0.1, steps=100_000, batch=128, learning_rate=2e-4, ema=0.9999),
}


def presets(words: dict[str, str]) -> Args | None:
    """The preset by its name, or the one for the images."""
    kind, size = image_sets.kind_of(words.get("data", "digits")), words.get("size", "")
    side = int(size) if size.isdecimal() else {"digits": 8, "mnist": 28, "cifar10": 32, "folder": 64}[kind]
    fitting = "digits" if side < 16 else "mnist" if kind in ("digits", "mnist") else "small"
    return PRESETS.get(words.get("preset", fitting))


@dataclass(frozen=True)
class SampleArgs(FromRun):
    run: Path | None = None
    """Folder of a run: runs/diffusion/NAME."""
    weights: str | None = None
    """Published weights instead: a pipeline of diffusers (UNet2DModel and scheduler), a folder or a hub repository."""
    sampler: Literal[tuple(SAMPLERS)] = "ddim"
    """Sampler."""
    sampler_steps: Count = 50
    """Steps of the sampler."""
    eta: Share = 0.0
    """With ddim: 0 draws no noise on the way, 1 as much as ddpm."""
    spacing: Literal[SPACINGS] | None = None
    """Times of the steps; trailing, or that of the weights' scheduler, if None."""
    guidance: NonNegative | None = None
    """With a net with classes: 1 is what it was trained for, more is further into the class, 0 is without class."""
    label: Natural | None = None
    """Class of all samples; every class in turn if None."""
    count: Count = 64
    """Number of samples."""
    seed: Natural = 0
    """Seed of the noise."""
    compile: bool = True
    """Compile the sampler's step with torch.compile."""
    out: Path | None = None
    """New folder for samples.npy (count, height, width, channels) and pictures; RUN/sampled, or sampled with
    --weights, numbered if it exists, if None."""


class State(NamedTuple):
    """history: losses by time, for `--importance`; else ()."""

    train: TrainState
    history: importance.LossHistory | tuple


def model_of(args: Args, data: Data) -> Diffusion:
    """The net and the process, fitted to the data."""
    process, learned = args.process, args.process.variance == "learned"
    if learned != (process.loss_weight == "hybrid") and process.loss_weight != "bound":
        raise ValueError("--variance learned goes with --loss-weight hybrid or bound: what else is there to learn")
    if process.flip and args.data == "digits":
        raise ValueError("--flip is not for digits: mirrored they are others, or none")
    choices = {"channels": data.shape[0], "learned_variance": learned, "dropout": args.dropout}
    choices |= {"classes": len(data.classes)} if process.classes else {}
    cfg = dataclasses.replace(unet.PRESETS[args.preset], **choices)
    halved, (_, height, width) = 2 ** (len(cfg.widths) - 1), data.shape
    if height % halved or width % halved:
        sides = f"the images have {height} x {width} pixels"
        raise ValueError(f"{sides}; the {args.preset} net takes sides divisible by {halved}: choose --size")
    return Diffusion(cfg, process, diffusion.schedule_of(process))


def train(args: Args) -> None:
    free = ("data", "steps", "batch", "learning_rate", "sampler", "sampler_steps", "count", "classifier")
    run = begin(RUNS, args, free=free, shards=BY_ROWS)
    data = diffusion.read(args.data, args.size, args.process.classes)
    model, count = model_of(args, data), len(data.train.labels)
    understood(print, data.facts | {"preset": args.preset, "process": dataclasses.asdict(args.process)})
    if args.batch > count:
        raise ValueError(f"--batch is {args.batch}, but there are {count} images")
    sampler = diffusion.make_sampler(model, args.sampler, args.sampler_steps, compile=args.common.compile)
    diffusion.check_figures(data, args.classifier)
    identity = {"net": model.cfg, "data": fingerprint(data.train, data.test)}

    init_key, order_key, time_key, end_key = random.split(random.key(args.common.seed), 4).unbind(0)
    init_key, time_key, end_key = tree.move((init_key, time_key, end_key), run.device)
    train_images, test_images, schedule = tree.move((data.train, data.test, model.schedule), run.device)
    data, model = data._replace(train=train_images, test=test_images), model._replace(schedule=schedule)
    rate = schedules.warmup_cosine(args.learning_rate, min(200, args.steps // 10), args.steps)
    adam = optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.adam(rate))
    optimizer = optimizers.ema(adam, args.ema, debias=True)
    history = tree.move(importance.init(model.steps), run.device) if args.importance else ()
    spec = unet.spec(model.cfg)
    state = State(create(init_key, spec, optimizer), history)
    state = run.restore(state, identity, args.steps, spec)
    objective = functools.partial(diffusion.losses, model=model, levels=data.levels, policy=run.policy)
    watched = {"watch": by_time.watched} if args.watch_gradients else {}
    options = {"distributed": run.distributed, "compile": args.common.compile, **watched}
    step = make_step(objective, optimizer, donate=True, update_norm=False, **options)
    draw = compiled(importance.draw) if args.common.compile else importance.draw

    with run.open({"levels": data.levels, "classes": data.classes}):
        run.log.print(f"{tree.count(spec):,} parameters; run in {run.folder}")
        average = watch.begin(run.folder)
        batches = (batching.epoch_batch(order_key, i, count, args.batch) for i in run.remaining)
        for at, rows in run.steps(batches):
            here = random.fold_in(time_key, at - 1)
            time, weights = draw_time(here, model.schedule, args.batch), torch.ones(args.batch, device=run.device)
            if args.importance:
                time, weights = draw(state.history, here, args.batch)
            images, labels = (part[rows.to(run.device)] for part in data.train)
            learner, metrics = step(state.train, (images, labels, time, weights))
            losses, norms = metrics.pop("losses"), metrics.pop("example_norms", None)
            history = importance.update(state.history, time, losses / weights) if args.importance else ()
            state = State(learner, history)
            if args.watch_gradients:
                average, metrics = watch.record(run.log, at, metrics, average)
            run.record(at, metrics, args.batch)
            if args.watch_gradients and run.due(at, LOG_EVERY):
                run.log.metrics(at, by_time.norms(time, norms, model.steps))
            if run.due(at, args.common.save_every):
                run.save(at, state)
        report(run, model, run.whole(optimizers.averaged(state.train.opt_state)), data, sampler, end_key)


def report(run: Run, model: Diffusion, params: tree.Tree, data: Data, sampler: Sampler, key: Tensor) -> None:
    """The final figures, and the pictures."""
    args, (test_key, sample_key) = run.args, random.split(key).unbind(0)
    times, errors = diffusion.errors_of(model, params, data, test_key, min(args.count, diffusion.BATCH))
    run.log.print(f"{args.sampler} in {args.sampler_steps} steps ...")
    real = diffusion.real_images(data, args.count)
    labels = diffusion.labels_of(model, len(real), key.device)
    samples, film = diffusion.generate(sampler, params, labels, sample_key, data.shape, len(real))
    figures = diffusion.compared(real, samples, args.classifier) | {"loss": float(errors.mean())}
    figures |= diffusion.baseline(data, args.count, args.classifier)
    middle, means = by_time.grouped(times, errors, model.steps)
    losses = dict(zip(middle.tolist(), means.tolist(), strict=True))
    run.result({**figures, "loss_by_time": losses, "features": str(args.classifier or "pixels")})
    diffusion.draw(run.folder, samples, film)
    title, lines = f"Error of the {model.process.predicts}", {"on test images": (middle, means)}
    plots.curves(run.folder / "loss_by_time.png", lines, "time", "mean squared error", title)
    curve, weight = read_curves(run.folder, "train/loss"), model.process.loss_weight
    plots.curves(run.folder / "loss.png", curve, ylabel="loss", title=f"{weight} loss", log=weight != "bound")
    if args.watch_gradients:
        watch.draw(run.folder)
        by_time.draw(run.folder, model.steps)
    print(f"{format_figures(figures)}; {run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def sample(args: SampleArgs) -> None:
    """Sample images with a run's net or with a published pipeline."""
    check_source(args)
    net = diffusion.from_run(args) if args.run else diffusion.published(args.weights, args.device)
    model, classes = net.model, net.model.cfg.classes
    for flag, value in (("guidance", args.guidance), ("label", args.label)):
        if value is not None and not classes:
            raise ValueError(f"--{flag} is {value}, but the net of '{net.name}' has no classes")
    if args.label is not None and args.label >= classes:
        raise ValueError(f"--label is {args.label}; expected 0 to {classes - 1}")
    options = {"eta": args.eta, "spacing": args.spacing or net.spacing, "clip": net.clip, "compile": args.compile}
    guidance = 1.0 if args.guidance is None else args.guidance
    folder = unused(args.out, (args.run or Path()) / "sampled")
    sampler = diffusion.make_sampler(model, args.sampler, args.sampler_steps, guidance, **options)
    labels = diffusion.labels_of(model, args.count, net.device)
    labels = labels if args.label is None else torch.full_like(labels, args.label)
    key = random.key(args.seed, net.device)
    samples, film = diffusion.generate(sampler, net.params, labels, key, net.shape, args.count)
    folder.mkdir(parents=True)
    diffusion.draw(folder, samples, film)
    pixels = (unit(samples) * 255).round().to(torch.uint8).movedim(1, -1)  # (count, height, width, channels)
    np.save(folder / "samples.npy", pixels.numpy())
    print(f"{args.count} samples by {args.sampler} in {args.sampler_steps} steps in {folder}/")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train, presets), root=RUNS, sample=(SampleArgs, sample))
