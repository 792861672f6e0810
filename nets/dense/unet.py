"""U-Net: a class per pixel, from features of all scales.

Ronneberger et al. 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation" (arXiv:1505.04597), figure 1:
on the way down each level halves the image and doubles the channels, on the way up it is enlarged again and meets the
feature map that the way down had at this size:

    d_0 = convs(x);   d_i = convs(pool(d_{i-1}));   u_n = d_n;   u_i = convs([d_i, up(u_{i+1})]);   logits = head(u_0)

Each `convs` are two 3x3 convolutions with batch norm and ReLU. Unlike in the paper the convolutions are padded, so that
the logits have the size of the image, as in the public implementation by milesial (Pytorch-UNet), whose files
`nets.dense.by_name` reads. The paper enlarges by transposed convolutions; `bilinear` interpolates, with half the
channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers
from core.layers import conv, conv_spec, conv_transpose, max_pool
from nets.blocks.conv_norm import (
    affine_names,
    check_images,
    conv_norm,
    conv_norm_names,
    conv_norm_spec,
    fan_uniform,
)
from nets.weights import Rename, WeightsError

HE = initializers.kaiming_normal(nonlinearity="relu")
"""Normal with variance 2 / fan_in (section 3 of the paper)."""


@dataclass(frozen=True)
class Config:
    """Sizes of a U-Net: level i of 0 to `depth` has width * 2**i channels and 1 / 2**i of the image's height and
    width."""

    width: int = 64
    depth: int = 4
    """Halvings of the image."""
    bilinear: bool = False
    """Enlarge by bilinear interpolation, corners to corners, not by transposed convolutions."""
    channels: int = 3
    classes: int = 2

    def __post_init__(self):
        for name in ("width", "depth", "channels", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"unet: {name} is {getattr(self, name)}; expected at least 1")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level on the way down."""
        widths = [self.width * 2**i for i in range(self.depth + 1)]
        return (*widths[:-1], widths[-1] // 2 if self.bilinear else widths[-1])


PRESETS = {
    "unet": Config(),
    "unet-bilinear": Config(bilinear=True),
    "unet-small": Config(width=16),
}


def _convs_spec(d_in: int, inner: int, d_out: int) -> list:
    return [conv_norm_spec(d_in, inner, 3, init=HE), conv_norm_spec(inner, d_out, 3, init=HE)]


def spec(cfg: Config) -> dict:
    """`stem` and `down.i`, two convolutions each; `up.i` from coarse to fine, `convs` and, unless bilinear, `up`; and
    `head`."""
    widths, up = cfg.widths, []
    for i in reversed(range(cfg.depth)):
        own = widths[i]
        convs = _convs_spec(2 * own, own, own // 2 if cfg.bilinear and i else own)
        enlarge = conv_spec(widths[i + 1], own, 2, transposed=True, **fan_uniform(4 * own))
        up.append({"convs": convs} if cfg.bilinear else {"convs": convs, "up": enlarge})
    return {
        "down": [_convs_spec(widths[i], widths[i + 1], widths[i + 1]) for i in range(cfg.depth)],
        "head": conv_spec(cfg.width, cfg.classes, 1),
        "stem": _convs_spec(cfg.channels, cfg.width, cfg.width),
        "up": up,
    }


def _convs(p: list, x: Tensor, train: bool) -> Tensor:
    for q in p:
        x = conv_norm(q, x, train=train)  # (batch, d_out, height, width)
    return x


def _enlarged(p: dict, x: Tensor, like: Tensor) -> Tensor:
    """x at twice the size, with zeros around it where `like`, whose pixels were halved, had an odd number of them."""
    if "up" in p:
        x = conv_transpose(p["up"], x, stride=2)  # (batch, d_out, 2h, 2w)
    else:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)  # (batch, d_in, 2h, 2w)
    rows, columns = (a - b for a, b in zip(like.shape[2:], x.shape[2:], strict=True))
    if not rows and not columns:
        return x
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))  # the size of `like`


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of each pixel. No key is needed.

    Args:
        x: (batch, channels, height, width), any height and width from 2**depth on.

    Returns:
        (batch, classes, height, width).

    Raises:
        ValueError: images with other channels, or smaller than the net's stride.
    """
    check_images("unet", x, cfg.channels, 2**cfg.depth)
    y, skips = _convs(params["stem"], x, train), []  # d_0: (batch, width, height, width)
    for p in params["down"]:
        skips.append(y)
        y = _convs(p, max_pool(y, 2), train)  # d_i: twice the channels, half the height and width, rounded down
    for p in params["up"]:
        skip = skips.pop()
        y = torch.cat([skip, _enlarged(p, y, skip)], 1)  # [d_i, up(u_{i+1})]: twice the channels of the level
        y = _convs(p["convs"], y, train)  # u_i
    return conv(params["head"], y)  # (batch, classes, height, width)


# Files of milesial's Pytorch-UNet.


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of milesial's UNet."""

    def convs(ours: str, theirs: str) -> dict[str, Rename]:
        names = f"{theirs}.double_conv"
        return conv_norm_names(f"{ours}.0", f"{names}.0", f"{names}.1") | conv_norm_names(
            f"{ours}.1", f"{names}.3", f"{names}.4"
        )

    table = convs("stem", "inc") | affine_names("head", "outc.conv")
    for i in range(cfg.depth):
        table |= convs(f"down.{i}", f"down{i + 1}.maxpool_conv.1") | convs(f"up.{i}.convs", f"up{i + 1}.conv")
        table |= {} if cfg.bilinear else affine_names(f"up.{i}.up", f"up{i + 1}.up")
    return table


def config_of(state: dict[str, Tensor], source: str = "U-Net weights") -> Config:
    """The sizes of milesial's net, from its tensors. Raises WeightsError: the tensors are of another net."""
    stem, head = state.get("inc.double_conv.0.weight"), state.get("outc.conv.weight")
    if stem is None or head is None or stem.ndim != 4:
        raise WeightsError(f"'{source}' is of another net than milesial's U-Net: it has no inc.double_conv.0.weight")
    depth = sum(f"down{i}.maxpool_conv.1.double_conv.0.weight" in state for i in range(1, 1 + len(state)))
    return Config(len(stem), max(depth, 1), "up1.up.weight" not in state, stem.shape[1], len(head))
