"""Figures and pictures of a segmentation net on pictures whose masks are known."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.parts.segmenter import Segmenter, Trained, entropy, probabilities, regions, scaled
from train import plots
from train.data.images import mask_baselines
from train.data.images.mask_sets import MaskSet, Segmented
from train.data.images.masks import VOID
from train.metrics import segmentation
from train.plots import classification as confusion_plot
from train.plots import segmentation as pictures

SHOWN = 6
"""Test pictures in the comparison."""


class Measured(NamedTuple):
    """counts (pictures, classes, classes) of the averaged members, `members` (members, classes, classes) of each;
    `losses` (members + 1,) sums of -log p of the label, the last of the average; pixels by uncertainty (64, 2), right
    and wrong ones; objects; and the predictions of the pictures that are shown."""

    counts: Tensor
    members: Tensor
    losses: Tensor
    uncertainty: Tensor
    objects: segmentation.Objects
    shown: dict[int, tuple[Tensor, Tensor]]


def measure(model: Segmenter, part: Segmented) -> Measured:
    """Compare the predictions of a part's pictures with its masks."""
    classes, members = len(model.trained.classes), model.trained.members
    counts, each = [], torch.zeros(members, classes, classes, dtype=torch.int64)
    losses, uncertainty, objects = torch.zeros(members + 1).double(), torch.zeros(2, 64), [0, 0, 0]
    places = torch.linspace(0, len(part.images) - 1, min(SHOWN, len(part.images))).round().long().tolist()
    shown = {}
    for i, (probs, mask) in enumerate(zip(probabilities(model, part.images), part.masks, strict=True)):
        probs = scaled(probs, mask.shape)  # (members, classes, height, width)
        mean = probs.mean(0)  # (classes, height, width)
        labels, unsure = mean.argmax(0), entropy(mean) / math.log(classes)
        counts.append(segmentation.confusion(labels, mask, classes, VOID))
        for m in range(members if members > 1 else 0):
            each[m] += segmentation.confusion(probs[m].argmax(0), mask, classes, VOID)
        valid = mask != VOID
        picked = torch.cat([probs, mean[None]]).gather(1, mask.where(valid, 0).long().expand(members + 1, 1, -1, -1))
        losses -= picked[:, 0, valid].clamp(min=1e-12).log().double().sum(1)
        for wrong in (0, 1):
            those = unsure[valid & ((labels != mask) == bool(wrong))]
            uncertainty[wrong] += torch.histc(those, 64, 0, 1)
        if part.objects:
            matches = segmentation.match_objects(regions(labels, True), part.objects[i])
            objects = [a + b for a, b in zip(objects, matches, strict=True)]
        if i in places:
            shown[i] = labels.byte(), unsure
    return Measured(torch.stack(counts), each, losses, uncertainty, segmentation.Objects(*objects), shown)


def of(model: Segmenter, part: Segmented) -> dict[str, Any]:
    """The figures of a part's pictures."""
    return figures(model, part, measure(model, part))


def figures(model: Segmenter, part: Segmented, out: Measured) -> dict[str, Any]:
    """The figures of a measurement; with several members those of a single one too, and how well the uncertainty tells
    wrong pixels."""
    background, pixels = model.trained.background, out.counts.sum().clamp(min=1)
    values = segmentation.figures(out.counts, background) | {"nll": float(out.losses[-1] / pixels)}
    if part.objects:
        values["object_f1"] = out.objects.f1
    if model.trained.members > 1:
        alone = [segmentation.figures(one[None], background) for one in out.members]
        values["member_mean_iou"] = sum(one["mean_iou"] for one in alone) / len(alone)
        values["member_dice_pooled"] = sum(one["dice_pooled"] for one in alone) / len(alone)
        values["member_nll"] = float(out.losses[:-1].mean() / pixels)
    values["errors_in_least_certain_tenth"] = _share_of_errors(out.uncertainty, 0.1)
    return values | {"iou": dict(zip(model.trained.classes, segmentation.iou(out.counts.sum(0)).tolist(), strict=True))}


