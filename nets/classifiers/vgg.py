"""VGG: nothing but 3x3 convolutions and pooling, then a large MLP.

Simonyan and Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (arXiv:1409.1556): two
3x3 convolutions see as much of the image as a 5x5 one, three as much as a 7x7, with fewer weights and more
nonlinearities between them. Each stage ends in 2x2 max pooling, which halves the image:

    x = relu(conv3x3(x)), several times;   x = maxpool(x);   at the end   logits = W_3 relu(W_2 relu(W_1 x))
"""

from dataclasses import dataclass

from torch import Tensor

from core import initializers
from core.layers import (
    adaptive_average_pool,
    batch_norm_spec,
    conv,
    conv_spec,
    dropout,
    linear,
    linear_spec,
    max_pool,
)
from nets.blocks.conv_norm import HE, affine_names, check_images, conv_norm, dropout_keys, fill_published, norm_names
from nets.weights import Rename, read

LINEAR = initializers.normal(0.01)
"""Initialiser of the linear layers (section 3.1 of the paper)."""


@dataclass(frozen=True)
class Config:
    """Sizes of VGG: `stages` are the channels of each convolution, stage by stage."""

    stages: tuple[tuple[int, ...], ...]
    norm: bool = False
    """Batch norm after each convolution."""
    pooled: int = 7
    """Side that the last feature maps are average-pooled to, so that images may be of any size."""
    hidden: int = 4096
    dropout: float = 0.5
    channels: int = 3
    classes: int = 1000

    def __post_init__(self):
        if not self.stages or not all(stage and min(stage) > 0 for stage in self.stages):
            raise ValueError(f"vgg: stages {self.stages}; expected at least one convolution in each")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"vgg: dropout {self.dropout} is outside [0, 1)")


def _published(*depths: int, norm: bool) -> Config:
    """Table 1 of the paper: its columns differ in the number of convolutions per stage."""
    return Config(tuple((width,) * d for width, d in zip((64, 128, 256, 512, 512), depths, strict=True)), norm)


PRESETS = {
    f"vgg{depth}{'_bn' if norm else ''}": _published(*depths, norm=norm)
    for depth, depths in {11: (1, 1, 2, 2, 2), 13: (2,) * 5, 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}.items()
    for norm in (False, True)
}


def spec(cfg: Config) -> dict:
    """`stages.s.i` with `conv` and, in a net with norms, `norm`; `hidden.0`, `hidden.1` and `head`.

    The convolutions have a bias even before a norm, as the published weights do; batch norm cancels it.
    """
    d_in, stages = cfg.channels, []
    for widths in cfg.stages:
        stage = []
        for d_out in widths:
            layer = {"conv": conv_spec(d_in, d_out, 3, init=HE)}
            stage.append(layer | {"norm": batch_norm_spec(d_out)} if cfg.norm else layer)
            d_in = d_out
        stages.append(stage)
    sizes = d_in * cfg.pooled**2, cfg.hidden, cfg.hidden
    return {
        "head": linear_spec(cfg.hidden, cfg.classes, init=LINEAR),
        "hidden": [linear_spec(*pair, init=LINEAR) for pair in zip(sizes[:-1], sizes[1:], strict=True)],
        "stages": stages,
    }


def feature_maps(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> list[Tensor]:
    """The output of each stage before its pooling, (batch, channels, height, width) each.

    Args:
        x: (batch, channels, height, width).

    Raises:
        ValueError: images with other channels, or smaller than the net's stride.
    """
    check_images("vgg", x, cfg.channels, 2 ** len(cfg.stages))
    maps = []
    for stage in params["stages"]:
        x = max_pool(maps[-1], 2) if maps else x  # (batch, d, h / 2, w / 2)
        for p in stage:  # (batch, d of the stage, h / 2, w / 2)
            x = conv_norm(p, x, train=train) if cfg.norm else conv(p["conv"], x, padding=1).relu()
        maps.append(x)
    return maps


def features(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Penultimate features: the second hidden layer. (batch, channels, h, w) -> (batch, hidden)."""
    keys = dropout_keys("vgg", cfg.dropout, key, 2, train)
    x = max_pool(feature_maps(params, x, cfg, train=train)[-1], 2)  # (batch, d, h, w)
    x = adaptive_average_pool(x, cfg.pooled).flatten(1)  # (batch, d * pooled**2)
    for p, k in zip(params["hidden"], keys, strict=True):
        x = dropout(linear(p, x).relu(), cfg.dropout, k, train)  # (batch, hidden)
    return x


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
    """Our names -> torchvision's, which counts norms, activations and poolings in one list with the convolutions."""
    table = {**affine_names("head", "classifier.6")}
    for i, index in enumerate((0, 3)):
        table |= affine_names(f"hidden.{i}", f"classifier.{index}")
    index = 0
    for s, stage in enumerate(cfg.stages):
        for i in range(len(stage)):
            table |= affine_names(f"stages.{s}.{i}.conv", f"features.{index}")
            if cfg.norm:
                table |= norm_names(f"stages.{s}.{i}.norm", f"features.{index + 1}")
            index += 3 if cfg.norm else 2
        index += 1
    return table


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters and Stats from torchvision's file of this net: a local file or folder, or a hub repository."""
    return fill_published(spec(cfg), read(source), rename_table(cfg), source)
