"""CycleGAN: pictures of one kind into another and back, learned from two sets that are not paired.

Zhu et al. 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks" (arXiv:1703.10593).
Two generators, a critic of each kind, and the cycle: what was translated there and back should be what it was. Without
a flag it learns between white digits on black and yellow digits on blue, of which no two are the same, offline:

    python experiments/cyclegan.py                                           9 minutes on a busy CPU core
    python experiments/cyclegan.py --data photographs,paintings              two folders; a tenth of each is for testing
    python experiments/cyclegan.py --preset paper-128 --size 128 ...         the paper's sizes
    python experiments/cyclegan.py translate --run runs/cyclegan/NAME --back a.png b.png
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from torch import Tensor
from torch.nn.functional import interpolate

from core import random, tree
from nets.generative import cyclegan
from train import optimizers, plots
from train.adversarial import objectives, replay_buffer
from train.adversarial.step import create, make_step
from train.data import DataError
from train.data.images import arrays
from train.data.images import pairs as image_pairs
from train.data.images.pairs import signed
from train.losses import l1 as mean_absolute_error
from train.plots import gan as gan_plots
from train.run import command_line
from train.run import run as runs
from train.run.logs import read_curves

RUNS = Path("runs/cyclegan")
SHOWN = 8


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits" (embedded: two colours of scikit-learn's digits), or FIRST,SECOND: two folders of pictures."""
    preset: str = "small"
    """Sizes of nets.generative.cyclegan: paper (for 256 pixels), paper-128 or small (for 64 and less)."""
    size: int = 32
    """Pixels a side that are cut out of pictures of 9/8 of it; a multiple of 4."""
    objective: str = "least-squares"
    """What the patches' scores are for: minimax, non-saturating, wasserstein, least-squares, hinge."""
    cycle: float = 10.0
    """Weight of the error after there and back."""
    identity: float = 5.0
    """Weight of the change to pictures that are of the wanted kind already."""
    capacity: int = 50
    """Generated pictures of each kind that the critics are reminded of."""
    steps: int = 800
    """Training steps."""
    batch: int = 4
    """Pictures of each kind a step."""
    learning_rate: float = 2e-4
    """Of all players; Adam with betas of 0.5 and 0.999."""
    average: float = 0.99
    """Decay of the moving average of the generators' parameters."""
    sample_every: int = 200
    """Steps between two pictures, the frames of training.gif."""
    save_every: int = 400
    """Steps between two checkpoints."""
    seed: int = 0
    """Seed of everything random."""
    name: str | None = None
    """Folder under runs/cyclegan; the date and time if not given. With --resume: which run, else the newest."""
    resume: bool = False
    """Continue a run from its last checkpoint, with the flags it was started with."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""
    compile: bool = True
    """Compile the step with torch.compile."""


@dataclass(frozen=True)
class TranslateArgs:
    run: Path
    """Folder of a run, such as runs/cyclegan/NAME."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures of the first kind."""
    back: bool = False
    """They are of the second kind, to be translated into the first."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps ..."""


