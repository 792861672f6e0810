"""Densely connected networks for images: DenseNet-BC.

Huang et al. 2017, "Densely Connected Convolutional Networks" (arXiv:1608.06993): each layer sees the feature maps of
all layers before it in its block, and adds `growth` channels of its own (k in the paper),

    x_l = H_l([x_0, x_1, ..., x_(l-1)]),    H = conv3x3(relu(norm(conv1x1(relu(norm(.))))))

where the 1x1 convolution has 4 * growth channels ("B"). Between two blocks a transition takes half of the channels
("C") and averages over 2x2 pixels.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from core import initializers
from core.layers import (
    average_pool,
    batch_norm,
    batch_norm_spec,
    conv,
    conv_spec,
    dropout_sites,
    global_average_pool,
    linear,
    linear_spec,
    max_pool,
)
from nets.blocks.conv_norm import (
    affine_names,
    check_images,
    conv_norm,
    conv_norm_names,
    conv_norm_spec,
    dropout_keys,
    fill_published,
    norm_names,
)
from nets.weights import Rename, read

HE_IN = initializers.kaiming_normal()
"""Initialiser of the convolutions: He et al. 2015, eq. 10."""

HEAD = initializers.kaiming_uniform(a=5**0.5)
"""Initialiser of the head: uniform within 1 / sqrt(fan_in), torch's default for linear layers."""


@dataclass(frozen=True)
class Config:
    """Sizes of DenseNet: `depths` layers in each block. The stem halves the images twice, each transition once."""

    depths: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32
    """Channels that a layer adds."""
    width: int = 64
    """Channels of the stem."""
    expansion: int = 4
    """Channels between the two convolutions of a layer, in units of growth."""
    dropout: float = 0.0
    """Dropout rate of the channels that a layer adds (the paper: 0.2 for data without augmentation)."""
    channels: int = 3
    classes: int = 1000

    def __post_init__(self):
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"densenet: depths {self.depths}; expected at least one layer in each block")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"densenet: dropout {self.dropout} is outside [0, 1)")


PRESETS = {
    "densenet121": Config(),
    "densenet161": Config((6, 12, 36, 24), growth=48, width=96),
    "densenet169": Config((6, 12, 32, 32)),
    "densenet201": Config((6, 12, 48, 32)),
}


def _norm_conv_spec(d_in: int, d_out: int, kernel: int) -> dict:
    return {"conv": conv_spec(d_in, d_out, kernel, bias=False, init=HE_IN), "norm": batch_norm_spec(d_in)}


def _norm_conv(p: dict, x: Tensor, train: bool) -> Tensor:
    """conv(relu(norm(x))). The norm comes first: the output of a layer is normalised again by each layer that sees it.

    x: (batch, d_in, height, width) -> (batch, d_out, height, width).
    """
    return conv(p["conv"], batch_norm(p["norm"], x, train=train).relu(), padding=p["conv"]["weight"].shape[-1] // 2)


def spec(cfg: Config) -> dict:
    """`stem`, `stages.s.b.i` (layer b of block s, its two convolutions with their norms), `transitions.s`, `norm`,
    and `head`."""
    bottleneck, stages, transitions = cfg.expansion * cfg.growth, [], []
    d = cfg.width
    for s, depth in enumerate(cfg.depths):
        if s:
            transitions.append(_norm_conv_spec(d, d // 2, 1))
            d = d // 2
        sizes = [d + b * cfg.growth for b in range(depth)]
        stages.append([[_norm_conv_spec(n, bottleneck, 1), _norm_conv_spec(bottleneck, cfg.growth, 3)] for n in sizes])
        d = d + depth * cfg.growth
    return {
        "head": linear_spec(d, cfg.classes, init=HEAD),
        "norm": batch_norm_spec(d),
        "stages": stages,
        "stem": conv_norm_spec(cfg.channels, cfg.width, 7, init=HE_IN),
        "transitions": transitions,
    }


def _drops(key: Tensor | None, layers: int, shape: tuple[int, ...], rate: float) -> list:
    """Dropout of the channels that each layer of a block adds."""
    return [lambda y: y] * layers if key is None else dropout_sites(key, layers, shape, rate)


def feature_maps(
    params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False
) -> list[Tensor]:
    """The output of the stem and of each block, (batch, channels, height, width) each; that of the last is normalised.

    Args:
        x: (batch, channels, height, width).
        key: (2,) or one per example (batch, 2); needed in training if there is dropout.

    Raises:
        ValueError: images with other channels, or too small; no key in training with dropout.
    """
    check_images("densenet", x, cfg.channels, 2 ** (len(cfg.depths) + 1) - 3)
    keys = dropout_keys("densenet", cfg.dropout, key, len(cfg.depths), train)
    x = conv_norm(params["stem"], x, train=train, stride=2)  # (batch, cfg.width, height / 2, width / 2)
    maps = [x]
    x = max_pool(x, 3, stride=2, padding=1)  # (batch, cfg.width, height / 4, width / 4)
    for s, layers in enumerate(params["stages"]):
        if s:
            x = _norm_conv(params["transitions"][s - 1], x, train)  # (batch, d / 2, h, w)
            x = average_pool(x, 2)  # (batch, d / 2, h / 2, w / 2)
        drops = _drops(keys[s], len(layers), (x.shape[0], cfg.growth, *x.shape[2:]), cfg.dropout)
        for (reduce, grow), drop in zip(layers, drops, strict=True):
            added = drop(_norm_conv(grow, _norm_conv(reduce, x, train), train))  # H_l(x): (batch, growth, h, w)
            x = torch.cat([x, added], 1)  # [x_0, ..., x_l]: (batch, d + growth, h, w)
        maps.append(x)
    maps[-1] = batch_norm(params["norm"], x, train=train).relu()
    return maps


def features(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Penultimate features: the last feature maps, global-average-pooled. (batch, channels, h, w) -> (batch, d)."""
    return global_average_pool(feature_maps(params, x, cfg, key=key, train=train)[-1])


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of images. x: (batch, channels, height, width) -> (batch, classes). Key as in `feature_maps`."""
    return linear(params["head"], features(params, x, cfg, key=key, train=train))


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> torchvision's."""

    def norm_conv_names(ours: str, conv: str, norm: str) -> dict[str, Rename]:
        return conv_norm_names(ours, f"features.{conv}", f"features.{norm}")

    table = {
        **affine_names("head", "classifier"),
        **norm_names("norm", "features.norm5"),
        **norm_conv_names("stem", "conv0", "norm0"),
    }
    for s, depth in enumerate(cfg.depths):
        if s:
            theirs = f"transition{s}"
            table |= norm_conv_names(f"transitions.{s - 1}", f"{theirs}.conv", f"{theirs}.norm")
        for b in range(depth):
            theirs = f"denseblock{s + 1}.denselayer{b + 1}"
            for i in range(2):
                ours = f"stages.{s}.{b}.{i}"
                table |= norm_conv_names(ours, f"{theirs}.conv{i + 1}", f"{theirs}.norm{i + 1}")
    return table


def recognise(state: dict[str, Tensor], cfg: Config) -> tuple[dict[str, Tensor], dict[str, Rename]]:
    """(tensors, rename table). The files that torchvision publishes write `norm.1` where its module now has `norm1`."""
    return {re.sub(r"\.(conv|norm)\.([12])\.", r".\1\2.", name): x for name, x in state.items()}, rename_table(cfg)


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters and Stats from torchvision's file of this net: a local file or folder, or a hub repository."""
    return fill_published(spec(cfg), *recognise(read(source), cfg), source)
