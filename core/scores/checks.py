"""Checks of the logits and labels of a classifier.

The values of labels are not looked at, which a compiled function may not do: one that is no class is an error of
torch's own on CPU, and undefined elsewhere.
"""

import torch
from torch import Tensor


def check_logits(name: str, logits: Tensor, rank: int = 2) -> None:
    """Raise ValueError unless `logits` is a tensor with `rank` axes, the last two (examples, classes)."""
    if not isinstance(logits, Tensor) or logits.ndim != rank or not logits.is_floating_point():
        kind = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name}: the logits are {kind}; expected floating-point (examples, classes)")


def check_labels(name: str, labels: Tensor, count: int) -> None:
    """Raise ValueError, TypeError unless `labels` are integers (count,)."""
    if labels.shape != (count,):
        raise ValueError(f"{name}: the labels have shape {tuple(labels.shape)}; expected one per example, ({count},)")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{name}: the labels are {labels.dtype}; expected integers")


def membership(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """One-hot labels, (examples, classes)."""
    # Not labels == arange(classes), to which a label that is no class would be a row of zeros.
    zeros = torch.zeros(*labels.shape, classes, dtype=dtype, device=labels.device)
    return zeros.scatter(-1, labels.long()[..., None], 1.0)
