"""MobileNet v3: the inverted residuals of v2 with squeeze-and-excitation and a cheap smooth activation.

Howard et al. 2019, "Searching for MobileNetV3" (arXiv:1905.02244). The kernel, width and activation of each block come
from a search (tables 1 and 2). Two activations are piecewise linear or quadratic:

    hard_sigmoid(x) = relu6(x + 3) / 6,  hard_swish(x) = x hard_sigmoid(x)

The large layer before the head comes after the pooling, where it works on one position and not on a whole feature map.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from core import initializers
from core.layers import activation, dropout, global_average_pool, linear, linear_spec
from nets.blocks.conv_norm import (
    affine_names,
    check_images,
    conv_norm,
    conv_norm_names,
    conv_norm_spec,
    divisible,
    dropout_keys,
    fill_published,
    inverted_residual,
    inverted_residual_spec,
)
from nets.weights import Rename, read

LINEAR = initializers.normal(0.01)
NORM = {"eps": 1e-3, "momentum": 0.01}


class Block(NamedTuple):
    """A row of the paper's tables: kernel, expanded and output channels, squeeze-and-excitation, activation, stride."""

    kernel: int
    expanded: int
    channels: int
    squeeze: bool
    act: str
    stride: int = 1


RE, HS = "relu", "hard_swish"

LARGE = (
    (Block(3, 16, 16, False, RE),),
    (Block(3, 64, 24, False, RE, 2), Block(3, 72, 24, False, RE)),
    (Block(5, 72, 40, True, RE, 2), Block(5, 120, 40, True, RE), Block(5, 120, 40, True, RE)),
    (
        Block(3, 240, 80, False, HS, 2),
        Block(3, 200, 80, False, HS),
        Block(3, 184, 80, False, HS),
        Block(3, 184, 80, False, HS),
        Block(3, 480, 112, True, HS),
        Block(3, 672, 112, True, HS),
    ),
    (Block(5, 672, 160, True, HS, 2), Block(5, 960, 160, True, HS), Block(5, 960, 160, True, HS)),
)
SMALL = (
    (Block(3, 16, 16, True, RE, 2),),
    (Block(3, 72, 24, False, RE, 2), Block(3, 88, 24, False, RE)),
    (
        Block(5, 96, 40, True, HS, 2),
        Block(5, 240, 40, True, HS),
        Block(5, 240, 40, True, HS),
        Block(5, 120, 48, True, HS),
        Block(5, 144, 48, True, HS),
    ),
    (Block(5, 288, 96, True, HS, 2), Block(5, 576, 96, True, HS), Block(5, 576, 96, True, HS)),
)


@dataclass(frozen=True)
class Config:
    """Sizes of MobileNet v3: `stages` are the blocks between two halvings of the image. All channels are multiplied by
    `width` and rounded to multiples of 8."""

    stages: tuple[tuple[Block, ...], ...] = LARGE
    hidden: int = 1280
    """Width of the layer before the head."""
    width: float = 1.0
    stem: int = 16
    dropout: float = 0.2
    channels: int = 3
    classes: int = 1000

    def __post_init__(self):
        if self.width <= 0:
            raise ValueError(f"mobilenet_v3: width {self.width}; expected a factor above 0")
        if not self.stages or not all(self.stages):
            raise ValueError(f"mobilenet_v3: stages {self.stages}; expected at least one block in each")
        for block in (block for blocks in self.stages for block in blocks):
            if block.kernel % 2 == 0 or block.act not in (RE, HS) or block.stride < 1:
                raise ValueError(f"mobilenet_v3: {block}; expected an odd kernel, {RE} or {HS}, a stride of 1 or more")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"mobilenet_v3: dropout {self.dropout} is outside [0, 1)")


PRESETS = {
    "mobilenet_v3_large": Config(),
    "mobilenet_v3_small": Config(SMALL, 1024),
}


