"""The transformer: an encoder and a decoder made of attention, for translation and similar tasks.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762):

    x = sqrt(width) tokens[source] + positions;   memory = encoder_i(x)
    y = sqrt(width) tokens[target] + positions;   y = decoder_i(y, memory);   logits = y tokensᵀ

A layer is attention within the sequence (causal in the decoder), in the decoder attention to the memory, and an MLP,
each of them norm(x + f(x)). With `norm_first` it is x + f(norm(x)), and a norm follows the last layer; that trains
without a warm-up too (Xiong et al. 2020, arXiv:2002.04745).

A target begins with a start token; the logits at a position are of the token after it. Published weights:
`nets/language/marian.py`. In 100 lines of plain torch: `nets/explained/transformer.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from core import initializers, random
from core.attention import Cache, cross_keys_values, empty_cache
from core.layers import activation, dropout_sites, embedding, embedding_spec, layer_norm, layer_norm_spec
from core.layers.linear import linear, linear_spec
from nets.blocks.transformer_block import block, block_spec, cached_block, decoder_block_spec, identity, sinusoids

POSITIONS = ("sinusoidal", "halves", "learned")


@dataclass(frozen=True)
class Config:
    """Sizes and rates of a Transformer."""

    source_vocabulary: int = 37000
    """Tokens that the encoder's embedding knows."""
    target_vocabulary: int = 37000
    """Tokens that the decoder's embedding and the output layer know."""
    layers: int = 6
    """Layers of the encoder, and of the decoder."""
    heads: int = 8
    """Attention heads per layer."""
    width: int = 512
    """Size of the hidden states."""
    hidden: int = 2048
    """Hidden units of the MLPs."""
    dropout: float = 0.1
    """Dropout rate of the sums with the positions and of each sub-layer's output."""
    attention_dropout: float = 0.0
    """Dropout rate of the attention weights, which the paper does not drop."""
    positions: str = "sinusoidal"
    """sinusoidal: sines and cosines alternate, as in the paper. halves: all sines, then all cosines, as in Marian.
    learned: one vector per position, different ones in encoder and decoder."""
    context: int = 1024
    """Maximal number of tokens in a sentence."""
    norm_first: bool = False
    """Norm before each sub-layer (True) or after each residual sum."""
    final_norms: bool | None = None
    """Norm after the last layer of each side. None: with norm_first only; torch.nn.Transformer always has them."""
    activation: str = "relu"
    """Activation of the MLPs, a name of `core.layers.ACTIVATIONS`."""
    shared: bool = True
    """One embedding for source, target and output layer (True), or three."""
    scale: bool = True
    """Multiply embeddings by sqrt(width)."""
    output_bias: bool = False
    """Add a bias to the logits."""
    eps: float = 1e-5
    """Epsilon of the norms."""
    padding_id: int = 0
    """Token id of the padding."""
    attention: str = "auto"
    """Method of `core.attention.attention`: auto, explicit or fused."""

    def __post_init__(self):
        for name in ("source_vocabulary", "target_vocabulary", "layers", "heads", "width", "hidden", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"transformer: {name} is {getattr(self, name)}; expected at least 1")
        if self.width % self.heads:
            raise ValueError(f"transformer: width {self.width} is not divisible by {self.heads} heads")
        if self.positions not in POSITIONS:
            raise ValueError(f"transformer: positions '{self.positions}' is none of {', '.join(POSITIONS)}")
        if self.positions != "learned" and self.width % 2:
            raise ValueError(f"transformer: width {self.width} is odd; sines and cosines need an even one")
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"transformer: {name} {getattr(self, name)} is outside [0, 1)")
        if self.shared and self.source_vocabulary != self.target_vocabulary:
            sizes = f"{self.source_vocabulary} and {self.target_vocabulary}"
            raise ValueError(f"transformer: vocabularies of {sizes} tokens cannot share an embedding; use shared=False")
        if not 0 <= self.padding_id < self.source_vocabulary:
            raise ValueError(f"transformer: padding_id {self.padding_id} is not one of {self.source_vocabulary} tokens")
        activation(self.activation)


PRESETS = {
    "base": Config(),
    "big": Config(heads=16, width=1024, hidden=4096, dropout=0.3),
    "small": Config(10000, 10000, layers=3, heads=8, width=256, hidden=512, context=256),
    "tiny": Config(256, 256, layers=2, heads=4, width=128, hidden=512, dropout=0.0, context=128),
}


