"""Losses of segmentation: a class per pixel.

Logits are (batch, classes, *space), labels integers (batch, *space). Pixels with the label `ignore_id` ("void") count
in nothing. Dice and Lovász compare regions, of one image or, `pooled`, of all images of a batch as if they were one;
classes that no pixel of them has are left out of their mean over classes, and without any class the loss is 0.
"""

import torch
from torch import Tensor

from train.losses.basic import check_class_labels, nll
from train.losses.weighted import WeightedLoss


def pixel_cross_entropy(
    logits: Tensor, labels: Tensor, *, weight: Tensor | None = None, ignore_id: int | None = None
) -> WeightedLoss:
    """Cross-entropy whose mean is over all pixels of a batch but the void: sum w_y (-log p_y) / sum w_y.

    Args:
        weight: (classes,), w; ones if None.
    """
    log_probs, valid = _log_probs(logits, labels), _valid(labels, ignore_id)
    pixels = valid.to(log_probs.dtype)  # (batch, *space)
    if weight is not None:
        pixels = pixels * weight.to(log_probs)[labels.where(valid, 0).long()]
    values = nll(log_probs, labels, ignore_id=ignore_id, reduction="none")  # (batch, *space)
    return WeightedLoss((pixels * values).flatten(1).sum(1), pixels.flatten(1).sum(1))


def focal(logits: Tensor, labels: Tensor, *, gamma: float = 2.0, ignore_id: int | None = None) -> WeightedLoss:
    """-(1 - p_y)^gamma log p_y, its mean over all pixels but the void (Lin et al. 2017, arXiv:1708.02002, eq. 4).

    With gamma 0 it is cross-entropy; the greater gamma, the less count pixels that are right already.
    """
    if gamma < 0:
        raise ValueError(f"focal: gamma is {gamma}; expected at least 0")
    values = nll(_log_probs(logits, labels), labels, ignore_id=ignore_id, reduction="none")  # -log p_y, (batch, *space)
    # 1 - p_y = -expm1(log p_y); away from 0, where a power below 1 has no finite slope.
    wrong = (-torch.expm1(-values)).clamp(min=torch.finfo(values.dtype).tiny)
    pixels = _valid(labels, ignore_id).to(values.dtype)
    return WeightedLoss((wrong**gamma * values).flatten(1).sum(1), pixels.flatten(1).sum(1))


def dice(
    logits: Tensor,
    labels: Tensor,
    *,
    squared: bool = False,
    smooth: float = 1.0,
    pooled: bool = False,
    ignore_id: int | None = None,
) -> Tensor:
    """1 - the mean over classes of 2 sum p g + s / (sum p + sum g + s), p the probabilities, g 1 for the label, else 0.

    Milletari et al. 2016, "V-Net" (arXiv:1606.04797), section 3.

    Args:
        squared: p² and g² in the denominator, as in the paper.
        smooth: s, in pixels: with it a small region that is missed altogether still has a slope.

    Returns:
        (batch,), or () if pooled.
    """
    p, g = _regions(logits, labels, pooled, ignore_id)  # (regions, classes, pixels)
    size = (p * p if squared else p).sum(-1) + g.sum(-1)  # (regions, classes)
    overlap = (2 * (p * g).sum(-1) + smooth) / (size + smooth).clamp(min=torch.finfo(p.dtype).tiny)
    out = _mean_of_present(1 - overlap, g)
    return out[0] if pooled else out


def lovasz(logits: Tensor, labels: Tensor, *, pooled: bool = False, ignore_id: int | None = None) -> Tensor:
    """Lovász-softmax, the convex extension of 1 - IoU (Berman et al. 2018, arXiv:1705.08790, eq. 11).

    With the errors m_i = |g_i - p_i| of a class sorted downwards and J_i the Jaccard loss of mistaking the first i:

        loss = sum_i m_i (J_i - J_{i-1}),   J_i = 1 - (n - sum_{j<=i} g_j) / (n + sum_{j<=i} (1 - g_j)),   n = sum_j g_j

    Returns:
        (batch,), or () if pooled.
    """
    p, g = _regions(logits, labels, pooled, ignore_id)  # (regions, classes, pixels)
    errors, order = (g - p).abs().sort(-1, descending=True)
    g_sorted, n = g.gather(-1, order), g.sum(-1, keepdim=True)  # void pixels have error 0, and so come last
    hit = g_sorted.cumsum(-1)
    wrong = (1 - g_sorted).cumsum(-1)
    jaccard = 1 - (n - hit) / (n + wrong)  # J_i
    steps = torch.cat([jaccard[..., :1], jaccard.diff(dim=-1)], -1)  # J_i - J_{i-1}
    out = _mean_of_present((errors * steps).sum(-1), g)
    return out[0] if pooled else out


def _log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """(batch, *space, classes) in float32 or wider."""
    if isinstance(logits, Tensor) and logits.ndim < 3:
        raise ValueError(f"expected logits (batch, classes, *space), got {tuple(logits.shape)}")
    last = logits.movedim(1, -1)
    check_class_labels(last, labels)
    return last.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _valid(labels: Tensor, ignore_id: int | None) -> Tensor:
    return torch.ones_like(labels, dtype=torch.bool) if ignore_id is None else labels != ignore_id


def _regions(logits: Tensor, labels: Tensor, pooled: bool, ignore_id: int | None) -> tuple[Tensor, Tensor]:
    """Probabilities and one-hot labels, each (regions, classes, pixels), both 0 at void pixels."""
    log_probs, valid = _log_probs(logits, labels), _valid(labels, ignore_id)
    classes = torch.arange(log_probs.shape[-1], device=labels.device)
    g = ((labels.unsqueeze(-1) == classes) & valid.unsqueeze(-1)).to(log_probs.dtype)  # (batch, *space, classes)
    p = log_probs.exp() * valid.unsqueeze(-1)
    first = 0 if pooled else 1
    p, g = (x.flatten(first, -2).movedim(-1, -2) for x in (p, g))  # (batch, classes, pixels), or without batch
    return (p[None], g[None]) if pooled else (p, g)


def _mean_of_present(values: Tensor, g: Tensor) -> Tensor:
    """(regions, classes) -> (regions,): the mean over the classes that a region has; 0 where it has none."""
    present = (g.sum(-1) > 0).to(values.dtype)
    return (values * present).sum(-1) / present.sum(-1).clamp(min=1)
