"""CycleGAN: pictures of one kind into another and back, learned from two sets that are not paired.

Zhu et al. 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks" (arXiv:1703.10593).
Two generators, a critic of each kind, and the cycle: what was translated there and back should be what it was. Without
a flag it learns between white digits on black and yellow digits on blue, of which no two are the same, offline:

    python experiments/cyclegan.py                                           10 minutes on one CPU core
    python experiments/cyclegan.py --data photographs,paintings              two folders; a tenth of each is for testing
    python experiments/cyclegan.py --data FOLDER                             with trainA, trainB, testA and testB
    python experiments/cyclegan.py --preset paper-128 --data horse2zebra     the paper's sizes and set; downloaded once
    python experiments/cyclegan.py translate --run runs/cyclegan/NAME --back a.png FOLDER
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from core import random, tree
from experiments.parts import image_translation as parts
from experiments.parts.image_translation import SHOWN, TranslateArgs, rgb, translated
from nets.generative import cyclegan
from train import optimizers, plots
from train.adversarial import objectives, replay_buffer
from train.adversarial.step import create, make_step
from train.data.fingerprint import fingerprint
from train.data.images import arrays, pair_sets
from train.data.images import pairs as image_pairs
from train.data.images.pairs import signed
from train.data.understood import understood
from train.losses import l1
from train.plots import gan as gan_plots
from train.run import Common, Count, NonNegative, Positive, Rate, Shared, begin, command_line, open_run
from train.run.logs import read_curves
from train.run.run import format_figures

RUNS = Path("runs/cyclegan")


@dataclass(frozen=True)
class Args:
    data: str = "digits"
    """"digits" (embedded: two colours of scikit-learn's digits); "horse2zebra" (downloaded once); FIRST,SECOND: two
    folders of pictures; or a folder with trainA, trainB, testA and testB."""
    preset: Literal[tuple(cyclegan.PRESETS)] = "small"
    """Sizes of the nets, and the defaults of what follows (this help shows those of the preset on its command line)."""
    size: Count = 32
    """Pixels per side that are cut out of pictures of 9/8 of it; a multiple of 4."""
    objective: Literal[tuple(objectives.OBJECTIVES)] = "least-squares"
    """Objective of all players for the patches' scores."""
    cycle: NonNegative = 10.0
    """Weight of the error after there and back."""
    identity: NonNegative = 5.0
    """Weight of the change to pictures that are of the right kind already."""
    capacity: Count = 50
    """Generated pictures of each kind in the buffers that remind the critics of them."""
    steps: Count = 800
    """Training steps."""
    batch: Count = 4
    """Pictures of each kind per step."""
    learning_rate: Positive = 2e-4
    """Learning rate of all players; Adam with betas of 0.5 and 0.999."""
    ema: Rate = 0.99
    """Decay of the moving average of the generators' parameters, which are evaluated."""
    sample_every: Count = 200
    """Steps between pictures of translations, the frames of training.gif."""
    common: Shared = Common(save_every=400)


# 200 epochs of about a thousand pictures, one by one (section 4 of the paper).
PAPER = {"steps": 200_000, "batch": 1, "sample_every": 10_000}
PRESETS = {"paper": Args(preset="paper", size=256, **PAPER), "paper-128": Args(preset="paper-128", size=128, **PAPER)}


@dataclass(frozen=True, kw_only=True)
class EitherWayArgs(TranslateArgs):
    back: bool = False
    """The pictures are of the second kind, to be translated into the first."""


class Kinds(NamedTuple):
    """Pictures of both kinds, (count, channels, size, size) bytes. `truth` is the test pictures of the first kind as
    the second, where that is known; `facts` are for `understood`."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    truth: Tensor | None
    facts: dict[str, Any]


BLUE, YELLOW = (0.15, 0.25, 0.75), (0.98, 0.85, 0.35)


def recoloured(grey: Tensor) -> Tensor:
    """White on black (count, 1, h, w) in [0, 1] -> yellow on blue (count, 3, h, w)."""
    ink, paper = (torch.tensor(colour)[:, None, None] for colour in (YELLOW, BLUE))
    return grey * ink + (1 - grey) * paper


def digits(size: int) -> Kinds:
    """Half of scikit-learn's digits white on black, the other half yellow on blue."""

    def halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        x = interpolate(x, (size, size), mode="bilinear", align_corners=False)
        return x.tensor_split([len(x) // 2])

    def pixels(x: Tensor) -> Tensor:
        return (255 * x).round().to(torch.uint8).expand(-1, 3, -1, -1)

    train, test = (part.images for part in arrays.digits())
    (first, second), (third, fourth) = halves(train, parts.loaded_size(size)), halves(test, size)
    facts = {"pictures to train on": f"{len(first)} and {len(second)}"}
    facts |= {"pictures to test on": f"{len(third)} and {len(fourth)}"}
    kinds = (pixels(first), pixels(recoloured(second))), (pixels(third), pixels(recoloured(fourth)))
    return Kinds(*kinds, pixels(recoloured(third)), facts)


def read(args: Args) -> Kinds:
    if args.data == "digits":
        return digits(args.size)
    larger, facts = parts.loaded_size(args.size), {}
    if args.data.count(",") == 1:
        both = image_pairs.unpaired(*args.data.split(","), size=larger)
        kinds = [parts.held_out(images, args.size) for images in both]
    else:
        expected = "digits, horse2zebra, FIRST,SECOND, or a folder with trainA, trainB, testA and testB"
        folder = pair_sets.folder_of(args.data, ("horse2zebra",), expected)
        both = image_pairs.unpaired(folder / "trainA", folder / "trainB", size=larger)
        channels = both[0].images.shape[1]
        tests = image_pairs.unpaired(folder / "testA", folder / "testB", size=args.size, channels=channels)
        kinds = list(zip(both, tests, strict=True))
    for name, kind in zip(("first", "second"), kinds, strict=True):
        facts |= {f"{name} kind: {fact}": value for fact, value in image_pairs.facts("pictures", *kind).items()}
    train, test = (tuple(part.images for part in use) for use in zip(*kinds, strict=True))
    return Kinds(train, test, None, facts)


def losses(cfg: cyclegan.Config, objective: objectives.Objective, cycle: float, identity: float):
    """Losses of both critics and of both generators for `train.adversarial.step`; a batch is (x, y), a picture of each
    kind, and `there` makes y of x."""

    def generate(params, x):
        return cyclegan.generator(params, x, cfg, train=True)

    def scores(params, x):
        return cyclegan.critic(params, x, cfg, train=True)

    def critic_loss(own, other, batch, key, memory):
        x, y = batch
        total, buffers = 0.0, {}
        fakes = {"x": generate(other["back"], y), "y": generate(other["there"], x)}
        for number, (kind, real) in enumerate((("x", x), ("y", y))):
            buffers[kind], fake = replay_buffer.buffer(memory[kind], fakes[kind], random.fold_in(key, number))
            total = total + objective.critic(scores(own[kind], real), scores(own[kind], fake))
        return total / 2, ({}, buffers)  # half of it, as the authors do, so that critics learn more slowly

    def generator_loss(own, other, batch, key, memory):
        x, y = batch
        as_y, as_x = generate(own["there"], x), generate(own["back"], y)
        # E|F(G(x)) - x|_1 + E|G(F(y)) - y|_1
        returned = l1(generate(own["back"], as_y), x) + l1(generate(own["there"], as_x), y)
        terms = {"adversarial": 0.0, "cycle": cycle * returned}
        for kind, real, fake in (("x", x, as_x), ("y", y, as_y)):
            real_scores = scores(other[kind], real) if objective.needs_real else None
            terms["adversarial"] = terms["adversarial"] + objective.generator(scores(other[kind], fake), real_scores)
        if identity:
            # E|G(y) - y|_1 + E|F(x) - x|_1
            same = l1(generate(own["there"], y), y) + l1(generate(own["back"], x), x)
            terms["identity"] = identity * same
        return sum(terms.values()), ({name: value.detach() for name, value in terms.items()}, memory)

    return critic_loss, generator_loss


def study(generators: tree.Tree, cfg: cyclegan.Config, data: Kinds) -> tuple[dict[str, float], Tensor]:
    """(figures of the test pictures, a table of them: both kinds, translated and brought back)."""
    (x, y), figures, rows = map(signed, data.test), {}, []
    for kind, pictures, there, back in (("x", x, "there", "back"), ("y", y, "back", "there")):
        images = translated(cyclegan, generators[there], cfg, pictures)
        again = translated(cyclegan, generators[back], cfg, images)
        figures[f"cycle_{kind}"] = float(l1(again, pictures))
        rows += [pictures[:SHOWN], images[:SHOWN], again[:SHOWN]]
        if kind == "x" and data.truth is not None:  # beside the error of the picture itself as its translation
            errors = {"error": l1(images, signed(data.truth)), "error_source": l1(pictures, signed(data.truth))}
            figures |= {name: float(error) for name, error in errors.items()}
    columns = min(map(len, rows))
    return figures, torch.stack([rgb(row[:columns]) for row in rows])  # (6, columns, 3, size, size)


def draw(path: Path, table: Tensor, title: str) -> None:
    rows = ["first kind", "as the second", "and back", "second kind", "as the first", "and back"]
    gan_plots.image_table(path, table, rows, title=title, scale=1.0)


def train(args: Args) -> None:
    run, cfg = begin(RUNS, args, free=("data", "steps", "sample_every")), cyclegan.PRESETS[args.preset]
    parts.check_size(args, cyclegan.HALVINGS, cfg.critic_layers)
    data = read(args)
    cfg, fewest = dataclasses.replace(cfg, channels=data.train[0].shape[1]), min(map(len, data.train))
    understood(print, {"data": args.data, **data.facts, "net": cfg})
    if args.batch > fewest:
        raise ValueError(f"--batch is {args.batch}, but there are {fewest} pictures of one kind")

    init_key, *order_keys = random.split(random.key(args.common.seed), 3).unbind(0)
    critic, generator = cyclegan.critic_spec(cfg), cyclegan.generator_spec(cfg)
    players = {"x": critic, "y": critic}, {"back": generator, "there": generator}
    optimizer = optimizers.adam(args.learning_rate, 0.5, 0.999)
    both = optimizer, optimizers.ema(optimizer, args.ema, debias=True)
    shape = (cfg.channels, args.size, args.size)
    memory = {kind: replay_buffer.create(shape, args.capacity, device=run.device) for kind in "xy"}
    state = create(init_key.to(run.device), *players, *both, memory)
    state = run.restore(state, {"net": cfg, "data": fingerprint(data.train, data.test)}, args.steps)
    terms = losses(cfg, objectives.choose(args.objective), args.cycle, args.identity)
    step = make_step(*terms, *both, policy=run.policy, compile=args.common.compile)

    def batch_at(i: int) -> tuple[Tensor, Tensor]:
        cut = args.batch, args.size
        flip = args.data != "digits"  # which no longer are digits in a mirror
        kinds = zip(order_keys, data.train, strict=True)
        return tuple(image_pairs.batch_at(key, i, *cut, images, flip=flip)[0] for key, images in kinds)

    with run.open({"pictures": [len(images) for images in data.train]}, files={"frames": Path.mkdir}):
        counts = [tree.count(player.params) for player in (state.generator, state.critic)]
        run.log.print(f"generators {counts[0]:,} parameters, critics {counts[1]:,} parameters; run in {run.folder}")
        for at, batch in run.steps(map(batch_at, run.remaining)):
            state, metrics = step(state, tree.map(lambda x: x[None], tree.move(batch, run.device)))
            shown = {"cycle": metrics["generator/cycle"], "critic": metrics["critic/loss"]}
            run.record(at, metrics, 2 * args.batch, group="", **shown)
            if run.due(at, args.sample_every):
                figures, table = study(optimizers.averaged(state.generator.opt_state), cfg, data)
                draw(run.folder / "frames" / f"{at:07}.png", table, f"step {at}")
                run.log.metrics(at, {f"test/{name}": value for name, value in figures.items()})
            if run.due(at, args.common.save_every):
                run.save(at, state)
        figures, table = study(optimizers.averaged(state.generator.opt_state), cfg, data)
        run.result(figures)
    draw(run.folder / "translations.png", table, "Pictures that it has not learned from")
    gan_plots.animation(run.folder / "training.gif", sorted((run.folder / "frames").glob("*.png")), parts.FRAME)
    lines = read_curves(run.folder, "test/cycle_x", "test/cycle_y")
    plots.curves(run.folder / "cycle.png", lines, ylabel="mean absolute error", title="There and back, in [-1, 1]")
    print(f"{format_figures(figures)}; {run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def translate(args: EitherWayArgs) -> None:
    """Translate pictures with a run's generators, from the first kind to the second, or back."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    trained, cfg = run.read("args", Args), run.read("net", cyclegan.Config)
    one = cyclegan.generator_spec(cfg)
    both = run.learned({"back": one, "there": one}, "generator")
    values = tree.move(both["back" if args.back else "there"], device)
    parts.translate_files(args, cyclegan, values, cfg, trained.size, cfg.channels)


if __name__ == "__main__":
    command_line.run(__doc__, (Args, train, PRESETS), root=RUNS, translate=(EitherWayArgs, translate))