def spec(cfg: Config) -> dict:
    """`encoder` and `decoder` of `blocks.i`; `tokens` if shared, else `tokens` in each and `output`.

    As fairseq does: Glorot's for matrices, queries, keys and values counted as one of 3 width rows; N(0, 1 / width)
    for embeddings, so that embedded tokens and first logits are of unit variance; 0 for biases. The embeddings matter:
    the N(0, 1) of torch, scaled by sqrt(width), is that many times as large as the positions, and the logits have a
    standard deviation of sqrt(width). Base then starts at 91 nats, not 11; six layers hardly learn to reverse 8 tokens.
    """
    init = initializers.normal(cfg.width**-0.5)

    def table(rows: int, axis: str = "vocabulary") -> dict:
        return embedding_spec(rows, cfg.width, init=init, axes=(axis, "embed"))

    def side(one_block: dict, vocabulary: int) -> dict:
        parts = {"blocks": [one_block] * cfg.layers}
        if cfg.norm_first if cfg.final_norms is None else cfg.final_norms:
            parts["norm"] = layer_norm_spec(cfg.width)
        if cfg.positions == "learned":
            parts["positions"] = table(cfg.context, "time")
        return parts if cfg.shared else parts | {"tokens": table(vocabulary)}

    sizes = (cfg.width, cfg.heads, cfg.hidden)
    head = linear_spec(cfg.width, cfg.target_vocabulary, bias=cfg.output_bias, init=init, axes=("vocabulary", "embed"))
    output = {name: leaf for name, leaf in head.items() if name == "bias" or not cfg.shared}
    decoder = side(decoder_block_spec(*sizes), cfg.target_vocabulary)
    parts = {"decoder": decoder, "encoder": side(block_spec(*sizes), cfg.source_vocabulary)}
    parts |= {"output": output} if output else {}
    return parts | ({"tokens": table(cfg.target_vocabulary)} if cfg.shared else {})


def _embed(params: dict, side: str, ids: Tensor, positions: Tensor, cfg: Config) -> Tensor:
    """ids (batch, time) at positions (time,) or (batch, time) -> (batch, time, width)."""
    x = embedding(params["tokens"] if cfg.shared else params[side]["tokens"], ids)  # (batch, time, width)
    x = x * math.sqrt(cfg.width) if cfg.scale else x
    if cfg.positions == "learned":
        return x + embedding(params[side]["positions"], positions)
    return x + sinusoids(positions, cfg.width, cfg.positions == "halves").to(x.dtype)


def logits(params: dict, x: Tensor, cfg: Config) -> Tensor:
    """Logits of the next token: the decoder's last hidden states (..., width) -> (..., target vocabulary)."""
    head = {"bias": params["output"]["bias"]} if cfg.output_bias else {}
    return linear(head | {"weight": params["tokens" if cfg.shared else "output"]["weight"]}, x)


def _check(name: str, ids: Tensor, cfg: Config) -> None:
    if ids.ndim != 2:
        raise ValueError(f"transformer: expected {name} tokens of shape (batch, time), found {tuple(ids.shape)}")
    if ids.shape[1] > cfg.context:
        raise ValueError(f"transformer: a {name} of {ids.shape[1]} tokens is longer than the context of {cfg.context}")


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        expected = f"expected a {name} of shape {tuple(shape)} of torch.bool"
        raise ValueError(f"transformer: {expected}, found {tuple(mask.shape)} of {mask.dtype}")


def _over_queries(mask: Tensor | None) -> Tensor | None:
    """(batch, keys) -> (batch, 1, 1, keys), the same for all heads and queries."""
    return None if mask is None else mask[:, None, None, :]


def _keys(key: Tensor | None, cfg: Config, train: bool) -> list[Tensor | None]:
    """One key per kind of dropout: two of the encoder, three of the decoder. None without dropout."""
    if not train or not (cfg.dropout or cfg.attention_dropout):
        return [None] * 5
    if key is None:
        rates = f"dropout {cfg.dropout} and attention_dropout {cfg.attention_dropout}"
        raise ValueError(f"transformer: training with {rates} draws random numbers; pass key=")
    return list(random.sites(key, 5).unbind(0))


def _sites(key: Tensor | None, n: int, shape: tuple[int, ...], rate: float, without: Callable | None) -> list:
    return [without] * n if key is None or not rate else dropout_sites(key, n, shape, rate)