def _stage_specs(cfg: Config) -> tuple[list[list[dict]], int]:
    """The specs of all blocks, and the output channels of the last."""
    d_in, stages = divisible(cfg.stem * cfg.width), []
    for blocks in cfg.stages:
        stage = []
        for block in blocks:
            expanded, d_out = divisible(block.expanded * cfg.width), divisible(block.channels * cfg.width)
            squeezed = divisible(expanded // 4) if block.squeeze else 0
            stage.append(inverted_residual_spec(d_in, expanded, d_out, block.kernel, squeezed=squeezed))
            d_in = d_out
        stages.append(stage)
    return stages, d_in


def spec(cfg: Config) -> dict:
    """`stem`, `stages.s.b` with `expand`, `depthwise`, `squeeze` and `project`, `last`, `hidden` and `head`."""
    stages, d_out = _stage_specs(cfg)
    hidden = divisible(cfg.hidden * cfg.width)
    return {
        "head": linear_spec(hidden, cfg.classes, init=LINEAR),
        "hidden": linear_spec(6 * d_out, hidden, init=LINEAR),
        "last": conv_norm_spec(d_out, 6 * d_out, 1),
        "stages": stages,
        "stem": conv_norm_spec(cfg.channels, divisible(cfg.stem * cfg.width), 3),
    }


def feature_maps(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> list[Tensor]:
    """The output of the stem, of each stage and of the last convolution, (batch, channels, height, width) each.

    Args:
        x: (batch, channels, height, width) of any size, as each stride rounds up.

    Raises:
        ValueError: images with other channels, or without a pixel.
    """
    check_images("mobilenet_v3", x, cfg.channels, 1)
    maps = [conv_norm(params["stem"], x, HS, train=train, stride=2, **NORM)]  # (batch, d, height / 2, width / 2)
    for blocks, table in zip(params["stages"], cfg.stages, strict=True):
        x = maps[-1]
        for p, block in zip(blocks, table, strict=True):
            x = inverted_residual(p, x, block.act, train=train, stride=block.stride, **NORM)  # (batch, next d, h, w)
        maps.append(x)
    return [*maps, conv_norm(params["last"], maps[-1], HS, train=train, **NORM)]


def features(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Penultimate features: the hidden layer. (batch, channels, h, w) -> (batch, hidden)."""
    (key,) = dropout_keys("mobilenet_v3", cfg.dropout, key, 1, train)
    pooled = global_average_pool(feature_maps(params, x, cfg, train=train)[-1])  # (batch, d)
    return dropout(activation(HS)(linear(params["hidden"], pooled)), cfg.dropout, key, train)


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of images.

    Args:
        x: (batch, channels, height, width).
        key: (2,) or one per example (batch, 2); needed in training if there is dropout.

    Returns:
        (batch, classes).
    """
    return linear(params["head"], features(params, x, cfg, key=key, train=train))


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> torchvision's, which counts all blocks in one list with the stem and the last convolution."""
    table = {**affine_names("head", "classifier.3"), **affine_names("hidden", "classifier.0")}
    table |= conv_norm_names("stem", "features.0.0", "features.0.1")
    index = 1
    for s, blocks in enumerate(spec(cfg)["stages"]):
        for b, block in enumerate(blocks):
            parts = [part for part in ("expand", "depthwise", "squeeze", "project") if part in block]
            for i, part in enumerate(parts):
                ours, theirs = f"stages.{s}.{b}.{part}", f"features.{index}.block.{i}"
                if part == "squeeze":
                    table |= affine_names(f"{ours}.reduce", f"{theirs}.fc1")
                    table |= affine_names(f"{ours}.restore", f"{theirs}.fc2")
                else:
                    table |= conv_norm_names(ours, f"{theirs}.0", f"{theirs}.1")
            index += 1
    return table | conv_norm_names("last", f"features.{index}.0", f"features.{index}.1")


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters and Stats from torchvision's file of this net: a local file or folder, or a hub repository."""
    return fill_published(spec(cfg), read(source), rename_table(cfg), source)
