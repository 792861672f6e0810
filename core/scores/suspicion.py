"""Suspicion per label: how little a classifier, and its view of the neighbours, support the label of each example."""

import torch
from torch import Tensor

from core.scores.checks import check_labels, check_logits, membership
from core.scores.sketched import sketched_neighbours


def neighbour_agreement(log_probs: Tensor, labels: Tensor, k: int = 10) -> Tensor:
    """Share of each example's neighbours that have its label, weighted by similarity, in [0, 1]:

    a_n = sum_m c_nm [y_m = y_n] / sum_m c_nm,   c the cosines of centred log-probabilities, above 0, of the k nearest

    Args:
        log_probs: (N, classes), or logits.
        labels: (N,) integers in [0, classes).
        k: neighbours; N - 1 if that is less.

    Raises:
        TypeError, ValueError: log_probs or labels of another kind or shape, fewer than two examples.
    """
    check_logits("neighbour_agreement", log_probs)
    check_labels("neighbour_agreement", labels, len(log_probs))
    rows = log_probs.float().clamp(min=-100.0)
    near = sketched_neighbours(rows - rows.mean(1, keepdim=True), k)
    weights = near.cosines.clamp(min=0)  # (N, k)
    same = labels[near.indices] == labels[:, None]
    return (weights * same).sum(1) / weights.sum(1).clamp(min=torch.finfo(weights.dtype).tiny)


def label_suspicion(log_probs: Tensor, labels: Tensor, held_out: Tensor | None = None, k: int = 10) -> Tensor:
    """1 minus the mean support of each label, (N,) in [0, 1]: the model's probability of the label, the agreement of
    the neighbours, and the probability by models that have not learned from the example, where there are any.

    The last is the ranking by self-confidence of confident learning (Northcutt et al. 2021, arXiv:1911.00068); the
    others correct it where a single model errs.

    Args:
        log_probs, labels, k: as in `neighbour_agreement`.
        held_out: (N, classes) log-probabilities by cross-validation.

    Raises:
        TypeError, ValueError: as `neighbour_agreement`.
    """
    support = [label_probability(log_probs, labels), neighbour_agreement(log_probs, labels, k)]
    if held_out is not None:
        check_logits("label_suspicion", held_out)
        support.append(label_probability(held_out, labels))
    return 1.0 - torch.stack(support).mean(0)


def label_probability(log_probs: Tensor, labels: Tensor) -> Tensor:
    """p(y_n), (N,)."""
    return (log_probs.exp() * membership(labels, log_probs.shape[1], log_probs.dtype)).sum(1)
