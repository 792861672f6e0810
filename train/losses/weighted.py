"""Losses whose mean is not over the examples alone: sums per example and their weights, such as numbers of tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from train.losses.basic import cross_entropy


class WeightedLoss(NamedTuple):
    """sum(values) / sum(weights): the form of a loss that gives the same gradient in micro-batches of any size.

    The mean over tokens has sums of token losses as values and numbers of tokens as weights; a mean over examples with
    weights w has values w * losses.
    """

    values: Tensor
    """(examples,)"""
    weights: Tensor
    """(examples,), not negative; the step takes them as constants."""

    @property
    def mean(self) -> Tensor:
        """sum(values) / sum(weights), 0-D; 0 where nothing has a weight."""
        return self.values.sum() / positive(self.weights.sum())


def positive(total: Tensor) -> Tensor:
    """The total of some weights as a divisor: 1 in place of 0."""
    return torch.where(total > 0, total, torch.ones_like(total))


def token_cross_entropy(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, ignore_id: int | None = None
) -> WeightedLoss:
    """`cross_entropy` whose mean is over all tokens of a batch but those with `ignore_id`.

    Args:
        logits: (examples, ..., classes).
        labels: (examples, ...) integers.
        label_smoothing, ignore_id: as in `cross_entropy`.
    """
    if labels.ndim < 2:
        raise ValueError(f"token_cross_entropy: expected labels (examples, ..., tokens), found {tuple(labels.shape)}")
    values = cross_entropy(logits, labels, label_smoothing=label_smoothing, ignore_id=ignore_id, reduction="none")
    counts = torch.ones_like(values) if ignore_id is None else (labels != ignore_id).to(values.dtype)
    return WeightedLoss(values.flatten(1).sum(1), counts.flatten(1).sum(1))  # each (examples,)
