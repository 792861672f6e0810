"""Layers of StyleGAN: equalised learning rate, blur, adaptive instance norm, minibatch standard deviation.

Karras et al. 2018, "Progressive Growing of GANs for Improved Quality, Stability, and Variation" (arXiv:1710.10196),
section 4.1: all weights start from N(0, 1) and are scaled where they are used, so that Adam, whose steps do not depend
on the scale of a gradient, moves all of them alike. Here the input is scaled instead of the weight: the same map.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from core.layers import conv, instance_norm, linear

RELU_GAIN = math.sqrt(2)
"""He et al. 2015: for layers followed by a leaky ReLU."""


def equalised_linear(p: dict, x: Tensor, gain: float = 1.0, rate: float = 1.0) -> Tensor:
    """Linear layer with equalised learning rate: x (..., d_in) -> (..., d_out).

        y = rate (gain / sqrt(d_in) W x + b)

    W starts with a standard deviation of 1 / rate, so y has one of gain for x of unit variance; to Adam it is as if the
    learning rate were `rate` times as large.
    """
    scale = gain / math.sqrt(p["weight"].shape[1])
    return rate * linear(p, x * scale)  # (..., d_out)


def equalised_conv(p: dict, x: Tensor, gain: float = RELU_GAIN) -> Tensor:
    """Convolution with equalised learning rate that keeps the size: x (batch, d_in, ...) -> (batch, d_out, ...).

    y = gain / sqrt(d_in k^2) W * x + b, for kernels of k x k pixels, k odd.
    """
    scale = gain / math.sqrt(math.prod(p["weight"].shape[1:]))
    return conv(p, x * scale, padding=p["weight"].shape[-1] // 2)  # (batch, d_out, height, width)


def blur(x: Tensor) -> Tensor:
    """[1 2 1] / 4 along both axes, zeros around. Zhang 2019, arXiv:1904.11486. x: (batch, channels, height, width)."""
    x = F.pad(x, (1, 1, 1, 1))  # (batch, channels, height + 2, width + 2)
    x = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4  # (batch, channels, height + 2, width)
    return (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4  # (batch, channels, height, width)


def pixel_norm(x: Tensor) -> Tensor:
    """x / rms(x) over axis 1: x (batch, channels, ...) -> the same shape. Karras et al. 2018, section 4.2."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


def adaptive_instance_norm(x: Tensor, style: Tensor) -> Tensor:
    """(1 + s) (x - mean(x)) / std(x) + t. Huang & Belongie 2017, arXiv:1703.06868; equation 1 of StyleGAN.

    x: (batch, channels, height, width); style: (batch, 2 * channels), s and t.
    """
    s, t = style[..., None, None].chunk(2, 1)  # each (batch, channels, 1, 1)
    return (1 + s) * instance_norm({}, x, eps=1e-8) + t


def minibatch_std(x: Tensor, group: int) -> Tensor:
    """x with one more channel: the standard deviation over a group of examples, averaged over all other axes.

    Karras et al. 2018, section 3: it shows the critic when generated images are too much alike. Example i is in a
    group with those of the same index modulo batch / group, as in the authors' code. Every example of a group depends
    on the others, also outside training; with `group` 1 none does.

    Args:
        x: (batch, channels, height, width).
        group: examples per group, a divisor of the batch; of a smaller batch, all.

    Returns:
        (batch, channels + 1, height, width).

    Raises:
        ValueError: the group does not divide the batch.
    """
    batch, _, height, width = x.shape
    group = min(group, batch)
    if batch % group:
        raise ValueError(f"stylegan critic: batch {batch} is not divisible into groups of {group}")
    grouped = x.reshape(group, batch // group, *x.shape[1:])  # (group, groups, channels, height, width)
    std = (grouped.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # (groups,)
    channel = std.repeat(group)[:, None, None, None].expand(batch, 1, height, width)
    return torch.cat([x, channel], 1)  # (batch, channels + 1, height, width)
