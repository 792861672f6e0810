"""A detector that `experiments/detect.py` trains: its data and loss, its detections, figures and pictures."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core import boxes as box_ops
from core import random, tree
from nets.dense import detr, fcos
from train.data.images import annotations, boxed, scenes
from train.data.images.annotations import BoxSet
from train.data.images.arrays import digits
from train.data.images.boxed import Boxed
from train.files import replacing, shown, write_json
from train.losses import detection, matching
from train.metrics.detection import Frames, Precision, average_precision
from train.plots import detection as pictures
from train.plots import figures
from train.run import SavedRun

NETS = {"fcos": fcos, "detr": detr}
TRAINING, TESTING = 4000, 500
"""Scenes to learn from and to test on."""
BATCH = 32
"""Pictures at once, without a gradient."""
SHOWN = 12
"""Pictures with boxes that are content."""


class Detector(NamedTuple):
    """`net` is one of `NETS`; pictures are made to fit `size` pixels per side."""

    net: str
    params: tree.Tree
    cfg: Any
    classes: tuple[str, ...]
    size: int

    @property
    def module(self) -> ModuleType:
        return NETS[self.net]


class Data(NamedTuple):
    """Pictures to learn from and to test on; `facts` are what was understood of them."""

    train: Boxed
    test: Boxed
    classes: tuple[str, ...]
    facts: dict[str, Any]
    skipped: int


# Data.


def _of_scenes(key: Tensor, count: int, pool: Any) -> Boxed:
    content = scenes.scenes(key, count, pool)
    scales, crowd = torch.ones(count), torch.zeros_like(content.labels, dtype=torch.bool)
    return Boxed((255 * content.images).round().to(torch.uint8), content.boxes, content.labels, crowd, scales)


def open_data(data: str, size: int, classes: Sequence[str] | None = None) -> Data:
    """The pictures of `--data`: "scenes", or files with boxes. Raises DataError as `annotations.open_boxes`."""
    if data == "scenes" and not Path(data).exists():
        train_digits, test_digits = digits()
        keys = random.split(random.key(0)).unbind(0)
        learn, test = _of_scenes(keys[0], TRAINING, train_digits), _of_scenes(keys[1], TESTING, test_digits)
        facts = {"pictures": {"train": TRAINING, "test": TESTING}, "to test on": "scenes of other digits"}
        return Data(learn, test, scenes.NUMBERS, facts, 0)
    files: BoxSet = annotations.open_boxes(data, classes)
    learn, bad = boxed.read(files.train, files.classes, size)
    test, also_bad = boxed.read(files.test, files.classes, size)
    files = files._replace(skipped=(*files.skipped, *bad, *also_bad))
    return Data(learn, test, files.classes, annotations.facts(files), len(files.skipped))


# Training.


def configuration(args: Any, classes: int) -> Any:
    """The configuration of the flags of detect.py. Raises ValueError: there is no such preset."""
    presets = NETS[args.net].PRESETS
    if args.preset not in presets:
        raise ValueError(f"--preset {args.preset} is none of {args.net}: {', '.join(presets)}")
    return dataclasses.replace(presets[args.preset], classes=classes)


def augmented(args: Any, keys: Tensor, images: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The batch after the changes that the flags ask for; pictures become floating-point numbers in [0, 1]."""
    values = images.float() / 255, boxes, labels
    own = random.split(keys, 2)
    if args.mosaic:
        values = boxed.mosaic(*values)
    if args.zoom > 1.0:
        values = boxed.zoom(own[:, 0], *values, least=1 / args.zoom, greatest=args.zoom)
    return boxed.flip(own[:, 1], *values) if args.flip else values


