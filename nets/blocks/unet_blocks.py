"""Parts of the denoising U-Net: time embedding, residual blocks conditional on it, attention between positions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers, random
from core.attention import self_attention, self_attention_spec
from core.layers import conv, conv_spec, conv_transpose, dropout_sites, group_norm, group_norm_spec, linear, linear_spec

XAVIER = initializers.xavier_uniform()
"""Glorot's uniform distribution, the initialiser of all weights in the code of Ho et al. 2020."""


def time_embedding(time: Tensor, width: int, *, shift: int = 1, cosine_first: bool = False) -> Tensor:
    """Sinusoidal embedding of the time: width / 2 frequencies from 1 down to (about) 1 / 10000.

    Vaswani et al. 2017, section 3.5, in the form of the code of Ho et al. 2020, with n = width / 2 and i = 0 ... n - 1:

        sin(t w_i) for all i, then cos(t w_i),   w_i = 10000^(-i / (n - shift))

    Args:
        time: (batch,), integers or floats.
        width: even, and at least 2 shift + 2.
        shift: as in w_i; 1 makes the last frequency exactly 1 / 10000.
        cosine_first: the cosines before the sines.

    Returns:
        (batch, width) in float32, or in float64 if time is.
    """
    half = width // 2
    wide = torch.promote_types(time.dtype, torch.float32) if time.is_floating_point() else torch.float32
    i = torch.arange(half, dtype=wide, device=time.device)
    frequencies = torch.exp(i * (-math.log(10_000) / (half - shift)))  # (width / 2,)
    angles = time.to(wide)[:, None] * frequencies  # (batch, width / 2)
    waves = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(waves, 1)  # (batch, width)


def time_spec(width: int, d_time: int) -> dict:
    """Parameters of `time_vector`: `first` (d_time, width) and `second` (d_time, d_time)."""
    return {"first": linear_spec(width, d_time, init=XAVIER), "second": linear_spec(d_time, d_time, init=XAVIER)}


def time_vector(p: dict, waves: Tensor) -> Tensor:
    """MLP of the time embedding: waves (batch, width) -> (batch, d_time)."""
    return linear(p["second"], F.silu(linear(p["first"], waves)))  # (batch, d_time)


def level_drops(
    key: Tensor | None, x: Tensor, widths: tuple[int, ...], sites: int, rate: float
) -> list[list[Callable[[Tensor], Tensor] | None]]:
    """Dropout of each level's `sites` residual blocks; the last level has two more, those of the middle.

    All feature maps of a level have one shape, so one call draws the masks of a level.

    Args:
        key: (2,), or one per example (batch, 2); ignored with rate 0.
        x: the images, (batch, channels, height, width).
        widths: channels of each level.

    Returns:
        For each level a function per block, or None with rate 0.
    """
    if rate == 0:
        return [[None] * (sites + 2)] * len(widths)
    drops = []
    for i, (width, k) in enumerate(zip(widths, random.sites(key, len(widths)).unbind(0), strict=True)):
        shape = (x.shape[0], width, *(side // 2**i for side in x.shape[2:]))
        drops.append(dropout_sites(k, sites + 2 * (i == len(widths) - 1), shape, rate))
    return drops


def residual_spec(d_in: int, d_out: int, d_time: int, *, scale_shift: bool, zero: bool) -> dict:
    """Parameters of `residual`: norms, two 3x3 convolutions, the time's matrix, a 1x1 `shortcut` if d_in is not d_out.

    zero: the second convolution starts at 0.
    """
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
        embedding: (batch, d_time), that of the time (and the class), after a SiLU.
        groups, eps: of the norms.
        drop: dropout of the second convolution's input.

    Returns:
        (batch, d_out, height, width).
    """
    y = conv(p["conv1"], F.silu(group_norm(p["norm1"], x, groups, eps=eps)), padding=1)  # (batch, d_out, h, w)
    e = linear(p["time"], embedding)[:, :, None, None]  # (batch, d_out or 2 d_out, 1, 1)
    if scale_shift:
        scale, shift = e.chunk(2, 1)
        z = group_norm(p["norm2"], y, groups, eps=eps) * (1 + scale) + shift
    else:
        z = group_norm(p["norm2"], y + e, groups, eps=eps)
    z = F.silu(z) if drop is None else drop(F.silu(z))
    return (conv(p["shortcut"], x) if "shortcut" in p else x) + conv(p["conv2"], z, padding=1)


def attention_spec(width: int, heads: int, *, zero: bool) -> dict:
    """Parameters of `attention`: `norm`, and `qkv` and `proj` of self-attention; `zero`: `proj` starts at 0."""
    # The bound of a matrix each for queries, keys and values, sqrt(6 / (width + width)), though they lie in one.
    init = initializers.xavier_uniform(math.sqrt(2))
    parts = self_attention_spec(width, heads, init=init, proj_init=initializers.zeros if zero else XAVIER)
    return {"norm": group_norm_spec(width), **parts}


def attention(p: dict, x: Tensor, heads: int, *, groups: int, eps: float, method: str = "auto") -> Tensor:
    """x + self-attention of norm(x) between all positions. x: (batch, channels, height, width) -> the same shape."""
    normed = group_norm(p["norm"], x, groups, eps=eps).flatten(2).transpose(1, 2)  # (batch, positions, channels)
    y = self_attention(p, normed, heads, method=method)  # (batch, positions, channels)
    return x + y.transpose(1, 2).unflatten(2, x.shape[2:])  # (batch, channels, height, width)


def downsample(p: dict, x: Tensor, padding: str) -> Tensor:
    """3x3 convolution with stride 2: x (batch, d_in, h, w) with even h and w -> (batch, d_out, h / 2, w / 2).

    padding: "symmetric" adds a pixel on every side, "tensorflow" one on the right and one at the bottom.
    """
    if padding == "symmetric":
        return conv(p, x, stride=2, padding=1)  # (batch, d_out, h / 2, w / 2)
    return conv(p, F.pad(x, (0, 1, 0, 1)), stride=2)  # (batch, d_out, h / 2, w / 2)


def upsample(p: dict, x: Tensor) -> Tensor:
    """Nearest neighbours at twice the size, then a 3x3 convolution: x (batch, d_in, h, w) -> (batch, d_out, 2h, 2w).

    Among the nine pixels under the kernel, some are copies of the same old one: along each axis an even new pixel has
    the old pixels i - 1, i, i and an odd one i, i, i + 1. So the weights of copies are added, which gives a transposed
    convolution of stride 2 with 4 weights per axis: 4/9 of the multiplications, the same result.
    """
    weight = p["weight"].transpose(0, 1)  # (d_in, d_out, 3, 3)
    for axis in (2, 3):
        first, middle, last = weight.unbind(axis)
        weight = torch.stack([last, middle + last, first + middle, first], axis)  # in the end (d_in, d_out, 4, 4)
    return conv_transpose({**p, "weight": weight}, x, stride=2, padding=1)  # (batch, d_out, 2h, 2w)
