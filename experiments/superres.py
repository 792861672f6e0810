"""Super-resolution: pictures enlarged by SRCNN, FSRCNN, ESPCN, VDSR, DRCN, DRRN, EDSR, MDSR, SRResNet and SRGAN.

Dong et al. 2016, "Accelerating the Super-Resolution Convolutional Neural Network" (arXiv:1608.00367), and seven others
(nets/README.md). Without a flag FSRCNN learns from the two photographs in scikit-learn to enlarge three times, and is
tested on the portrait in matplotlib, offline:

    python experiments/superres.py                                           1.5 minutes of one CPU core
    python experiments/superres.py --data t91 --test set5                    downloaded once; or folders of pictures
    python experiments/superres.py --net vdsr --scale 2 3 4 --data t91 --test set5
    python experiments/superres.py --net srgan --scale 4 --weights runs/superres/NAME     from a run of SRResNet
    python experiments/superres.py evaluate --run runs/superres/NAME --test set5 --self-ensemble
    python experiments/superres.py upscale --run runs/superres/NAME photo.jpg FOLDER
    python experiments/superres.py upscale --weights edsr_baseline_x2.pt --net edsr-baseline --scale 2 photo.jpg

Expected: 29.19 dB, where bicubic interpolation gives 27.58; from T91, on Set5 after 6000 steps, 32.75 and 30.39.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core import random, tree
from experiments.parts import upscaled_files, upscaler, upscaler_training
from experiments.parts.upscaler import Upscaler
from nets.superresolution import by_name
from train import plots
from train.data.fingerprint import fingerprint
from train.data.images import folders, originals, patches
from train.data.understood import understood
from train.files import write_json
from train.run import (
    Common,
    Count,
    FromRun,
    NonNegative,
    Positive,
    Shared,
    begin,
    command_line,
    open_run,
)
from train.run.flags import check_source
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS, alone
from train.run.run import unused

RUNS = Path("runs/superres")


@dataclass(frozen=True)
class Args:
    net: Literal[tuple(by_name.PRESETS)] = "fsrcnn"
    """Net, and the defaults of what follows (this help shows those of the --net on its command line)."""
    scale: tuple[Count, ...] = (3,)
    """Factors of enlargement; several for the nets of enlarged pictures and MDSR."""
    data: str = "photographs"
    """Pictures to learn from: "photographs" (embedded), "t91" (downloaded once), or a folder."""
    test: str = "portrait"
    """Pictures to test on: "portrait" (embedded), "set5" (downloaded once), or a folder."""
    weights: str | None = None
    """Values to start from: a run of the same net, perhaps of another scale, or a file of its public version."""
    residual: bool = True
    """The net learns the difference from the bicubic enlargement (VDSR, DRCN and DRRN always do)."""
    patch: Count = 60
    """Pixels per side of the patches, in the large pictures; a multiple of the scales."""
    batch: Count = 16
    """Patches per step."""
    steps: Count = 2500
    """Training steps; the learning rate falls over all of them."""
    learning_rate: Positive = 2e-3
    """Peak learning rate."""
    loss: Literal[tuple(upscaler_training.LOSSES)] = "mse"
    """Loss of the pixels."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam, or SGD with a momentum of 0.9."""
    weight_decay: NonNegative = 1e-4
    """Weight decay of SGD."""
    clip: NonNegative = 0.0
    """Limit of the gradient, 0 for none."""
    clipping: Literal["norm", "adjustable"] = "norm"
    """Limited is the norm, or with SGD each value, to the limit divided by the learning rate (VDSR's)."""
    classifier: Path | None = None
    """With SRGAN: a run of classify.py with a VGG, or "published" (VGG-19), whose features the content loss compares;
    the pixels if None."""
    content_stage: Count = 5
    """Stage of that VGG whose last feature maps are compared."""
    adversarial: NonNegative = 1e-3
    """With SRGAN: weight of the adversarial loss."""
    eval_every: Count | None = None
    """Steps between evaluations on the test pictures; a quarter of all if None."""
    common: Shared = Common()


RECIPES = {
    "srcnn": {"patch": 48, "learning_rate": 1e-3},
    "espcn": {"learning_rate": 2e-3},
    "vdsr": {"patch": 48, "learning_rate": 1e-3},
    "drcn": {"patch": 48, "learning_rate": 1e-3},
    "drrn": {"patch": 48, "learning_rate": 1e-3},
    "edsr": {"patch": 48, "learning_rate": 5e-4, "loss": "l1"},
    "srgan": {"patch": 96, "learning_rate": 5e-4},
}
"""Choices of a family's presets for short runs."""


