"""Class labels as an input of a generator or critic: one-hot values beside a vector, feature maps beside an image.

Mirza & Osindero 2014, "Conditional Generative Adversarial Nets", arXiv:1411.1784: both players get the label y as a
further input, here one-hot. (A learned embedding before a linear layer is the same map.)
"""

import torch
from torch import Tensor


def check_labels(name: str, labels: Tensor | None, batch: int) -> Tensor:
    """The labels, once they are known to be integers (batch,). Raises ValueError if they are missing or misshapen."""
    if labels is None:
        raise ValueError(f"{name}: it is conditional on classes; pass labels=, integers (batch,)")
    if tuple(labels.shape) != (batch,) or labels.is_floating_point():
        raise ValueError(
            f"{name}: expected labels of shape ({batch},), integers, found {labels.dtype} {tuple(labels.shape)}"
        )
    return labels


def with_labels(name: str, x: Tensor, labels: Tensor | None, classes: int) -> Tensor:
    """x with the one-hot label as further channels, which come last; x itself if there are no classes.

    x: (batch, channels, *space) -> (batch, channels + classes, *space). Errors as in `check_labels`.
    """
    if classes == 0:
        return x
    labels = check_labels(name, labels, x.shape[0])
    one_hot = (labels[:, None] == torch.arange(classes, device=x.device)).to(x.dtype)  # (batch, classes)
    maps = one_hot.reshape(one_hot.shape + (1,) * (x.ndim - 2)).expand(*one_hot.shape, *x.shape[2:])
    return torch.cat([x, maps], 1)  # (batch, channels + classes, *space)


def check_latent(name: str, z: Tensor, latent: int) -> None:
    """Raise ValueError unless z is (batch, latent)."""
    if z.ndim != 2 or z.shape[1] != latent:
        raise ValueError(f"{name}: expected z of shape (batch, {latent}), found {tuple(z.shape)}")
