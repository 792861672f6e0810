"""The transformer: an encoder and a decoder that are made of attention, for translation and its like.

Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762):

    x = sqrt(width) tokens[source] + positions;   memory = encoder_i(x)
    y = sqrt(width) tokens[target] + positions;   y = decoder_i(y, memory);   logits = y tokensᵀ

A layer is attention within the sequence (in the decoder up to each place), in the decoder attention to the memory, and
a perceptron, each of them norm(x + f(x)). With `norm_first` it is x + f(norm(x)), and a norm stands behind the last
layer; that trains without a warm-up too (Xiong et al. 2020, arXiv:2002.04745).

A target begins with a token that stands for its start; the logits at a place are of the token behind it. Published
weights: `nets/language/marian.py`.
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
from core.spec import Param
from nets.blocks.transformer_block import block, block_spec, cached_block, decoder_block_spec

POSITIONS = ("sinusoidal", "halves", "learned")


@dataclass(frozen=True)
class Config:
    source_vocabulary: int = 37000
    target_vocabulary: int = 37000
    layers: int = 6
    """Of the encoder, and as many of the decoder."""
    heads: int = 8
    width: int = 512
    hidden: int = 2048
    """Of the perceptrons."""
    dropout: float = 0.1
    """Of the sums with the positions, and of what each sub-layer adds."""
    attention_dropout: float = 0.0
    """Of the attention weights, which the paper does not drop."""
    positions: str = "sinusoidal"
    """sinusoidal: sines and cosines take turns, as in the paper. halves: all sines, then all cosines, as in Marian.
    learned: a vector a place, others for the encoder than for the decoder."""
    context: int = 1024
    """The most tokens of a sentence."""
    norm_first: bool = False
    final_norms: bool | None = None
    """A norm behind the last layer of each side: with norm_first if not said otherwise; torch.nn.Transformer always."""
    activation: str = "relu"
    shared: bool = True
    """One embedding for source and target, which is the output layer too; else there are three."""
    scale: bool = True
    """Multiply embeddings by sqrt(width)."""
    output_bias: bool = False
    """Of the logits."""
    eps: float = 1e-5
    """Of the norms."""
    padding_id: int = 0
    attention: str = "auto"
    """As in core.attention.attention."""

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
    the N(0, 1) of torch comes out of the scale sqrt(width) times as large as the positions, and as logits of deviation
    sqrt(width). Then base starts at a loss of 91 nats, not 11, and six layers hardly learn to reverse eight tokens.
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

    sizes, output = (cfg.width, cfg.heads, cfg.hidden), {}
    if cfg.output_bias:
        output["bias"] = Param((cfg.target_vocabulary,), axes=("vocabulary",))
    if not cfg.shared:
        output |= table(cfg.target_vocabulary)
    decoder = side(decoder_block_spec(*sizes), cfg.target_vocabulary)
    parts = {"decoder": decoder, "encoder": side(block_spec(*sizes), cfg.source_vocabulary)}
    parts |= {"output": output} if output else {}
    return parts | ({"tokens": table(cfg.target_vocabulary)} if cfg.shared else {})


# Embeddings and positions.


def sinusoids(places: Tensor, width: int, halves: bool = False) -> Tensor:
    """sin and cos of places / 10000^(2i / width) for i = 0 ... width / 2: places (...) -> (..., width), float64.

    They take turns (section 3.5 of the paper), or with `halves` all sines come first.
    """
    wide = torch.float32 if places.device.type == "mps" else torch.float64
    exponents = torch.arange(0, width, 2, dtype=wide, device=places.device) / width
    angles = places[..., None].to(wide) * 10000.0**-exponents
    sines, cosines = angles.sin(), angles.cos()
    return torch.cat([sines, cosines], -1) if halves else torch.stack([sines, cosines], -1).flatten(-2)


def _embed(params: dict, side: str, ids: Tensor, places: Tensor, cfg: Config) -> Tensor:
    """ids (batch, time) at places (time,) or (batch, time) -> (batch, time, width)."""
    x = embedding(params["tokens"] if cfg.shared else params[side]["tokens"], ids)
    x = x * math.sqrt(cfg.width) if cfg.scale else x
    if cfg.positions == "learned":
        return x + embedding(params[side]["positions"], places)
    return x + sinusoids(places, cfg.width, cfg.positions == "halves").to(x.dtype)


def logits(params: dict, x: Tensor, cfg: Config) -> Tensor:
    """The decoder's last layer (..., width) -> scores of the next token (..., target vocabulary)."""
    x = x @ (params["tokens"] if cfg.shared else params["output"])["weight"].T
    return x + params["output"]["bias"] if cfg.output_bias else x


