"""pix2pix: one picture from another, learned from pairs.

Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks" (arXiv:1611.07004). A U-Net
translates, a critic judges patches of (source, translation). Without a flag it learns to colour grey photographs, from
tiles of the two in scikit-learn, offline:

    python experiments/pix2pix.py                                            11 minutes on one CPU core
    python experiments/pix2pix.py --data facades                             photographs from labels; downloaded once
    python experiments/pix2pix.py --data facades --preset paper              the paper's sizes
    python experiments/pix2pix.py --data FOLDER --source right               A|B in one file, best in train/ and test/
    python experiments/pix2pix.py --data labels,photographs                  two folders, paired by name
    python experiments/pix2pix.py translate --run runs/pix2pix/NAME a.png FOLDER
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from core import random, tree
from experiments.parts import image_translation as parts
from experiments.parts.image_translation import TranslateArgs, rgb, translated
from nets.generative import pix2pix
from train import optimizers, plots
from train.adversarial import objectives
from train.adversarial.step import create, make_step
from train.data.fingerprint import fingerprint
from train.data.images import pair_sets
from train.data.images import pairs as image_pairs
from train.data.images.folders import layout
from train.data.images.pairs import Pairs, signed
from train.data.understood import understood
from train.losses import l1 as mean_absolute_error
from train.plots import gan as gan_plots
from train.run import Common, Count, NonNegative, Positive, Rate, Shared, begin, command_line, open_run
from train.run.logs import read_curves
from train.run.run import format_figures
from train.step import TrainState

RUNS = Path("runs/pix2pix")


@dataclass(frozen=True)
class Args:
    data: str = "photographs"
    """"photographs" (embedded); "facades" (downloaded once); SOURCES,TARGETS: two folders paired by name; or a folder
    of files with two pictures each, side by side, best inside `train` and `test` or `val` (otherwise a tenth is for
    testing)."""
    source: Literal["left", "right"] = "left"
    """Half of a file that is the source; of facades the right one, the labels, by default."""
    preset: Literal[tuple(pix2pix.PRESETS)] = "small"
    """Sizes of the nets, and the defaults of what follows (this help shows those of the preset on its command line)."""
    size: Count = 64
    """Pixels per side that are cut out of pictures of 9/8 of it; a multiple of 2^depth."""
    objective: Literal[tuple(objectives.OBJECTIVES)] = "non-saturating"
    """Objective of both players for the patches' scores."""
    l1: NonNegative = 100.0
    """Weight of the mean absolute error."""
    steps: Count = 1500
    """Training steps."""
    batch: Count = 8
    """Pairs per step."""
    learning_rate: Positive = 2e-4
    """Learning rate of both players; Adam with betas of 0.5 and 0.999."""
    ema: Rate = 0.995
    """Decay of the moving average of the generator's parameters, which is evaluated."""
    sample_every: Count = 250
    """Steps between pictures of translations, the frames of training.gif."""
    common: Shared = Common()


# 200 epochs of the 400 facades, one by one (section 6.2 of the paper).
PAPER = {"size": 256, "steps": 80_000, "batch": 1, "sample_every": 4000}
PRESETS = {name: Args(preset=name, **PAPER) for name in ("paper", "instance")}


def presets(words: dict[str, str]) -> Args | None:
    args = PRESETS.get(words.get("preset", ""))
    named = words.get("data") == "facades" and not Path("facades").exists()
    return dataclasses.replace(args or Args(), source="right") if named else args


def read(args: Args) -> tuple[Pairs, Pairs]:
    """(train, test)."""
    larger, side_by_side = parts.loaded_size(args.size), image_pairs.side_by_side
    if args.data == "photographs":
        return image_pairs.photographs(max(96, larger), args.size)
    if "," in args.data:
        sources, targets = args.data.split(",", 1)
        return parts.held_out(image_pairs.paired(sources, targets, size=larger), args.size)
    expected = "photographs, facades, a folder of files with two pictures each, or SOURCES,TARGETS"
    folder, test, _ = layout(pair_sets.folder_of(args.data, ("facades",), expected))
    train = side_by_side(folder, source=args.source, size=larger)
    if test is None:
        return parts.held_out(train, args.size)
    test = test.with_name("test") if test.with_name("test").is_dir() else test  # rather than val, if there are both
    return train, side_by_side(test, source=args.source, size=args.size, channels=train.sources.shape[1])


def losses(cfg: pix2pix.Config, objective: objectives.Objective, l1: float):
    """Losses of critic and generator for `train.adversarial.step`; a batch is (source, target)."""

    def scores(params, source, image):
        return pix2pix.critic(params, (source, image), cfg, train=True)

    def critic_loss(own, other, batch, key, memory):
        source, target = batch
        fake = pix2pix.generator(other, source, cfg, key=key, train=True)
        real_scores, fake_scores = scores(own, source, target), scores(own, source, fake)
        metrics = {"real": real_scores.mean().detach(), "fake": fake_scores.mean().detach()}
        # -(E[log D(x, y)] + E[log(1 - D(x, G(x)))]) / 2: half of it, so that the critic learns more slowly than the
        # generator (section 3.3).
        return objective.critic(real_scores, fake_scores) / 2, (metrics, memory)

    def generator_loss(own, other, batch, key, memory):
        source, target = batch
        fake = pix2pix.generator(own, source, cfg, key=key, train=True)
        distance = mean_absolute_error(fake, target)
        real_scores = scores(other, source, target) if objective.needs_real else None
        # -E[log D(x, G(x))] + lambda E|y - G(x)|_1
        value = objective.generator(scores(other, source, fake), real_scores) + l1 * distance
        return value, ({"l1": distance.detach()}, memory)

    return critic_loss, generator_loss