def _layers(
    params: dict, side: str, ids: Tensor, cfg: Config, embedded: Callable, drops: list[dict], **options
) -> Tensor:
    """ids (batch, time) through the encoder or decoder -> (batch, time, width).

    `embedded` is the dropout of the sum with the positions, `drops` each block's, as arguments of `block`.
    """
    p, positions = params[side], torch.arange(ids.shape[1], device=ids.device)
    options |= {"norm_first": cfg.norm_first, "activation": cfg.activation, "eps": cfg.eps, "method": cfg.attention}
    x = embedded(_embed(params, side, ids, positions, cfg))  # (batch, time, width)
    for one, drop in zip(p["blocks"], drops, strict=True):
        x = block(one, x, cfg.heads, **drop, **options)
    return layer_norm(p["norm"], x, eps=cfg.eps) if "norm" in p else x


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
        ValueError: source or mask of another shape, a source longer than `cfg.context`, no key where one is needed.
    """
    _check("source", source, cfg)
    _check_mask("mask", mask, source.shape)
    mask = source != cfg.padding_id if mask is None else mask
    (batch, time), n, (weights_key, values_key, *_) = source.shape, cfg.layers, _keys(key, cfg, train)
    weights = _sites(weights_key, n, (batch, cfg.heads, time, time), cfg.attention_dropout, None)
    first, *values = _sites(values_key, 1 + 2 * n, (batch, time, cfg.width), cfg.dropout, identity)
    drops = [{"drops": drop} for drop in zip(weights, values[0::2], values[1::2], strict=True)]
    return _layers(params, "encoder", source, cfg, first, drops, mask=_over_queries(mask))


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
        target: (batch, time) integers.
        memory: (batch, source time, width), from `encode`.
        source_mask: (batch, source time) boolean, True at the source's tokens; None if it is all tokens.
        key: as in `encode`.

    Returns:
        logits, (batch, time, target vocabulary).

    Raises:
        ValueError: as `encode`, and for a memory of another batch.
    """
    _check("target", target, cfg)
    _check_memory(memory, target.shape[0], cfg)
    _check_mask("source_mask", source_mask, memory.shape[:2])
    (batch, time), n, (*_, weights_key, cross_key, values_key) = target.shape, cfg.layers, _keys(key, cfg, train)
    weights = _sites(weights_key, n, (batch, cfg.heads, time, time), cfg.attention_dropout, None)
    cross = _sites(cross_key, n, (batch, cfg.heads, time, memory.shape[1]), cfg.attention_dropout, None)
    first, *values = _sites(values_key, 1 + 3 * n, (batch, time, cfg.width), cfg.dropout, identity)
    each = zip(weights, values[0::3], values[2::3], cross, values[1::3], strict=True)
    drops = [{"drops": drop[:3], "cross_drops": drop[3:]} for drop in each]
    options = {"causal": True, "memory": memory, "memory_mask": _over_queries(source_mask)}
    return logits(params, _layers(params, "decoder", target, cfg, first, drops, **options), cfg)


def _check_memory(memory: Tensor, batch: int, cfg: Config) -> None:
    if memory.ndim != 3 or memory.shape[0] != batch or memory.shape[2] != cfg.width:
        expected = f"expected a memory of shape ({batch}, source time, {cfg.width})"
        raise ValueError(f"transformer: {expected}, found {tuple(memory.shape)}")


