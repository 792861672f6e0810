"""Boxes, (..., 4) as left, top, right, bottom: areas, overlaps, and the suppression of duplicates.

Coordinates are real numbers, so a box of one pixel is (x, y, x + 1, y + 1). Boxes without an area overlap with nothing.
"""

import torch
from torch import Tensor


def from_centres(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) -> (left, top, right, bottom)."""
    centres, sizes = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centres - sizes / 2, centres + sizes / 2], -1)


def to_centres(boxes: Tensor) -> Tensor:
    """(left, top, right, bottom) -> (centre x, centre y, width, height)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...); 0 where a box is inverted."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """The part of each box inside an image."""
    size = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), size)


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(common area, area of both together)."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    return common, area(a) + area(b) - common


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of pairs, (..., 4) and (..., 4) -> (...): broadcast as a[:, None], b for all pairs."""
    common, union = _overlap(a, b)
    return common / torch.where(union > 0, union, 1.0)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU less the share of the smallest box around both that neither fills, in (-1, 1]: (..., 4), (..., 4) -> (...).

    Rezatofighi et al. 2019 (arXiv:1902.09630): GIoU = IoU - |C without A and B| / |C|.
    """
    common, union = _overlap(a, b)
    around = torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1)
    hull = area(around)
    return common / torch.where(union > 0, union, 1.0) - (hull - union) / torch.where(hull > 0, hull, 1.0)


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor | None = None, threshold: float = 0.5) -> Tensor:
    """Non-maximum suppression: numbers of the boxes that stay, by descending score.

    From the best box down, each that overlaps with a better one that stays, IoU > threshold, goes. Of equal scores the
    earlier box is the better.

    Args:
        boxes: (count, 4).
        scores: (count,).
        labels: (count,) classes; boxes of different ones do not suppress each other.

    Raises ValueError: shapes that do not fit.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        shapes = f"boxes {tuple(boxes.shape)} and scores {tuple(scores.shape)}"
        raise ValueError(f"suppress: expected boxes (count, 4) and scores (count,), found {shapes}")
    order = scores.argsort(descending=True, stable=True)
    sorted_boxes = boxes[order]
    rivals = iou(sorted_boxes[:, None], sorted_boxes) > threshold  # (count, count)
    if labels is not None:
        rivals &= labels[order, None] == labels[order]
    rivals = rivals.tril(-1)  # row: a box, column: a better one
    stays = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    while True:
        # Each pass settles at least one more box than the one before, the best ones first.
        again = ~(rivals & stays).any(1)
        if torch.equal(again, stays):
            return order[stays]
        stays = again
