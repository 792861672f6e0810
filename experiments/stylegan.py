"""StyleGAN: a style for every layer, noise for every pixel, images that grow.

Karras et al. 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks" (arXiv:1812.04948), with
the progressive growing of Karras et al. 2018 (arXiv:1710.10196), non-saturating loss and R1. Without a flag it learns
scikit-learn's digits, offline:

    python experiments/stylegan.py                                                10 minutes on one CPU core
    python experiments/stylegan.py --data FOLDER --preset photographs-64          a folder of pictures
    python experiments/stylegan.py sample --run runs/stylegan/NAME --truncation 0.7
    python experiments/stylegan.py sample --run runs/stylegan/NAME --mix
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from core import random, tree
from experiments.parts import generator as gans
from nets.generative import stylegan
from train import optimizers, plots
from train.adversarial import objectives
from train.adversarial.regularisers import r1
from train.adversarial.step import create, make_step
from train.data import batching
from train.data.fingerprint import fingerprint
from train.data.understood import understood
from train.plots import gan as gan_plots
from train.run import (
    Common,
    Count,
    FromRun,
    Natural,
    NonNegative,
    Number,
    Positive,
    Rate,
    Shared,
    begin,
    command_line,
    open_run,
)
from train.run.run import format_figures, unused

RUNS = Path("runs/stylegan")


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits", "mnist", "cifar10" ... (downloaded once), or a folder of their files or of pictures."""
    preset: Literal[tuple(stylegan.PRESETS)] = "small"
    """Sizes of the nets, and the defaults of what follows (this help shows those of the preset on its command line)."""
    size: Count = 8
    """Pixels per side at the highest level, a power of 2."""
    first: Natural = 0
    """Level to begin with: 4 * 2^first pixels per side."""
    phase: Count = 12_000
    """Images for which a new level is faded in, and as many for which it is trained before the next."""
    r1: NonNegative = 10.0
    """Gamma: the critic's loss has gamma / 2 |gradient|^2 at real images."""
    steps: Count = 2500
    """Training steps."""
    batch: Count = 32
    """Images per step; a multiple of the critic's groups of 4."""
    learning_rate: Positive = 1e-3
    """Learning rate of both players; Adam with betas of 0 and 0.99."""
    ema: Rate = 0.995
    """Decay of the moving average of the generator's parameters, which is evaluated."""
    classifier: Path | None = None
    """Run of classify.py on the same data, whose features the figures compare; the pixels if None."""
    sample_every: Count = 250
    """Steps between pictures of samples, the frames of training.gif."""
    common: Shared = Common()


PHOTOGRAPHS = {"phase": 100_000, "steps": 20_000, "sample_every": 1000}
PRESETS = {
    "photographs-64": Args(preset="photographs-64", size=64, **PHOTOGRAPHS),
    "photographs-128": Args(preset="photographs-128", size=128, **PHOTOGRAPHS),
    # 25 million images, of which 800,000 in each phase (Karras et al. 2018, appendix A).
    "paper": Args(preset="paper", size=1024, first=1, phase=800_000, steps=780_000, sample_every=10_000),
}


@dataclass(frozen=True)
class SampleArgs(FromRun):
    count: Count = 64
    """Number of samples."""
    truncation: Number = 0.7
    """Psi: styles are moved towards their mean, to which 0 moves them altogether; 1 leaves them."""
    mix: bool = False
    """A table of mixed styles instead: the coarse layers of the rows, the fine ones of the columns."""
    seed: Natural = 0
    """Seed of latents and noise."""
    out: Path | None = None
    """New picture; RUN/sampled.png or mixed.png, numbered if it exists, if None."""


