"""The layers of StyleGAN: weights with equalised learning rate, blur, adaptive instance norm, minibatch deviation.

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
    """With equalised learning rate: the weights, of std 1 / rate, work as if of std gain / sqrt(d_in)."""
    return rate * linear(p, x * (gain / math.sqrt(p["weight"].shape[1])))


def equalised_conv(p: dict, x: Tensor, gain: float = RELU_GAIN) -> Tensor:
    """The same, with padding that keeps the size."""
    scale = gain / math.sqrt(math.prod(p["weight"].shape[1:]))
    return conv(p, x * scale, padding=p["weight"].shape[-1] // 2)


def blur(x: Tensor) -> Tensor:
    """[1 2 1] / 4 along both axes, zeros around. Zhang 2019, arXiv:1904.11486. x: (batch, channels, height, width)."""
    x = F.pad(x, (1, 1, 1, 1))
    x = (x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]) / 4
    return (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4


def doubled(x: Tensor) -> Tensor:
    """Every pixel four times."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def pixel_norm(x: Tensor) -> Tensor:
    """x / rms(x) over axis 1."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


def adaptive_instance_norm(x: Tensor, style: Tensor) -> Tensor:
    """(1 + s) normalised(x) + t. Huang & Belongie 2017, arXiv:1703.06868; equation 1 of StyleGAN.

    x: (batch, channels, height, width); style: (batch, 2 * channels), s and t.
    """
    s, t = style[..., None, None].chunk(2, 1)
    return (1 + s) * instance_norm({}, x, eps=1e-8) + t


def minibatch_deviation(x: Tensor, group: int) -> Tensor:
    """x with one more channel: the standard deviation over a group of examples, averaged over all else.

    Karras et al. 2018, section 3: it lets the critic see that images are too much alike. Example i is in a group with
    those that have its number modulo batch / group, as in the authors' code. Every example of a group looks at the
    others, also outside training; with `group` 1 none does.

    Args:
        x: (batch, channels, height, width).
        group: at most the batch, of which it must be a divisor.

    Raises:
        ValueError: it is none.
    """
    batch, _, height, width = x.shape
    group = min(group, batch)
    if batch % group:
        raise ValueError(f"stylegan critic: batch {batch} is not divisible into groups of {group}")
    grouped = x.reshape(group, batch // group, *x.shape[1:])
    deviation = (grouped.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
    return torch.cat([x, deviation.repeat(group)[:, None, None, None].expand(batch, 1, height, width)], 1)
