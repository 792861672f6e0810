"""A classifier that `experiments/classify.py` or `imagenet.py` trains or has trained, or a published one: its loss, its
`evaluate` and `predict`, a fine-tuning from it, and its `features` of images, which other scripts compare images by."""

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from core import tree
from core.layers import freeze_batch_norms
from nets.classifiers import by_name, torchvision_weights
from train.data import batching
from train.data.images import augment, folders
from train.data.images import sets as image_sets
from train.data.images.arrays import Labelled
from train.data.images.files import Decoder, Files
from train.data.understood import understood
from train.files import replacing, shown, write_json
from train.losses import cross_entropy
from train.metrics import classification
from train.optimizers import recipes
from train.plots import classification as pictures
from train.run import FromRun, Natural, SavedRun, command_line, open_run
from train.run.flags import check_source
from train.run.run import unused

RUNS = Path("runs/classify")
SCRIPTS = ("classify", "imagenet")
"""Scripts whose runs have a classifier."""


@dataclass(frozen=True)
class Trained:
    """A run's net and its preparation of images; the entry "trained" of its configuration."""

    net: str
    channels: int
    size: int
    resize: int
    """Pixels that the shorter side of a picture is scaled to; the net sees the middle of it."""
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    choices: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the net's Config that differ from the preset: weights of another library may want another padding."""
    averaged: bool = False
    """Evaluate the moving average of the parameters."""
    interpolation: str = "bilinear"
    """Filter that pictures are scaled with before the net sees their middle."""


@dataclass(frozen=True, kw_only=True)
class FromRunOrWeights(FromRun):
    """Flags of a sub-command that uses a run's net or published weights."""

    run: Path | None = None
    """Folder of a run: runs/classify/NAME, runs/imagenet/NAME."""
    weights: str | None = None
    """Published weights instead: "published" (those of --net, downloaded), a weights file or a hub repository."""
    net: str | None = None
    """With --weights: their net, any preset of nets.classifiers (a wrong name lists them)."""

    def check(self) -> None:
        """Raise ValueError if flags contradict each other."""
        check_source(self)
        if self.weights and not self.net:
            raise ValueError(f"--weights '{self.weights}' needs --net, the name of their net")
        if self.net and not self.weights:
            raise ValueError("--net goes with --weights; a run has its own net")


