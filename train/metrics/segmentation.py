"""Figures of a segmentation, from the confusion matrix of its pixels.

Counts are pooled: the matrices of all images are added before anything is divided. Void pixels are left out before they
are counted. A class that no pixel truly has is nan, and left out of every mean: its IoU could only be 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def confusion(predicted: Tensor, labels: Tensor, classes: int, ignore_id: int | None = None) -> Tensor:
    """(classes, classes) int64: number of pixels of the class of the row that were taken for that of the column.

    Args:
        predicted, labels: integers in [0, classes), any one shape; labels may be `ignore_id`.

    Raises:
        ValueError: other shapes, or values.
    """
    if predicted.shape != labels.shape:
        raise ValueError(f"confusion: predicted {tuple(predicted.shape)} and labels {tuple(labels.shape)}")
    valid = torch.ones_like(labels, dtype=torch.bool) if ignore_id is None else labels != ignore_id
    rows, columns = labels[valid].long(), predicted[valid].long()  # (pixels,)
    for name, x in (("label", rows), ("predicted", columns)):
        if len(x) and not 0 <= int(x.min()) <= int(x.max()) < classes:
            raise ValueError(
                f"confusion: {name} values from {int(x.min())} to {int(x.max())}; expected 0 to {classes - 1}"
            )
    return torch.bincount(rows * classes + columns, minlength=classes**2).reshape(classes, classes)


def iou(counts: Tensor) -> Tensor:
    """(..., classes) float64: true positives / (true + false positives + false negatives); nan without pixels.

    counts: (..., classes, classes).
    """
    hits, true, predicted = _margins(counts)
    return torch.where(true > 0, hits / (true + predicted - hits), torch.nan)


def dice(counts: Tensor) -> Tensor:
    """(..., classes) float64: 2 true positives / (predicted + true pixels), the F1 score; nan without pixels."""
    hits, true, predicted = _margins(counts)
    return torch.where(true > 0, 2 * hits / (true + predicted), torch.nan)


def _margins(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts = counts.double()
    return counts.diagonal(dim1=-2, dim2=-1), counts.sum(-1), counts.sum(-2)


def figures(counts: Tensor, background: bool) -> dict[str, float]:
    """Figures of a set of images.

    - mean_iou: the mean of `iou` of the pooled counts over the classes that are there;
    - pixel_accuracy: the share of pixels that are right;
    - dice_pooled: the mean of `dice` of the pooled counts;
    - dice_per_image: for each image the mean of `dice` over classes, then the mean over images.

    Args:
        counts: (images, classes, classes).
        background: class 0 is none to look for, and left out of both Dice figures.
    """
    pooled, first = counts.sum(0), int(background)
    values = {
        "mean_iou": iou(pooled).nanmean(),
        "dice_per_image": dice(counts)[:, first:].nanmean(-1).nanmean(),
        "dice_pooled": dice(pooled)[first:].nanmean(),
        "pixel_accuracy": pooled.diagonal().sum() / pooled.sum().clamp(min=1),
    }
    return {name: float(value) for name, value in values.items()}


class Objects(NamedTuple):
    """Numbers of objects: those of the truth that a predicted one meets, those that none meets, and predicted ones that
    meet none."""

    hits: int
    misses: int
    extras: int

    @property
    def f1(self) -> float:
        """2 hits / (2 hits + misses + extras); nan without any object."""
        total = 2 * self.hits + self.misses + self.extras
        return 2 * self.hits / total if total else float("nan")


def match_objects(predicted: Tensor, true: Tensor, threshold: float = 0.5) -> Objects:
    """Compare two maps of objects: a predicted object meets a true one if their IoU is above the threshold.

    From 1/2 on, none meets two.

    Args:
        predicted, true: (height, width) integers, 0 for no object.
    """
    if threshold < 0.5:
        raise ValueError(f"match_objects: threshold is {threshold}; expected at least 0.5")
    rows, columns = int(true.max()) + 1, int(predicted.max()) + 1
    pairs = true.long().flatten() * columns + predicted.long().flatten()
    overlap = torch.bincount(pairs, minlength=rows * columns).reshape(rows, columns).double()
    own, others = overlap.sum(1)[1:], overlap.sum(0)[1:]  # pixels of each true, each predicted object
    overlap = overlap[1:, 1:]  # (true objects, predicted objects)
    union = own[:, None] + others - overlap
    hits = int((overlap / union.clamp(min=1) > threshold).sum())
    return Objects(hits, int((own > 0).sum()) - hits, int((others > 0).sum()) - hits)
