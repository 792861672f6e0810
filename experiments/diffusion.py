"""Diffusion models of images: trained, sampled, inverted, inpainted, and measured.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), with what followed: other schedules,
predictions, weights and samplers. Without a flag a small U-Net learns scikit-learn's 8x8 digits, offline:

    python experiments/diffusion.py                                          under 4 minutes on 2 CPU cores
    python experiments/diffusion.py --data FOLDER --classes                  the files of MNIST; any folder of pictures
    python experiments/diffusion.py --variance learned --weight hybrid --schedule cosine --importance
    python experiments/diffusion.py sample --run runs/diffusion/NAME --sampler ddim --steps 50 --guidance 2 --label 3
    python experiments/diffusion.py interpolate --run runs/diffusion/NAME    between test images, by way of their noise
    python experiments/diffusion.py inpaint --run runs/diffusion/NAME --mask half
    python experiments/diffusion.py evaluate --run runs/diffusion/NAME       a table of samplers, and bits per dimension
    python experiments/diffusion.py gradients --run runs/diffusion/NAME      which times the gradient comes from
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from core import random, tree
from experiments import diffusion_study as studied
from experiments.parts import diffusion as trained
from experiments.parts.diffusion import Data, Diffusion
from experiments.parts.generator import distances
from nets.generative import unet
from train import optimizers, plots
from train.data import batching
from train.diffusion import importance
from train.diffusion import schedules as noising
from train.diffusion.losses import WEIGHTS, diffusion_loss
from train.diffusion.process import PREDICTIONS, VARIANCES
from train.gradients import watch as watching
from train.optimizers import schedules
from train.run import command_line
from train.run import run as runs
from train.run.logs import read_curves
from train.step import TrainState, compiled, create, make_step

RUNS = Path("runs/diffusion")


@dataclass(frozen=True)
class Recipe:
    """What a preset is trained with where no flag says otherwise."""

    steps: int
    batch: int
    learning_rate: float
    average: float


RECIPES = {
    "digits": Recipe(1500, 64, 2e-3, 0.995),
    "mnist": Recipe(2300, 64, 2e-3, 0.995),  # 21 minutes on 2 CPU cores
    "small": Recipe(20_000, 128, 5e-4, 0.9995),
    "cifar": Recipe(100_000, 128, 2e-4, 0.9999),
}


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits", "mnist", "fashion-mnist", "cifar10" (downloaded once), or a folder of MNIST, CIFAR or pictures."""
    size: int | None = None
    """Pixels that images are scaled to; their own if not given, 64 for pictures."""
    preset: str | None = None
    """Net and recipe: digits, mnist, small, cifar; by the size of the images if not given."""
    schedule: str = "cosine"
    """How the noise grows: linear, cosine, sigmoid, sigmoid-betas."""
    timesteps: int = 1000
    """Times of the schedule."""
    predicts: str = "velocity"
    """What the net is asked for: noise, image, velocity."""
    weight: str = "simple"
    """Of the loss at each time: simple, min-snr, bound, hybrid."""
    variance: str = "small"
    """Of a step back: small, large, or learned (with --weight hybrid or bound)."""
    importance: bool = False
    """Draw the times by the size of their losses."""
    classes: bool = False
    """Tell the net the class."""
    drop: float = 0.1
    """With --classes: the share of labels that is left out, so that guidance has a net without classes."""
    dropout: float | None = None
    """In the net; the preset's if not given."""
    flip: bool = False
    """Mirror half of the images; not for digits."""
    steps: int | None = None
    """Training steps; the learning rate falls to 0 over all of them. Like the next three the preset's if not given."""
    batch: int | None = None
    """Images a step."""
    learning_rate: float | None = None
    """Adam's at its highest."""
    average: float | None = None
    """Decay of the moving average of the parameters, which is what is used."""
    bfloat16: bool = False
    """Compute the net in bfloat16; parameters and losses stay as they are."""
    watch_gradients: bool = False
    """Log the gradients of single examples, by their times; draws gradients_by_time.png and gradients.png."""
    sampler: str = "ddim"
    """For the samples of the end: ddpm, ddim, dpm-solver++, heun."""
    sampler_steps: int = 50
    """Steps of the sampler."""
    count: int = 10_000
    """Samples that the figures are of, at most; as many as there are images if there are fewer."""
    classifier: Path | None = None
    """A run of classify.py on the same data; figures are then of its features, otherwise of the pixels."""
    save_every: int = 500
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random."""
    name: str | None = None
    """Folder under runs/diffusion; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 ..."""
    compile: bool = True
    """Compile the train step and the sampler's step with torch.compile."""


class State(NamedTuple):
    """train: of the net. history: of the losses, for `--importance`; else ()."""

    train: TrainState
    history: importance.LossHistory | tuple


