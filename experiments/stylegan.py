"""StyleGAN: a style for every layer, noise for every pixel, images that grow.

Karras et al. 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks" (arXiv:1812.04948), with
the progressive growing of Karras et al. 2018 (arXiv:1710.10196), non-saturating loss and R1. Without a flag it learns
scikit-learn's digits, offline:

    python experiments/stylegan.py                                                14 minutes on a busy CPU core
    python experiments/stylegan.py --data FOLDER --preset photographs-64 --size 64 --phase 100000 --steps 20000
    python experiments/stylegan.py sample --run runs/stylegan/NAME --truncation 0.7
    python experiments/stylegan.py sample --run runs/stylegan/NAME --mix
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core import random, tree
from experiments.parts.generator import distances
from nets.generative import stylegan
from train import optimizers, plots
from train.adversarial import objectives
from train.adversarial.regularisers import r1
from train.adversarial.step import create, make_step
from train.data import batching
from train.data.images import sets as image_sets
from train.plots import gan as gan_plots
from train.run import checkpoints, command_line
from train.run import run as runs
from train.run.logs import read_curves

RUNS = Path("runs/stylegan")
SHOWN = 64


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits", "mnist", "cifar10" ... (downloaded once), or a folder of their files or of pictures."""
    preset: str = "small"
    """Sizes of nets.generative.stylegan: paper (1024 pixels), photographs-128, photographs-64, small (32)."""
    size: int | None = 8
    """Pixels a side at the highest level, a power of 2; None is the preset's."""
    first: int = 0
    """The level to begin with: 4 * 2^first pixels per side."""
    phase: int = 12_000
    """Images for which a new level is faded in, and as many for which it is trained before the next."""
    r1: float = 10.0
    """Gamma: the critic's loss has gamma / 2 |gradient|^2 at real images."""
    steps: int = 2500
    """Training steps."""
    batch: int = 32
    """Images a step; a multiple of the critic's groups of 4."""
    learning_rate: float = 1e-3
    """Of both players; Adam with betas of 0 and 0.99."""
    average: float = 0.995
    """Decay of the moving average of the generator's parameters."""
    classifier: Path | None = None
    """A run of classify.py on the same data; figures are then of its features, otherwise of the pixels."""
    sample_every: int = 250
    """Steps between two pictures of samples; the frames of training.gif."""
    save_every: int = 500
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random."""
    name: str | None = None
    """Folder under runs/stylegan; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    compile: bool = True
    """Compile the step with torch.compile, once for each level."""


@dataclass(frozen=True)
class SampleArgs:
    run: Path
    """Folder of a run, such as runs/stylegan/NAME."""
    count: int = 64
    """How many samples."""
    truncation: float = 0.7
    """Psi: styles are drawn to their mean, to which 0 moves them altogether; 1 leaves them."""
    mix: bool = False
    """A table of mixed styles instead: the coarse layers of the rows, the fine ones of the columns."""
    seed: int = 0
    """Seed of latents and noise."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


def losses(cfg: stylegan.Config, level: int, gamma: float):
    """Of both players at a level, for `train.adversarial.step`; the batch is (images, alpha)."""
    goal = objectives.OBJECTIVES["non-saturating"]

    def made(params, images, alpha, key):
        keys = random.sites(key, 2).unbind(0)
        z = random.normal(keys[0], (len(images), cfg.latent))
        each = random.sites(keys[1], len(images))
        return stylegan.generator(params, z, cfg, key=each, train=True, level=level, alpha=alpha)

    def scores(params, x, alpha):
        return stylegan.critic(params, x, cfg, train=True, level=level, alpha=alpha)

    def critic_loss(own, other, batch, key, memory):
        images, alpha = batch
        real, fake = stylegan.reals(images, level, alpha, cfg), made(other, images, alpha, key)
        real_scores, fake_scores = scores(own, real, alpha), scores(own, fake, alpha)
        penalty = r1(lambda x: scores(own, x, alpha), real, fake, key, weight=gamma)
        value = goal.critic(real_scores, fake_scores)
        metrics = {"real": real_scores.mean(), "fake": fake_scores.mean(), "penalty": penalty}
        return value + penalty, ({name: x.detach() for name, x in metrics.items()}, memory)

    def generator_loss(own, other, batch, key, memory):
        images, alpha = batch
        return goal.generator(scores(other, made(own, images, alpha, key), alpha)), ({}, memory)

    return critic_loss, generator_loss


@torch.no_grad()
def generated(values: tree.Tree, cfg: stylegan.Config, z: Tensor, level: int, alpha: float = 1.0) -> Tensor:
    """(count, channels, size, size) in [0, 1], of the highest level's size, with noise that is always the same."""
    size = (cfg.size, cfg.size)
    parts = [
        torch.nn.functional.interpolate(stylegan.generator(values, x, cfg, level=level, alpha=alpha), size)
        for x in z.split(64)
    ]
    return ((torch.cat(parts) + 1) / 2).clamp(0, 1)