@dataclass(frozen=True, kw_only=True)
class PredictArgs(FromRunOrWeights):
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures, folders of pictures, a .txt file with one name per line, or - for names on standard input."""
    out: Path | None = None
    """New folder for predictions.csv, predictions.json and a picture of the first 32; predictions, numbered if it
    exists, if None."""
    workers: Natural = 2
    """Processes that decode files."""


def net_of(trained: Trained) -> tuple[ModuleType, Any]:
    """(module of nets, Config)."""
    sizes = {"channels": trained.channels, "classes": len(trained.classes), "size": trained.size}
    net, cfg = by_name.configured(trained.net, **sizes)
    return net, dataclasses.replace(cfg, **trained.choices)


def is_run(folder: str | Path) -> bool:
    return (Path(folder) / "checkpoints").is_dir()


def losses(
    params, batch, keys, net: ModuleType, cfg, trained: Trained, smoothing: float, frozen: tuple[str, ...], dtype
):
    """Cross-entropy of each example; auxiliary heads are added with their weights. Labels are integers or, where they
    are mixed, probabilities."""
    pixels, labels = batch
    params = freeze_batch_norms(params, lambda name: recipes.matches(name, frozen)) if frozen else params
    output = net.apply(params, normalised(pixels, trained).to(dtype), cfg, key=keys, train=True)
    heads, options = by_name.weighted_logits(net, output), {"label_smoothing": smoothing, "reduction": "none"}
    values = sum(weight * cross_entropy(logits, labels, **options) for weight, logits in heads)
    classes = labels.argmax(-1) if labels.is_floating_point() else labels
    return values, {"accuracy": classification.accuracy(heads[0][1].detach(), classes)}


def root_of(folder: Path, root: Path = RUNS) -> Path:
    """The folder of the runs of the script that a run is of, beside `root`; `root` if it is of no script with
    classifiers, which an error then says."""
    try:
        script = json.loads((folder / "config.json").read_text(encoding="utf-8"))["experiment"]
    except (OSError, ValueError, KeyError, TypeError):
        return root
    return root.with_name(script) if script in SCRIPTS else root


def load(folder: Path, checkpoint: str = "latest", root: Path = RUNS) -> tuple[Trained, tree.Tree]:
    """The net of a run, and the values and Stats of a checkpoint, on the CPU.

    Args:
        root: folder of the runs that an error lists if `folder` is none.

    Raises ValueError: there is no checkpoint, or it is of another experiment, or damaged.
    """
    run = open_run(folder, root_of(folder, root), checkpoint)
    trained = run.read("trained", Trained)
    net, cfg = net_of(trained)
    return trained, run.learned(net.spec(cfg), averaged=trained.averaged)


def opened(args: FromRun, root: Path = RUNS) -> tuple[SavedRun, Trained, tree.Tree]:
    """The run that a sub-command names, its net, and its values on the device."""
    device = command_line.device(args.device)
    trained, values = load(args.run, args.checkpoint, root)
    return open_run(args.run, root_of(args.run, root), args.checkpoint), trained, tree.move(values, device)


def published(source: str, name: str) -> tuple[Trained, tree.Tree]:
    """The net and the preparation of images of `--weights`, and their values, on the CPU.

    Args:
        source: "published", a file, a folder or a hub repository.
        name: preset of the net.

    Raises ValueError: they are of another net, or have no head.
    """
    if is_run(source):
        raise ValueError(f"--weights '{source}' is a run's folder; expected it as --run")
    values, cfg, facts = torchvision_weights.from_pretrained(name, None if source == "published" else source)
    if "head" not in values:
        raise ValueError(f"--weights '{source}': {facts.notes[-1]}; expected one for the classes of {name}")
    if len(facts.mean) != cfg.channels:
        raise ValueError(f"--weights '{source}': {name} takes {cfg.channels} channels, their images {len(facts.mean)}")
    if facts.interpolation.upper() not in Image.Resampling.__members__:
        raise ValueError(f"--weights '{source}' want images scaled by '{facts.interpolation}', unknown to Pillow")
    for note in facts.notes:
        print(f"--weights '{source}': {note}")
    classes = torchvision_weights.class_names(facts, cfg.classes)
    trained = Trained(name, cfg.channels, facts.crop, facts.resize, classes, facts.mean, facts.std)
    return dataclasses.replace(trained, choices=choices(trained, cfg), interpolation=facts.interpolation), values


def from_flags(args: FromRunOrWeights, root: Path = RUNS) -> tuple[Trained, tree.Tree]:
    """The net of `--run` or of `--weights`, and its values on the device."""
    if args.run:
        return opened(args, root)[1:]
    device = command_line.device(args.device)
    trained, values = published(args.weights, args.net)
    return trained, tree.move(values, device)


def choices(trained: Trained, cfg: Any) -> dict[str, Any]:
    """Fields of a Config that differ from those of the preset for the same images."""
    net, plain = net_of(trained)
    sizes = {"channels": trained.channels, "classes": len(trained.classes), "size": trained.size}
    fields = vars(by_name.fitted(net, cfg, **sizes))
    return {field: fields[field] for field, value in vars(plain).items() if fields[field] != value}


def beginning(args: Any, data: image_sets.ImageSet, resumed_from: Path | None) -> tuple[Trained, tree.Tree | None]:
    """The net and its preparation of images, and the values of `--weights` if there are any.

    Args:
        args: those of classify.py.
        resumed_from: the run that is continued: its net and preparation are kept, and no weights are read.
    """
    if resumed_from and is_run(resumed_from) and any((resumed_from / "checkpoints").iterdir()):
        return open_run(resumed_from, RUNS).read("trained", Trained), None
    resize = args.size if data.in_memory else round(args.size * 256 / 224)  # as usual with ImageNet
    usual = torchvision_weights.IMAGENET
    trained = Trained(
        args.net, data.channels, args.size, resize, data.classes, usual["mean"], usual["std"], averaged=args.ema > 0
    )
    own = load(Path(args.weights)) if args.weights and is_run(args.weights) else None
    channels = own[0].channels if own else 3
    if args.weights and channels != data.channels:
        raise ValueError(f"--weights '{args.weights}' want images of {channels} channels, found {data.channels}")
    if own:
        source, values = own
        return dataclasses.replace(trained, mean=source.mean, std=source.std, choices=source.choices), values
    if args.weights:
        name = None if args.weights == "published" else args.weights
        values, cfg, facts = torchvision_weights.from_pretrained(args.net, name, size=args.size)
        for note in facts.notes:
            print(f"--weights '{args.weights}': {note}")
        changes = {"mean": facts.mean, "std": facts.std, "choices": choices(trained, cfg)}
        return dataclasses.replace(trained, **changes), values
    if data.in_memory:
        std, mean = torch.std_mean(data.train.images, (0, 2, 3))  # each (channels,)
        trained = dataclasses.replace(trained, mean=tuple(mean.tolist()), std=tuple(std.clamp(min=1e-3).tolist()))
    return trained, None


def normalised(pixels: Tensor, trained: Trained) -> Tensor:
    """Bytes, or numbers in [0, 1], (batch, channels, size, size), as the net takes them."""
    return torchvision_weights.preprocess(augment.unit(pixels), trained)


@torch.no_grad()
def predictions(
    values: tree.Tree, trained: Trained, test: Labelled | Files, decoder: Decoder | None = None
) -> tuple[Tensor, Tensor]:
    """Log probabilities (images, classes) and labels (images,) of all images, on the CPU.

    decoder: for files.
    """
    net, cfg = net_of(trained)
    device, log_probs, labels = tree.leaves(values)[0].device, [], []
    for pixels, numbers in image_sets.test_batches(test, trained.size, trained.resize, decoder, trained.interpolation):
        logits = net.apply(values, normalised(pixels.to(device), trained), cfg)
        log_probs.append(logits.float().log_softmax(-1).cpu())
        labels.append(numbers)
    return torch.cat(log_probs), torch.cat(labels)


@torch.no_grad()
def features(values: tree.Tree, trained: Trained, pixels: Tensor) -> Tensor:
    """Penultimate features of images in [0, 1], (images, channels, height, width) -> (images, d), on the CPU.

    The images are scaled to the size that the net has learned from.
    """
    net, cfg = net_of(trained)
    device, parts = tree.leaves(values)[0].device, []
    for part in batching.evaluation_batches(len(pixels), image_sets.EVALUATED):
        x, size = pixels[part].to(device), (trained.size, trained.size)
        if tuple(x.shape[2:]) != size:
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        parts.append(net.features(values, normalised(x, trained), cfg).cpu())
    return torch.cat(parts)


def study(
    folder: Path, values: tree.Tree, trained: Trained, test: Labelled | Files, decoder: Decoder
) -> dict[str, float]:
    """The figures of the test images; `report.txt` and pictures go to the folder."""

    def pixels(indices: Tensor) -> Tensor:
        return image_sets.some(test, indices, trained.size, trained.resize, decoder)

    return classification.study(folder, values, *predictions(values, trained, test, decoder), trained.classes, pixels)


def summary(figures: Mapping[str, float]) -> str:
    """The figures in a line, beside the best baseline."""
    top5 = f", {figures['top5_accuracy']:.2%} among the first five" if "top5_accuracy" in figures else ""
    line = f"{figures['accuracy']:.2%} of the test images right{top5}, NLL {figures['nll']:.4f}, "
    line += f"ECE {figures['calibration_error']:.2%}"
    for name in ("nearest_mean_accuracy", "commonest_class_accuracy"):
        if name in figures:
            return f"{line} ({name.removesuffix('_accuracy').replace('_', ' ')}: {figures[name]:.2%})"
    return line


def report_skipped(decoder: Decoder) -> None:
    if decoder.skipped:
        print(f"{len(decoder.skipped)} of the files could not be read, and were skipped")


def pictures_of(paths: Sequence[Path], trained: Trained, workers: int) -> image_sets.Pictures:
    """Files as the net sees them."""
    sizes = trained.size, trained.resize, trained.channels
    return image_sets.pictures(paths, *sizes, workers, trained.interpolation)


def write_predictions(folder: Path, values: tree.Tree, trained: Trained, images: image_sets.Pictures) -> None:
    """predictions.csv, predictions.json and a picture of the first images; prints each image's likeliest classes."""
    test = Labelled(images.images, torch.zeros(len(images.images), dtype=torch.int64))
    log_probs, _ = predictions(values, trained, test)
    names, rows = [shown(path) for path in images.paths], []
    for name, probabilities in zip(names, log_probs.exp(), strict=True):
        best = probabilities.topk(min(5, len(probabilities)))
        pairs = [(trained.classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        rows.append({"picture": name, "class": pairs[0][0], "probabilities": dict(pairs)})
        print(name, *(f"  {p:7.2%}  {shown(label)}" for label, p in pairs), sep="\n")
    write_json(folder / "predictions.json", rows)
    with replacing(folder / "predictions.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["picture", "class", "probability"])
        table.writerows([row["picture"], row["class"], row["probabilities"][row["class"]]] for row in rows)
    pictures.predictions(folder / "predictions.png", images.images, log_probs, trained.classes, names)


def predict(args: PredictArgs, root: Path = RUNS) -> None:
    """The most probable classes of pictures, by a run's net or by published weights."""
    args.check()
    paths, skipped = folders.picture_paths(args.images)
    folder = unused(args.out, Path("predictions"))
    trained, values = from_flags(args, root)
    images = pictures_of(paths, trained, args.workers)
    understood(print, {"pictures": len(paths), "unreadable": len(images.skipped), "skipped": skipped})
    write_predictions(folder, values, trained, images)
    print(f"files in {folder}/")
