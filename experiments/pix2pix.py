"""pix2pix: one picture from another, learned from pairs.

Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks" (arXiv:1611.07004). A U-Net
translates, a critic judges patches of (source, translation). Without a flag it learns to colour grey photographs, from
tiles of the two in scikit-learn, offline:

    python experiments/pix2pix.py                                            18 minutes on a busy CPU core
    python experiments/pix2pix.py --data facades --source right              A|B in one file, train/ and val/ or test/
    python experiments/pix2pix.py --data labels,photographs                  two folders, paired by name
    python experiments/pix2pix.py --preset paper --size 256 --batch 1 ...    the paper's sizes
    python experiments/pix2pix.py translate --run runs/pix2pix/NAME a.png b.png
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from core import random, tree
from nets.generative import pix2pix
from train import optimizers, plots
from train.adversarial import objectives
from train.adversarial.step import create, make_step
from train.data import DataError
from train.data.images import pairs as image_pairs
from train.data.images.pairs import Pairs, signed
from train.losses import l1 as mean_absolute_error
from train.plots import gan as gan_plots
from train.run import command_line
from train.run import run as runs
from train.run.logs import read_curves

RUNS = Path("runs/pix2pix")
SHOWN = 8


@dataclass(frozen=True)
class Args:
    data: str = "photographs"
    """"photographs" (embedded), a folder with two pictures a file, or SOURCES,TARGETS: two folders paired by name."""
    source: str = "left"
    """Which half of a file is the source: left or right."""
    preset: str = "small"
    """Sizes of nets.generative.pix2pix: paper, instance (both for 256 pixels) or small (for 64)."""
    size: int = 64
    """Pixels a side that are cut out of pictures of 9/8 of it; a multiple of 2^depth."""
    objective: str = "non-saturating"
    """What the patches' scores are for: minimax, non-saturating, wasserstein, least-squares, hinge."""
    l1: float = 100.0
    """Weight of the mean absolute error."""
    steps: int = 1500
    """Training steps."""
    batch: int = 8
    """Pairs a step."""
    learning_rate: float = 2e-4
    """Of both players; Adam with betas of 0.5 and 0.999."""
    average: float = 0.995
    """Decay of the moving average of the generator's parameters."""
    sample_every: int = 250
    """Steps between two pictures, the frames of training.gif."""
    save_every: int = 500
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random."""
    name: str | None = None
    """Folder under runs/pix2pix; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    compile: bool = True
    """Compile the step with torch.compile."""


