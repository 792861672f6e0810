"""Segmentation: a class for each pixel, by a U-Net; several members trained at once tell where they are unsure.

Ronneberger et al. 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation" (arXiv:1505.04597). Without a
flag it learns generated scenes of scikit-learn's digits, where colour says nothing, offline:

    python experiments/segment.py                                           three minutes on 2 CPU cores
    python experiments/segment.py --members 4                               an ensemble, and where it disagrees
    python experiments/segment.py --data NUCLEI                             images/ and instances/: objects
    python experiments/segment.py --data CamVid                             SegNet's copy of CamVid, with its void
    python experiments/segment.py --data FOLDER                             any images/ and masks/, or IMAGES,MASKS
    python experiments/segment.py evaluate --run runs/segment/NAME --data OTHER_FOLDER
    python experiments/segment.py predict --run runs/segment/NAME photo.jpg FOLDER --objects
    python experiments/segment.py predict --weights published --net deeplabv3_resnet50 --longest 520 photo.jpg

Expected: mean IoU 0.82 over the digits and the background, where the colour alone reaches 0.13.
"""

import experiments.parts.interrupts  # noqa: F401 # isort: skip
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from core import random, tree
from experiments.parts import segmentation_figures, segmentation_task, segmentation_weights, segmenter
from experiments.parts.segmentation_task import LOSSES, Loss
from experiments.parts.segmenter import Segmenter, Trained
from nets.dense import by_name
from train import optimizers, plots
from train.data.fingerprint import fingerprint
from train.data.images import folders, mask_sets
from train.data.images.masks import OBJECTS
from train.data.understood import understood
from train.files import write_json
from train.optimizers import schedules
from train.run import Common, Count, FromRun, Natural, NonNegative, Positive, Shared, begin, command_line, open_run
from train.run.flags import check_source
from train.run.logs import read_curves
from train.run.ranks import BY_ROWS, alone
from train.run.run import unused
from train.step import compiled, create, make_step

RUNS = Path("runs/segment")
FREE = ("data", "steps", "batch", "learning_rate", "weight_decay", "eval_every", "tile", "overlap")


@dataclass(frozen=True)
class Args:
    data: str = "scenes"
    """"scenes", generated; or a folder of pictures with masks: images/ and masks/ (or instances/, maps of objects),
    train/ and test/ with these, CamVid's train/ and trainannot/, a folder per picture with a mask per object; or
    IMAGES,MASKS. The defaults of what follows fit its kind."""
    net: str = "unet-small"
    """Any preset of nets.dense (a wrong name lists them)."""
    width: Count | None = 12
    """Channels of the first level of a U-Net; the preset's if None."""
    depth: Count | None = 3
    """Halvings of the picture in a U-Net; the preset's if None."""
    members: Count = 1
    """Nets trained together, in one compiled step: their mean predicts, their disagreement is uncertainty."""
    size: Count = 64
    """Pixels per side of the windows that the net learns from."""
    longest: Count | None = None
    """Pixels of the longer side that larger pictures are scaled to before the net sees them; none are if None."""
    zoom: NonNegative = 0.0
    """Windows are enlarged at random, by up to 1 + zoom, or made smaller by as much."""
    flip: bool = False
    """Random horizontal flips."""
    turn: bool = False
    """Random quarter turns and flips, for pictures without an upper side."""
    colour_jitter: NonNegative = 0.0
    """Largest random change of brightness, contrast and saturation, as a factor; of hue a quarter of it."""
    loss: Literal[tuple(LOSSES)] = "cross-entropy+dice"
    """Loss: per pixel, per region (dice, lovasz), or the sum of both."""
    weights: str | None = None
    """Start from "published" (torchvision's FCN or DeepLabV3, downloaded), a file (of these, of a ResNet for their
    backbone, of milesial's U-Net, of TransUNet's authors), a hub repository or a run's folder."""
    balance: bool = False
    """Weigh the classes in the cross-entropy by their median frequency over their own."""
    steps: Count = 600
    """Training steps; the learning rate rises over a twentieth of them, and then falls to 0."""
    batch: Count = 16
    """Windows per step (and member)."""
    learning_rate: Positive = 5e-3
    """Peak learning rate of AdamW."""
    weight_decay: NonNegative = 0.01
    """Weight decay of weights with two axes or more."""
    eval_every: Count | None = None
    """Steps between evaluations on the test pictures; a fourth of all if None."""
    tile: Count = 512
    """Pixels per side of the tiles that larger pictures are predicted in."""
    overlap: Natural = 96
    """Pixels that neighbouring tiles share, at least; their predictions are blended there."""
    common: Shared = Common()


