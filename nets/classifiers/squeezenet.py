"""SqueezeNet: the accuracy of AlexNet with a fiftieth of its parameters.

Iandola et al. 2016, "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size"
(arXiv:1602.07360). A "fire" module squeezes to a few channels by a 1x1 convolution and expands again, half of the
channels by 1x1 and half by 3x3 convolutions:

    s = relu(squeeze(x)),  y = [relu(expand1(s)), relu(expand3(s))]

There is no linear layer: a 1x1 convolution gives a feature map per class, whose mean is the class's logit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core import initializers
from core.layers import conv, conv_spec, dropout, global_average_pool, max_pool
from nets.blocks.conv_norm import affine_names, check_images, dropout_keys
from nets.weights import Rename, fill, read

HE_UNIFORM = initializers.kaiming_uniform(nonlinearity="relu")


@dataclass(frozen=True)
class Config:
    """Sizes of SqueezeNet: `stages` are (squeezed channels, channels of each half) of the fire modules; a max pooling
    comes before each stage."""

    stages: tuple[tuple[tuple[int, int], ...], ...]
    stem: int
    """Channels of the first convolution, which has stride 2 and no padding."""
    kernel: int
    """Kernel of the first convolution."""
    dropout: float = 0.5
    channels: int = 3
    classes: int = 1000

    def __post_init__(self):
        if not self.stages or not all(self.stages):
            raise ValueError(f"squeezenet: stages {self.stages}; expected at least one fire module in each")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"squeezenet: dropout {self.dropout} is outside [0, 1)")


FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))

PRESETS = {
    "squeezenet1_0": Config((FIRES[:3], FIRES[3:7], FIRES[7:]), stem=96, kernel=7),
    # Pools earlier, and so needs less than half of the arithmetic.
    "squeezenet1_1": Config((FIRES[:2], FIRES[2:4], FIRES[4:]), stem=64, kernel=3),
}


def _fire_spec(d_in: int, squeezed: int, half: int) -> dict:
    return {
        "expand1": conv_spec(squeezed, half, 1, init=HE_UNIFORM),
        "expand3": conv_spec(squeezed, half, 3, init=HE_UNIFORM),
        "squeeze": conv_spec(d_in, squeezed, 1, init=HE_UNIFORM),
    }


def spec(cfg: Config) -> dict:
    """`stem`, `stages.s.i` with `squeeze`, `expand1` and `expand3`, and `head`."""
    d_in, stages = cfg.stem, []
    for fires in cfg.stages:
        stage = []
        for squeezed, half in fires:
            stage.append(_fire_spec(d_in, squeezed, half))
            d_in = 2 * half
        stages.append(stage)
    return {
        "head": conv_spec(d_in, cfg.classes, 1, init=initializers.normal(0.01)),
        "stages": stages,
        "stem": conv_spec(cfg.channels, cfg.stem, cfg.kernel, init=HE_UNIFORM),
    }


def _fire(p: dict, x: Tensor) -> Tensor:
    """y = [relu(expand1(s)), relu(expand3(s))]. x: (batch, channels, h, w) -> (batch, 2 half, h, w)."""
    s = conv(p["squeeze"], x).relu()  # (batch, squeezed, height, width)
    return torch.cat([conv(p["expand1"], s).relu(), conv(p["expand3"], s, padding=1).relu()], 1)


def feature_maps(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> list[Tensor]:
    """The output of the stem and of each stage, (batch, channels, height, width) each.

    Args:
        x: (batch, channels, height, width).
        train: without effect here.

    Raises:
        ValueError: images with other channels, or smaller than the strides need.
    """
    # The last pooling needs two pixels per side, and each before it twice as many; the stem has no padding.
    check_images("squeezenet", x, cfg.channels, 2 * (2 ** len(cfg.stages) - 1) + cfg.kernel)
    maps = [conv(params["stem"], x, stride=2).relu()]  # (batch, stem, (height - kernel) // 2 + 1, ...)
    for stage in params["stages"]:
        x = max_pool(maps[-1], 3, stride=2, ceil_mode=True)  # (batch, d, h / 2, w / 2)
        for p in stage:
            x = _fire(p, x)  # (batch, 2 half, h / 2, w / 2)
        maps.append(x)
    return maps


def features(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """The last stage's feature maps, global-average-pooled. (batch, channels, h, w) -> (batch, d).

    The head is no function of these: it works on each position of the feature maps.
    """
    return global_average_pool(feature_maps(params, x, cfg, train=train)[-1])


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of images, mean over space of relu(head(x)); none is negative.

    Args:
        x: (batch, channels, height, width).
        key: (2,) or one per example (batch, 2); needed in training if there is dropout.

    Returns:
        (batch, classes).
    """
    (key,) = dropout_keys("squeezenet", cfg.dropout, key, 1, train)
    x = dropout(feature_maps(params, x, cfg, train=train)[-1], cfg.dropout, key, train)  # (batch, d, h, w)
    return global_average_pool(conv(params["head"], x).relu())


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> torchvision's, which counts the activation of the stem and the poolings with the modules."""
    table = {**affine_names("head", "classifier.1"), **affine_names("stem", "features.0")}
    index = 2
    for s, stage in enumerate(cfg.stages):
        for i in range(len(stage)):
            index += 1
            for ours, theirs in (("expand1", "expand1x1"), ("expand3", "expand3x3"), ("squeeze", "squeeze")):
                table |= affine_names(f"stages.{s}.{i}.{ours}", f"features.{index}.{theirs}")
        index += 1
    return table


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters from torchvision's file of this net: a local file or folder, or a hub repository."""
    return fill(spec(cfg), read(source), rename_table(cfg), source)
