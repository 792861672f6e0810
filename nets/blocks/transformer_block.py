"""The transformer block: attention and an MLP, each a residual branch with a layer norm.

The block of a decoder has attention to an encoder's output, the memory, between the two.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from core import initializers
from core.attention import (
    Cache,
    cached_self_attention,
    cross_attention,
    cross_attention_spec,
    self_attention,
    self_attention_spec,
)
from core.layers import activation, layer_norm, layer_norm_spec, linear, linear_spec


def sinusoids(positions: Tensor, width: int, halves: bool = False) -> Tensor:
    """Sinusoidal position encodings, Vaswani et al. 2017, section 3.5: positions (...) -> (..., width), float64.

    sin and cos of positions / 10000^(2i / width) for i = 0 ... width / 2 - 1, alternating, or with `halves` all sines
    first.
    """
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    exponents = torch.arange(0, width, 2, dtype=wide, device=positions.device) / width  # (width / 2,)
    angles = positions[..., None].to(wide) * 10000.0**-exponents  # (..., width / 2)
    sines, cosines = angles.sin(), angles.cos()
    return torch.cat([sines, cosines], -1) if halves else torch.stack([sines, cosines], -1).flatten(-2)  # (..., width)


def feedforward_spec(
    width: int,
    hidden: int,
    *,
    bias: bool = True,
    init: initializers.Initializer | None = None,
    down_init: initializers.Initializer | None = None,
) -> dict:
    """Parameters of `feedforward`: `up` (hidden, width) and `down` (width, hidden)."""
    init = initializers.xavier_uniform() if init is None else init
    return {
        "down": linear_spec(hidden, width, bias=bias, init=down_init or init, axes=("embed", "mlp")),
        "up": linear_spec(width, hidden, bias=bias, init=init, axes=("mlp", "embed")),
    }


def feedforward(p: dict, x: Tensor, name: str = "gelu_tanh") -> Tensor:
    """down(activation(up(x))) at every position: x (..., width) -> the same shape. name: that of the activation."""
    hidden = activation(name)(linear(p["up"], x))  # (..., hidden)
    return linear(p["down"], hidden)  # (..., width)


def block_spec(
    width: int,
    heads: int,
    hidden: int,
    *,
    bias: bool = True,
    init: initializers.Initializer | None = None,
    residual_init: initializers.Initializer | None = None,
) -> dict:
    """Parameters of `block`; `residual_init` is that of the two matrices that write into the residual stream."""
    return {
        "attn": self_attention_spec(width, heads, bias=bias, init=init, proj_init=residual_init),
        "mlp": feedforward_spec(width, hidden, bias=bias, init=init, down_init=residual_init),
        "norm1": layer_norm_spec(width, bias=bias),
        "norm2": layer_norm_spec(width, bias=bias),
    }


def decoder_block_spec(width: int, heads: int, hidden: int) -> dict:
    """Parameters of a `block` with memory: those of one without memory, `cross` and its norm."""
    parts = block_spec(width, heads, hidden)
    parts |= {"cross": cross_attention_spec(width, heads), "norm_cross": layer_norm_spec(width)}
    return {name: parts[name] for name in sorted(parts)}


def identity(x: Tensor) -> Tensor:
    """x itself, in place of a dropout."""
    return x


def _residual(x: Tensor, norm: dict, f: Callable[[Tensor], Tensor], norm_first: bool, eps: float) -> Tensor:
    if norm_first:
        return x + f(layer_norm(norm, x, eps=eps))
    return layer_norm(norm, x + f(x), eps=eps)


def block(
    p: dict,
    x: Tensor,
    heads: int,
    *,
    norm_first: bool = True,
    causal: bool = False,
    mask: Tensor | None = None,
    memory: Tensor | Cache | None = None,
    memory_mask: Tensor | None = None,
    activation: str = "gelu_tanh",
    drops: tuple[Callable, Callable, Callable] | None = None,
    cross_drops: tuple[Callable, Callable] | None = None,
    eps: float = 1e-5,
    method: str = "auto",
) -> Tensor:
    """Transformer layer: with `norm_first` (GPT-2) x + f(norm(x)), otherwise (GPT, the original) norm(x + f(x)).

    Args:
        x: (batch, time, width).
        mask: boolean, broadcastable to (batch, heads, time, time), True where a query may attend to a key.
        memory: encoder's output that a decoder's block attends to, (batch, memory time, width) or its keys and values,
            as in `core.attention.cross_attention`; memory_mask is broadcastable to (batch, heads, time, memory time).
        activation: of the MLP, a name of `core.layers.ACTIVATIONS`.
        drops: dropout of the attention weights and of the two residual branches, each a function of the values
            (`core.layers.dropout_sites`).
        cross_drops: the same for the weights and the branch of the attention to the memory.
        eps: epsilon of the norms.
        method: as in `core.attention.attention`.

    Returns:
        (batch, time, width).
    """
    drop_weights, drop_attention, drop_feedforward = drops or (None, identity, identity)
    drop_cross_weights, drop_cross = cross_drops or (None, identity)

    def attend(x: Tensor) -> Tensor:
        y = self_attention(p["attn"], x, heads, mask=mask, causal=causal, drop=drop_weights, method=method)
        return drop_attention(y)

    def attend_memory(x: Tensor) -> Tensor:
        y = cross_attention(p["cross"], x, memory, heads, mask=memory_mask, drop=drop_cross_weights, method=method)
        return drop_cross(y)

    def feed(x: Tensor) -> Tensor:
        return drop_feedforward(feedforward(p["mlp"], x, activation))

    x = _residual(x, p["norm1"], attend, norm_first, eps)
    if memory is not None:
        x = _residual(x, p["norm_cross"], attend_memory, norm_first, eps)
    return _residual(x, p["norm2"], feed, norm_first, eps)


def cached_block(
    p: dict,
    x: Tensor,
    cache: Cache,
    position: Tensor,
    heads: int,
    *,
    norm_first: bool = True,
    memory: Tensor | Cache | None = None,
    memory_mask: Tensor | None = None,
    activation: str = "gelu_tanh",
    eps: float = 1e-5,
    method: str = "auto",
    donate: bool = False,
) -> tuple[Tensor, Cache]:
    """Causal block on the next tokens alone, without dropout: x (batch, time, width) -> (the same shape, new cache).

    Arguments as in `core.attention.cached_self_attention` and, for the memory, in `block`.
    """
    caches = []

    def attend(x: Tensor) -> Tensor:
        y, updated = cached_self_attention(p["attn"], x, cache, position, heads, method=method, donate=donate)
        caches.append(updated)
        return y

    def attend_memory(x: Tensor) -> Tensor:
        return cross_attention(p["cross"], x, memory, heads, mask=memory_mask, method=method)

    x = _residual(x, p["norm1"], attend, norm_first, eps)
    if memory is not None:
        x = _residual(x, p["norm_cross"], attend_memory, norm_first, eps)
    x = _residual(x, p["norm2"], lambda x: feedforward(p["mlp"], x, activation), norm_first, eps)
    return x, caches[0]