FOLDER = Args(depth=4, size=128, batch=8, flip=True, zoom=0.25, colour_jitter=0.2, steps=450)


def presets(words: dict[str, str]) -> Args:
    """The recipe of the kind of data; a net that the command line names has its own sizes."""
    data, args = words.get("data", "scenes"), FOLDER
    names = {path.name.lower() for path in Path(data).iterdir()} if Path(data).is_dir() else set()
    if data == "scenes":
        args = Args()
    elif "trainannot" in names:
        args = dataclasses.replace(FOLDER, longest=240, size=160, loss="cross-entropy", balance=True)
    elif names & {"instances", "instance", "objects"}:
        args = dataclasses.replace(FOLDER, turn=True)
    return dataclasses.replace(args, width=None, depth=None) if "net" in words else args


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs(FromRun):
    data: str | None = None
    """Other pictures with masks of the run's classes, all of them; the run's own test pictures if None."""
    tile: Count | None = None
    """Pixels per side of the tiles of large pictures; the run's if None."""
    overlap: Natural | None = None
    """Pixels that neighbouring tiles share; the run's if None."""
    out: Path | None = None
    """New folder for figures and pictures; RUN/evaluations/DATA, numbered if it exists, if None."""


@dataclass(frozen=True, kw_only=True)
class PredictArgs(FromRun):
    run: Path | None = None
    """Folder of a run: runs/segment/NAME."""
    weights: str | None = None
    """Published weights instead: "published" (torchvision's of --net, downloaded), a file or a hub repository."""
    net: str | None = None
    """With --weights: their net, a preset of nets.dense (a wrong name lists them)."""
    longest: Count | None = None
    """With --weights: pixels of the longer side that larger pictures are scaled to; none are if None."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, folders of pictures, a .txt file with one name per line, or - for names on standard input."""
    objects: bool = False
    """Number the connected regions of each class too: NAME_objects.png and objects.csv."""
    tile: Count | None = None
    """Pixels per side of the tiles of large pictures; the run's if None."""
    overlap: Natural | None = None
    """Pixels that neighbouring tiles share; the run's if None."""
    out: Path | None = None
    """New folder for the masks; RUN/predicted, numbered if it exists, if None."""


CURVES = ("mean_iou", "dice_per_image", "nll")
SUMMARY = (
    "mean IoU {mean_iou:.3f}, Dice {dice_per_image:.3f} per image and {dice_pooled:.3f} pooled, "
    "{pixel_accuracy:.2%} of the pixels right"
)


