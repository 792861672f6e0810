"""Residual networks for images: ResNet, ResNeXt, Wide ResNet, and the small ones for CIFAR.

He et al. 2016, "Deep Residual Learning for Image Recognition" (arXiv:1512.03385): a block adds to its input,

    y = relu(shortcut(x) + F(x))

F is two 3x3 convolutions ("basic"), or 1x1, 3x3, 1x1 where the 3x3 one has a quarter of the channels ("bottleneck");
the stride is in the 3x3 one, as in torchvision ("ResNet v1.5"). ResNeXt (Xie et al. 2017, arXiv:1611.05431) cuts the
3x3 convolution of a bottleneck into groups; Wide ResNet (Zagoruyko and Komodakis 2016, arXiv:1605.07146) doubles its
channels.
"""

from dataclasses import dataclass

from torch import Tensor

from core.layers import global_average_pool, linear, linear_spec
from nets.blocks.conv_norm import affine_names, fill_published, fitting_table, with_base_prefix
from nets.blocks.residual_stages import TORCHVISION, TRANSFORMERS, Stages, stage_maps, stage_names, stages_spec
from nets.weights import Rename, read


@dataclass(frozen=True)
class Config(Stages):
    """Sizes of a ResNet: those of its stages, and the classes."""

    classes: int = 1000


def _bottleneck(depths: tuple[int, ...], groups: int = 1, group_width: int = 64) -> Config:
    return Config(depths, "bottleneck", groups=groups, group_width=group_width)


def _cifar(depth: int) -> Config:
    """6n + 2 layers (section 4.2 of the paper)."""
    return Config(((depth - 2) // 6,) * 3, width=16, stem="cifar", shortcut="padding", classes=10)


PRESETS = {
    "resnet18": Config(),
    "resnet34": Config((3, 4, 6, 3)),
    "resnet50": _bottleneck((3, 4, 6, 3)),
    "resnet101": _bottleneck((3, 4, 23, 3)),
    "resnet152": _bottleneck((3, 8, 36, 3)),
    "resnext50_32x4d": _bottleneck((3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": _bottleneck((3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": _bottleneck((3, 4, 23, 3), 64, 4),
    "wide_resnet50_2": _bottleneck((3, 4, 6, 3), group_width=128),
    "wide_resnet101_2": _bottleneck((3, 4, 23, 3), group_width=128),
    **{f"cifar-resnet{depth}": _cifar(depth) for depth in (8, 20, 32, 44, 56, 110)},
}


def spec(cfg: Config) -> dict:
    """`stem`, `stages.s.b.convs.i`, `stages.s.b.shortcut` where the shape changes, and `head`."""
    return {"head": linear_spec(cfg.outputs(len(cfg.depths) - 1), cfg.classes), **stages_spec(cfg)}


def feature_maps(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> list[Tensor]:
    """The output of the stem and of each stage, (batch, channels, height, width) each.

    Args:
        x: (batch, channels, height, width).

    Raises:
        ValueError: images with other channels, or smaller than the net's stride.
    """
    return stage_maps(params, x, cfg, train=train)


def features(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """Penultimate features: the last stage's output, global-average-pooled. (batch, channels, h, w) -> (batch, d)."""
    return global_average_pool(feature_maps(params, x, cfg, train=train)[-1])


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of images. x: (batch, channels, height, width) -> (batch, classes). No key is needed."""
    return linear(params["head"], features(params, x, cfg, train=train))


NAMES = {
    "torchvision": {**TORCHVISION, "head": "fc"},
    "transformers": {part: tuple(f"resnet.{name}" for name in names) for part, names in TRANSFORMERS.items()}
    | {"head": "classifier.1"},
}
"""Names of the convolutions and norms of stage s, block b, and of the head in other libraries' files."""


def rename_table(cfg: Config, source: str = "torchvision") -> dict[str, Rename]:
    """Our names -> torchvision's, or those of transformers' ResNetForImageClassification.

    Raises:
        ValueError: a source that is neither.
    """
    if source not in NAMES:
        raise ValueError(f"resnet: source '{source}' is unknown; expected one of {', '.join(NAMES)}")
    names = NAMES[source]
    return {**affine_names("head", names["head"]), **stage_names(cfg, names)}


def recognise(state: dict[str, Tensor], cfg: Config) -> tuple[dict[str, Tensor], dict[str, Rename]]:
    """(tensors, rename table of the library that wrote them)."""
    transformers = rename_table(cfg, "transformers")
    state = with_base_prefix(state, "resnet.", transformers)
    return state, fitting_table(state, rename_table(cfg), transformers)


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters and Stats from torchvision's or transformers' file: a local file or folder, or a hub repository."""
    return fill_published(spec(cfg), *recognise(read(source), cfg), source)
