"""Labels that are made wrong, and how well a score ranks them first."""

import torch
from torch import Tensor

from core import random


def flip(labels: Tensor, classes: int, count: int, key: Tensor) -> tuple[Tensor, Tensor]:
    """(labels of which `count` are another class, mask of these), (N,) each."""
    which_key, class_key = random.split(key).unbind(0)
    wrong = torch.zeros_like(labels, dtype=torch.bool)
    wrong[random.permutation(which_key, len(labels))[:count]] = True
    shift = random.randint(class_key, labels.shape, 1, classes).to(labels.dtype)
    return torch.where(wrong, (labels + shift) % classes, labels), wrong


def precision_recall(suspicion: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall of "wrong if the score is at least t" for each t that occurs, the highest first."""
    values, ranked = suspicion.sort(descending=True, stable=True)
    last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool, device=values.device)])
    hits = wrong[ranked].cumsum(0)[last].double()
    return hits / (last.nonzero()[:, 0] + 1), hits / wrong.sum()


def average_precision(suspicion: Tensor, wrong: Tensor) -> float:
    """sum_t (recall_t - recall_t-1) precision_t."""
    precision, recall = precision_recall(suspicion, wrong)
    return float((recall.diff(prepend=recall.new_zeros(1)) * precision).sum())