def train(args: Args) -> None:
    run = begin(RUNS, args, free=FREE, shards=BY_ROWS if args.members == 1 else alone(f"--members {args.members}"))
    source = segmentation_task.source_of(args)
    data, table = source.data, source.data.table
    classes = table.classes
    sizes = {"classes": len(classes), "size": args.size, "width": args.width, "depth": args.depth}
    net, cfg = by_name.configured(args.net, **sizes)
    initial, means = None, segmentation_task.means(data.train)
    if run.resumed_from:
        means = segmentation_weights.prepared_before(run.resumed_from, RUNS, means)
    elif args.weights:
        initial, means = segmentation_weights.initial(args.weights, args.net, net, cfg, RUNS)
    values = tuple(sorted(table.labels.items()))
    trained = Trained(args.net, classes, values, table.coloured, *means, args.longest, args.members)
    understood(print, source.facts | {"net": cfg})
    segmenter.check_sizes(net, cfg, args.tile, args.overlap, args.size)
    weight = mask_sets.median_weights(data.train, len(classes)) if args.balance else None

    create_key, order_key = random.split(random.key(args.common.seed)).unbind(0)
    order_keys = random.split(order_key, args.members)
    model, rate = net.spec(cfg), schedules.warmup_cosine(args.learning_rate, args.steps // 20, args.steps)
    optimizer = optimizers.adamw(rate, weight_decay=args.weight_decay, mask=lambda name, leaf: leaf.ndim >= 2)
    loss = Loss(net, cfg, trained, args.loss, weight, run.policy.compute or torch.float32)
    start = functools.partial(create, model=model, optimizer=optimizer)
    if initial is not None:
        start = functools.partial(segmentation_weights.state_from, values=initial, model=model, optimizer=optimizer)
    if args.members == 1:
        state = start(create_key.to(run.device))
    else:
        state = torch.vmap(start)(random.split(create_key, args.members).to(run.device))
        state = tree.map(torch.Tensor.contiguous, state)  # vmap repeats what the members share, such as the step
        step = torch.vmap(make_step(loss, optimizer, policy=run.policy, compile=False))
        step = compiled(step) if args.common.compile else step
    identity = {"net": cfg, "trained": trained, "data": fingerprint(*data.train[:2], *data.test[:2])}
    parameters, every = tree.count(state.params), args.eval_every or max(1, args.steps // 4)
    state = run.restore(state, identity, args.steps, model)
    if args.members == 1:
        options = {"policy": run.policy, "distributed": run.distributed, "compile": args.common.compile}
        step = make_step(loss, optimizer, donate=True, **options)

    def current(state) -> Segmenter:
        return Segmenter(tree.merge(run.whole(state.params), state.stats), net, cfg, trained, args.tile, args.overlap)

    with run.open({}):
        each = f", {args.members} members together" if args.members > 1 else ""
        run.log.print(f"{parameters:,} parameters{each}; run in {run.folder}")
        batches = (segmentation_task.batch_of(source, order_keys, t) for t in run.remaining)
        for at, batch in run.steps(batches):
            state, metrics = step(state, tree.move(batch, run.device))
            run.record(at, metrics, args.members * args.batch)
            if at % every == 0 and at < args.steps:
                out = segmentation_figures.of(current(state), data.test)
                run.log.metrics(at, {f"test/{name}": out[name] for name in CURVES})
            if run.due(at, args.common.save_every):
                run.save(at, state)
        figures = segmentation_figures.study(run.folder, current(state), data, baseline=True)
        run.log.metrics(run.at, {f"test/{name}": figures[name] for name in CURVES})
        run.result({**figures, "parameters": parameters, "skipped": len(data.skipped)})
    plots.curves(
        run.folder / "loss.png", read_curves(run.folder, "train/loss", "test/nll"), title="Loss", ylabel="loss"
    )
    print(SUMMARY.format(**figures))
    print(segmentation_figures.baseline_line(figures))
    print(f"{run.at} steps in {run.seconds:.0f} s; files in {run.folder}/")


def tiled(model: Segmenter, args: Args | EvaluateArgs | PredictArgs, usual: Args) -> Segmenter:
    """The net with its tiles, which are checked."""
    tile, overlap = args.tile or usual.tile, usual.overlap if args.overlap is None else args.overlap
    segmenter.check_sizes(model.net, model.cfg, tile, overlap)
    return model._replace(tile=tile, overlap=overlap)


def evaluate(args: EvaluateArgs) -> None:
    """Figures and pictures of a run's net on its test pictures, or on other ones."""
    run, device = open_run(args.run, RUNS, args.checkpoint), command_line.device(args.device)
    trained = run.read("args", Args)
    model = tiled(segmenter.load(run, device), args, trained)
    if args.data is None:
        data, name = segmentation_task.source_of(trained).data, "test"
    else:
        table = model.trained.table
        data = mask_sets.open_masks(args.data, trained.longest, "all", OBJECTS if not table.labels else table)
        understood(print, mask_sets.facts(data, args.data))
        name = Path(args.data).resolve().name
    folder = unused(args.out, args.run / "evaluations" / name)
    folder.mkdir(parents=True)
    figures = segmentation_figures.study(folder, model, data, baseline=args.data is None)
    write_json(folder / "result.json", {**figures, "skipped": len(data.skipped), "checkpoint": run.step})
    print(SUMMARY.format(**figures), f"files in {folder}/", sep="\n")


def predict(args: PredictArgs) -> None:
    """Masks of pictures: a class for each pixel, over the picture too, and the connected regions with --objects."""
    check_source(args)
    device = command_line.device(args.device)
    if args.run:
        run = open_run(args.run, RUNS, args.checkpoint)
        model = tiled(segmenter.load(run, device), args, run.read("args", Args))
    else:
        model = tiled(segmentation_weights.published(args.weights, args.net or "", device, args.longest), args, Args())
    paths, skipped = folders.picture_paths(args.images)
    folder = unused(args.out, args.run / "predicted" if args.run else Path("predicted"))
    understood(print, {"pictures": len(paths), "classes": list(model.trained.classes), "skipped": skipped})
    segmenter.write_predictions(folder, model, paths, args.objects)
    print(f"files in {folder}/")


COMMANDS = {"evaluate": (EvaluateArgs, evaluate), "predict": (PredictArgs, predict)}

if __name__ == "__main__":
    command_line.run(__doc__, (Args, train, presets), root=RUNS, **COMMANDS)