def losses(cfg: stylegan.Config, level: int, gamma: float):
    """Losses of both players at a level for `train.adversarial.step`; a batch is (images, alpha)."""
    goal = objectives.OBJECTIVES["non-saturating"]

    def generate(params, images, alpha, key):
        keys = random.sites(key, 2).unbind(0)
        z = random.normal(keys[0], (len(images), cfg.latent)).to(images.dtype)
        options = {"key": random.sites(keys[1], len(images)), "level": level, "alpha": alpha}
        return stylegan.generator(params, z, cfg, train=True, **options)

    def scores(params, x, alpha):
        return stylegan.critic(params, x, cfg, train=True, level=level, alpha=alpha)

    def critic_loss(own, other, batch, key, memory):
        images, alpha = batch
        real, fake = stylegan.reals(images, level, alpha, cfg), generate(other, images, alpha, key)
        real_scores, fake_scores = scores(own, real, alpha), scores(own, fake, alpha)
        penalty = r1(lambda x: scores(own, x, alpha), real, fake, key, weight=gamma)
        value = goal.critic(real_scores, fake_scores)
        metrics = {"real": real_scores.mean(), "fake": fake_scores.mean(), "penalty": penalty}
        return value + penalty, ({name: x.detach() for name, x in metrics.items()}, memory)

    def generator_loss(own, other, batch, key, memory):
        images, alpha = batch
        return goal.generator(scores(other, generate(own, images, alpha, key), alpha)), ({}, memory)

    return critic_loss, generator_loss


@torch.no_grad()
def generated(values: tree.Tree, cfg: stylegan.Config, z: Tensor, level: int, alpha: float) -> Tensor:
    """Samples with always the same noise, of the highest level's size: (count, channels, size, size) in [0, 1]."""
    size = (cfg.size, cfg.size)
    parts = [
        torch.nn.functional.interpolate(stylegan.generator(values, x, cfg, level=level, alpha=alpha), size)
        for x in z.split(64)
    ]
    return ((torch.cat(parts) + 1) / 2).clamp(0, 1)


def net_of(args: Args) -> stylegan.Config:
    cfg = dataclasses.replace(stylegan.PRESETS[args.preset], size=args.size)
    if args.batch % min(cfg.group, args.batch):
        raise ValueError(f"batch {args.batch} is not divisible into groups of {cfg.group}, over which the critic looks")
    if args.first > stylegan.top(cfg):
        raise ValueError(f"--first is {args.first}; expected 0 to {stylegan.top(cfg)}, the level of {cfg.size} pixels")
    return cfg


def grown(args: Args, cfg: stylegan.Config, at: int) -> tuple[int, float]:
    """(level, alpha) in step `at`."""
    return stylegan.growth((at - 1) * args.batch, args.phase, cfg, args.first)