def recipe_of(args: Args) -> Recipe:
    said = {field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)}
    recipe = dataclasses.replace(RECIPES[args.preset], **{n: v for n, v in said.items() if v is not None})
    command_line.at_least_one(steps=recipe.steps, batch=recipe.batch, save_every=args.save_every, count=args.count)
    command_line.positive(learning_rate=recipe.learning_rate)
    return recipe


def with_preset(args: Args, data: Data) -> Args:
    side = data.shape[-1]
    fitting = "digits" if side < 16 else "mnist" if data.shape[0] == 1 else "small"
    return args if args.preset else dataclasses.replace(args, preset=fitting)


def settings(args: Args, data: Data) -> Diffusion:
    """The net and the process, fitted to the data."""
    command_line.choice("--preset", args.preset, unet.PRESETS)
    for flag, options in (("predicts", PREDICTIONS), ("weight", WEIGHTS), ("variance", VARIANCES)):
        command_line.choice(f"--{flag}", getattr(args, flag), options)
    if (args.variance == "learned") != (args.weight == "hybrid") and args.weight != "bound":
        raise ValueError("--variance learned goes with --weight hybrid, or --weight bound: what else is there to learn")
    if not 0 <= args.drop < 1:
        raise ValueError(f"--drop is {args.drop}; expected a share in [0, 1)")
    if args.flip and args.data == "digits":
        raise ValueError("--flip is not for digits: mirrored they are others, or none")
    choices = {"channels": data.shape[0], "learned_variance": args.variance == "learned"}
    choices |= {"classes": len(data.classes)} if args.classes else {}
    choices |= {"dropout": args.dropout} if args.dropout is not None else {}
    cfg = dataclasses.replace(unet.PRESETS[args.preset], **choices)
    halved, (_, height, width) = 2 ** (len(cfg.widths) - 1), data.shape
    if height % halved or width % halved:
        found = f"the images have {height} x {width} pixels"
        raise ValueError(f"{found}; the {args.preset} net takes sides divisible by {halved}: choose --size")
    return Diffusion(cfg, noising.make(args.schedule, args.timesteps), args.predicts, args.variance)


def losses_of(who: Diffusion, args: Args, levels: int):
    """`losses(params, batch, keys) -> (examples,)`, weighted as the batch says."""

    def losses(params, batch, keys):
        images, labels, time, weights = batch
        for_noise, for_flip, for_label, for_net = random.sites(keys, 4)
        if args.flip:
            mirrored = random.bernoulli(for_flip, 0.5)[:, None, None, None]
            images = torch.where(mirrored, images.flip(-1), images)
        if args.classes:
            labels = torch.where(random.bernoulli(for_label, args.drop), who.cfg.classes, labels)
        if args.bfloat16:
            params = tree.cast(params, torch.bfloat16)

        def model(x, time):
            x = x.to(torch.bfloat16) if args.bfloat16 else x
            given = labels if args.classes else None
            return unet.apply(params, x, time, who.cfg, labels=given, key=for_net, train=True).to(images.dtype)

        choices = {"predicts": who.predicts, "weight": args.weight, "variance": who.variance, "levels": levels}
        return weights * diffusion_loss(model, who.schedule, images, for_noise, time=time, **choices)

    return losses


def batch_at(data: Data, key, step: int, size: int, history, who: Diffusion, draw):
    """(images, labels, time, weights): a function of key, step and history."""
    for_rows, for_time = random.split(key).unbind(0)
    rows, for_time = batching.epoch_batch(for_rows, step, len(data.train.labels), size), random.fold_in(for_time, step)
    if history:
        time, weights = draw(history, for_time, size)
    else:
        time = random.randint(for_time, (size,), 0, who.steps).long()
        weights = torch.ones(size, device=key.device)
    return data.train.images[rows], data.train.labels[rows], time, weights


