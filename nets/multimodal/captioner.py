"""Captions: a ViT reads a picture, a causal transformer writes about it word by word.

The encoder and decoder of Vinyals et al. 2015, "Show and Tell" (arXiv:1411.4555), both made of attention here, as in
transformers' ViT-GPT2:

    memory = W norm(encoder_i([class token; embedded patches] + positions))
    y = tokens[words] + positions;   y = decoder_i(y, memory);   logits = norm(y) tokensᵀ

A layer of the decoder attends to the words so far, then to the patches: where a word looks. Dosovitskiy et al. 2021
(arXiv:2010.11929); Radford et al. 2019. With `stem`, stages of two small convolutions come before the patches, by which
a ViT learns from far fewer pictures (Xiao et al. 2021, arXiv:2106.14881).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers, random
from core.attention import Cache, cross_keys_values, empty_cache
from core.layers import (
    conv,
    conv_spec,
    dropout_sites,
    embedding,
    embedding_spec,
    group_norm,
    group_norm_spec,
    layer_norm,
    layer_norm_spec,
    linear,
    linear_spec,
)
from core.layers.checks import check_tensor
from core.spec import Param
from core.tree import Tree
from nets.blocks.conv_norm import check_images, patch_embedding, patch_embedding_spec
from nets.blocks.transformer_block import block, block_spec, cached_block, decoder_block_spec, identity, sinusoids

SIZES = ("image", "channels", "patch", "image_layers", "image_heads", "image_width", "image_hidden")
SIZES += ("vocabulary", "context", "text_layers", "text_heads", "text_width", "text_hidden")
GROUPS = 8
"""Groups of the norms of the stem."""


@dataclass(frozen=True)
class Config:
    """Sizes and rates; by default those of ViT-B/16 and GPT-2 in its smallest size."""

    image: int = 224
    """Pixels per side."""
    channels: int = 3
    patch: int = 16
    """Pixels per side of a patch."""
    stem: tuple[int, ...] = ()
    """Channels of each stage of convolutions before the patches are embedded; a stage halves the sides,
    so that there are up to log2(patch) of them."""
    image_layers: int = 12
    image_heads: int = 12
    image_width: int = 768
    """Size of the encoder's hidden states."""
    image_hidden: int = 3072
    """Hidden units of the encoder's MLPs."""
    vocabulary: int = 50257
    context: int = 1024
    """Maximal number of tokens in a caption, with the one that it starts from."""
    text_layers: int = 12
    text_heads: int = 12
    text_width: int = 768
    """Size of the decoder's hidden states."""
    text_hidden: int = 3072
    """Hidden units of the decoder's MLPs."""
    dropout: float = 0.0
    """Dropout rate of the embeddings and of each sub-layer's output."""
    image_eps: float = 1e-12
    """Epsilon of the encoder's norms."""
    text_eps: float = 1e-5
    """Epsilon of the decoder's norms."""
    attention: str = "auto"
    """Method of `core.attention.attention`: auto, explicit or fused."""

    def __post_init__(self):
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"captioner: {name} is {getattr(self, name)}; expected at least 1")
        for tower in ("image", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"captioner: {tower}_width {width} is not divisible by {heads} heads")
        if self.image % self.patch:
            raise ValueError(f"captioner: image {self.image} is not divisible by patch {self.patch}")
        if any(width < 1 or width % GROUPS for width in self.stem):
            raise ValueError(f"captioner: stem {self.stem}; expected multiples of {GROUPS}")
        if self.patch % 2 ** len(self.stem):
            raise ValueError(f"captioner: patch {self.patch} is not divisible by the stem's 2^{len(self.stem)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"captioner: dropout {self.dropout} is outside [0, 1)")


TINY = {"image_layers": 1, "image_heads": 4, "image_width": 128, "image_hidden": 256, "vocabulary": 256, "context": 32}
TINY |= {"text_layers": 2, "text_heads": 4, "text_width": 128, "text_hidden": 256}
SMALL = {"image_layers": 4, "image_heads": 4, "image_width": 192, "image_hidden": 768, "vocabulary": 8000}
SMALL |= {"context": 64, "text_layers": 3, "text_heads": 4, "text_width": 192, "text_hidden": 768}
PRESETS = {
    "tiny": Config(image=64, patch=8, stem=(16, 32, 64), **TINY),
    "small": Config(image=128, patch=16, stem=(16, 32, 64, 128), **SMALL),
    "vit-gpt2": Config(),
}


def _grid(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Sinusoids of the row and of the column of each patch, (1, 1 + patches, width); 0 for the class token."""
    _, count, width = shape
    places, half = torch.arange(round((count - 1) ** 0.5), device=key.device), width // 4 * 2
    one = sinusoids(places, half)  # (side, half)
    both = one[:, None].expand(-1, len(one), -1), one[None].expand(len(one), -1, -1)
    table = torch.cat(both, -1).flatten(0, 1)  # (patches, 2 half)
    return F.pad(table, (0, width - 2 * half, 1, 0))[None].to(dtype)


def _conv_spec(d_in: int, d_out: int) -> Tree:
    init = initializers.kaiming_normal(nonlinearity="relu")
    return {"conv": conv_spec(d_in, d_out, 3, bias=False, init=init), "norm": group_norm_spec(d_out)}


def spec(cfg: Config) -> Tree:
    """`encoder` and `decoder`, and the `bridge` between them where their widths differ.

    Matrices are initialised by Glorot's uniform, the embeddings of words and of their positions by N(0, 0.02^2), the
    positions of the patches by sinusoids. The embedding of the words is the output layer too.
    """
    small = initializers.normal(0.02)
    channels, patch = (cfg.channels, *cfg.stem), cfg.patch // 2 ** len(cfg.stem)
    encoder = {
        "blocks": [block_spec(cfg.image_width, cfg.image_heads, cfg.image_hidden)] * cfg.image_layers,
        "class_token": Param((1, 1, cfg.image_width), axes=(None, None, "embed")),
        "norm": layer_norm_spec(cfg.image_width),
        "patches": patch_embedding_spec(channels[-1], cfg.image_width, patch, init=initializers.lecun_normal()),
        "positions": Param((1, 1 + (cfg.image // cfg.patch) ** 2, cfg.image_width), _grid, (None, "time", "embed")),
    }
    if cfg.stem:
        pairs = zip(channels, cfg.stem, strict=False)
        encoder["stem"] = [[_conv_spec(a, b), _conv_spec(b, b)] for a, b in pairs]
    decoder = {
        "blocks": [decoder_block_spec(cfg.text_width, cfg.text_heads, cfg.text_hidden)] * cfg.text_layers,
        "norm": layer_norm_spec(cfg.text_width),
        "positions": embedding_spec(cfg.context, cfg.text_width, init=small, axes=("time", "embed")),
        "tokens": embedding_spec(cfg.vocabulary, cfg.text_width, init=small, axes=("vocabulary", "embed")),
    }
    bridge = {"bridge": linear_spec(cfg.image_width, cfg.text_width)} if cfg.image_width != cfg.text_width else {}
    return {**bridge, "decoder": decoder, "encoder": encoder}


def _drops(key: Tensor | None, cfg: Config, train: bool, side: int, n: int, shape: tuple[int, ...]) -> list[Callable]:
    """Dropout at n sites of the encoder (side 0) or decoder (side 1), whose values have this shape."""
    if not train or not cfg.dropout:
        return [identity] * n
    if key is None:
        raise ValueError(f"captioner: training with dropout {cfg.dropout} draws random numbers; pass key=")
    return dropout_sites(random.sites(key, 2)[side], n, shape, cfg.dropout)


def _embed_patches(p: Tree, x: Tensor) -> Tensor:
    """x (batch, channels, image, image) -> (batch, patches, width)."""
    for first, second in p.get("stem", ()):
        for one, stride in ((first, 2), (second, 1)):
            x = conv(one["conv"], x, stride=stride, padding=1)  # (batch, stem, height / 2, width / 2)
            x = F.relu(group_norm(one["norm"], x, GROUPS))
    return patch_embedding(p["patches"], x).flatten(2).transpose(1, 2)  # (batch, patches, width)


def encode(params: Tree, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """The memory of pictures: x (batch, channels, image, image) -> (batch, 1 + patches, text width), class token first.

    Args:
        key: (2,) or one per example (batch, 2); needed in training with dropout. `encode` and `decode` draw different
            masks from one key.

    Raises:
        ValueError: pictures of another size or with other channels, no key where one is needed.
    """
    check_tensor("captioner", x)
    check_images("captioner", x, cfg.channels, 1)
    if tuple(x.shape[2:]) != (cfg.image, cfg.image):
        raise ValueError(f"captioner: the images are {x.shape[2]} x {x.shape[3]}; expected {cfg.image} x {cfg.image}")
    p = params["encoder"]
    patches = _embed_patches(p, x)  # (batch, patches, width)
    token = p["class_token"].expand(x.shape[0], 1, cfg.image_width)  # (batch, 1, width)
    z = torch.cat([token, patches], 1) + p["positions"]  # (batch, 1 + patches, width)
    first, *drops = _drops(key, cfg, train, 0, 1 + 2 * cfg.image_layers, tuple(z.shape))
    options = {"activation": "gelu", "eps": cfg.image_eps, "method": cfg.attention}
    z = first(z)
    for one, *drop in zip(p["blocks"], drops[0::2], drops[1::2], strict=True):
        z = block(one, z, cfg.image_heads, drops=(None, *drop), **options)
    z = layer_norm(p["norm"], z, eps=cfg.image_eps)
    return linear(params["bridge"], z) if "bridge" in params else z  # (batch, 1 + patches, text width)


def _decoded(
    params: Tree, tokens: Tensor, memory: Tensor, cfg: Config, drops: list[Callable], see: list[Callable | None]
) -> Tensor:
    """Logits (batch, time, vocabulary); `see` has a function of the weights of each layer's attention to the memory."""
    check_tensor("captioner", tokens, "tokens")
    if tokens.ndim != 2 or not 0 < tokens.shape[1] <= cfg.context:
        raise ValueError(f"captioner: expected tokens (batch, time up to {cfg.context}), found {tuple(tokens.shape)}")
    if memory.ndim != 3 or memory.shape[0] != tokens.shape[0] or memory.shape[2] != cfg.text_width:
        expected = f"expected a memory of shape ({tokens.shape[0]}, patches, {cfg.text_width})"
        raise ValueError(f"captioner: {expected}, found {tuple(memory.shape)}")
    p, (first, *drops) = params["decoder"], drops
    y = embedding(p["tokens"], tokens) + p["positions"]["weight"][: tokens.shape[1]]  # (batch, time, width)
    y = first(y)
    options = {"causal": True, "memory": memory, "eps": cfg.text_eps, "method": cfg.attention}
    for one, look, a, b, c in zip(p["blocks"], see, drops[0::3], drops[1::3], drops[2::3], strict=True):
        y = block(one, y, cfg.text_heads, drops=(None, a, c), cross_drops=(look, b), **options)
    return linear(p["tokens"], layer_norm(p["norm"], y, eps=cfg.text_eps))  # (batch, time, vocabulary)


def decode(
    params: Tree, tokens: Tensor, memory: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """Logits of each next word, given the words so far and the picture.

    What follows a caption's end needs no mask: the positions before it do not attend to it.

    Args:
        tokens: (batch, time) integers.
        memory: (batch, 1 + patches, text width), from `encode`.
        key: as in `encode`.

    Returns:
        logits, (batch, time, vocabulary).

    Raises:
        ValueError: tokens of another shape or longer than the context, a memory of another batch, no key where one is
            needed.
    """
    drops = _drops(key, cfg, train, 1, 1 + 3 * cfg.text_layers, (*tokens.shape, cfg.text_width))
    return _decoded(params, tokens, memory, cfg, drops, [None] * cfg.text_layers)


def apply(
    params: Tree, x: tuple[Tensor, Tensor], cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> Tensor:
    """Logits of each next word, (batch, time, vocabulary).

    Args:
        x: pictures (batch, channels, image, image), and tokens (batch, time) of integers below `cfg.vocabulary`.
        key: (2,) or one per example (batch, 2); needed in training with dropout.

    Raises:
        ValueError: as `encode` and `decode`.
    """
    memory = encode(params, x[0], cfg, key=key, train=train)  # (batch, 1 + patches, text width)
    return decode(params, x[1], memory, cfg, key=key, train=train)


def attention_maps(params: Tree, x: tuple[Tensor, Tensor], cfg: Config) -> Tensor:
    """Where each word looks: the weights of the decoder's attention to the memory, each row of which sums to 1.

    x: as in `apply`. -> (batch, layers, heads, time, 1 + patches); row t is of the word after token t.
    """
    maps: list[Tensor] = []

    def see(weights: Tensor) -> Tensor:  # dropout of the weights is a function of them: this one takes its place
        maps.append(weights)
        return weights

    drops = [identity] * (1 + 3 * cfg.text_layers)
    _decoded(params, x[1], encode(params, x[0], cfg), cfg, drops, [see] * cfg.text_layers)
    return torch.stack(maps, 1)  # (batch, layers, heads, time, 1 + patches)


# Decoding, a word at a time.


def start(params: Tree, memory: Tensor, cfg: Config, positions: int) -> dict:
    """Initial state of `step`: the memory's keys and values, and room for `positions` words.

    memory: (batch, 1 + patches, text width), from `encode`.

    Returns:
        tree of tensors, batch leading in each: `past`, one `core.attention.Cache` per layer with the words' keys and
        values, (batch, heads, positions, depth); `shared`, one with those of the memory.

    Raises:
        ValueError: more positions than the context.
    """
    if positions > cfg.context:
        raise ValueError(f"captioner: {positions} positions exceed the context of {cfg.context}")
    blocks, depth = params["decoder"]["blocks"], cfg.text_width // cfg.text_heads
    like = memory.dtype, memory.device
    empty = [empty_cache(len(memory), cfg.text_heads, positions, depth, *like) for _ in blocks]
    return {"past": empty, "shared": [cross_keys_values(p["cross"], memory, cfg.text_heads) for p in blocks]}


def step(
    params: Tree, cache: dict, tokens: Tensor, position: Tensor, cfg: Config, *, donate: bool = False
) -> tuple[Tensor, dict]:
    """Logits of the next word of each caption, given all words before it in the cache.

    Args:
        cache: from `start`. `past` and tokens may have several consecutive rows per picture (its beams) while `shared`
            has one.
        tokens: (batch,) the words at `position`.
        position: () or (batch,) integer, from 0; below the positions of `start`, which is not checked, as that would
            wait for the device.
        donate: overwrite the buffers of `cache["past"]`, which must not be used again; otherwise they are copied.

    Returns:
        logits (batch, vocabulary) and the new cache.
    """
    if tokens.ndim != 1:
        raise ValueError(f"captioner: expected tokens of shape (batch,), found {tuple(tokens.shape)}")
    p, position = params["decoder"], position.expand(tokens.shape)  # (batch,)
    method = "fused" if cfg.attention == "auto" and not torch.compiler.is_compiling() else cfg.attention
    y = (embedding(p["tokens"], tokens) + embedding(p["positions"], position))[:, None]  # (batch, 1, width)
    options, updated = {"eps": cfg.text_eps, "method": method, "donate": donate}, []
    for one, memory, past in zip(p["blocks"], cache["shared"], cache["past"], strict=True):
        y, past = cached_block(one, y, past, position, cfg.text_heads, memory=memory, **options)
        updated.append(past)
    logits = linear(p["tokens"], layer_norm(p["norm"], y[:, 0], eps=cfg.text_eps))  # (batch, vocabulary)
    return logits, {"past": updated, "shared": cache["shared"]}


def stepper(params: Tree, cfg: Config, step: Callable = step) -> Callable:
    """`step`, or a compiled form of it, as `nets.language.decoding` and `nets.language.beam_search` call it.

    `cache = start(params, encode(params, pictures, cfg), cfg, positions)`, then
    `beam_search(stepper(params, cfg), cache["past"], first, shared=cache["shared"], positions_axis=2, beams=5, ...)`.
    """

    def call(past: list[Cache], tokens: Tensor, position: Tensor, shared: list[Cache]) -> tuple[Tensor, list[Cache]]:
        logits, cache = step(params, {"past": past, "shared": shared}, tokens, position, cfg)
        return logits, cache["past"]

    return call