def translations(generator: TrainState, cfg: pix2pix.Config, test: Pairs) -> Tensor:
    """Test sources translated by the averaged generator, in [-1, 1]."""
    values = tree.merge(optimizers.averaged(generator.opt_state), generator.stats)
    return translated(pix2pix, values, cfg, signed(test.sources))


def draw(path: Path, test: Pairs, images: Tensor, title: str) -> None:
    """Sources, translations and targets below each other, of pictures from all over the test set."""
    indices = torch.linspace(0, len(images) - 1, min(parts.SHOWN, len(images))).round().long()
    rows = [signed(test.sources[indices]), images[indices], signed(test.targets[indices])]
    table = torch.stack([rgb(x) for x in rows])  # (3, columns, 3, size, size)
    gan_plots.image_table(path, table, ["source", "translation", "target"], title=title, scale=1.1)


def train(args: Args) -> None:
    run, cfg = begin(RUNS, args, free=("data", "steps", "sample_every")), pix2pix.PRESETS[args.preset]
    parts.check_size(args, cfg.depth, cfg.critic_layers)
    pairs, test = read(args)
    cfg = dataclasses.replace(cfg, source_channels=pairs.sources.shape[1], channels=pairs.targets.shape[1])
    understood(print, {"data": args.data, **image_pairs.facts("pairs", pairs, test), "net": cfg})
    if args.batch > len(pairs.sources):
        raise ValueError(f"--batch is {args.batch}, but there are {len(pairs.sources)} pairs")

    init_key, order_key = random.split(random.key(args.common.seed)).unbind(0)
    optimizer = optimizers.adam(args.learning_rate, 0.5, 0.999)
    both = optimizer, optimizers.ema(optimizer, args.ema, debias=True)
    state = create(init_key.to(run.device), pix2pix.critic_spec(cfg), pix2pix.generator_spec(cfg), *both)
    identity = {"net": cfg, "data": fingerprint(pairs.sources, pairs.targets, test.sources, test.targets)}
    state = run.restore(state, identity, args.steps)
    players = losses(cfg, objectives.choose(args.objective), args.l1)
    step = make_step(*players, *both, policy=run.policy, compile=args.common.compile)

    targets = signed(test.targets)
    with run.open({"pairs": [len(pairs.sources), len(targets)]}, files={"frames": Path.mkdir}):
        counts = [tree.count(player.params) for player in (state.generator, state.critic)]
        run.log.print(f"generator {counts[0]:,} parameters, critic {counts[1]:,} parameters; run in {run.folder}")
        cut = args.batch, args.size, pairs.sources, pairs.targets
        batches = (image_pairs.batch_at(order_key, i, *cut) for i in run.remaining)
        for at, batch in run.steps(batches):
            state, metrics = step(state, tree.map(lambda x: x[None], tree.move(batch, run.device)))
            shown = {"l1": metrics["generator/l1"], "critic": metrics["critic/loss"]}
            run.record(at, metrics, args.batch, group="", **shown)
            if run.due(at, args.sample_every):
                images = translations(state.generator, cfg, test)
                draw(run.folder / "frames" / f"{at:07}.png", test, images, f"step {at}")
                run.log.metrics(at, {"test/l1": mean_absolute_error(images, targets)})
            if run.due(at, args.common.save_every):
                run.save(at, state)
        images = translations(state.generator, cfg, test)
        figures = {"l1": float(mean_absolute_error(images, targets))}
        average = torch.mean(pairs.targets, dim=0, keepdim=True, dtype=torch.float32)  # larger than a test picture
        average = signed(F.interpolate(average / 255, tuple(targets.shape[2:]), mode="bilinear", antialias=True))
        figures["l1_mean"] = float(mean_absolute_error(average.expand_as(targets), targets))  # one and the same for all
        if cfg.source_channels in (1, cfg.channels):  # the source itself as its translation
            figures["l1_source"] = float(mean_absolute_error(signed(test.sources).expand_as(images), targets))
        run.result(figures)
    draw(run.folder / "translations.png", test, images, "Pictures that it has not learned from")
    gan_plots.animation(run.folder / "training.gif", sorted((run.folder / "frames").glob("*.png")), parts.FRAME)
    lines = read_curves(run.folder, "generator/l1", "test/l1")
    plots.curves(run.folder / "l1.png", lines, ylabel="mean absolute error", title="Numbers in [-1, 1]")
    print(f"{format_figures(figures)} on {len(images)} test pictures;", end=" ")
    print(f"{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def translate(args: TranslateArgs) -> None:
    """Translate pictures with a run's generator."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    trained, cfg = run.read("args", Args), run.read("net", pix2pix.Config)
    values = tree.move(run.learned(pix2pix.generator_spec(cfg), "generator"), device)
    parts.translate_files(args, pix2pix, values, cfg, trained.size, cfg.source_channels)


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train, presets), root=RUNS, translate=(TranslateArgs, translate))
