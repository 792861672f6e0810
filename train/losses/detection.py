"""Losses of detectors: targets for every place, and losses by images, so that micro-batches add up.

FCOS: Tian et al. 2019 (arXiv:1904.01355), with the sampling around centres of Tian et al. 2020 (arXiv:2006.09214) and
the overlap as the loss of boxes (Rezatofighi et al. 2019, arXiv:1902.09630); the focal loss: Lin et al. 2017
(arXiv:1708.02002).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import boxes as box_ops
from train.losses.weighted import WeightedLoss

BACKGROUND = -1
"""Label of a place, or of an unused row of boxes, without an object."""


class PlaceTargets(NamedTuple):
    """labels (batch, places), `BACKGROUND` or a class; boxes (batch, places, 4) in pixels; centreness (batch, places),
    in [0, 1]. The last two mean nothing where the label is `BACKGROUND`."""

    labels: Tensor
    boxes: Tensor
    centreness: Tensor


def fcos_targets(
    boxes: Tensor, labels: Tensor, centres: Tensor, strides: Tensor, *, radius: float | None = 1.5
) -> PlaceTargets:
    """The box that each place is to predict.

    A place is positive for a box that it lies in, no farther than `radius` strides from its centre along both axes, and
    whose farthest side is between 4 and 8 strides away; the finest level has no lower bound, the coarsest no upper one.
    Of several boxes it predicts the smallest.

        centreness = sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))

    Args:
        boxes: (batch, most, 4) in pixels; labels (batch, most), `BACKGROUND` in unused rows.
        centres: (places, 2); strides (places,), of all levels.
        radius: None for all places inside the box, as in the first paper.
    """
    usable = (labels >= 0) & (box_ops.area(boxes) > 0)  # (batch, most)
    low = centres[:, None] - boxes[:, None, :, :2]  # (batch, places, most, 2)
    high = boxes[:, None, :, 2:] - centres[:, None]
    sides = torch.cat([low, high], -1)  # (batch, places, most, 4): l, t, r, b
    fits = (sides.amin(-1) > 0) & usable[:, None]
    if radius is not None:
        middle = (boxes[..., :2] + boxes[..., 2:]) / 2  # (batch, most, 2)
        away = (centres[:, None] - middle[:, None]).abs().amax(-1)  # (batch, places, most)
        fits &= away < radius * strides[:, None]
    least = torch.where(strides == strides.min(), 0.0, 4 * strides)
    most = torch.where(strides == strides.max(), torch.inf, 8 * strides)
    farthest = sides.amax(-1)
    fits &= (farthest > least[:, None]) & (farthest < most[:, None])

    sizes = torch.where(fits, box_ops.area(boxes)[:, None], torch.inf)  # (batch, places, most)
    smallest, rows = sizes.min(-1)  # (batch, places)
    matched = smallest.isfinite()
    own = boxes.gather(1, rows[..., None].expand(-1, -1, 4))  # (batch, places, 4)
    left, top = (centres - own[..., :2]).unbind(-1)
    right, bottom = (own[..., 2:] - centres).unbind(-1)
    share = _ratio(left, right, matched) * _ratio(top, bottom, matched)
    return PlaceTargets(torch.where(matched, labels.gather(1, rows), BACKGROUND), own, share.sqrt())


def _ratio(a: Tensor, b: Tensor, where: Tensor) -> Tensor:
    """min / max of two distances; 1 elsewhere."""
    return torch.where(where, torch.minimum(a, b) / torch.where(where, torch.maximum(a, b), 1.0), 1.0)


def sigmoid_focal(logits: Tensor, targets: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t of every logit, p_t the probability of its target, 0 or 1: the shape of logits.

    Lin et al. 2017, eq. 5; alpha_t is alpha for targets of 1 and 1 - alpha for others.
    """
    p = logits.sigmoid()
    nll = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    wrong = p * (1 - targets) + (1 - p) * targets  # 1 - p_t
    return (alpha * targets + (1 - alpha) * (1 - targets)) * wrong**gamma * nll


def fcos_losses(
    logits: Tensor, boxes: Tensor, centreness: Tensor, targets: PlaceTargets
) -> tuple[WeightedLoss, dict[str, WeightedLoss]]:
    """Focal loss of the classes, 1 - GIoU of the boxes and cross-entropy of the centreness, the last two of positive
    places; each is divided by the number of positive places of the batch, at least 1.

    Args:
        logits: (batch, places, classes); boxes (batch, places, 4) in pixels; centreness (batch, places), logits.

    Returns:
        their sum, and metrics: each by itself.
    """
    positive = targets.labels >= 0  # (batch, places)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    one_hot = (targets.labels[..., None] == classes).to(logits.dtype)  # (batch, places, classes)
    parts = {
        "boxes": torch.where(positive, 1 - box_ops.generalized_iou(boxes, targets.boxes), 0.0).sum(1),
        "centreness": torch.where(positive, _cross_entropy(centreness, targets.centreness), 0.0).sum(1),
        "classes": sigmoid_focal(logits, one_hot).sum((1, 2)),
    }
    counts = positive.sum(1).to(logits.dtype)  # (batch,)
    metrics = {name: WeightedLoss(values.detach(), counts) for name, values in parts.items()}
    return WeightedLoss(sum(parts.values()), counts), metrics


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