class Kinds(NamedTuple):
    """Pictures of both kinds, (count, channels, size, size) bytes. `truth` is what the test pictures of the first kind
    are as the second, where that is known."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    truth: Tensor | None = None


BLUE, YELLOW = (0.15, 0.25, 0.75), (0.98, 0.85, 0.35)


def recoloured(grey: Tensor) -> Tensor:
    """White on black (count, 1, h, w) in [0, 1] -> yellow on blue (count, 3, h, w)."""
    ink, paper = (torch.tensor(colour)[:, None, None] for colour in (YELLOW, BLUE))
    return grey * ink + (1 - grey) * paper


def read(args: Args) -> Kinds:
    larger = args.size * 9 // 8
    if args.data == "digits":
        train, test = arrays.digits()

        def scaled(x: Tensor, size: int) -> Tensor:
            return interpolate(x, (size, size), mode="bilinear", align_corners=False)

        def pixels(x: Tensor) -> Tensor:
            return (255 * x).round().to(torch.uint8)

        half, small = scaled(train.images, larger), scaled(test.images, args.size)
        first, second = half[: len(half) // 2], half[len(half) // 2 :]
        both = pixels(first.expand(-1, 3, -1, -1)), pixels(recoloured(second))
        held = len(small) // 2
        tests = pixels(small[:held].expand(-1, 3, -1, -1)), pixels(recoloured(small[held:]))
        return Kinds(both, tests, pixels(recoloured(small[:held])))
    if args.data.count(",") != 1:
        raise DataError(f"--data '{args.data}' is neither digits nor two folders, FIRST,SECOND")
    parts = []
    for found in image_pairs.unpaired(*args.data.split(","), size=larger):
        count, held = len(found.images), max(1, len(found.images) // 10)
        if count < 2:
            raise DataError(f"{found.paths[0].parent} has one picture; expected at least 2, one of them for testing")
        order, edge = random.permutation(random.key(0), count), (larger - args.size) // 2
        middle = (..., slice(edge, edge + args.size), slice(edge, edge + args.size))
        parts.append((found.images[order[held:]], found.images[order[:held]][middle]))
    return Kinds(*zip(*parts, strict=True))


def losses(cfg: cyclegan.Config, objective: objectives.Objective, cycle: float, identity: float):
    """Of both critics and of both generators, for `train.adversarial.step`. Kinds are x and y; `there` makes y of x."""

    def made(params, x):
        return cyclegan.generator(params, x, cfg, train=True)

    def scores(params, x):
        return cyclegan.critic(params, x, cfg, train=True)

    def critic_loss(own, other, batch, key, memory):
        x, y = batch
        total, kept = 0.0, {}
        fakes = {"x": made(other["back"], y), "y": made(other["there"], x)}
        for number, (kind, real) in enumerate((("x", x), ("y", y))):
            kept[kind], fake = replay_buffer.buffer(memory[kind], fakes[kind], random.fold_in(key, number))
            total = total + objective.critic(scores(own[kind], real), scores(own[kind], fake))
        return total / 2, ({}, kept)

    def generator_loss(own, other, batch, key, memory):
        x, y = batch
        as_y, as_x = made(own["there"], x), made(own["back"], y)
        returned = mean_absolute_error(made(own["back"], as_y), x) + mean_absolute_error(made(own["there"], as_x), y)
        terms = {"adversarial": 0.0, "cycle": cycle * returned}
        for kind, real, fake in (("x", x, as_x), ("y", y, as_y)):
            real_scores = scores(other[kind], real) if objective.needs_real else None
            terms["adversarial"] = terms["adversarial"] + objective.generator(scores(other[kind], fake), real_scores)
        if identity:
            same = mean_absolute_error(made(own["there"], y), y) + mean_absolute_error(made(own["back"], x), x)
            terms["identity"] = identity * same
        return sum(terms.values()), ({name: value.detach() for name, value in terms.items()}, memory)

    return critic_loss, generator_loss


@torch.no_grad()
def translated(values: tree.Tree, cfg: cyclegan.Config, pictures: Tensor) -> Tensor:
    """(count, channels, size, size) in [-1, 1] -> the same, by one generator, on the CPU."""
    device = tree.leaves(values)[0].device
    return torch.cat([cyclegan.generator(values, x.to(device), cfg).cpu() for x in pictures.split(16)])


def studied(values: tree.Tree, cfg: cyclegan.Config, data: Kinds) -> tuple[dict[str, float], Tensor]:
    """(figures of the test pictures, a table of them: both kinds, translated and brought back)."""
    figures, rows = {}, []
    for number, (there, back) in enumerate((("there", "back"), ("back", "there"))):
        pictures = signed(data.test[number])
        found = translated(values[there], cfg, pictures)
        again = translated(values[back], cfg, found)
        figures[f"cycle_{'xy'[number]}"] = float(mean_absolute_error(again, pictures))
        rows += [pictures[:SHOWN], found[:SHOWN], again[:SHOWN]]
        if number == 0 and data.truth is not None:
            figures["error"] = float(mean_absolute_error(found, signed(data.truth)))
    count = min(len(row) for row in rows)
    return figures, (torch.stack([row[:count].expand(-1, 3, -1, -1) for row in rows]) + 1) / 2


def train(args: Args) -> None:
    origin, args = runs.begin(RUNS, args, free=("steps", "sample_every", "save_every", "device", "compile"))
    command_line.choice("--preset", args.preset, cyclegan.PRESETS)
    command_line.choice("--objective", args.objective, objectives.OBJECTIVES)
    command_line.at_least_one(steps=args.steps, batch=args.batch, sample_every=args.sample_every, size=args.size)
    command_line.at_least_one(save_every=args.save_every, capacity=args.capacity)
    command_line.positive(learning_rate=args.learning_rate)
    cfg, device, data = cyclegan.PRESETS[args.preset], command_line.device(args.device), read(args)
    if args.size % 4:
        raise ValueError(f"--size is {args.size}; expected a multiple of 4, since pictures are halved twice")
    fewest = min(len(x) for x in data.train)
    if args.batch > fewest:
        raise ValueError(f"--batch is {args.batch}, but there are {fewest} pictures of one kind")
    channels = data.train[0].shape[1]
    cfg = cyclegan.Config(**{**vars(cfg), "channels": channels})
    critics, generators = cyclegan.critic_spec(cfg), cyclegan.generator_spec(cfg)
    optimizer = optimizers.adam(args.learning_rate, 0.5, 0.999)
    both = optimizer, optimizers.ema(optimizer, args.average, debias=True)
    shape = (channels, args.size, args.size)
    memory = {kind: replay_buffer.create(shape, args.capacity, device=device) for kind in "xy"}
    specs = {"x": critics, "y": critics}, {"back": generators, "there": generators}
    state = create(random.key(args.seed, device), *specs, *both, memory)
    order_keys = random.split(random.fold_in(random.key(args.seed), 2))  # `create` has 0 and 1
    identity = {"net": cfg, "pictures": [len(x) for x in data.train]}
    state = runs.restore(origin, state, identity, args.steps)
    players = losses(cfg, objectives.choose(args.objective), args.cycle, args.identity)
    step = make_step(*players, *both, compile=args.compile)

    config = {"args": args, **identity, "torch": torch.__version__}
    with runs.opened(origin, config, total=args.steps) as run:
        counts = [tree.count(player.params) for player in (state.generator, state.critic)]
        run.log.print(f"{counts[0]:,} parameters translate, {counts[1]:,} judge; run in {run.folder}")
        if args.compile and run.first < args.steps:
            run.log.print("compiling the step ...")
        frames, at = run.folder / "frames", run.first
        frames.mkdir(exist_ok=True)
        for at in range(run.first + 1, args.steps + 1):
            batch = tuple(
                image_pairs.drawn(key, at - 1, args.batch, args.size, x, flip=args.data != "digits")[0]
                for key, x in zip(order_keys, data.train, strict=True)
            )
            state, metrics = step(state, tree.map(lambda x: x[None], tree.move(batch, device)))
            runs.check_finite(run, at, metrics)
            last = at == args.steps or run.stop.requested
            run.log.progress(at, 2 * args.batch, cycle=metrics["generator/cycle"], critic=metrics["critic/loss"])
            if at % 10 == 0 or last:
                run.log.metrics(at, metrics)
            if at % args.sample_every == 0 or last:
                figures, table = studied(optimizers.averaged(state.generator.opt_state), cfg, data)
                draw(frames / f"{at:07}.png", table, f"step {at}")
                run.log.metrics(at, {f"test/{name}": value for name, value in figures.items()})
            if at % args.save_every == 0 or last:
                runs.save(run, at, state)
            if last:
                break
        seconds = runs.seconds(run)
        if runs.stopped(run, at):
            return
        figures, table = studied(optimizers.averaged(state.generator.opt_state), cfg, data)
        run.log.result({**figures, "steps": at, "seconds": seconds})
    draw(run.folder / "translations.png", table, "Pictures that it has not learned from")
    gan_plots.animation(run.folder / "training.gif", sorted(frames.glob("*.png")), 0.4)
    lines = read_curves(run.folder, "test/cycle_x", "test/cycle_y")
    plots.curves(run.folder / "cycle.png", lines, ylabel="mean absolute error", title="There and back, in [-1, 1]")
    shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    print(f"{shown}; {at} steps in {seconds:.0f} s; files in {run.folder}/")


def draw(path: Path, table: Tensor, title: str) -> None:
    rows = ["first kind", "as the second", "and back", "second kind", "as the first", "and back"]
    gan_plots.image_table(path, table, rows, title=title, scale=1.0)


def translate(args: TranslateArgs) -> None:
    trained, cfg = runs.read_config(args.run, "args", Args), runs.read_config(args.run, "net", cyclegan.Config)
    one, device = cyclegan.generator_spec(cfg), command_line.device(args.device)
    both = runs.learned(args.run, {"back": one, "there": one}, "generator")
    values = tree.move(both["back" if args.back else "there"], device)
    sources = [image_pairs.picture(path, size=trained.size, channels=cfg.channels)[None] for path in args.images]
    folder = args.run / "translated"
    folder.mkdir(exist_ok=True)
    for path, source in zip(args.images, sources, strict=True):
        found = (translated(values, cfg, signed(source)) + 1) / 2
        gan_plots.save(folder / f"{path.stem}.png", gan_plots.tile(found, 1, gap=0))
        print(folder / f"{path.stem}.png")


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train), translate=(TranslateArgs, translate))