def _check(what: str, ids: Tensor, cfg: Config) -> None:
    if ids.ndim != 2:
        raise ValueError(f"transformer: expected {what} tokens of shape (batch, time), found {tuple(ids.shape)}")
    if ids.shape[1] > cfg.context:
        raise ValueError(f"transformer: a {what} of {ids.shape[1]} tokens is longer than the context of {cfg.context}")


def _check_mask(what: str, mask: Tensor | None, shape: tuple[int, ...]) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        found = f"{tuple(mask.shape)} of {mask.dtype}"
        raise ValueError(f"transformer: expected a {what} of shape {tuple(shape)} of torch.bool, found {found}")


def _over_queries(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None, None, :]


def _same(x: Tensor) -> Tensor:
    return x


def _keys(key: Tensor | None, cfg: Config, train: bool) -> list[Tensor | None]:
    """One key a kind of place: two of the encoder, three of the decoder. They are None if nothing is to be dropped."""
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
    """ids (batch, time) through one side; the dropout of each block is as its arguments."""
    p, places = params[side], torch.arange(ids.shape[1], device=ids.device)
    options |= {"norm_first": cfg.norm_first, "activation": cfg.activation, "eps": cfg.eps, "method": cfg.attention}
    x = embedded(_embed(params, side, ids, places, cfg))
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
        mask: (batch, time) boolean, True where a token is; by default where it is not `cfg.padding_id`.
        key: (2,) or one an example (batch, 2); needed in training if there is dropout. `encode` and `decode` draw
            differently from one key.

    Raises:
        ValueError: source or mask of another shape, a source longer than `cfg.context`, no key where one is needed.
    """
    _check("source", source, cfg)
    _check_mask("mask", mask, source.shape)
    mask = source != cfg.padding_id if mask is None else mask
    (batch, time), n, (weights_key, values_key, *_) = source.shape, cfg.layers, _keys(key, cfg, train)
    weights = _sites(weights_key, n, (batch, cfg.heads, time, time), cfg.attention_dropout, None)
    first, *values = _sites(values_key, 1 + 2 * n, (batch, time, cfg.width), cfg.dropout, _same)
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
    """Scores of each next token, given the target so far.

    Padding behind a target needs no mask: the places in front of it do not look at it.

    Args:
        target: (batch, time) integers.
        memory: (batch, source time, width), from `encode`.
        source_mask: (batch, source time) boolean, True where the source has a token; None if it has one everywhere.
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
    first, *values = _sites(values_key, 1 + 3 * n, (batch, time, cfg.width), cfg.dropout, _same)
    each = zip(weights, values[0::3], values[2::3], cross, values[1::3], strict=True)
    drops = [{"drops": drop[:3], "cross_drops": drop[3:]} for drop in each]
    options = {"causal": True, "memory": memory, "memory_mask": _over_queries(source_mask)}
    return logits(params, _layers(params, "decoder", target, cfg, first, drops, **options), cfg)


def _check_memory(memory: Tensor, batch: int, cfg: Config) -> None:
    if memory.ndim != 3 or memory.shape[0] != batch or memory.shape[2] != cfg.width:
        wanted = f"({batch}, source time, {cfg.width})"
        raise ValueError(f"transformer: expected a memory of shape {wanted}, found {tuple(memory.shape)}")


