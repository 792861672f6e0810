"""TransUNet: a U-Net whose coarsest level is a transformer over the feature map of a residual net.

Chen et al. 2021, "TransUNet: Transformers Make Strong Encoders for Medical Image Segmentation" (arXiv:2102.04306), the
hybrid "R50-ViT-B_16". A residual net with weight standardisation and group norm gives the feature maps f_1, f_2, f_3 at
1/2, 1/4 and 1/8 of the image and f_4 at 1/16; each position of f_4 is a token of a ViT without class token; its output
is enlarged step by step and meets the finer maps:

    z = ViT(embed(f_4) + positions);   u_4 = conv(z);   u_{i-1} = convs([enlarge(u_i), f_{i-1}]);   logits = head(u_0)

It equals the authors' code, whose files `nets.dense.by_name` reads, where that differs from the paper too: a block of
the residual net has its norms after the convolutions, and maps that the pooling without padding left a pixel short are
filled up with zeros on the right and at the bottom.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers, random
from core.layers import (
    conv,
    conv_spec,
    dropout_sites,
    group_norm,
    group_norm_spec,
    layer_norm,
    layer_norm_spec,
    max_pool,
)
from core.spec import Param
from nets.blocks.conv_norm import (
    affine_names,
    check_images,
    conv_norm,
    conv_norm_names,
    conv_norm_spec,
    patch_embedding,
    patch_embedding_spec,
)
from nets.blocks.transformer_block import block, block_spec, identity
from nets.weights import Rename

TORCH = initializers.kaiming_uniform(a=math.sqrt(5))
"""The default of torch.nn for weights."""
EPS = 1e-6
"""Epsilon of the norms, but that of a shortcut."""


@dataclass(frozen=True)
class Config:
    """Sizes of a TransUNet: a residual net, a transformer on its feature maps, a decoder."""

    image: int = 224
    """Pixels per side, a multiple of 16: the positions are learned, one vector per 16 x 16 pixels."""
    depths: tuple[int, int, int] = (3, 4, 9)
    """Blocks in each stage of the residual net."""
    stem: int = 64
    """Channels after the first convolution; stage s has 4 * 2**s times as many."""
    groups: int = 32
    """Groups of the norms of the residual net."""
    layers: int = 12
    heads: int = 12
    width: int = 768
    hidden: int = 3072
    """Hidden units of the MLPs."""
    decoder: tuple[int, int, int, int] = (256, 128, 64, 16)
    """Channels at 1/8, 1/4, 1/2 and 1 of the image on the way up."""
    bridge: int = 512
    """Channels between the transformer and the way up."""
    dropout: float = 0.1
    """Dropout rate of the embeddings and of the outputs of the MLPs; the authors also drop the MLPs' hidden units."""
    channels: int = 3
    classes: int = 9

    def __post_init__(self):
        for name in ("image", "stem", "layers", "heads", "width", "hidden", "bridge", "channels", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"transunet: {name} is {getattr(self, name)}; expected at least 1")
        if self.image % 16:
            raise ValueError(f"transunet: image is {self.image}; expected a multiple of 16")
        if self.width % self.heads or self.stem % self.groups:
            sizes = f"{self.heads} heads do not divide width {self.width}, or {self.groups} groups stem {self.stem}"
            raise ValueError(f"transunet: {sizes}")
        if len(self.depths) != 3 or min(self.depths) < 1 or len(self.decoder) != 4 or min(self.decoder) < 1:
            raise ValueError(
                f"transunet: depths {self.depths}, decoder {self.decoder}; expected 3 and 4 numbers from 1 on"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"transunet: dropout {self.dropout} is outside [0, 1)")

    @property
    def skips(self) -> tuple[int, ...]:
        """Channels of the finer maps that each step on the way up meets."""
        return (8 * self.stem, 4 * self.stem, self.stem, 0)


PRESETS = {
    "transunet": Config(),
    "transunet-small": Config(
        128, (1, 1, 2), 32, 8, layers=4, heads=4, width=128, hidden=256, decoder=(64, 32, 16, 16), bridge=128
    ),
}


def _stages(cfg: Config) -> list[list[tuple[int, int, int]]]:
    """(input channels, inner channels, stride) of every block of the residual net."""
    d_in, stages = cfg.stem, []
    for s, depth in enumerate(cfg.depths):
        inner = cfg.stem * 2**s
        stages.append([(d_in, inner, 2 if s else 1)] + [(4 * inner, inner, 1)] * (depth - 1))
        d_in = 4 * inner
    return stages