def train(args: Args) -> None:
    run, cfg = begin(RUNS, args, free=("data", "steps", "sample_every", "classifier")), net_of(args)
    data = gans.read_images(args.data, args.size)
    cfg = dataclasses.replace(cfg, channels=data.shape[0])
    understood(print, data.facts | {"net": cfg})
    gans.check_images(data, args.batch, args.classifier)

    init_key, order_key, look_key = random.split(random.key(args.common.seed), 3).unbind(0)
    init_key, look_key = tree.move((init_key, look_key), run.device)
    optimizer = optimizers.adam(args.learning_rate, 0.0, 0.99)
    both = optimizer, optimizers.ema(optimizer, args.ema, debias=True)
    state = create(init_key, stylegan.critic_spec(cfg), stylegan.generator_spec(cfg), *both)
    identity = {"net": cfg, "data": fingerprint(data.train.images, data.test.images)}
    state = run.restore(state, identity, args.steps)

    @functools.cache
    def step_of(level: int):
        players = losses(cfg, level, args.r1)
        return make_step(*players, *both, policy=run.policy, compile=args.common.compile)

    images, latents, before = data.train.images, random.normal(look_key, (gans.SHOWN, cfg.latent)), None
    with run.open({"images": len(images)}, files={"frames": Path.mkdir}):
        counts = [tree.count(player.params) for player in (state.generator, state.critic)]
        run.log.print(f"generator {counts[0]:,} parameters, critic {counts[1]:,} parameters; run in {run.folder}")
        rows = (batching.epoch_batch(order_key, i, len(images), args.batch) for i in run.remaining)
        for at, indices in run.steps(rows):
            level, alpha = grown(args, cfg, at)
            if level != before:
                run.log.print(f"step {at}: {4 * 2**level} x {4 * 2**level} pixels")
                before = level
            batch = tree.move((images[indices][None], torch.tensor([alpha])), run.device)
            state, metrics = step_of(level)(state, batch)
            metrics |= {"level": torch.full_like(batch[1][0], level), "alpha": batch[1][0]}
            shown = {"critic": metrics["critic/loss"], "generator": metrics["generator/loss"]}
            run.record(at, metrics, args.batch, group="", **shown)
            if run.due(at, args.sample_every):
                values = optimizers.averaged(state.generator.opt_state)
                samples = generated(values, cfg, latents, level, alpha)
                path = run.folder / "frames" / f"{at:07}.png"
                plots.image_grid(path, samples, 8, title=f"step {at}", scale=0.6)
            if run.due(at, args.common.save_every):
                run.save(at, state)
        values, (level, alpha) = optimizers.averaged(state.generator.opt_state), grown(args, cfg, run.at)
        real = gans.real_images(data)
        z = random.normal(random.fold_in(look_key, 1), (len(real), cfg.latent))
        run.log.print(f"comparing {len(real)} samples with as many images ...")
        figures = gans.distances(real, generated(values, cfg, z, level, alpha), args.classifier)
        figures |= gans.baseline(data, args.classifier)
        run.result({**figures, "level": level, "features": str(args.classifier or "pixels")})
    mix(run.folder / "mixed.png", values, cfg, level, random.fold_in(look_key, 2))
    gans.draw_training(run.folder, "StyleGAN")
    print(f"{format_figures(figures)}; {run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


@torch.no_grad()
def mix(path: Path, values: tree.Tree, cfg: stylegan.Config, level: int, key: Tensor, count: int = 6) -> None:
    """Rows give the styles of the first half of the layers, columns those of the second (section 3.1)."""
    layers = 2 * (level + 1)
    coarse, fine = stylegan.mapping(values, random.normal(key, (2 * count, cfg.latent)), cfg).split(count)
    styles = stylegan.mixed(coarse.repeat_interleave(count, 0), fine.repeat(count, 1), layers // 2, layers)
    noise = stylegan.noises(random.fold_in(key, 1), 1, level)
    images = stylegan.synthesis(values, styles, noise, cfg, level=level)
    table = ((images + 1) / 2).clamp(0, 1).reshape(count, count, *images.shape[1:])
    rows, columns = [f"coarse {i + 1}" for i in range(count)], [f"fine {i + 1}" for i in range(count)]
    gan_plots.image_table(path, table, rows, columns, "Mixed styles")


@torch.no_grad()
def sample(args: SampleArgs) -> None:
    """Sample images with a run's averaged generator, truncated or with mixed styles."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    trained, cfg = run.read("args", Args), run.read("net", stylegan.Config)
    path = unused(args.out, args.run / ("mixed.png" if args.mix else "sampled.png"))
    values, key = (
        tree.move(run.learned(stylegan.generator_spec(cfg), "generator"), device),
        random.key(args.seed, device),
    )
    level, alpha = grown(trained, cfg, run.step)
    if args.mix:
        mix(path, values, cfg, level, key)
    else:
        w = stylegan.mapping(values, random.normal(key, (args.count, cfg.latent)), cfg)  # (count, style)
        w = stylegan.truncated(w, stylegan.mean_style(values, random.fold_in(key, 1), cfg), args.truncation)
        noise = stylegan.noises(random.fold_in(key, 2), len(w), level)
        styles = w[:, None].expand(-1, len(noise), -1)  # (count, layers, style)
        images = stylegan.synthesis(values, styles, noise, cfg, level=level, alpha=alpha)
        plots.image_grid(path, (images + 1) / 2, scale=0.6)
    print(f"{path}: level {level}, alpha {alpha:.2f}")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train, PRESETS), root=RUNS, sample=(SampleArgs, sample))