def normalised(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as the nets take them: about zero, with a standard deviation near 1."""
    return 4 * (images - 0.5)


def losses(params: tree.Tree, batch: tuple, keys: Tensor, net: str, cfg: Any):
    """The net's own losses of a batch of images, boxes and labels; crowds are no objects to learn."""
    images, boxes, labels = batch
    images = normalised(images)
    if net == "detr":
        out = detr.apply(params, images, cfg, key=keys, train=True)
        height, width = images.shape[2:]
        frames = box_ops.to_centres(boxes) / torch.tensor([width, height, width, height], device=boxes.device)
        return matching.detr_loss(out["logits"], out["boxes"], labels, frames.to(out["boxes"].dtype))
    out = fcos.apply(params, images, cfg, train=True)
    at = fcos.places(cfg, *images.shape[2:], images.device)
    targets = detection.fcos_targets(boxes, labels, at.centres, at.strides)
    return detection.fcos_losses(out["logits"], fcos.decode(out["distances"], at), out["centreness"], targets)


def load(run: SavedRun, device: torch.device | str = "cpu") -> Detector:
    """The detector of a run, at its checkpoint."""
    net = run.config["args"]["net"]
    cfg = run.read("net", NETS[net].Config)
    params = tree.move(run.learned(NETS[net].spec(cfg), averaged=False), device)
    return Detector(net, params, cfg, tuple(run.config["classes"]), run.config["args"]["size"])


# Detections.


def detect(model: Detector, images: Tensor, score: float = 0.05) -> list[Any]:
    """`Detections` of each image, bytes of (count, channels, size, size), on the CPU."""
    device, out = tree.leaves(model.params)[0].device, []
    for batch in images.split(BATCH):
        inputs = normalised(batch.to(device).float() / 255)
        each = model.module.detect(model.params, inputs, model.cfg, score=score)
        out += [type(one)(*(values.cpu() for values in one)) for one in each]
    return out


def truth(data: Boxed) -> list[Frames]:
    """In pixels of the files."""
    out = []
    for boxes, labels, crowd, scale in zip(data.boxes, data.labels, data.crowd, data.scales, strict=True):
        live = labels >= 0
        out.append(Frames(boxes[live].double() / scale, labels[live], crowd=crowd[live]))
    return out


def precision(detections: Sequence[Any], data: Boxed, classes: int) -> Precision:
    frames = [
        Frames(one.boxes.double() / scale, one.labels, one.scores)
        for one, scale in zip(detections, data.scales, strict=True)
    ]
    return average_precision(frames, truth(data), classes)


def regions(images: Tensor, label: int, least: int = 20) -> list[fcos.Detections]:
    """A detector without a net: connected regions that differ from the middle grey by Otsu's threshold.

    Otsu 1979. All are of one class; larger ones come first.
    """
    from scipy import ndimage

    out = []
    for image in images.numpy():
        away = np.abs(image.astype(np.float32) - np.median(image, (1, 2), keepdims=True)).max(0)
        pieces, _ = ndimage.label(away > _otsu(away))
        areas = np.bincount(pieces.ravel())
        rows = [
            (areas[i + 1], (s[1].start, s[0].start, s[1].stop, s[0].stop))
            for i, s in enumerate(ndimage.find_objects(pieces))
            if areas[i + 1] >= least
        ]
        rows.sort(key=lambda row: -row[0])
        boxes = torch.tensor([box for _, box in rows], dtype=torch.float32).reshape(-1, 4)
        scores = torch.tensor([float(area) for area, _ in rows]) / away.size
        out.append(fcos.Detections(boxes, scores, torch.full((len(rows),), label)))
    return out


def _otsu(values: np.ndarray) -> float:
    """The threshold between two groups whose means differ most, weighted by their sizes."""
    counts, edges = np.histogram(values, 64)
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * middles)
    gap = sums / np.maximum(below, 1) - (sums[-1] - sums) / np.maximum(above, 1)
    return float(edges[1:][(below * above * gap**2).argmax()])


def baseline(data: Boxed, train: Boxed, classes: int) -> float:
    """AP50 of `regions`, each taken for the commonest class of the training part."""
    label = int(train.labels[train.labels >= 0].mode().values)
    return precision(regions(data.images, label), data, classes).ap50


# Figures and pictures.


def study(folder: Path, model: Detector, data: Boxed, score: float) -> dict[str, Any]:
    """AP, AP50, AP75; writes detections.png, precision_recall.png and, of DETR, attention.png."""
    detections = detect(model, data.images)
    out = precision(detections, data, len(model.classes))
    count = min(SHOWN, len(data.images))
    frames = [_compared(one, data, i, model.classes, score) for i, one in enumerate(detections[:count])]
    title = "Detections: right, wrong (orange), missed (yellow)"
    shown_images = [boxed.unfilled(image) for image in data.images[:count]]
    pictures.boxes(folder / "detections.png", shown_images, frames, title=title)
    names = [f"{shown(name)}, {value:.2f}" for name, value in zip(model.classes, out.per_class, strict=True)]
    curves = dict(zip(names, out.curves.T, strict=True))
    pictures.precision_recall(folder / "precision_recall.png", curves, "Precision over recall, and AP50")
    if model.net == "detr":
        attention(folder / "attention.png", model, data.images[0], score)
    per_class = {name: float(x) for name, x in zip(model.classes, out.per_class, strict=True) if np.isfinite(x)}
    return {"ap": out.ap, "ap50": out.ap50, "ap75": out.ap75, "ap50_per_class": per_class}


