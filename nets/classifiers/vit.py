"""ViT: a transformer that reads an image as a sequence of patches.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale"
(arXiv:2010.11929), equations 1 to 4:

    z = [class token; embedded patches] + positions;   z = block_i(z);   logits = head(norm(z)[0])

The positions are learned, one vector per patch, so a net is for images of one size; `resize` makes one for another
size. The small sizes are those of Touvron et al. 2021 (DeiT, arXiv:2012.12877).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers, random
from core.attention import self_attention_spec
from core.layers import dropout_sites, layer_norm, layer_norm_spec, linear, linear_spec, stochastic_depth
from core.spec import Param
from nets.blocks.conv_norm import check_images, fitting_table, patch_embedding, patch_embedding_spec
from nets.blocks.transformer_block import block, block_spec
from nets.weights import Rename, fill, read

RATES = ("dropout", "attention_dropout", "stochastic_depth")


@dataclass(frozen=True)
class Config:
    """Sizes and rates of a ViT."""

    image: int = 224
    """Pixels a side."""
    patch: int = 16
    layers: int = 12
    heads: int = 12
    width: int = 768
    hidden: int = 3072
    """Hidden units of the MLPs."""
    dropout: float = 0.0
    """Dropout rate of the embeddings (patches plus positions) and of the outputs of attention and MLPs, as in
    transformers; torchvision also drops the MLPs' hidden units."""
    attention_dropout: float = 0.0
    """Dropout rate of the attention weights."""
    stochastic_depth: float = 0.0
    """Probability that a branch of the last block is dropped; it grows linearly from 0 in the first."""
    pool: str = "token"
    """Input of the head: token is the class token, mean the mean of the patches."""
    zero_head: bool = True
    """Start the head's weights at 0, as the paper does before fine-tuning, so that all classes start equal."""
    eps: float = 1e-6
    """Epsilon of the norms; transformers' files are for 1e-12."""
    channels: int = 3
    classes: int = 1000
    attention: str = "auto"
    """Method, as in core.attention.attention."""

    def __post_init__(self):
        for name in ("image", "patch", "layers", "heads", "width", "hidden", "channels", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"vit: {name} is {getattr(self, name)}; expected at least 1")
        if self.image % self.patch:
            raise ValueError(f"vit: image {self.image} is not divisible by patch {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"vit: width {self.width} is not divisible by {self.heads} heads")
        for name in RATES:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"vit: {name} {getattr(self, name)} is outside [0, 1)")
        if self.pool not in ("token", "mean"):
            raise ValueError(f"vit: pool '{self.pool}' is unknown; expected token or mean")


def _large(patch: int) -> Config:
    return Config(patch=patch, layers=24, heads=16, width=1024, hidden=4096)


PRESETS = {
    "vit_ti_16": Config(heads=3, width=192, hidden=768),
    "vit_s_16": Config(heads=6, width=384, hidden=1536),
    "vit_b_16": Config(),
    "vit_b_32": Config(patch=32),
    "vit_l_16": _large(16),
    "vit_l_32": _large(32),
    "vit_h_14": Config(patch=14, layers=32, heads=16, width=1280, hidden=5120),
}