def apply(
    params: dict, x: tuple[Tensor, Tensor], cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """Scores of each next target token: x is (source, target), `cfg.padding_id` behind what is shorter.

    Args:
        x: (batch, source time) and (batch, target time) integers.
        key: (2,) or one an example (batch, 2); needed in training if there is dropout.

    Returns:
        logits, (batch, target time, target vocabulary).

    Raises:
        ValueError: as `encode` and `decode`.
    """
    source, target = x
    memory = encode(params, source, cfg, key=key, train=train)
    return decode(params, target, memory, cfg, source_mask=source != cfg.padding_id, key=key, train=train)


def attention_maps(params: dict, x: tuple[Tensor, Tensor], cfg: Config) -> dict[str, Tensor]:
    """Where every head looks: x as in `apply` -> `encoder`, `decoder` and `cross`.

    Returns:
        each (batch, layers, heads, queries, keys), rows that sum to 1. What padding looks at has no meaning.
    """
    source, target = x
    _check("source", source, cfg)
    _check("target", target, cfg)
    found: dict[str, list[Tensor]] = {"encoder": [], "decoder": [], "cross": []}

    def record(weights: Tensor, where: str) -> Tensor:
        found[where].append(weights)
        return weights

    # Where dropout of the weights would be, they are seen.
    on_encoder, on_decoder, on_cross = (partial(record, where=where) for where in found)
    mask = _over_queries(source != cfg.padding_id)
    drops = {"drops": (on_encoder, _same, _same)}
    memory = _layers(params, "encoder", source, cfg, _same, [drops] * cfg.layers, mask=mask)
    drops = {"drops": (on_decoder, _same, _same), "cross_drops": (on_cross, _same)}
    options = {"causal": True, "memory": memory, "memory_mask": mask}
    _layers(params, "decoder", target, cfg, _same, [drops] * cfg.layers, **options)
    return {where: torch.stack(maps, 1) for where, maps in found.items()}


# Decoding, a token at a time.


def start(params: dict, memory: Tensor, source_mask: Tensor | None, cfg: Config, places: int) -> dict:
    """What `step` needs to know of the source and of the `places` tokens to come.

    Args:
        memory: (batch, source time, width), from `encode`.
        source_mask: as in `decode`.

    Returns:
        a tree of tensors, batch leading in each: `past`, a `core.attention.Cache` a layer of keys and values of the
        target, each (batch, heads, places, depth); and `shared`, what is known of the source (the mask, and keys and
        values of the memory). To reorder or repeat examples, index every leaf.

    Raises:
        ValueError: as `decode`, or places that are more than the context.
    """
    _check_memory(memory, memory.shape[0], cfg)
    _check_mask("source_mask", source_mask, memory.shape[:2])
    if places > cfg.context:
        raise ValueError(f"transformer: {places} places are more than the context of {cfg.context}")
    blocks, depth = params["decoder"]["blocks"], cfg.width // cfg.heads
    mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device) if source_mask is None else source_mask
    empty = [empty_cache(len(memory), cfg.heads, places, depth, memory.dtype, memory.device) for _ in blocks]
    keys_values = [cross_keys_values(p["cross"], memory, cfg.heads) for p in blocks]
    return {"past": empty, "shared": {"mask": mask, "memory": keys_values}}


def step(
    params: dict, cache: dict, tokens: Tensor, position: Tensor, cfg: Config, *, donate: bool = False
) -> tuple[Tensor, dict]:
    """Scores of the next token of each example, given all tokens before it in the cache.

    Args:
        cache: from `start`. `shared` may stay as it is while `past` is of several rows an example, one behind the other
            (the beams of a sentence), and so are tokens.
        tokens: (batch,) the tokens at `position`.
        position: () or (batch,) integer, from 0; below the places of `start`, which is not checked, as that would
            wait for the device.
        donate: the buffers of `cache["past"]` may be overwritten; it must not be used again. Otherwise they are copied.

    Returns:
        logits (batch, target vocabulary) and the new cache.

    With `cfg.attention` "auto" and uncompiled, attention is torch's fused kernel; "explicit" vmaps on the CPU too.
    """
    if tokens.ndim != 1:
        raise ValueError(f"transformer: expected tokens of shape (batch,), found {tuple(tokens.shape)}")
    # As in gpt2.decode: few kernels count most in eager mode.
    method = "fused" if cfg.attention == "auto" and not torch.compiler.is_compiling() else cfg.attention
    options = {"norm_first": cfg.norm_first, "activation": cfg.activation, "eps": cfg.eps, "method": method}
    shared, p, position = cache["shared"], params["decoder"], position.expand(tokens.shape)
    options |= {"memory_mask": _over_queries(shared["mask"]), "donate": donate}
    x, updated = _embed(params, "decoder", tokens[:, None], position[:, None], cfg), []
    for one, memory, past in zip(p["blocks"], shared["memory"], cache["past"], strict=True):
        x, past = cached_block(one, x, past, position, cfg.heads, memory=memory, **options)
        updated.append(past)
    x = layer_norm(p["norm"], x, eps=cfg.eps) if "norm" in p else x
    return logits(params, x[:, 0], cfg), {"past": updated, "shared": shared}


def stepper(params: dict, cfg: Config, step: Callable = step) -> Callable:
    """`step`, or a compiled form of it, as `nets.language.decoding` and `nets.language.beam_search` call it.

    cache = start(params, memory, source_mask, cfg, places)
    beam_search(stepper(params, cfg), cache["past"], first, shared=cache["shared"], places_axis=2, beams=5, ...)
    """

    def call(past: list[Cache], tokens: Tensor, position: Tensor, shared: dict) -> tuple[Tensor, list[Cache]]:
        scores, cache = step(params, {"past": past, "shared": shared}, tokens, position, cfg)
        return scores, cache["past"]

    return call