def settings(args: Args, channels: int) -> stylegan.Config:
    command_line.at_least_one(steps=args.steps, batch=args.batch, phase=args.phase, sample_every=args.sample_every)
    command_line.at_least_one(save_every=args.save_every)
    command_line.positive(learning_rate=args.learning_rate)
    preset = stylegan.PRESETS[args.preset]
    cfg = dataclasses.replace(preset, channels=channels, size=args.size or preset.size)
    if args.batch % min(cfg.group, args.batch):
        raise ValueError(f"batch {args.batch} is not divisible into groups of {cfg.group}, over which the critic looks")
    if not 0 <= args.first <= stylegan.top(cfg):
        raise ValueError(f"--first is {args.first}; expected 0 to {stylegan.top(cfg)}, the level of {cfg.size} pixels")
    return cfg


def train(args: Args) -> None:
    origin, args = runs.begin(
        RUNS, args, free=("steps", "sample_every", "save_every", "device", "compile", "classifier")
    )
    command_line.choice("--preset", args.preset, stylegan.PRESETS)
    device = command_line.device(args.device)
    data = image_sets.read_all(args.data, args.size or stylegan.PRESETS[args.preset].size)
    images = 2 * data.train.images - 1
    cfg = settings(args, images.shape[1])
    if args.classifier is not None:
        distances(*2 * [data.test.images[:8]], args.classifier)  # fails now rather than at the end
    optimizer = optimizers.adam(args.learning_rate, 0.0, 0.99)
    both = optimizer, optimizers.ema(optimizer, args.average, debias=True)
    key = random.key(args.seed, device)
    state = create(key, stylegan.critic_spec(cfg), stylegan.generator_spec(cfg), *both)
    order_key, look_key = random.fold_in(random.key(args.seed), 2), random.fold_in(key, 3)  # `create` has 0 and 1
    identity = {"net": cfg, "images": len(images)}
    state = runs.restore(origin, state, identity, args.steps)

    @functools.cache
    def step_of(level: int):
        return make_step(*losses(cfg, level, args.r1), *both, compile=args.compile)

    def grown(at: int) -> tuple[int, float]:
        return stylegan.growth((at - 1) * args.batch, args.phase, cfg, args.first)

    latents = random.normal(look_key, (SHOWN, cfg.latent))
    config = {"args": args, **identity, "torch": torch.__version__}
    with runs.opened(origin, config, total=args.steps) as run:
        counts = [tree.count(player.params) for player in (state.generator, state.critic)]
        run.log.print(f"{counts[0]:,} parameters generate, {counts[1]:,} judge; run in {run.folder}")
        frames, at, before = run.folder / "frames", run.first, None
        frames.mkdir(exist_ok=True)
        for at in range(run.first + 1, args.steps + 1):
            level, alpha = grown(at)
            if level != before:
                pixels = 4 * 2**level
                run.log.print(f"step {at}: {pixels} x {pixels} pixels" + ", compiling ..." * args.compile)
                before = level
            rows = batching.epoch_batch(order_key, at - 1, len(images), args.batch)
            batch = tree.move((images[rows], torch.tensor(alpha)), device)
            state, metrics = step_of(level)(state, tree.map(lambda x: x[None], batch))
            runs.check_finite(run, at, metrics)
            last = at == args.steps or run.stop.requested
            run.log.progress(at, args.batch, critic=metrics["critic/loss"], generator=metrics["generator/loss"])
            if at % 10 == 0 or last:
                run.log.metrics(at, {**metrics, "level": torch.tensor(float(level)), "alpha": torch.tensor(alpha)})
            if at % args.sample_every == 0 or last:
                values = optimizers.averaged(state.generator.opt_state)
                found = generated(values, cfg, latents, level, alpha)
                plots.image_grid(frames / f"{at:07}.png", found, 8, title=f"step {at}", scale=0.6)
            if at % args.save_every == 0 or last:
                runs.save(run, at, state)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        values, (level, alpha) = optimizers.averaged(state.generator.opt_state), grown(at)
        real = torch.cat([data.test.images, data.train.images])[:10_000]
        z = random.normal(random.fold_in(look_key, 1), (len(real), cfg.latent))
        figures = distances(real, generated(values, cfg, z, level, alpha).cpu(), args.classifier)
        run.log.result({**figures, "level": level, "steps": at, "seconds": seconds})
    plots.image_grid(run.folder / "samples.png", generated(values, cfg, latents, level, alpha), 8, scale=0.6)
    mix(run.folder / "mixed.png", values, cfg, level, random.fold_in(look_key, 2))
    gan_plots.animation(run.folder / "training.gif", sorted(frames.glob("*.png")))
    lines = read_curves(run.folder, "critic/loss", "generator/loss")
    plots.curves(run.folder / "loss.png", lines, ylabel="loss", title="StyleGAN: both players")
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{shown}; {at} steps in {seconds:.0f} s; files in {run.folder}/")