def spec(cfg: Config) -> dict:
    """`class_token`, `patches`, `positions`, `blocks.i`, `norm` and `head`.

    Matrices are initialised as torchvision's: Glorot's uniform, the output of attention as in torch.nn.Linear. Biases
    and the class token start at 0.
    """
    patches = (cfg.image // cfg.patch) ** 2
    as_torch = initializers.kaiming_uniform(a=math.sqrt(5))
    one_block = block_spec(cfg.width, cfg.heads, cfg.hidden)
    one_block |= {"attn": self_attention_spec(cfg.width, cfg.heads, proj_init=as_torch)}
    head = {"init": initializers.zeros} if cfg.zero_head else {}
    return {
        "blocks": [one_block] * cfg.layers,
        "class_token": Param((1, 1, cfg.width), axes=(None, None, "embed")),
        "head": linear_spec(cfg.width, cfg.classes, **head),
        "norm": layer_norm_spec(cfg.width),
        "patches": patch_embedding_spec(cfg.channels, cfg.width, cfg.patch, init=initializers.lecun_normal()),
        "positions": Param((1, 1 + patches, cfg.width), initializers.normal(0.02), (None, "time", "embed")),
    }


def _same(x: Tensor) -> Tensor:
    return x


def _branch(x: Tensor, drop: Callable[[Tensor], Tensor], rate: float, key: Tensor | None) -> Tensor:
    return stochastic_depth(drop(x), rate, key)


def _drops(key: Tensor, cfg: Config, batch: int) -> tuple[Callable, list[tuple]]:
    """Dropout of the embeddings, and per block of (attention weights, attention branch, MLP branch)."""
    time, n = 1 + (cfg.image // cfg.patch) ** 2, cfg.layers
    weights_key, values_key, depth_key = random.sites(key, 3).unbind(0)
    on_weights, on_values, depth_keys = [None] * n, [_same] * (1 + 2 * n), [None] * (2 * n)
    if cfg.attention_dropout:
        on_weights = dropout_sites(weights_key, n, (batch, cfg.heads, time, time), cfg.attention_dropout)
    if cfg.dropout:
        on_values = dropout_sites(values_key, 1 + 2 * n, (batch, time, cfg.width), cfg.dropout)
    if cfg.stochastic_depth:
        depth_keys = random.sites(depth_key, 2 * n)
    first, *on_values = on_values
    rates = [cfg.stochastic_depth * (i // 2) / max(n - 1, 1) for i in range(2 * n)]
    branches = [
        partial(_branch, drop=drop, rate=rate, key=k)
        for drop, rate, k in zip(on_values, rates, depth_keys, strict=True)
    ]
    return first, list(zip(on_weights, branches[0::2], branches[1::2], strict=True))


def hidden_states(
    params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> list[Tensor]:
    """Input of the first block and output of each, (batch, 1 + patches, width), class token first.

    Args:
        x: (batch, channels, cfg.image, cfg.image).
        key: (2,) or one per example (batch, 2); needed in training if there is any dropout or stochastic depth.

    Raises:
        ValueError: images of another size or with other channels; no key where one is needed.
    """
    check_images("vit", x, cfg.channels, cfg.patch)
    if tuple(x.shape[2:]) != (cfg.image, cfg.image):
        sizes = f"the images are {x.shape[2]} x {x.shape[3]}; expected {cfg.image} x {cfg.image}"
        raise ValueError(f"vit: {sizes} (vit.resize makes a net for another size)")
    rates = [f"{name} {getattr(cfg, name)}" for name in RATES if train and getattr(cfg, name)]
    if rates and key is None:
        raise ValueError(f"vit: training with {', '.join(rates)} draws random numbers; pass key=")
    first, drops = _drops(key, cfg, x.shape[0]) if rates else (_same, [None] * cfg.layers)
    patches = patch_embedding(params["patches"], x)  # (batch, width, rows, columns)
    patches = patches.flatten(2).transpose(1, 2)  # (batch, patches, width)
    token = params["class_token"].expand(x.shape[0], 1, cfg.width)  # (batch, 1, width)
    embedded = torch.cat([token, patches], 1) + params["positions"]  # eq. 1: (batch, 1 + patches, width)
    states = [first(embedded)]
    options = {"activation": "gelu", "eps": cfg.eps, "method": cfg.attention}
    for p, drop in zip(params["blocks"], drops, strict=True):
        states.append(block(p, states[-1], cfg.heads, drops=drop, **options))  # eq. 2 and 3: z = block_i(z)
    return states


def feature_maps(
    params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> list[Tensor]:
    """`hidden_states` of the patches, laid out as images: (batch, width, rows, columns) each."""
    side = cfg.image // cfg.patch
    states = hidden_states(params, x, cfg, key=key, train=train)
    return [state[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for state in states]  # (batch, width, side, side)


def features(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Penultimate features: the class token, or the mean of the patches, after the last norm. -> (batch, width)."""
    z = hidden_states(params, x, cfg, key=key, train=train)[-1]  # (batch, 1 + patches, width)
    z = layer_norm(params["norm"], z, eps=cfg.eps)
    return z[:, 0] if cfg.pool == "token" else z[:, 1:].mean(1)  # eq. 4: (batch, width)


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of images.

    Args:
        x: (batch, channels, cfg.image, cfg.image).
        key: as in `hidden_states`.

    Returns:
        (batch, classes).
    """
    return linear(params["head"], features(params, x, cfg, key=key, train=train))


def _resized(positions: Tensor, side: int) -> Tensor:
    """Positions for side * side patches, interpolated (bicubic, corner patches keep theirs).

    positions: (1, 1 + patches, width) of a square of patches, else they are returned unchanged.
    """
    old = math.isqrt(max(sum(positions.shape[1:2]) - 1, 0))
    if positions.ndim != 3 or old in (0, side) or positions.shape[1] != 1 + old**2:
        return positions
    token, patches = positions.split([1, old**2], 1)  # (1, 1, width), (1, old * old, width)
    grid = patches.transpose(1, 2).unflatten(2, (old, old))  # (1, width, old, old)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=True)  # (1, width, side, side)
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], 1)  # (1, 1 + side * side, width)


def resize(params: dict, cfg: Config, image: int) -> tuple[dict, Config]:
    """The net for images of another size: the positions interpolated (bicubic, corner patches keep theirs).

    Section 3.2 of the paper, for fine-tuning at a higher resolution than that of pre-training.

    Args:
        image: pixels per side.

    Raises:
        ValueError: the patches do not divide it.
    """
    resized = replace(cfg, image=image)
    return params | {"positions": _resized(params["positions"], image // cfg.patch)}, resized


NAMES = {
    "torchvision": {
        "blocks.#.attn.proj": "encoder.layers.encoder_layer_#.self_attention.out_proj.*",
        "blocks.#.attn.qkv": "encoder.layers.encoder_layer_#.self_attention.in_proj_*",
        "blocks.#.mlp.down": "encoder.layers.encoder_layer_#.mlp.3.*",
        "blocks.#.mlp.up": "encoder.layers.encoder_layer_#.mlp.0.*",
        "blocks.#.norm1": "encoder.layers.encoder_layer_#.ln_1.*",
        "blocks.#.norm2": "encoder.layers.encoder_layer_#.ln_2.*",
        "class_token": "class_token",
        "head": "heads.head.*",
        "norm": "encoder.ln.*",
        "patches": "conv_proj.*",
        "positions": "encoder.pos_embedding",
    },
    "transformers": {
        "blocks.#.attn.proj": "encoder.layer.#.attention.output.dense.*",
        "blocks.#.attn.qkv": tuple(f"encoder.layer.#.attention.attention.{x}.*" for x in ("query", "key", "value")),
        "blocks.#.mlp.down": "encoder.layer.#.output.dense.*",
        "blocks.#.mlp.up": "encoder.layer.#.intermediate.dense.*",
        "blocks.#.norm1": "encoder.layer.#.layernorm_before.*",
        "blocks.#.norm2": "encoder.layer.#.layernorm_after.*",
        "class_token": "embeddings.cls_token",
        "head": "classifier.*",
        "norm": "layernorm.*",
        "patches": "embeddings.patch_embeddings.projection.*",
        "positions": "embeddings.position_embeddings",
    },
    "timm": {
        "blocks.#.attn.proj": "blocks.#.attn.proj.*",
        "blocks.#.attn.qkv": "blocks.#.attn.qkv.*",
        "blocks.#.mlp.down": "blocks.#.mlp.fc2.*",
        "blocks.#.mlp.up": "blocks.#.mlp.fc1.*",
        "blocks.#.norm1": "blocks.#.norm1.*",
        "blocks.#.norm2": "blocks.#.norm2.*",
        "class_token": "cls_token",
        "head": "head.*",
        "norm": "norm.*",
        "patches": "patch_embed.proj.*",
        "positions": "pos_embed",
    },
}
"""Our names -> those in other libraries' files: # is the number of a block, * weight and bias."""


def rename_table(cfg: Config, source: str = "torchvision") -> dict[str, Rename]:
    """Our names -> torchvision's, timm's, or those in a file of transformers' ViTForImageClassification (less "vit.").

    Raises:
        ValueError: a source that is none of these.
    """
    if source not in NAMES:
        raise ValueError(f"vit: source '{source}' is unknown; expected one of {', '.join(NAMES)}")
    table = {}
    for ours, theirs in NAMES[source].items():
        several = isinstance(theirs, tuple)
        parts = ("",) if ours in ("class_token", "positions") else ("bias", "weight")
        for layer, part in product(range(cfg.layers if "#" in ours else 1), parts):
            names = [x.replace("#", str(layer)).replace("*", part) for x in (theirs if several else (theirs,))]
            mine = ours.replace("#", str(layer)) + (f".{part}" if part else "")
            table[mine] = Rename(tuple(names) if several else names[0])
    return table


def recognise(state: dict[str, Tensor], cfg: Config) -> tuple[dict[str, Tensor], dict[str, Rename]]:
    """(tensors, rename table of the library that wrote them). Positions for another image size are resized."""
    state = {name.removeprefix("vit."): value for name, value in state.items()}
    # The first files of torchvision have other names for the MLP; transformers' may have a layer for the token.
    state = {n.replace("mlp.linear_1.", "mlp.0.").replace("mlp.linear_2.", "mlp.3."): x for n, x in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith("pooler.")}
    table = fitting_table(state, *(rename_table(cfg, source) for source in NAMES))
    positions = table["positions"].theirs
    if positions in state:
        state[positions] = _resized(state[positions].float(), cfg.image // cfg.patch)
    return state, table


def from_published(state: dict[str, Tensor], cfg: Config, what: str = "ViT weights") -> dict:
    """Parameters from the tensors of torchvision, timm or transformers, which their names tell apart.

    Those of a net for another image size are resized.

    Raises:
        WeightsError: naming the first tensor that is missing, left over or misshapen.
    """
    return fill(spec(cfg), *recognise(state, cfg), what)


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters from a file of torchvision, timm or transformers: a local file or folder, or a hub repository."""
    return from_published(read(source), cfg, source)