def presets(words: dict[str, str]) -> Args:
    name = words.get("net", "fsrcnn")
    if name not in by_name.PRESETS:
        return Args()
    recipe = RECIPES.get(by_name.PRESETS[name].__name__.rpartition(".")[2], {})
    if name.startswith("sr"):
        cfg = by_name.PRESETS[name].PRESETS[name]
        recipe = recipe | {"patch": getattr(cfg, "size", recipe["patch"])}
    recipe |= {"learning_rate": 1e-4} if name.startswith("srgan") else {}
    return Args(net=name, **recipe)


@dataclass(frozen=True, kw_only=True)
class FromRunOrWeights(FromRun):
    """Flags of a sub-command that uses a run's net or published weights."""

    run: Path | None = None
    """Folder of a run: runs/superres/NAME."""
    weights: str | None = None
    """Weights of a public version of --net instead: a file in its names."""
    net: Literal[tuple(by_name.PRESETS)] | None = None
    """With --weights: their net."""
    tile: Count = upscaler.TILE
    """Pixels per side of what the net sees at once, which bounds the memory; the result does not depend on it."""
    self_ensemble: bool = False
    """Mean over the eight symmetries of a square, in eight times the time."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(FromRunOrWeights):
    scale: tuple[Count, ...] = ()
    """Factors of enlargement; all of the run's if none. With --weights: those of their net."""
    test: str | None = None
    """Pictures to test on, as in training; the run's if None."""
    out: Path | None = None
    """New folder for figures and pictures; RUN/evaluations/TEST, numbered if it exists, if None."""


@dataclass(frozen=True, kw_only=True)
class UpscaleArgs(FromRunOrWeights):
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, folders of pictures, a .txt file with one name per line, or - for names on standard input."""
    scale: Count | None = None
    """Factor of enlargement; the run's if None. With --weights: that of their net."""
    white: Positive | None = None
    """Value of white in pictures of 16 bits or floating point; 65535 and 1 if None."""
    out: Path | None = None
    """New folder for the pictures; RUN/upscaled, or "upscaled" here, numbered if it exists, if None."""


def of_source(source: str, name: str, scales: tuple[int, ...]) -> Upscaler:
    """The net of `--weights`, a run or a file in the names of a public version, on the CPU.

    Raises ValueError: another net, or no public version; besides what reading them raises.
    """
    net, cfg = by_name.configured(name, scales)
    if not Path(source).exists():
        raise ValueError(f"--weights '{source}' does not exist; expected a run, or a file of the public {name}")
    if (Path(source) / "checkpoints").is_dir():
        model = upscaler.load(open_run(Path(source), RUNS))
        if model.net is not net:
            raise ValueError(f"--weights '{source}' is a {model.name}, expected a {name}")
        return model
    if not hasattr(net, "from_pretrained"):
        raise ValueError(f"--weights '{source}': expected a run, since no public {name} is known by its names")
    return Upscaler(name, net, cfg, net.from_pretrained(source, cfg), scales, False)


def of_flags(args: FromRunOrWeights, scales: tuple[int, ...]) -> Upscaler:
    """The net that a sub-command names, on its device, with the scales it asks for."""
    check_source(args)
    device = command_line.device(args.device)
    if args.run:
        model = upscaler.load(open_run(args.run, RUNS, args.checkpoint))
    elif args.net is None or not scales:
        raise ValueError(f"--weights '{args.weights}' needs --net and --scale, those of their net")
    else:
        model = of_source(args.weights, args.net, scales)
    if unknown := [scale for scale in scales if scale not in model.scales]:
        known = ", ".join(map(str, model.scales))
        raise ValueError(f"--scale is {unknown[0]}; the net has learned to enlarge by {known}")
    model = model._replace(values=tree.move(model.values, device), scales=scales or model.scales)
    for scale in model.scales:
        next(upscaler.windows(1, 1, args.tile, model.overlap(scale)))  # an error if the tile is too small
    return model