def _compared(one: Any, data: Boxed, i: int, classes: Sequence[str], score: float) -> list[pictures.Box]:
    """Boxes above a score, right or wrong, and the truth that none of them fits."""
    live = (data.labels[i] >= 0).nonzero()[:, 0].tolist()
    left, out = set(live), []
    for box, value, label in zip(one.boxes, one.scores.tolist(), one.labels.tolist(), strict=True):
        if value < score:
            continue
        overlaps = [(float(box_ops.iou(box, data.boxes[i, j])), j) for j in left if int(data.labels[i, j]) == label]
        best, row = max(overlaps, default=(0.0, -1))
        left -= {row} if best >= 0.5 else set()
        colour = pictures.RIGHT if best >= 0.5 else pictures.WRONG
        out.append(pictures.Box(tuple(box.tolist()), f"{shown(classes[label])} {value:.2f}", colour))
    out.sort(key=lambda box: box.colour == pictures.RIGHT)  # drawn last, above the others
    missed = [pictures.Box(tuple(data.boxes[i, j].tolist()), "", pictures.MISSED, dashed=True) for j in sorted(left)]
    return [*missed, *out]


@torch.no_grad()
def attention(path: Path, model: Detector, image: Tensor, score: float) -> None:
    """Where the queries of DETR that found something look, by the last layer of the decoder, mean over the heads."""
    seen: list[Tensor] = []

    def see(weights: Tensor) -> Tensor:
        seen.append(weights)
        return weights

    inputs = normalised(image[None].float() / 255)
    params = tree.move(model.params, "cpu")
    detr.apply(params, inputs, model.cfg, see=see)
    (one,) = detr.detect(params, inputs, model.cfg, score=score)
    side = round(seen[-1].shape[-1] ** 0.5)
    maps = seen[-1][0].mean(0)[one.queries].unflatten(1, (side, side))  # (objects, side, side)
    count = max(1, min(6, len(maps)))
    with figures.panels(path, 1, 1 + count, 2.6, 2.8) as (first, *rest):
        first.imshow(image.permute(1, 2, 0).numpy())
        first.set_axis_off()
        for panel in rest:
            panel.set_axis_off()
        for panel, values, box, label in zip(rest, maps, one.boxes.tolist(), one.labels.tolist(), strict=False):
            panel.imshow(image.float().mean(0).numpy(), cmap="gray")
            extent = (-0.5, image.shape[2] - 0.5, image.shape[1] - 0.5, -0.5)
            panel.imshow(values.numpy(), cmap="magma", alpha=0.65, extent=extent, interpolation="bilinear")
            xs, ys = [box[0], box[2], box[2], box[0], box[0]], [box[1], box[1], box[3], box[3], box[1]]
            panel.plot(xs, ys, color="white", lw=1)
            panel.set_title(shown(model.classes[label]), fontsize=9)


def write_predictions(folder: Path, model: Detector, paths: Sequence[Path], score: float) -> tuple[int, list[tuple]]:
    """boxes.json and boxes.csv in pixels of the files, and each picture with its boxes, in pages of twelve.

    -> (number of pictures, those that cannot be read and why).
    """
    entries = [annotations.Annotated(path, None, (), (), ()) for path in paths]
    data, skipped = boxed.read(entries, model.classes, model.size)
    names = [shown(path) for path in paths if path not in {where for where, _ in skipped}]
    detections, records = detect(model, data.images, score), []
    for name, one, scale in zip(names, detections, data.scales.tolist(), strict=True):
        rows = zip((one.boxes / scale).tolist(), one.scores.tolist(), one.labels.tolist(), strict=True)
        objects = [{"class": model.classes[k], "score": s, "box": [round(x, 2) for x in b]} for b, s, k in rows]
        records.append({"picture": name, "objects": objects})
        print(f"{name}: {', '.join(shown(entry['class']) for entry in objects) or 'nothing'}")
    write_json(folder / "boxes.json", records)
    with replacing(folder / "boxes.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["picture", "class", "score", "left", "top", "right", "bottom"])
        for record in records:
            table.writerows([record["picture"], x["class"], x["score"], *x["box"]] for x in record["objects"])
    for page, start in enumerate(range(0, len(names), SHOWN)):
        rows, images, frames = range(start, min(start + SHOWN, len(names))), [], []
        for i in rows:
            one = detections[i]
            texts = [f"{shown(model.classes[k])} {s:.2f}" for s, k in zip(one.scores, one.labels, strict=True)]
            frames.append([pictures.Box(tuple(b.tolist()), text) for b, text in zip(one.boxes, texts, strict=True)])
            images.append(boxed.unfilled(data.images[i]))
        pictures.boxes(folder / f"boxes_{page + 1}.png", images, frames, titles=[Path(names[i]).name for i in rows])
    return len(names), skipped
