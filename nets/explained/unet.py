"""The denoising U-Net in 100 lines, with torch and nothing else: the same numbers as `nets.generative.unet`.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), appendix B, with two sizes of feature
maps. n grey images of side s; a channels at full size, b at half of it; d = 4 a numbers for the time. The full one has
any number of sizes and blocks, attention at each, classes, dropout and checks too. `nets/explained/ddpm.py` trains it.

A layer's parameters p are {"weight", "bias"}, handed to torch's functions as **p.
"""

import math

import torch
from torch.nn.functional import conv2d, interpolate, linear, silu
from torch.nn.functional import group_norm as torch_group_norm


def group_norm(p, x):
    """(x - mean) / sqrt(variance + 1e-6) * weight + bias; mean and variance of each eighth of the channels."""
    return torch_group_norm(x, 8, **p, eps=1e-6)


def time_embedding(time, width):
    """sin(t w_i) for all i, then cos(t w_i), w_i = 10000^(-i / (width / 2 - 1)): (n,) -> (n, width)."""
    angles = time[:, None] * 10_000 ** (-torch.arange(width // 2) / (width // 2 - 1))
    return torch.cat([angles.sin(), angles.cos()], 1)


def residual(p, x, e):
    """x + conv(norm(conv(norm(x)) + time)), a SiLU after each norm: (n, c, s, s), e (n, d) -> (n, c', s, s)."""
    y = conv2d(silu(group_norm(p["norm1"], x)), **p["conv1"], padding=1)  # (n, c', s, s)
    y = y + linear(e, **p["time"])[:, :, None, None]  # one number per channel
    y = conv2d(silu(group_norm(p["norm2"], y)), **p["conv2"], padding=1)
    return y + (conv2d(x, **p["shortcut"]) if "shortcut" in p else x)  # c' channels of x, if it has others


def attention(p, x):
    """x + softmax(q kᵀ / sqrt(c)) v, between all pixels: (n, c, s, s) -> (n, c, s, s)."""
    pixels = group_norm(p["norm"], x).flatten(2).transpose(1, 2)  # (n, s², c)
    q, k, v = linear(pixels, **p["qkv"]).chunk(3, -1)  # each (n, s², c)
    y = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
    return x + linear(y, **p["proj"]).transpose(1, 2).reshape(x.shape)


def unet(params, x, time):
    """The noise in x: (n, 1, s, s) at times (n,) -> (n, 1, s, s)."""
    e = time_embedding(time, len(params["input"]["bias"])).to(x.dtype)  # (n, a)
    e = silu(linear(silu(linear(e, **params["time"]["first"])), **params["time"]["second"]))  # (n, d)
    y = conv2d(x, **params["input"], padding=1)  # (n, a, s, s)
    skips = [y]
    for p in params["down"]:
        y = residual(p["residuals"][0], y, e)
        skips.append(y)
        if "sample" in p:
            y = conv2d(y, **p["sample"], stride=2, padding=1)  # (n, a, s / 2, s / 2)
            skips.append(y)
    middle = params["middle"]
    y = attention(middle["attention"], residual(middle["first"], y, e))  # (n, b, s / 2, s / 2)
    y = residual(middle["second"], y, e)
    for p in params["up"]:
        for block in p["residuals"]:
            y = residual(block, torch.cat([y, skips.pop()], 1), e)  # what was seen on the way down, latest first
        if "sample" in p:
            y = conv2d(interpolate(y, scale_factor=2), **p["sample"], padding=1)  # (n, b, s, s)
    return conv2d(silu(group_norm(params["norm"], y)), **params["output"], padding=1)


def init(rng, a, b):
    """Parameters. The last layer of each block and of the net is 0: blocks start as the identity or the shortcut."""

    def layer(d_in, d_out, *kernel, scale=1.0):
        bound = scale * math.sqrt(6 / ((d_in + d_out) * math.prod(kernel)))  # Glorot and Bengio 2010
        weight = bound * (2 * torch.rand(d_out, d_in, *kernel, generator=rng) - 1)
        return {"weight": weight.requires_grad_(), "bias": torch.zeros(d_out, requires_grad=True)}

    def norm(c):
        return {"weight": torch.ones(c, requires_grad=True), "bias": torch.zeros(c, requires_grad=True)}

    def block(c_in, c_out):
        p = {"norm1": norm(c_in), "conv1": layer(c_in, c_out, 3, 3), "time": layer(4 * a, c_out)}
        p |= {"norm2": norm(c_out), "conv2": layer(c_out, c_out, 3, 3, scale=0.0)}
        return p | ({"shortcut": layer(c_in, c_out, 1, 1)} if c_in != c_out else {})

    # The bound of a matrix each for q, k and v, though they lie in one.
    attend = {"norm": norm(b), "qkv": layer(b, 3 * b, scale=math.sqrt(2)), "proj": layer(b, b, scale=0.0)}
    up = {"residuals": [block(b + b, b), block(b + a, b)], "sample": layer(b, b, 3, 3)}
    return {
        "input": layer(1, a, 3, 3),
        "time": {"first": layer(a, 4 * a), "second": layer(4 * a, 4 * a)},
        "down": [{"residuals": [block(a, a)], "sample": layer(a, a, 3, 3)}, {"residuals": [block(a, b)]}],
        "middle": {"first": block(b, b), "attention": attend, "second": block(b, b)},
        "up": [up, {"residuals": [block(b + a, a), block(a + a, a)]}],
        "norm": norm(a),
        "output": layer(a, 1, 3, 3, scale=0.0),
    }