def train(args: Args) -> None:
    adversarial = args.net.startswith("srgan")
    shards = alone(f"--net {args.net}") if adversarial else BY_ROWS
    run = begin(RUNS, args, free=("data", "test", "steps", "eval_every"), shards=shards)
    net, cfg = by_name.configured(args.net, args.scale)
    cfg = dataclasses.replace(cfg, size=args.patch) if adversarial else cfg
    upscaler_training.check(args)
    data = originals.open_originals(args.data, cfg.channels, args.patch)
    test = originals.open_originals(args.test, 3, upscaler.least_size(args.scale))
    understood(print, originals.facts("to learn from", data) | originals.facts("to test on", test) | {"net": cfg})
    bicubic = {scale: upscaler.bicubic_figures(test, scale) for scale in args.scale}
    for scale, values in bicubic.items():
        upscaler.check_set5(args.test, scale, upscaler.means(values)[0])
    start = of_source(args.weights, args.net, args.scale) if args.weights else None

    create_key, data_key = random.split(random.key(args.common.seed)).unbind(0)
    phi = upscaler_training.content(args.classifier, args.content_stage, run.device) if adversarial else None
    state, step_of = upscaler_training.beginning(args, net, cfg, create_key.to(run.device), run.policy, phi, start)
    identity = {"net": cfg, "data": fingerprint(data.pictures, test.pictures)}
    state, every = run.restore(state, identity, args.steps, net.spec(cfg)), args.eval_every or max(1, args.steps // 4)
    step = step_of(run.distributed)
    low = {scale: patches.lowered_all(data.pictures, scale) for scale in args.scale}
    table: dict[str, float] = {}

    def model() -> Upscaler:
        player = state.generator if adversarial else state
        return Upscaler(
            args.net, net, cfg, tree.merge(run.whole(player.params), player.stats), args.scale, args.residual
        )

    def figures() -> dict[str, float]:
        each = {s: upscaler.figures(model(), test, s) for s in args.scale}
        return {k: v for s in args.scale for k, v in upscaler.summary(s, each[s], bicubic[s]).items()}

    with run.open({"protocol": upscaler.PROTOCOL}):
        run.log.print(f"{tree.count(model().values):,} parameters; run in {run.folder}")
        batches = (upscaler_training.batch_at(data_key, t, args, data.pictures, low) for t in run.remaining)
        for at, batch in run.steps(batches):
            batch = tree.move(batch, run.device)
            state, metrics = step(state, tree.map(lambda x: x[None], batch) if adversarial else batch)
            if not adversarial:
                metrics["psnr"] = -10 * metrics.pop("mse").log10()  # of all pixels of the batch
            shown = {"content": metrics["generator/content"]} if adversarial else {"psnr": metrics["psnr"]}
            run.record(at, metrics, args.batch, group="" if adversarial else "train/", **shown)
            if at % every == 0 or at == args.steps:
                table = figures()
                run.log.metrics(at, {f"test/{name}": value for name, value in table.items() if "bicubic" not in name})
            if run.due(at, args.common.save_every):
                run.save(at, state)
        table = table or figures()  # of a run whose steps were all done before
        run.result({**table, "parameters": tree.count(model().values), "protocol": upscaler.PROTOCOL})
    before = [("before", start)] if start and set(args.scale) <= set(start.scales) else []
    models = [*before, (args.net, model())]
    upscaler.draw(run.folder, models, test, args.test, table)
    curves = read_curves(run.folder, *(f"test/psnr_x{scale}" for scale in args.scale))
    plots.curves(run.folder / "psnr.png", curves, ylabel="dB", title=f"PSNR of the test pictures, {args.net}")
    print(upscaler.line(table, args.scale))
    print(f"{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def evaluate(args: EvaluateArgs) -> None:
    """Figures of a net on test pictures, beside bicubic interpolation and the papers."""
    model = of_flags(args, args.scale)
    name = args.test or (open_run(args.run, RUNS).read("args", Args).test if args.run else "set5")
    test = originals.open_originals(name, 3, upscaler.least_size(model.scales))
    folder = unused(args.out, (args.run or Path()) / "evaluations" / Path(name).name)
    understood(print, originals.facts("to test on", test) | {"protocol": upscaler.PROTOCOL})
    table = {}
    for scale in model.scales:
        bicubic = upscaler.bicubic_figures(test, scale)
        print(upscaler.row("bicubic", scale, bicubic, test), flush=True)
        upscaler.check_set5(name, scale, upscaler.means(bicubic)[0])
        ours = upscaler.figures(model, test, scale, args.tile, args.self_ensemble)
        print(upscaler.row(model.name, scale, ours, test), flush=True)
        table |= upscaler.summary(scale, ours, bicubic)
    folder.mkdir(parents=True)
    write_json(folder / "result.json", {**table, "protocol": upscaler.PROTOCOL, "self_ensemble": args.self_ensemble})
    upscaler.draw(folder, [(model.name, model)], test, name, table)
    print(upscaler.line(table, model.scales), f"files in {folder}/", sep="\n")


def upscale(args: UpscaleArgs) -> None:
    """Enlarge pictures: files, and the files of folders."""
    model = of_flags(args, () if args.scale is None else (args.scale,))
    if len(model.scales) > 1:
        raise ValueError(f"the net enlarges by {', '.join(map(str, model.scales))}; expected one of them as --scale")
    folder = unused(args.out, (args.run or Path()) / "upscaled")
    paths, skipped = folders.picture_paths(args.images)
    upscaled_files.upscale(model, paths, skipped, folder, args.tile, args.self_ensemble, args.white)


if __name__ == "__main__":
    command_line.run(
        __doc__,
        (Args, train, presets),
        root=RUNS,
        evaluate=(EvaluateArgs, evaluate),
        upscale=(UpscaleArgs, upscale),
    )
