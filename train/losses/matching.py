"""Losses of set prediction: every object is matched with one query, the others are to predict "no object".

Carion et al. 2020 (arXiv:2005.12872), section 3.1. The matching has the least sum of

    cost(object, query) = -p(class) + 5 |box - box'|_1 - 2 GIoU(box, box')

and is found by scipy on the CPU, as one operator that torch.compile does not look into, so that a step is one region.
"""

import numpy as np
import torch
from torch import Tensor

from core import boxes as box_ops

COSTS = {"classes": 1.0, "l1": 5.0, "giou": 2.0}
WEIGHTS = {"classes": 1.0, "l1": 5.0, "giou": 2.0}
NO_OBJECT = 0.1
"""Weight of "no object" among the classes."""


@torch.library.custom_op("functree::assign", mutates_args=())
def assign(cost: Tensor, usable: Tensor) -> Tensor:
    """The query of each object in the matching of least cost (Kuhn 1955).

    Args:
        cost: (..., queries, objects); entries that are not finite are taken only where nothing else is left.
        usable: (..., objects) boolean, False for rows without an object.

    Returns:
        (..., objects) int64; -1 where there is no object, or no query left for it.
    """
    from scipy.optimize import linear_sum_assignment

    shape = usable.shape
    limit = torch.finfo(cost.dtype).max
    costs = cost.detach().nan_to_num(limit, limit, limit).flatten(0, -3).double().cpu().numpy()
    rows = usable.reshape(-1, shape[-1]).cpu().numpy()
    out = np.full(rows.shape, -1, np.int64)
    for one, live, result in zip(costs, rows, out, strict=True):
        objects = live.nonzero()[0]
        queries, taken = linear_sum_assignment(one[:, objects])
        result[objects[taken]] = queries
    return torch.from_numpy(out).reshape(shape).to(cost.device)


@assign.register_fake
def _(cost: Tensor, usable: Tensor) -> Tensor:
    return usable.new_empty(usable.shape, dtype=torch.int64)


@assign.register_vmap
def _(info, in_dims, cost: Tensor, usable: Tensor) -> tuple[Tensor, int]:
    parts = []
    for x, dim in zip((cost, usable), in_dims, strict=True):
        parts.append(x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0))
    return assign(*parts), 0


def matching(logits: Tensor, boxes: Tensor, labels: Tensor, frames: Tensor) -> Tensor:
    """The query of each object, (batch, most), -1 for rows without an object. Nothing of it has a gradient.

    Args:
        logits: (batch, queries, classes + 1); boxes (batch, queries, 4), centres and sizes as shares of the image.
        labels: (batch, most), -1 for rows without an object; frames (batch, most, 4), as `boxes`.
    """
    logits, boxes = logits.detach(), boxes.detach()
    kinds = labels.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1)  # (batch, queries, most)
    p = logits.softmax(-1).gather(2, kinds)
    l1 = (boxes[:, :, None] - frames[:, None]).abs().sum(-1)
    giou = box_ops.generalized_iou(box_ops.from_centres(boxes)[:, :, None], box_ops.from_centres(frames)[:, None])
    return assign(COSTS["l1"] * l1 - COSTS["classes"] * p - COSTS["giou"] * giou, labels >= 0)


def set_losses(logits: Tensor, boxes: Tensor, labels: Tensor, frames: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the classes, L1 and 1 - GIoU of the matched boxes, each 0-D.

    The first is a mean over all queries in which "no object" weighs 0.1; the others are divided by the number of
    objects of the batch, at least 1. Arguments as in `matching`.
    """
    match = matching(logits, boxes, labels, frames)  # (batch, most)
    live = match >= 0
    queries = torch.arange(logits.shape[1], device=logits.device)
    hit = (match[:, None] == queries[:, None]) & live[:, None]  # (batch, queries, most)
    none = logits.shape[-1] - 1
    targets = torch.where(hit.any(-1), (hit * labels[:, None]).sum(-1), none)  # (batch, queries)
    weights = torch.where(targets == none, NO_OBJECT, 1.0).to(logits.dtype)
    nll = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    own = boxes.gather(1, match.clamp(min=0)[..., None].expand(-1, -1, 4))  # (batch, most, 4)
    count = live.sum().clamp(min=1)
    l1 = torch.where(live, (own - frames).abs().sum(-1), 0.0)
    giou = box_ops.generalized_iou(box_ops.from_centres(own), box_ops.from_centres(frames))
    return {
        "classes": (weights * nll).sum() / weights.sum(),
        "giou": torch.where(live, 1 - giou, 0.0).sum() / count,
        "l1": l1.sum() / count,
    }


def detr_loss(logits: Tensor, boxes: Tensor, labels: Tensor, frames: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum over all layers of the decoder, and the three losses of the last one.

    Args:
        logits: (batch, layers, queries, classes + 1); boxes (batch, layers, queries, 4). Others as in `matching`.
    """
    each = [set_losses(logits[:, i], boxes[:, i], labels, frames) for i in range(logits.shape[1])]
    total = sum(WEIGHTS[name] * losses[name] for losses in each for name in WEIGHTS)
    return total, {name: value.detach() for name, value in each[-1].items()}