@dataclass(frozen=True)
class TranslateArgs:
    run: Path
    """Folder of a run, such as runs/pix2pix/NAME."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures to translate; of a file with two halves give the source alone."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


def read(args: Args) -> tuple[Pairs, Pairs]:
    """(train, test). Pictures to learn from are a little larger than what is cut out of them."""
    larger = args.size * 9 // 8
    if args.data == "photographs":
        return image_pairs.photographs(max(96, larger), args.size)
    if "," in args.data:
        sources, targets = args.data.split(",", 1)
        found = image_pairs.paired(sources, targets, size=larger)
        held = max(1, len(found.paths) // 10)  # every tenth, of an order that is always the same
        if len(found.paths) < 2:
            raise DataError(f"{args.data}: there is one pair; expected at least 2, of which one is for testing")
        order = random.permutation(random.key(0), len(found.paths))
        return part(found, order[held:], larger), part(found, order[:held], args.size)
    folder = Path(args.data)
    split = next((name for name in ("test", "val") if (folder / name).is_dir()), "val")
    train = image_pairs.side_by_side(folder, "train", source=args.source, size=larger)
    return train, image_pairs.side_by_side(folder, split, source=args.source, size=args.size)


def part(pairs: Pairs, chosen: Tensor, size: int) -> Pairs:
    """The middle of some pairs."""
    edge = (pairs.sources.shape[-1] - size) // 2
    middle = (..., slice(edge, edge + size), slice(edge, edge + size))
    paths = tuple(pairs.paths[i] for i in chosen.tolist())
    return Pairs(pairs.sources[chosen][middle], pairs.targets[chosen][middle], paths)


def settings(args: Args, pairs: Pairs) -> pix2pix.Config:
    command_line.choice("--preset", args.preset, pix2pix.PRESETS)
    command_line.choice("--objective", args.objective, objectives.OBJECTIVES)
    command_line.at_least_one(steps=args.steps, batch=args.batch, sample_every=args.sample_every)
    command_line.at_least_one(save_every=args.save_every, size=args.size)
    command_line.positive(learning_rate=args.learning_rate)
    channels = {"source_channels": pairs.sources.shape[1], "channels": pairs.targets.shape[1]}
    cfg = dataclasses.replace(pix2pix.PRESETS[args.preset], **channels)
    if args.size % 2**cfg.depth:
        halved = f"the {args.preset} net halves pictures {cfg.depth} times"
        raise ValueError(f"--size is {args.size}; expected a multiple of {2**cfg.depth}, since {halved}")
    if args.batch > len(pairs.sources):
        raise ValueError(f"--batch is {args.batch}, but there are {len(pairs.sources)} pairs")
    return cfg


def losses(cfg: pix2pix.Config, objective: objectives.Objective, l1: float):
    """Of both players, for `train.adversarial.step`."""

    def scores(params, source, image):
        return pix2pix.critic(params, (source, image), cfg, train=True)

    def critic_loss(own, other, batch, key, memory):
        source, target = batch
        fake = pix2pix.generator(other, source, cfg, key=key, train=True)
        real_scores, fake_scores = scores(own, source, target), scores(own, source, fake)
        metrics = {"real": real_scores.mean().detach(), "fake": fake_scores.mean().detach()}
        # Half of it, so that the critic learns more slowly than the generator (section 3.3).
        return objective.critic(real_scores, fake_scores) / 2, (metrics, memory)

    def generator_loss(own, other, batch, key, memory):
        source, target = batch
        fake = pix2pix.generator(own, source, cfg, key=key, train=True)
        distance = mean_absolute_error(fake, target)
        real_scores = scores(other, source, target) if objective.needs_real else None
        value = objective.generator(scores(other, source, fake), real_scores) + l1 * distance
        return value, ({"l1": distance.detach()}, memory)

    return critic_loss, generator_loss


@torch.no_grad()
def translated(values: tree.Tree, cfg: pix2pix.Config, sources: Tensor) -> Tensor:
    """sources (count, channels, size, size) bytes -> (count, channels, size, size) in [-1, 1]."""
    device = tree.leaves(values)[0].device
    return torch.cat([pix2pix.generator(values, signed(x).to(device), cfg).cpu() for x in sources.split(16)])


def coloured(images: Tensor) -> Tensor:
    """[-1, 1] -> three channels in [0, 1], of grey images too."""
    return ((images + 1) / 2).expand(-1, 3, -1, -1)


def draw(path: Path, test: Pairs, found: Tensor, title: str) -> None:
    """Sources, translations and targets below each other, of pictures from all over the test set."""
    shown = torch.linspace(0, len(found) - 1, min(SHOWN, len(found))).round().long()
    rows = [signed(test.sources[shown]), found[shown], signed(test.targets[shown])]
    table = torch.stack([coloured(x) for x in rows])
    gan_plots.image_table(path, table, ["source", "translation", "target"], title=title, scale=1.1)


def train(args: Args) -> None:
    origin, args = runs.begin(RUNS, args, free=("steps", "sample_every", "save_every", "device", "compile"))
    device, (pairs, test) = command_line.device(args.device), read(args)
    cfg = settings(args, pairs)
    optimizer = optimizers.adam(args.learning_rate, 0.5, 0.999)
    both = optimizer, optimizers.ema(optimizer, args.average, debias=True)
    key = random.key(args.seed, device)
    state = create(key, pix2pix.critic_spec(cfg), pix2pix.generator_spec(cfg), *both)
    order_key = random.fold_in(random.key(args.seed), 2)  # `create` has 0 and 1
    identity = {"net": cfg, "pairs": len(pairs.sources)}
    state = runs.restore(origin, state, identity, args.steps)
    players = losses(cfg, objectives.choose(args.objective), args.l1)
    step = make_step(*players, *both, compile=args.compile)

    config = {"args": args, **identity, "torch": torch.__version__}
    with runs.opened(origin, config, total=args.steps) as run:
        counts = [tree.count(player.params) for player in (state.generator, state.critic)]
        run.log.print(f"{counts[0]:,} parameters translate, {counts[1]:,} judge; run in {run.folder}")
        run.log.print(f"{len(pairs.sources)} pairs to learn from, {len(test.sources)} to test on")
        if args.compile and run.first < args.steps:
            run.log.print("compiling the step ...")
        frames, at = run.folder / "frames", run.first
        frames.mkdir(exist_ok=True)
        for at in range(run.first + 1, args.steps + 1):
            batch = image_pairs.drawn(order_key, at - 1, args.batch, args.size, pairs.sources, pairs.targets)
            state, metrics = step(state, tree.map(lambda x: x[None], tree.move(batch, device)))
            runs.check_finite(run, at, metrics)
            last = at == args.steps or run.stop.requested
            run.log.progress(at, args.batch, l1=metrics["generator/l1"], critic=metrics["critic/loss"])
            if at % 10 == 0 or last:
                run.log.metrics(at, metrics)
            if at % args.sample_every == 0 or last:
                values = tree.merge(optimizers.averaged(state.generator.opt_state), state.generator.stats)
                found = translated(values, cfg, test.sources)
                draw(frames / f"{at:07}.png", test, found, f"step {at}")
                run.log.metrics(at, {"test/l1": mean_absolute_error(found, signed(test.targets))})
            if at % args.save_every == 0 or last:
                runs.save(run, at, state)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        values = tree.merge(optimizers.averaged(state.generator.opt_state), state.generator.stats)
        found = translated(values, cfg, test.sources)
        # What one gets for nothing: the source itself, where it has as many channels or one.
        nothing = signed(test.sources).expand_as(found) if cfg.source_channels in (1, cfg.channels) else None
        figures = {"l1": float(mean_absolute_error(found, signed(test.targets)))}
        figures |= {} if nothing is None else {"l1_source": float(mean_absolute_error(nothing, signed(test.targets)))}
        run.log.result({**figures, "steps": at, "seconds": seconds})
    draw(run.folder / "translations.png", test, found, "Pictures that it has not learned from")
    gan_plots.animation(run.folder / "training.gif", sorted(frames.glob("*.png")), 0.4)
    lines = read_curves(run.folder, "generator/l1", "test/l1")
    plots.curves(run.folder / "l1.png", lines, ylabel="mean absolute error", title="Numbers in [-1, 1]")
    shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    print(f"{shown} on {len(found)} test pictures; {at} steps in {seconds:.0f} s; files in {run.folder}/")


def translate(args: TranslateArgs) -> None:
    trained, cfg = runs.read_config(args.run, "args", Args), runs.read_config(args.run, "net", pix2pix.Config)
    device = command_line.device(args.device)
    values = tree.move(runs.learned(args.run, pix2pix.generator_spec(cfg), "generator"), device)
    sources = [image_pairs.picture(path, size=trained.size, channels=cfg.source_channels)[None] for path in args.images]
    folder = args.run / "translated"
    folder.mkdir(exist_ok=True)
    for path, source in zip(args.images, sources, strict=True):
        found = gan_plots.tile(coloured(translated(values, cfg, source)), 1, gap=0)
        gan_plots.save(folder / f"{path.stem}.png", found)
        print(folder / f"{path.stem}.png")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), translate=(TranslateArgs, translate))
