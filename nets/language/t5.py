"""T5: an encoder and a decoder for any task of text to text.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
(arXiv:1910.10683). Scores of attention are not scaled, and positions enter by a learned bias per head and bucket of
distances, the same for all layers of a side:

    x = tokens[source];   memory = norm(encoder_i(x));   y = tokens[target];   y = norm(decoder_i(y, memory))
    scores[q, k] = Q_q · K_k + positions[bucket(k - q)]        logits = y tokensᵀ / sqrt(width)
    norm(x) = x / sqrt(mean(x²) + eps) * weight                mlp(x) = down(relu(up(x)))

Each layer is x + f(norm(x)); there are no biases. Version 1.1 (Shazeer 2020, arXiv:2002.05202) has
mlp(x) = down(gelu(gate(x)) * up(x)), an output layer of its own, and does not divide by sqrt(width).

A target begins with the padding token; the logits at a position are of the token after it. Published weights:
`nets/language/t5_weights.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from core import initializers, random
from core.attention import (
    Cache,
    attention,
    causal_mask,
    cross_attention,
    cross_keys_values,
    empty_cache,
    extend_cache,
    merge_heads,
    split_heads,
)
from core.layers import (
    activation,
    dropout_sites,
    embedding,
    embedding_spec,
    linear,
    linear_spec,
    rms_norm,
    rms_norm_spec,
)
from nets.blocks.transformer_block import identity


@dataclass(frozen=True)
class Config:
    """Sizes and rates of a T5."""

    vocabulary: int = 32128
    """Tokens that the embedding and the output layer know."""
    layers: int = 6
    """Layers of the encoder."""
    decoder_layers: int = 6
    """Layers of the decoder."""
    heads: int = 8
    """Attention heads per layer."""
    depth: int = 64
    """Size of a head; heads * depth need not be the width."""
    width: int = 512
    """Size of the hidden states."""
    hidden: int = 2048
    """Hidden units of the MLPs."""
    activation: str = "relu"
    """Activation of the MLPs, a name of `core.layers.ACTIVATIONS`."""
    gated: bool = False
    """Multiply the activations by a second linear layer, as in version 1.1."""
    tied: bool = True
    """Use the token embedding as the output layer."""
    scale: bool = True
    """Divide the decoder's output by sqrt(width) before the output layer."""
    buckets: int = 32
    """Buckets of distances; half of them for each direction in the encoder."""
    farthest: int = 128
    """Distance from which all share the last bucket."""
    dropout: float = 0.1
    """Dropout rate of embeddings, attention weights, hidden units, both sides' output and all branches."""
    eps: float = 1e-6
    """Epsilon of the norms."""
    padding_id: int = 0
    """Token id of the padding, and of the start of a target."""
    attention: str = "auto"
    """Method of `core.attention.attention`: auto, explicit or fused."""

    def __post_init__(self):
        for name in ("vocabulary", "layers", "decoder_layers", "heads", "depth", "width", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"t5: {name} is {getattr(self, name)}; expected at least 1")
        if self.buckets < 4 or self.buckets % 2 or self.farthest <= self.buckets // 2:
            sizes = f"{self.buckets} and {self.farthest}"
            raise ValueError(f"t5: expected an even number of buckets and farthest above its half, found {sizes}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"t5: dropout {self.dropout} is outside [0, 1)")
        if not 0 <= self.padding_id < self.vocabulary:
            raise ValueError(f"t5: padding_id {self.padding_id} is not one of {self.vocabulary} tokens")
        activation(self.activation)


V1_1 = {"activation": "gelu_tanh", "gated": True, "tied": False, "scale": False}
PRESETS = {
    "base": Config(layers=12, decoder_layers=12, heads=12, width=768, hidden=3072),
    "small": Config(),
    "tiny": Config(256, 2, 2, heads=4, depth=32, width=128, hidden=512, dropout=0.0),
    "v1.1-base": Config(layers=12, decoder_layers=12, heads=12, width=768, hidden=2048, **V1_1),
    "v1.1-small": Config(layers=8, decoder_layers=8, heads=6, hidden=1024, **V1_1),
}


def _attention_spec(cfg: Config) -> dict:
    """Queries are drawn smaller by sqrt(depth), as the scores are not divided by it."""
    inner, normal = cfg.heads * cfg.depth, initializers.normal
    kv, q = normal(cfg.width**-0.5), normal((cfg.width * cfg.depth) ** -0.5)
    return {
        "kv": linear_spec(cfg.width, 2 * inner, bias=False, init=kv, axes=("heads", "embed")),
        "proj": linear_spec(inner, cfg.width, bias=False, init=normal(inner**-0.5), axes=("embed", "heads")),
        "q": linear_spec(cfg.width, inner, bias=False, init=q, axes=("heads", "embed")),
    }


def spec(cfg: Config) -> dict:
    """`encoder` and `decoder` of `blocks.i`, `norm` and `positions`; `tokens`; `output` unless tied.

    Normal with the authors' standard deviations: 1 for the embedding; fan_in^(-1/2) for matrices, (width depth)^(-1/2)
    for queries; width^(-1/2) for the biases of positions. `mlp.up` of version 1.1 holds the rows of the gate first.
    """
    of_width = initializers.normal(cfg.width**-0.5)
    rows = 2 * cfg.hidden if cfg.gated else cfg.hidden
    down = initializers.normal(cfg.hidden**-0.5)
    mlp = {
        "down": linear_spec(cfg.hidden, cfg.width, bias=False, init=down, axes=("embed", "mlp")),
        "up": linear_spec(cfg.width, rows, bias=False, init=of_width, axes=("mlp", "embed")),
    }
    norm = rms_norm_spec(cfg.width)
    encoder = {"attn": _attention_spec(cfg), "mlp": mlp, "norm1": norm, "norm2": norm}
    decoder = encoder | {"cross": _attention_spec(cfg), "norm_cross": norm}
    decoder = {name: decoder[name] for name in sorted(decoder)}

    def side(block: dict, layers: int) -> dict:
        positions = embedding_spec(cfg.buckets, cfg.heads, init=of_width, axes=("buckets", "heads"))
        return {"blocks": [block] * layers, "norm": norm, "positions": positions}

    parts = {"decoder": side(decoder, cfg.decoder_layers), "encoder": side(encoder, cfg.layers)}
    axes = ("vocabulary", "embed")
    output = linear_spec(cfg.width, cfg.vocabulary, bias=False, init=of_width, axes=axes)
    table = embedding_spec(cfg.vocabulary, cfg.width, axes=axes)
    return parts | ({} if cfg.tied else {"output": output}) | {"tokens": table}


def bucket(distances: Tensor, buckets: int, farthest: int, both: bool) -> Tensor:
    """Bucket of each distance, key's position - query's: integers of any shape -> the same shape.

    Half of the buckets are of one distance each; the others grow with it, up to `farthest` and all beyond.

    Args:
        both: half of the buckets are for keys after the query (the encoder); otherwise these are of distance 0.
    """
    offset = torch.zeros_like(distances)
    if both:
        buckets //= 2
        offset = torch.where(distances > 0, buckets, 0)
    distances = distances.abs() if both else (-distances).clamp(min=0)
    exact = buckets // 2
    # exact + log(distance / exact) / log(farthest / exact) * (buckets - exact), rounded down
    growth = torch.log(distances.clamp(min=1).float() / exact) / math.log(farthest / exact)
    grown = exact + (growth * (buckets - exact)).long()
    return offset + torch.where(distances < exact, distances, grown.clamp(max=buckets - 1))


def _position_bias(p: dict, queries: Tensor, keys: int, cfg: Config, both: bool) -> Tensor:
    """Bias of the scores of queries at positions (..., time) with the first `keys` keys: (..., heads, time, keys)."""
    distances = torch.arange(keys, device=queries.device) - queries[..., None]  # (..., time, keys)
    values = embedding(p["positions"], bucket(distances, cfg.buckets, cfg.farthest, both))  # (..., time, keys, heads)
    return values.movedim(-1, -3)


def _norm(p: dict, x: Tensor, cfg: Config) -> Tensor:
    """x / sqrt(mean(x²) + eps), computed in float32 and rounded to x's dtype before it is multiplied by the weight."""
    return p["weight"] * rms_norm({}, x, eps=cfg.eps)


def _feedforward(p: dict, x: Tensor, cfg: Config, drop: Callable) -> Tensor:
    act, (first, *second) = activation(cfg.activation), linear(p["up"], x).chunk(2 if cfg.gated else 1, -1)
    hidden = act(first) * second[0] if cfg.gated else act(first)  # (..., hidden)
    return linear(p["down"], drop(hidden))  # (..., width)


def logits(params: dict, x: Tensor, cfg: Config) -> Tensor:
    """Logits of the next token: the decoder's last hidden states (..., width) -> (..., vocabulary)."""
    x = x * cfg.width**-0.5 if cfg.scale else x
    return linear(params.get("output", params["tokens"]), x)  # (..., vocabulary)


def _check(name: str, ids: Tensor, mask: Tensor | None = None) -> None:
    if ids.ndim != 2:
        raise ValueError(f"t5: expected {name} tokens of shape (batch, time), found {tuple(ids.shape)}")
    _check_mask(mask, ids.shape)


def _check_mask(mask: Tensor | None, shape: tuple[int, ...]) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        actual = f"{tuple(mask.shape)} of {mask.dtype}"
        raise ValueError(f"t5: expected a mask of shape {tuple(shape)} of torch.bool, found {actual}")


def _check_memory(memory: Tensor, batch: int, mask: Tensor | None, cfg: Config) -> None:
    if memory.ndim != 3 or memory.shape[0] != batch or memory.shape[2] != cfg.width:
        expected = f"expected a memory of shape ({batch}, source time, {cfg.width})"
        raise ValueError(f"t5: {expected}, found {tuple(memory.shape)}")
    _check_mask(mask, memory.shape[:2])


def _over_queries(mask: Tensor | None) -> Tensor | None:
    """(batch, keys) -> (batch, 1, 1, keys), the same for all heads and queries."""
    return None if mask is None else mask[:, None, None, :]


def _sites(key: Tensor | None, cfg: Config, train: bool, *sizes: tuple[int, tuple[int, ...]]) -> list[list[Callable]]:
    """Functions that drop values, for each (number of sites, shape of their values)."""
    if not train or not cfg.dropout:
        return [[identity] * n for n, _ in sizes]
    if key is None:
        raise ValueError(f"t5: training with dropout {cfg.dropout} draws random numbers; pass key=")
    keys = random.sites(key, len(sizes)).unbind(0)
    return [dropout_sites(k, n, shape, cfg.dropout) for k, (n, shape) in zip(keys, sizes, strict=True)]


def encode(
    params: dict,
    source: Tensor,
    cfg: Config,
    *,
    mask: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> Tensor:
    """The memory: source (batch, time) integers -> (batch, time, width).

    Args:
        mask: (batch, time) boolean, True at tokens; by default at all that are not `cfg.padding_id`.
        key: (2,) or one per example (batch, 2); needed in training with dropout. `encode` and `decode` draw different
            masks from one key.

    Raises:
        ValueError: source or mask of another shape, no key where one is needed.
    """
    _check("source", source, mask)
    mask = _over_queries(source != cfg.padding_id if mask is None else mask)
    (batch, time), n, p = source.shape, cfg.layers, params["encoder"]
    key = None if key is None else random.fold_in(key, 0)
    sizes = (batch, cfg.heads, time, time), (batch, time, cfg.width), (batch, time, cfg.hidden)
    weights, values, hidden = _sites(key, cfg, train, *zip((n, 2 + 2 * n, n), sizes, strict=True))
    bias = _position_bias(p, torch.arange(time, device=source.device), time, cfg, both=True)  # (heads, time, time)
    options = {"mask": mask, "bias": bias, "scale": 1.0, "method": cfg.attention}
    x = values[-2](embedding(params["tokens"], source))  # (batch, time, width)
    for i, one in enumerate(p["blocks"]):
        y = _norm(one["norm1"], x, cfg)
        x = x + values[2 * i](cross_attention(one["attn"], y, y, cfg.heads, drop=_of_weights(weights[i]), **options))
        x = x + values[2 * i + 1](_feedforward(one["mlp"], _norm(one["norm2"], x, cfg), cfg, hidden[i]))
    return values[-1](_norm(p["norm"], x, cfg))


def _of_weights(drop: Callable) -> Callable | None:
    """Without dropout None, with which attention may be fused."""
    return None if drop is identity else drop


def decode(
    params: dict,
    target: Tensor,
    memory: Tensor,
    cfg: Config,
    *,
    source_mask: Tensor | None,
    key: Tensor | None = None,
    train: bool = False,
) -> Tensor:
    """Logits of each next token, given the target so far.

    Padding after a target needs no mask: the positions before it do not attend to it.

    Args:
        target: (batch, time) integers, first `cfg.padding_id`.
        memory: (batch, source time, width), from `encode`.
        source_mask: (batch, source time) boolean, True at the source's tokens; None if it is all tokens.
        key: as in `encode`.

    Returns:
        logits, (batch, time, vocabulary).

    Raises:
        ValueError: as `encode`, and for a memory of another batch.
    """
    _check("target", target)
    _check_memory(memory, target.shape[0], source_mask, cfg)
    (batch, time), n, p = target.shape, cfg.decoder_layers, params["decoder"]
    key = None if key is None else random.fold_in(key, 1)
    sizes = [(batch, cfg.heads, time, size) for size in (time, memory.shape[1])]
    sizes += [(batch, time, cfg.width), (batch, time, cfg.hidden)]
    drops = _sites(key, cfg, train, *zip((n, n, 2 + 3 * n, n), sizes, strict=True))
    weights, cross_weights, values, hidden = drops
    bias = _position_bias(p, torch.arange(time, device=target.device), time, cfg, both=False)  # (heads, time, time)
    options = {"scale": 1.0, "method": cfg.attention}
    own = {"mask": causal_mask(time, device=target.device), "bias": bias} | options
    other = {"mask": _over_queries(source_mask)} | options
    x = values[-2](embedding(params["tokens"], target))  # (batch, time, width)
    for i, one in enumerate(p["blocks"]):
        y, drop = _norm(one["norm1"], x, cfg), _of_weights(weights[i])
        x = x + values[3 * i](cross_attention(one["attn"], y, y, cfg.heads, drop=drop, **own))
        y, drop = _norm(one["norm_cross"], x, cfg), _of_weights(cross_weights[i])
        x = x + values[3 * i + 1](cross_attention(one["cross"], y, memory, cfg.heads, drop=drop, **other))
        x = x + values[3 * i + 2](_feedforward(one["mlp"], _norm(one["norm2"], x, cfg), cfg, hidden[i]))
    return logits(params, values[-1](_norm(p["norm"], x, cfg)), cfg)


def apply(
    params: dict, x: tuple[Tensor, Tensor], cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """Logits of each next target token, (batch, target time, vocabulary).

    Args:
        x: source and target, (batch, source time) and (batch, target time) integers, filled with `cfg.padding_id`.
        key: (2,) or one per example (batch, 2); needed in training with dropout.

    Raises:
        ValueError: as `encode` and `decode`.
    """
    source, target = x
    memory = encode(params, source, cfg, key=key, train=train)  # (batch, source time, width)
    return decode(params, target, memory, cfg, source_mask=source != cfg.padding_id, key=key, train=train)


# Decoding, a token at a time.


def start(params: dict, memory: Tensor, source_mask: Tensor | None, cfg: Config, positions: int) -> dict:
    """Initial state of `step`: the source's keys and values, and room for `positions` tokens.

    Args:
        memory, source_mask: as in `decode`.

    Returns:
        tree of tensors, batch leading in each: `past`, one `core.attention.Cache` per layer with the target's keys and
        values, (batch, heads, positions, depth); `shared`, the source's mask and the memory's keys and values.
    """
    _check_memory(memory, len(memory), source_mask, cfg)
    mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device) if source_mask is None else source_mask
    blocks, sizes = params["decoder"]["blocks"], (len(memory), cfg.heads, positions, cfg.depth)
    empty = [empty_cache(*sizes, memory.dtype, memory.device) for _ in blocks]
    keys_values = [cross_keys_values(p["cross"], memory, cfg.heads) for p in blocks]
    return {"past": empty, "shared": {"mask": mask, "memory": keys_values}}


def step(
    params: dict, cache: dict, tokens: Tensor, position: Tensor, cfg: Config, *, donate: bool = False
) -> tuple[Tensor, dict]:
    """Logits of the next token of each example, given all tokens before it in the cache.

    Args:
        cache: from `start`. `past` and tokens may have several consecutive rows per example (the beams of a sentence)
            while `shared` has one.
        tokens: (batch,) the tokens at `position`.
        position: () or (batch,) integer, from 0; below the positions of `start`, which is not checked.
        donate: overwrite the buffers of `cache["past"]`, which must not be used again; otherwise they are copied.

    Returns:
        logits (batch, vocabulary) and the new cache.
    """
    if tokens.ndim != 1:
        raise ValueError(f"t5: expected tokens of shape (batch,), found {tuple(tokens.shape)}")
    # As in gpt2.decode: few kernels count most in eager mode.
    method = "fused" if cfg.attention == "auto" and not torch.compiler.is_compiling() else cfg.attention
    shared, p, position = cache["shared"], params["decoder"], position.expand(tokens.shape)  # (batch,)
    keys, updated = cache["past"][0].keys.shape[2], []
    bias = _position_bias(p, position[:, None], keys, cfg, both=False)  # (batch, heads, 1, positions)
    other = {"mask": _over_queries(shared["mask"]), "scale": 1.0, "method": method}
    x = embedding(params["tokens"], tokens[:, None])  # (batch, 1, width)
    for one, memory, past in zip(p["blocks"], shared["memory"], cache["past"], strict=True):
        y = _norm(one["norm1"], x, cfg)
        q = split_heads(linear(one["attn"]["q"], y), cfg.heads)  # (batch, heads, 1, depth)
        past, visible = extend_cache(past, *cross_keys_values(one["attn"], y, cfg.heads), position, donate=donate)
        y = attention(q, *past, mask=visible, bias=bias, scale=1.0, method=method)  # (batch, heads, 1, depth)
        x = x + linear(one["attn"]["proj"], merge_heads(y))
        x = x + cross_attention(one["cross"], _norm(one["norm_cross"], x, cfg), memory, cfg.heads, **other)
        x = x + _feedforward(one["mlp"], _norm(one["norm2"], x, cfg), cfg, identity)
        updated.append(past)
    return logits(params, _norm(p["norm"], x, cfg)[:, 0], cfg), {"past": updated, "shared": shared}


def stepper(params: dict, cfg: Config, step: Callable = step) -> Callable:
    """`step`, or a compiled form of it, as `nets.language.decoding` calls it; see `nets.language.transformer`."""

    def call(past: list[Cache], tokens: Tensor, position: Tensor, shared: dict) -> tuple[Tensor, list[Cache]]:
        scores, cache = step(params, {"past": past, "shared": shared}, tokens, position, cfg)
        return scores, cache["past"]

    return call