def _std_spec(d_in: int, d_out: int, kernel: int) -> dict:
    return {"conv": conv_spec(d_in, d_out, kernel, bias=False, init=TORCH), "norm": group_norm_spec(d_out)}


def _block_spec(d_in: int, inner: int, stride: int) -> dict:
    d_out = 4 * inner
    convs = [_std_spec(d_in, inner, 1), _std_spec(inner, inner, 3), _std_spec(inner, d_out, 1)]
    return {"convs": convs, "shortcut": _std_spec(d_in, d_out, 1)} if (stride, d_in) != (1, d_out) else {"convs": convs}


def spec(cfg: Config) -> dict:
    """`stem` and `stages.s.b` of the residual net; `patches`, `positions`, `blocks.i` and `norm` of the transformer;
    `bridge`, `up.i` from coarse to fine and `head`."""
    widths, up = (cfg.bridge, *cfg.decoder), []
    for d_in, skip, d_out in zip(widths, cfg.skips, cfg.decoder, strict=False):
        up.append([conv_norm_spec(d_in + skip, d_out, 3, init=TORCH), conv_norm_spec(d_out, d_out, 3, init=TORCH)])
    positions = (cfg.image // 16) ** 2
    return {
        "blocks": [block_spec(cfg.width, cfg.heads, cfg.hidden)] * cfg.layers,
        "bridge": conv_norm_spec(cfg.width, cfg.bridge, 3, init=TORCH),
        "head": conv_spec(cfg.decoder[-1], cfg.classes, 3, init=TORCH),
        "norm": layer_norm_spec(cfg.width),
        "patches": patch_embedding_spec(16 * cfg.stem, cfg.width, 1, init=TORCH),
        "positions": Param((1, positions, cfg.width), axes=(None, "time", "embed")),
        "stages": [[_block_spec(*sizes) for sizes in blocks] for blocks in _stages(cfg)],
        "stem": _std_spec(cfg.channels, cfg.stem, 7),
        "up": up,
    }


def _std_conv_norm(p: dict, x: Tensor, groups: int, *, stride: int = 1, eps: float = EPS) -> Tensor:
    """Group norm of a convolution whose kernels are standardised, w <- (w - mean) / sqrt(var + 1e-5) (Qiao et al. 2019,
    arXiv:1903.10520)."""
    w = p["conv"]["weight"]
    var, mean = torch.var_mean(w, (1, 2, 3), keepdim=True, correction=0)
    y = conv({"weight": (w - mean) / (var + 1e-5).sqrt()}, x, stride=stride, padding=w.shape[-1] // 2)
    return group_norm(p["norm"], y, groups, eps=eps)


def _residual(p: dict, x: Tensor, cfg: Config, stride: int) -> Tensor:
    """relu(shortcut(x) + F(x)). x: (batch, d_in, h, w) -> (batch, d_out, h / stride, w / stride)."""
    first, second, third = p["convs"]
    y = _std_conv_norm(first, x, cfg.groups).relu()
    y = _std_conv_norm(second, y, cfg.groups, stride=stride).relu()
    y = _std_conv_norm(third, y, cfg.groups)  # F(x): (batch, d_out, h / stride, w / stride)
    if "shortcut" in p:
        x = _std_conv_norm(p["shortcut"], x, y.shape[1], stride=stride, eps=1e-5)  # a group per channel
    return (x + y).relu()


def feature_maps(params: dict, x: Tensor, cfg: Config) -> list[Tensor]:
    """f_1 to f_4 of the residual net: (batch, channels, image / 2**i, image / 2**i) each."""
    maps = [_std_conv_norm(params["stem"], x, cfg.groups, stride=2).relu()]  # (batch, stem, image / 2, image / 2)
    y = max_pool(maps[0], 3, stride=2)  # one row and column less than image / 4
    for s, (blocks, sizes) in enumerate(zip(params["stages"], _stages(cfg), strict=True)):
        for p, (_, _, stride) in zip(blocks, sizes, strict=True):
            y = _residual(p, y, cfg, stride)
        rest = cfg.image // 2 ** (s + 2) - y.shape[-1]
        maps.append(F.pad(y, (0, rest, 0, rest)))
    return maps


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of each pixel.

    Args:
        x: (batch, channels, cfg.image, cfg.image); images of one channel are repeated.
        key: (2,), or one per example (batch, 2); needed in training with dropout.

    Returns:
        (batch, classes, cfg.image, cfg.image).

    Raises:
        ValueError: images of another size or with other channels; no key where one is needed.
    """
    x = x.expand(-1, cfg.channels, -1, -1) if x.ndim == 4 and x.shape[1] == 1 else x
    check_images("transunet", x, cfg.channels, cfg.image)
    if tuple(x.shape[2:]) != (cfg.image, cfg.image):
        raise ValueError(f"transunet: the images are {x.shape[2]} x {x.shape[3]}; expected {cfg.image} x {cfg.image}")
    drops = [identity] * (1 + cfg.layers)
    if train and cfg.dropout:
        if key is None:
            raise ValueError(f"transunet: training with dropout {cfg.dropout} draws random numbers; pass key=")
        shape = (x.shape[0], (cfg.image // 16) ** 2, cfg.width)
        drops = dropout_sites(random.sites(key, 1)[0], len(drops), shape, cfg.dropout)
    *finer, y = feature_maps(params, x, cfg)
    z = patch_embedding(params["patches"], y)  # (batch, width, image / 16, image / 16)
    side = z.shape[-1]
    z = drops[0](z.flatten(2).transpose(1, 2) + params["positions"])  # (batch, positions, width)
    for p, drop in zip(params["blocks"], drops[1:], strict=True):
        z = block(p, z, cfg.heads, activation="gelu", drops=(None, identity, drop), eps=EPS)
    z = layer_norm(params["norm"], z, eps=EPS).transpose(1, 2).unflatten(2, (side, side))
    y = conv_norm(params["bridge"], z, train=train)  # u_4: (batch, bridge, image / 16, image / 16)
    for p in params["up"]:
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)  # twice the height and width
        y = torch.cat([y, finer.pop()], 1) if finer else y
        for q in p:
            y = conv_norm(q, y, train=train)  # u_i
    return conv(params["head"], y, padding=1)  # (batch, classes, image, image)


# Files of the authors.


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of the authors' VisionTransformer."""
    net = "transformer.embeddings.hybrid_model"

    def std(ours: str, conv: str, norm: str) -> dict[str, Rename]:
        return {f"{ours}.conv.weight": Rename(f"{conv}.weight"), **affine_names(f"{ours}.norm", norm)}

    table = std("stem", f"{net}.root.conv", f"{net}.root.gn") | {
        "positions": Rename("transformer.embeddings.position_embeddings"),
        **affine_names("patches", "transformer.embeddings.patch_embeddings"),
        **affine_names("norm", "transformer.encoder.encoder_norm"),
        **conv_norm_names("bridge", "decoder.conv_more.0", "decoder.conv_more.1"),
        **affine_names("head", "segmentation_head.0"),
    }
    for s, blocks in enumerate(_stages(cfg)):
        for b, (d_in, inner, stride) in enumerate(blocks):
            ours, theirs = f"stages.{s}.{b}", f"{net}.body.block{s + 1}.unit{b + 1}"
            for i in range(3):
                table |= std(f"{ours}.convs.{i}", f"{theirs}.conv{i + 1}", f"{theirs}.gn{i + 1}")
            if (stride, d_in) != (1, 4 * inner):
                table |= std(f"{ours}.shortcut", f"{theirs}.downsample", f"{theirs}.gn_proj")
    for i in range(cfg.layers):
        ours, theirs = f"blocks.{i}", f"transformer.encoder.layer.{i}"
        for part in ("bias", "weight"):
            several = tuple(f"{theirs}.attn.{name}.{part}" for name in ("query", "key", "value"))
            table[f"{ours}.attn.qkv.{part}"] = Rename(several)
        table |= affine_names(f"{ours}.attn.proj", f"{theirs}.attn.out")
        table |= affine_names(f"{ours}.mlp.up", f"{theirs}.ffn.fc1") | affine_names(
            f"{ours}.mlp.down", f"{theirs}.ffn.fc2"
        )
        table |= affine_names(f"{ours}.norm1", f"{theirs}.attention_norm")
        table |= affine_names(f"{ours}.norm2", f"{theirs}.ffn_norm")
    for i in range(len(cfg.decoder)):
        for j in (0, 1):
            names = f"decoder.blocks.{i}.conv{j + 1}"
            table |= conv_norm_names(f"up.{i}.{j}", f"{names}.0", f"{names}.1")
    return table