def train(args: Args) -> None:
    free = ("steps", "save_every", "sampler", "sampler_steps", "count", "device", "compile", "classifier")
    origin, args = runs.begin(RUNS, args, free=free)
    device, data = command_line.device(args.device), trained.read(args.data, args.size)
    args = with_preset(args, data)
    who = settings(args, data)
    recipe = recipe_of(args)
    args = dataclasses.replace(args, **dataclasses.asdict(recipe))  # for `--resume`, whatever the recipes are by then
    sampler = trained.make_sampler(who, args.sampler, args.sampler_steps)
    if recipe.batch > len(data.train.labels):
        raise ValueError(f"--batch is {recipe.batch}, but there are {len(data.train.labels)} images")
    if args.classifier is not None:
        distances(*2 * [trained.unit(data.test.images[:8])], args.classifier)  # fails now rather than at the end
    data = data._replace(train=tree.move(data.train, device), test=tree.move(data.test, device))
    who = who._replace(schedule=tree.move(who.schedule, device))

    model, warmup = unet.spec(who.cfg), min(200, recipe.steps // 10)
    rate = schedules.warmup_cosine(recipe.learning_rate, warmup, recipe.steps)
    adam = optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.adam(rate))
    optimizer = optimizers.ema(adam, recipe.average, debias=True)
    key = random.key(args.seed, device)
    order_key, look_key = random.fold_in(key, 2), random.fold_in(key, 3)  # `create` has 0 and 1
    history = tree.move(importance.init(who.steps), device) if args.importance else ()
    identity = {"net": who.cfg, "timesteps": who.steps, "images": len(data.train.labels)}
    state = runs.restore(origin, State(create(key, model, optimizer), history), identity, recipe.steps)

    losses = losses_of(who, args, data.levels)

    def loss(params, batch, keys):
        found = losses(params, batch, keys)
        return found.mean(), {"losses": found.detach()}

    watch = {"watch": trained.watched} if args.watch_gradients else {}
    chosen = losses if args.watch_gradients else loss
    step = make_step(chosen, optimizer, donate=True, update_norm=False, compile=args.compile, **watch)
    draw = compiled(importance.draw) if args.compile else importance.draw

    config = {"args": args, **identity, "levels": data.levels, "classes": data.classes, "torch": torch.__version__}
    with runs.opened(origin, config, total=recipe.steps) as run:
        run.log.print(f"{tree.count(model):,} parameters, {len(data.train.labels):,} images; run in {run.folder}")
        if args.compile and run.first < recipe.steps:
            run.log.print("compiling the step ...")
        at, average = run.first, watching.begin(run.folder)
        for at in range(run.first + 1, recipe.steps + 1):
            batch = batch_at(data, order_key, at - 1, recipe.batch, state.history, who, draw)
            learner, metrics = step(state.train, batch)
            _, _, time, weights = batch
            found, norms = metrics.pop("losses"), metrics.pop("example_norms", None)
            history = importance.update(state.history, time, found / weights) if args.importance else ()
            state = State(learner, history)
            if args.watch_gradients:
                average, metrics = watching.record(run.log, at, metrics, average)
            runs.check_finite(run, at, metrics)
            last = at == recipe.steps or run.stop.requested
            run.log.progress(at, recipe.batch, loss=metrics["loss"])
            if at % 10 == 0 or last:
                by_time = trained.norms_by_time(who, time, norms) if args.watch_gradients else {}
                run.log.metrics(at, {**{f"train/{name}": value for name, value in metrics.items()}, **by_time})
            if at % args.save_every == 0 or last:
                runs.save(run, at, state)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        params = optimizers.averaged(state.train.opt_state)
        middle, by_time, mean = trained.loss_by_time(who, params, data, look_key, min(args.count, trained.BATCH))
        run.log.print(f"{args.sampler} in {args.sampler_steps} steps ...")
        found, _ = studied.measured(
            who,
            params,
            data,
            sampler,
            trained.make_step(who, sampler, compile=args.compile),
            look_key,
            args,
            run.folder,
        )
        figures = {**found, "loss": mean}
        more = {"loss_by_time": dict(zip(map(float, middle), map(float, by_time), strict=True))}
        run.log.result({**figures, **more, "steps": at, "seconds": seconds, "features": features(args)})
    lines = {"on test images": (middle, by_time)}
    plots.curves(run.folder / "loss_by_time.png", lines, "time", "mean squared error", f"Error of the {who.predicts}")
    curve = read_curves(run.folder, "train/loss")
    plots.curves(run.folder / "loss.png", curve, ylabel="loss", title=f"{args.weight} loss", log=args.weight != "bound")
    if args.watch_gradients:
        watching.draw(run.folder)
        trained.draw_watched(run.folder, who)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{shown}; {at} steps in {seconds:.0f} s; files in {run.folder}/")


def features(args: Args) -> str:
    return str(args.classifier or "pixels")


def opened(folder: Path, device: str) -> studied.Opened:
    """What a run has learned, with the data that it was trained on."""
    args, where = runs.read_config(folder, "args", Args), command_line.device(device)
    data = trained.read(args.data, args.size)
    # The net as it was made, whatever the presets are by now.
    who = settings(args, data)._replace(cfg=runs.read_config(folder, "net", unet.Config))
    params = tree.move(runs.learned(folder, unet.spec(who.cfg), "train"), where)
    data = data._replace(train=tree.move(data.train, where), test=tree.move(data.test, where))
    who = who._replace(schedule=tree.move(who.schedule, where))
    return studied.Opened(folder, args, who, data, params, where, losses_of(who, args, data.levels))


if __name__ == "__main__":
    commands = {
        name: (kind, lambda a, f=f: f(opened(a.run, a.device), a)) for name, (kind, f) in studied.COMMANDS.items()
    }
    command_line.run(__doc__, (Args, train), **commands)