def apply(
    params: dict, x: tuple[Tensor, Tensor], cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """Logits of each next target token, (batch, target time, target vocabulary).

    Args:
        x: source and target, (batch, source time) and (batch, target time) integers, filled with `cfg.padding_id`.
        key: (2,) or one per example (batch, 2); needed in training with dropout.

    Raises:
        ValueError: as `encode` and `decode`.
    """
    source, target = x
    memory = encode(params, source, cfg, key=key, train=train)  # (batch, source time, width)
    return decode(params, target, memory, cfg, source_mask=source != cfg.padding_id, key=key, train=train)


def attention_maps(params: dict, x: tuple[Tensor, Tensor], cfg: Config) -> dict[str, Tensor]:
    """Attention weights of `encoder`, `decoder` and `cross`, each (batch, layers, heads, queries, keys).

    x: as in `apply`. Each row sums to 1; the rows of padding have no meaning.
    """
    source, target = x
    _check("source", source, cfg)
    _check("target", target, cfg)
    maps: dict[str, list[Tensor]] = {"encoder": [], "decoder": [], "cross": []}

    def record(weights: Tensor, name: str) -> Tensor:
        maps[name].append(weights)
        return weights

    # Dropout of the weights is a function of them: one that records takes its place.
    on_encoder, on_decoder, on_cross = (partial(record, name=name) for name in maps)
    mask = _over_queries(source != cfg.padding_id)
    drops = {"drops": (on_encoder, identity, identity)}
    memory = _layers(params, "encoder", source, cfg, identity, [drops] * cfg.layers, mask=mask)
    drops = {"drops": (on_decoder, identity, identity), "cross_drops": (on_cross, identity)}
    options = {"causal": True, "memory": memory, "memory_mask": mask}
    _layers(params, "decoder", target, cfg, identity, [drops] * cfg.layers, **options)
    return {name: torch.stack(weights, 1) for name, weights in maps.items()}  # (batch, layers, heads, queries, keys)


def decoded_attention(params: dict, source: Tensor, tokens: Tensor, first: int, cfg: Config) -> dict[str, Tensor]:
    """`attention_maps` of a translation as it was decoded: query t of `decoder` and `cross` wrote token t.

    Args:
        source: (batch, source time) integers, as they were encoded.
        tokens: (batch, time) integers, as they were decoded (`nets.language.decoding.Decoded`).
        first: id of the start token; it and all tokens but the last are the keys of `decoder`.
    """
    _check("decoded text", tokens, cfg)
    starts = tokens.new_full((tokens.shape[0], 1), first)  # (batch, 1)
    return attention_maps(params, (source, torch.cat([starts, tokens[:, :-1]], 1)), cfg)


# Decoding, a token at a time.


def start(params: dict, memory: Tensor, source_mask: Tensor | None, cfg: Config, positions: int) -> dict:
    """Initial state of `step`: the source's keys and values, and room for `positions` tokens.

    Args:
        memory: (batch, source time, width), from `encode`.
        source_mask: as in `decode`.

    Returns:
        tree of tensors, batch leading in each: `past`, one `core.attention.Cache` per layer with the target's keys and
        values, (batch, heads, positions, depth); `shared`, the source's mask and the memory's keys and values. To
        reorder or repeat examples, index every leaf.

    Raises:
        ValueError: as `decode`, or more positions than the context.
    """
    _check_memory(memory, memory.shape[0], cfg)
    _check_mask("source_mask", source_mask, memory.shape[:2])
    if positions > cfg.context:
        raise ValueError(f"transformer: {positions} positions exceed the context of {cfg.context}")
    blocks, depth = params["decoder"]["blocks"], cfg.width // cfg.heads
    mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device) if source_mask is None else source_mask
    empty = [empty_cache(len(memory), cfg.heads, positions, depth, memory.dtype, memory.device) for _ in blocks]
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
        position: () or (batch,) integer, from 0; below the positions of `start`, which is not checked, as that would
            wait for the device.
        donate: overwrite the buffers of `cache["past"]`, which must not be used again; otherwise they are copied.

    Returns:
        logits (batch, target vocabulary) and the new cache.

    With `cfg.attention` "auto" and uncompiled, attention is torch's fused kernel; "explicit" vmaps on the CPU too.
    """
    if tokens.ndim != 1:
        raise ValueError(f"transformer: expected tokens of shape (batch,), found {tuple(tokens.shape)}")
    # As in gpt2.decode: few kernels count most in eager mode.
    method = "fused" if cfg.attention == "auto" and not torch.compiler.is_compiling() else cfg.attention
    options = {"norm_first": cfg.norm_first, "activation": cfg.activation, "eps": cfg.eps, "method": method}
    shared, p, position = cache["shared"], params["decoder"], position.expand(tokens.shape)  # (batch,)
    options |= {"memory_mask": _over_queries(shared["mask"]), "donate": donate}
    x, updated = _embed(params, "decoder", tokens[:, None], position[:, None], cfg), []  # (batch, 1, width)
    for one, memory, past in zip(p["blocks"], shared["memory"], cache["past"], strict=True):
        x, past = cached_block(one, x, past, position, cfg.heads, memory=memory, **options)
        updated.append(past)
    x = layer_norm(p["norm"], x, eps=cfg.eps) if "norm" in p else x
    return logits(params, x[:, 0], cfg), {"past": updated, "shared": shared}


def stepper(params: dict, cfg: Config, step: Callable = step) -> Callable:
    """`step`, or a compiled form of it, as `nets.language.decoding` and `nets.language.beam_search` call it.

    `cache = start(params, memory, source_mask, cfg, positions)`, then
    `beam_search(stepper(params, cfg), cache["past"], first, shared=cache["shared"], positions_axis=2, beams=5, ...)`.
    """

    def call(past: list[Cache], tokens: Tensor, position: Tensor, shared: dict) -> tuple[Tensor, list[Cache]]:
        scores, cache = step(params, {"past": past, "shared": shared}, tokens, position, cfg)
        return scores, cache["past"]

    return call
