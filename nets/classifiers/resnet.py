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
from torch.nn import functional as F

from core import initializers
from core.layers import global_average_pool, linear, linear_spec, max_pool
from nets.blocks.conv_norm import (
    affine_names,
    check_images,
    conv_norm,
    conv_norm_names,
    conv_norm_spec,
    fill_published,
    fitting_table,
    with_base_prefix,
)
from nets.weights import Rename, read

BLOCKS = {"basic": 1, "bottleneck": 4}
"""Output channels of a block, in units of the width of its stage."""


@dataclass(frozen=True)
class Config:
    """Sizes of a ResNet: `depths` blocks in each stage. Stage s has width * 2**s channels; all but the first halve the
    image."""

    depths: tuple[int, ...] = (2, 2, 2, 2)
    block: str = "basic"
    width: int = 64
    groups: int = 1
    """Groups of the 3x3 convolution of a bottleneck."""
    group_width: int = 64
    """Channels of a group in the first stage; the 3x3 convolution of stage s has groups * group_width * 2**s."""
    stem: str = "imagenet"
    """imagenet: 7x7 with stride 2, and pooling; cifar: 3x3."""
    shortcut: str = "projection"
    """Shortcut where a block changes the shape: projection is a 1x1 convolution; padding, every second pixel and zero
    channels, has no parameters (the paper's option A)."""
    zero_init: bool = False
    """Start the last norm of each block at 0, so that all blocks start as the identity (Goyal et al. 2017)."""
    channels: int = 3
    classes: int = 1000

    def __post_init__(self):
        if self.block not in BLOCKS:
            raise ValueError(f"resnet: block '{self.block}' is unknown; expected one of {', '.join(BLOCKS)}")
        if self.stem not in ("imagenet", "cifar") or self.shortcut not in ("projection", "padding"):
            kinds = f"stem '{self.stem}', shortcut '{self.shortcut}'"
            raise ValueError(f"resnet: {kinds}; expected imagenet or cifar, projection or padding")
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"resnet: depths {self.depths}; expected at least one block in each stage")
        if self.block == "basic" and (self.groups, self.group_width) != (1, 64):
            raise ValueError("resnet: groups are for bottleneck blocks")


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


def _stages(cfg: Config) -> list[list[tuple[int, int, int]]]:
    """(input channels, width, stride) of every block."""
    d_in, stages = cfg.width, []
    for s, depth in enumerate(cfg.depths):
        width = cfg.width * 2**s
        d_out = width * BLOCKS[cfg.block]
        stages.append([(d_in, width, 2 if s else 1)] + [(d_out, width, 1)] * (depth - 1))
        d_in = d_out
    return stages


def _block_spec(cfg: Config, d_in: int, width: int, stride: int) -> dict:
    d_out = width * BLOCKS[cfg.block]
    last = initializers.zeros if cfg.zero_init else initializers.ones
    if cfg.block == "basic":
        convs = [conv_norm_spec(d_in, d_out, 3), conv_norm_spec(d_out, d_out, 3, scale=last)]
    else:
        bottleneck = width * cfg.group_width // 64 * cfg.groups
        convs = [
            conv_norm_spec(d_in, bottleneck, 1),
            conv_norm_spec(bottleneck, bottleneck, 3, groups=cfg.groups),
            conv_norm_spec(bottleneck, d_out, 1, scale=last),
        ]
    projected = cfg.shortcut == "projection" and (stride, d_in) != (1, d_out)
    return {"convs": convs, "shortcut": conv_norm_spec(d_in, d_out, 1)} if projected else {"convs": convs}


def spec(cfg: Config) -> dict:
    """`stem`, `stages.s.b.convs.i`, `stages.s.b.shortcut` where the shape changes, and `head`."""
    d_out = cfg.width * 2 ** (len(cfg.depths) - 1) * BLOCKS[cfg.block]
    return {
        "head": linear_spec(d_out, cfg.classes),
        "stages": [[_block_spec(cfg, *sizes) for sizes in blocks] for blocks in _stages(cfg)],
        "stem": conv_norm_spec(cfg.channels, cfg.width, 7 if cfg.stem == "imagenet" else 3),
    }