@torch.no_grad()
def mix(path: Path, values: tree.Tree, cfg: stylegan.Config, level: int, key: Tensor, count: int = 6) -> None:
    """Rows give the styles of the first half of the layers, columns those of the second (section 3.1)."""
    layers = 2 * (level + 1)
    coarse, fine = stylegan.mapping(values, random.normal(key, (2 * count, cfg.latent)), cfg).split(count)
    styles = stylegan.mixed(coarse.repeat_interleave(count, 0), fine.repeat(count, 1), layers // 2, layers)
    noise = stylegan.noises(random.fold_in(key, 1), 1, level)
    found = stylegan.synthesis(values, styles, noise, cfg, level=level)
    table = ((found + 1) / 2).clamp(0, 1).reshape(count, count, *found.shape[1:])
    rows, columns = [f"coarse {i + 1}" for i in range(count)], [f"fine {i + 1}" for i in range(count)]
    gan_plots.image_table(path, table, rows, columns, "Mixed styles")


@torch.no_grad()
def sample(args: SampleArgs) -> None:
    command_line.at_least_one(count=args.count)
    cfg, trained = runs.read_config(args.run, "net", stylegan.Config), runs.read_config(args.run, "args", Args)
    device = command_line.device(args.device)
    values = tree.move(runs.learned(args.run, stylegan.generator_spec(cfg), "generator"), device)
    key, done = random.key(args.seed, device), checkpoints.latest(args.run / "checkpoints") * trained.batch
    level, alpha = stylegan.growth(done - trained.batch, trained.phase, cfg, trained.first)
    path = args.run / ("mixed.png" if args.mix else "sampled.png")
    if args.mix:
        mix(path, values, cfg, level, key)
    else:
        w = stylegan.mapping(values, random.normal(key, (args.count, cfg.latent)), cfg)
        w = stylegan.truncated(w, stylegan.mean_style(values, random.fold_in(key, 1), cfg), args.truncation)
        layers = 2 * (level + 1)
        noise = stylegan.noises(random.fold_in(key, 2), len(w), level)
        styles = w[:, None].expand(-1, layers, -1)
        found = stylegan.synthesis(values, styles, noise, cfg, level=level, alpha=alpha)
        plots.image_grid(path, (found + 1) / 2, scale=0.6)
    print(f"{path}: level {level}, alpha {alpha:.2f}")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), sample=(SampleArgs, sample))
