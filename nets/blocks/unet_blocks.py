"""Parts of the denoising U-Net: the time's embedding, residual blocks that see it, attention between places."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers, random
from core.attention import self_attention, self_attention_spec
from core.layers import conv, conv_spec, conv_transpose, dropout_sites, group_norm, group_norm_spec, linear, linear_spec

XAVIER = initializers.xavier_uniform()
"""Glorot's uniform, from which the code of Ho et al. 2020 draws all weights."""


def time_embedding(time: Tensor, width: int, *, shift: int = 1, cosine_first: bool = False) -> Tensor:
    """Sines and cosines of the time at width / 2 frequencies from 1 down to (about) 1 / 10000.

    Vaswani et al. 2017, section 3.5, in the form of the code of Ho et al. 2020, with n = width / 2 and i = 0 ... n - 1:

        sin(t w_i) for all i, then cos(t w_i),   w_i = 10000^(-i / (n - shift))

    Args:
        time: (batch,), integers or floats.
        width: even, and at least 2 shift + 2.
        shift: 1 makes the last frequency exactly 1 / 10000.

    Returns:
        (batch, width) in float32, or in float64 if time is.
    """
    half = width // 2
    wide = torch.promote_types(time.dtype, torch.float32) if time.is_floating_point() else torch.float32
    places = torch.arange(half, dtype=wide, device=time.device)
    angles = time.to(wide)[:, None] * torch.exp(places * (-math.log(10_000) / (half - shift)))
    waves = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(waves, 1)


def time_spec(width: int, d_time: int) -> dict:
    """The two matrices of `time_vector`."""
    return {"first": linear_spec(width, d_time, init=XAVIER), "second": linear_spec(d_time, d_time, init=XAVIER)}


def time_vector(p: dict, waves: Tensor) -> Tensor:
    """A perceptron of the time's embedding. waves: (batch, width) -> (batch, d_time)."""
    return linear(p["second"], F.silu(linear(p["first"], waves)))


def level_drops(
    key: Tensor | None, x: Tensor, widths: tuple[int, ...], sites: int, rate: float
) -> list[list[Callable[[Tensor], Tensor] | None]]:
    """For each level the dropout of its `sites` residual blocks, in the last level of two more: those of the middle.

    All values of a level have one shape, so there is one draw a level.

    Args:
        key: (2,), or one an example (batch, 2); not looked at with rate 0.
        x: the images.
    """
    if rate == 0:
        return [[None] * (sites + 2)] * len(widths)
    drops = []
    for i, (width, k) in enumerate(zip(widths, random.sites(key, len(widths)).unbind(0), strict=True)):
        shape = (len(x), width, *(side // 2**i for side in x.shape[2:]))
        drops.append(dropout_sites(k, sites + 2 * (i == len(widths) - 1), shape, rate))
    return drops


def residual_spec(d_in: int, d_out: int, d_time: int, *, scale_shift: bool, zero: bool) -> dict:
    """Norms, two 3x3 convolutions, the time's matrix, and a 1x1 `shortcut` where the channels change."""
    parts = {
        "conv1": conv_spec(d_in, d_out, 3, init=XAVIER),
        "conv2": conv_spec(d_out, d_out, 3, init=initializers.zeros if zero else XAVIER),
        "norm1": group_norm_spec(d_in),
        "norm2": group_norm_spec(d_out),
        "time": linear_spec(d_time, 2 * d_out if scale_shift else d_out, init=XAVIER),
    }
    if d_in != d_out:
        parts["shortcut"] = conv_spec(d_in, d_out, 1, init=XAVIER)
    return {name: parts[name] for name in sorted(parts)}


def residual(
    p: dict,
    x: Tensor,
    embedding: Tensor,
    *,
    groups: int,
    eps: float,
    scale_shift: bool,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x (or its 1x1 convolution) + conv2(drop(silu(z))), where y = conv1(silu(norm1(x))), e = time(embedding) and

        z = norm2(y + e)                                      Ho et al. 2020
        z = norm2(y) (1 + scale) + shift, [scale, shift] = e  Dhariwal & Nichol 2021

    Args:
        x: (batch, d_in, height, width).
        embedding: (batch, d_time), of the time (and the class), after a SiLU.

    Returns:
        (batch, d_out, height, width).
    """
    y = conv(p["conv1"], F.silu(group_norm(p["norm1"], x, groups, eps=eps)), padding=1)
    e = linear(p["time"], embedding)[:, :, None, None]
    if scale_shift:
        scale, shift = e.chunk(2, 1)
        z = group_norm(p["norm2"], y, groups, eps=eps) * (1 + scale) + shift
    else:
        z = group_norm(p["norm2"], y + e, groups, eps=eps)
    z = F.silu(z) if drop is None else drop(F.silu(z))
    return (conv(p["shortcut"], x) if "shortcut" in p else x) + conv(p["conv2"], z, padding=1)


def attention_spec(width: int, heads: int, *, zero: bool) -> dict:
    """`norm`, and `qkv` and `proj` of self-attention."""
    # The bound of a matrix each for queries, keys and values, sqrt(6 / (width + width)), though they lie in one.
    init = initializers.xavier_uniform(math.sqrt(2))
    inside = self_attention_spec(width, heads, init=init, proj_init=initializers.zeros if zero else XAVIER)
    return {"norm": group_norm_spec(width), **inside}


def attention(p: dict, x: Tensor, heads: int, *, groups: int, eps: float, method: str = "auto") -> Tensor:
    """x + self-attention of norm(x), in which every place looks at every other. x: (batch, width, height, width)."""
    places = group_norm(p["norm"], x, groups, eps=eps).flatten(2).transpose(1, 2)  # (batch, places, width)
    y = self_attention(p, places, heads, method=method)
    return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


def downsample(p: dict, x: Tensor, padding: str) -> Tensor:
    """A 3x3 convolution with stride 2: half the height and width, which are even.

    Args:
        padding: "symmetric" adds a pixel on every side, "tensorflow" one on the right and one at the bottom.
    """
    if padding == "symmetric":
        return conv(p, x, stride=2, padding=1)
    return conv(p, F.pad(x, (0, 1, 0, 1)), stride=2)


def upsample(p: dict, x: Tensor) -> Tensor:
    """The nearest neighbour at twice the size, then a 3x3 convolution: x (batch, d_in, h, w) -> (batch, d_out, 2h, 2w).

    Of the nine pixels that a new pixel looks at, some are copies of the same old one: along each axis an even place
    sees the old pixels i - 1, i, i and an odd one i, i, i + 1. So the weights of copies are added, and what is left is
    a transposed convolution of stride 2 with 4 weights an axis: 4/9 of the multiplications, the same numbers.
    """
    weight = p["weight"].transpose(0, 1)
    for axis in (2, 3):
        first, middle, last = weight.unbind(axis)
        weight = torch.stack([last, middle + last, first + middle, first], axis)
    return conv_transpose({**p, "weight": weight}, x, stride=2, padding=1)
