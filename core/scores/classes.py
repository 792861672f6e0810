"""What logits and labels of a classifier must look like."""

import torch
from torch import Tensor


def check_logits(name: str, logits: Tensor, rank: int = 2) -> None:
    """Raise ValueError unless `logits` is a tensor with `rank` axes, the last two (examples, classes)."""
    if not isinstance(logits, Tensor) or logits.ndim != rank or not logits.is_floating_point():
        found = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{name}: the logits are {found}; expected floating-point (examples, classes)")


def check_labels(name: str, labels: Tensor, count: int) -> None:
    """Raise ValueError, TypeError unless `labels` are integers (count,)."""
    if labels.shape != (count,):
        raise ValueError(f"{name}: the labels have shape {tuple(labels.shape)}; expected one an example, ({count},)")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{name}: the labels are {labels.dtype}; expected integers")


def membership(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """1 where an example has the class, else 0: (examples, classes)."""
    return (labels[..., None] == torch.arange(classes, device=labels.device)).to(dtype)
