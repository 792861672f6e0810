"""Calibration of a classifier's probabilities, binned by confidence."""

from typing import NamedTuple

import torch
from torch import Tensor


class Bins(NamedTuple):
    """Predictions by confidence, each (..., bins): mean confidence, fraction of right predictions, number.

    Bin m of M holds the confidences in (m / M, (m + 1) / M]; confidence and accuracy of an empty one are 0.
    """

    confidence: Tensor
    accuracy: Tensor
    counts: Tensor


def reliability_bins(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Bins:
    """The numbers of a reliability diagram (Guo et al. 2017, arXiv:1706.04599, section 2); `train.plots.reliability`.

    The confidence of a prediction is its greatest probability, the prediction the class that has it.

    Args:
        probabilities: (..., examples, classes).
        labels: integers (examples,), or (..., examples).

    Raises:
        ValueError: shapes that do not fit, no example or no bin.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; expected at least 1")
    if probabilities.ndim < 2 or labels.ndim < 1 or labels.shape != probabilities.shape[-1 - labels.ndim : -1]:
        shapes = f"probabilities {tuple(probabilities.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"expected probabilities (..., examples, classes) and labels (examples,), got {shapes}")
    if not probabilities.shape[-2]:
        raise ValueError(f"there are no examples: the probabilities have shape {tuple(probabilities.shape)}")
    confidence, predicted = probabilities.to(torch.promote_types(probabilities.dtype, torch.float32)).max(-1)
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    bin_of = (confidence.unsqueeze(-1) > edges[1:-1]).sum(-1, keepdim=True)  # (..., examples, 1)
    member = (bin_of == torch.arange(bins, device=confidence.device)).to(confidence.dtype)  # (..., examples, bins)
    counts = member.sum(-2)  # (..., bins)
    right = (predicted == labels).to(confidence.dtype)
    means = [(x.unsqueeze(-1) * member).sum(-2) / counts.clamp(min=1) for x in (confidence, right)]
    return Bins(*means, counts)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """ECE = sum_m n_m / n |accuracy_m - confidence_m| over the bins (Guo et al. 2017, eq. 3), shape (...).

    Its estimate from few examples is too high, the more so the more bins: compare only figures with equal numbers of
    examples and bins. Arguments and errors as in `reliability_bins`.
    """
    confidence, accuracy, counts = reliability_bins(probabilities, labels, bins)
    return (counts * (accuracy - confidence).abs()).sum(-1) / probabilities.shape[-2]  # sum_m n_m / n |a_m - c_m|