def _share_of_errors(uncertainty: Tensor, share: float) -> float:
    """Share of the wrong pixels that are among the `share` of all pixels that are least certain."""
    right, wrong = uncertainty.double().flip(1).cumsum(1)  # from the least certain bin on
    total = right + wrong
    if not wrong[-1]:
        return 0.0
    return float(np.interp(share * float(total[-1]), [0.0, *total.tolist()], [0.0, *(wrong / wrong[-1]).tolist()]))


def study(folder: Path, model: Segmenter, data: MaskSet, baseline: bool) -> dict[str, Any]:
    """The figures of the test pictures; writes examples.png, iou.png and confusion.png.

    baseline: add those of a method without a net, which learns from `data.train`.
    """
    out, trained = measure(model, data.test), model.trained
    values = figures(model, data.test, out)
    total = out.counts.sum(0)
    bars = {"net": segmentation.iou(total).tolist()}
    if baseline:
        name, counts = mask_baselines.baseline(data)
        values |= {f"{name}_{key}": x for key, x in segmentation.figures(counts, trained.background).items()}
        bars[f"{name} alone"] = segmentation.iou(counts.sum(0)).tolist()
    pictures.class_bars(folder / "iou.png", bars, trained.classes, "IoU", f"Mean IoU {values['mean_iou']:.3f}")
    shares = total / total.sum(1, keepdim=True).clamp(min=1)
    title = f"{values['pixel_accuracy']:.2%} of the pixels right"
    names = [confusion_plot.short(c, 24) for c in trained.classes]
    plots.matrix(folder / "confusion.png", shares, names, names, "predicted", "class", title)
    compare(folder / "examples.png", data.test, out.shown, trained)
    return values


def baseline_line(figures: dict[str, Any]) -> str:
    """The figures without a net, and of a single member, as a line."""
    name = "threshold" if "threshold_mean_iou" in figures else "colour"
    line = f"by {'a ' * (name == 'threshold')}{name} alone: mean IoU {figures[f'{name}_mean_iou']:.3f}, "
    line += f"Dice {figures[f'{name}_dice_per_image']:.3f} per image and {figures[f'{name}_dice_pooled']:.3f} pooled"
    if "member_mean_iou" in figures:
        line += f"; a member alone: mean IoU {figures['member_mean_iou']:.3f}, NLL {figures['member_nll']:.3f}"
        line += f", together {figures['nll']:.3f}"
    return line


def compare(path: Path, part: Segmented, shown: dict[int, tuple[Tensor, Tensor]], trained: Trained) -> None:
    """Pictures beside their truth, the prediction, its errors and its uncertainty."""
    colours, rows = pictures.palette(len(trained.classes), trained.background), []
    opacity = 0.85 if trained.background else 0.6  # what is no background hides little else
    high = max(float(unsure.max()) for _, unsure in shown.values())
    for i, (labels, unsure) in shown.items():
        image, mask = part.images[i], part.masks[i]
        if tuple(image.shape[1:]) != tuple(mask.shape):
            image = F.interpolate(image[None].float(), tuple(mask.shape), mode="bilinear")[0].round().byte()
        rows.append(
            [
                image.permute(1, 2, 0).numpy(),
                pictures.overlay(image, mask, colours, trained.background, opacity),
                pictures.overlay(image, labels, colours, trained.background, opacity),
                pictures.errors(image, labels, mask, VOID),
                pictures.heat(unsure, high),
            ]
        )
    legend = {confusion_plot.short(name, 24): colour for name, colour in zip(trained.classes, colours, strict=True)}
    legend = {name: colour for name, colour in legend.items() if name != "background"} if len(legend) <= 40 else {}
    columns = ("picture", "truth", "prediction", "wrong pixels", "uncertainty")
    pictures.comparison(path, rows, columns, legend)