def _block(p: dict, x: Tensor, cfg: Config, stride: int, train: bool) -> Tensor:
    """y = relu(shortcut(x) + F(x)). x: (batch, d_in, height, width) -> (batch, d_out, h, w), h = height / stride."""
    *first, last = p["convs"]
    y = x
    for i, q in enumerate(first):
        grouped = cfg.block == "bottleneck" and i == 1
        strided = grouped or cfg.block == "basic"
        y = conv_norm(q, y, train=train, stride=stride if strided else 1, groups=cfg.groups if grouped else 1)
    y = conv_norm(last, y, None, train=train)  # F(x): (batch, d_out, h, w)
    if "shortcut" in p:
        x = conv_norm(p["shortcut"], x, None, train=train, stride=stride)  # (batch, d_out, h, w)
    elif x.shape != y.shape:
        x = x[:, :, ::stride, ::stride]  # (batch, d_in, h, w)
        x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))  # (batch, d_out, h, w)
    return (x + y).relu()


def feature_maps(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> list[Tensor]:
    """The output of the stem and of each stage, (batch, channels, height, width) each.

    Args:
        x: (batch, channels, height, width).

    Raises:
        ValueError: images with other channels, or smaller than the net's stride.
    """
    halvings = len(cfg.depths) - 1 + (2 if cfg.stem == "imagenet" else 0)
    check_images("resnet", x, cfg.channels, 2**halvings)
    stride = 2 if cfg.stem == "imagenet" else 1
    x = conv_norm(params["stem"], x, train=train, stride=stride)  # (batch, cfg.width, height / stride, width / stride)
    maps = [x]
    if cfg.stem == "imagenet":
        x = max_pool(x, 3, stride=2, padding=1)  # (batch, cfg.width, height / 4, width / 4)
    for blocks, sizes in zip(params["stages"], _stages(cfg), strict=True):
        for p, (_, _, stride) in zip(blocks, sizes, strict=True):
            x = _block(p, x, cfg, stride, train)  # (batch, d of the stage, h / stride, w / stride)
        maps.append(x)
    return maps


def features(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """Penultimate features: the last stage's output, global-average-pooled. (batch, channels, h, w) -> (batch, d)."""
    return global_average_pool(feature_maps(params, x, cfg, train=train)[-1])


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of images. x: (batch, channels, height, width) -> (batch, classes). No key is needed."""
    return linear(params["head"], features(params, x, cfg, train=train))


PARTS = ("convolution", "normalization")

NAMES = {
    "torchvision": {
        "conv": ("layer{stage}.{b}.conv{number}", "layer{stage}.{b}.bn{number}"),
        "head": "fc",
        "shortcut": ("layer{stage}.{b}.downsample.0", "layer{stage}.{b}.downsample.1"),
        "stem": ("conv1", "bn1"),
    },
    "transformers": {
        "conv": tuple(f"resnet.encoder.stages.{{s}}.layers.{{b}}.layer.{{i}}.{part}" for part in PARTS),
        "head": "classifier.1",
        "shortcut": tuple(f"resnet.encoder.stages.{{s}}.layers.{{b}}.shortcut.{part}" for part in PARTS),
        "stem": tuple(f"resnet.embedder.embedder.{part}" for part in PARTS),
    },
}
"""Names of the convolutions and norms of stage s, block b, and of the head in other libraries' files; `stage` and
`number` count from 1, the others from 0."""


def rename_table(cfg: Config, source: str = "torchvision") -> dict[str, Rename]:
    """Our names -> torchvision's, or those of transformers' ResNetForImageClassification.

    Raises:
        ValueError: a source that is neither.
    """
    if source not in NAMES:
        raise ValueError(f"resnet: source '{source}' is unknown; expected one of {', '.join(NAMES)}")
    names = NAMES[source]

    def conv_norm_at(ours: str, part: str, **at: int) -> dict[str, Rename]:
        return conv_norm_names(ours, *(name.format(**at) for name in names[part]))

    table = {**affine_names("head", names["head"]), **conv_norm_at("stem", "stem")}
    for s, blocks in enumerate(spec(cfg)["stages"]):
        for b, block in enumerate(blocks):
            at = {"s": s, "stage": s + 1, "b": b}
            for i in range(len(block["convs"])):
                table |= conv_norm_at(f"stages.{s}.{b}.convs.{i}", "conv", **at, i=i, number=i + 1)
            if "shortcut" in block:
                table |= conv_norm_at(f"stages.{s}.{b}.shortcut", "shortcut", **at)
    return table


def recognise(state: dict[str, Tensor], cfg: Config) -> tuple[dict[str, Tensor], dict[str, Rename]]:
    """(tensors, rename table of the library that wrote them)."""
    transformers = rename_table(cfg, "transformers")
    state = with_base_prefix(state, "resnet.", transformers)
    return state, fitting_table(state, rename_table(cfg), transformers)


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters and Stats from torchvision's or transformers' file: a local file or folder, or a hub repository."""
    return fill_published(spec(cfg), *recognise(read(source), cfg), source)
