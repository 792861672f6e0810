"""Stages of residual blocks: the body of ResNets, for classifiers and for nets with an output per pixel.

A block adds to its input, y = relu(shortcut(x) + F(x)); see `nets.classifiers.resnet`, which has the papers. With
`output_stride` the last stages do not halve the image but spread their 3x3 kernels, so that feature maps stay fine
(Chen et al. 2017, "Rethinking Atrous Convolution for Semantic Image Segmentation", arXiv:1706.05587, section 3.1).
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from core import initializers
from core.layers import max_pool
from nets.blocks.conv_norm import check_images, conv_norm, conv_norm_names, conv_norm_spec
from nets.weights import Rename

BLOCKS = {"basic": 1, "bottleneck": 4}
"""Output channels of a block, in units of the width of its stage."""


@dataclass(frozen=True)
class Stages:
    """Sizes of a ResNet's body: `depths` blocks in each stage. Stage s has width * 2**s channels; all but the first
    halve the image."""

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

    def outputs(self, stage: int) -> int:
        """Channels of a stage's feature map."""
        return self.width * 2**stage * BLOCKS[self.block]


class _Block(NamedTuple):
    d_in: int
    width: int
    stride: int
    dilation: int


def _stages(cfg: Stages, output_stride: int | None = None) -> list[list[_Block]]:
    """Every block. In a stage that would pass the output stride, the first block keeps the dilation before it."""
    d_in, stages, total, dilation = cfg.width, [], 4 if cfg.stem == "imagenet" else 1, 1
    for s, depth in enumerate(cfg.depths):
        width, stride, before = cfg.width * 2**s, 2 if s else 1, dilation
        if s and output_stride is not None and total >= output_stride:
            stride, dilation = 1, 2 * dilation
        total *= stride
        d_out = cfg.outputs(s)
        stages.append([_Block(d_in, width, stride, before)] + [_Block(d_out, width, 1, dilation)] * (depth - 1))
        d_in = d_out
    return stages


def _block_spec(cfg: Stages, d_in: int, width: int, stride: int) -> dict:
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


def stages_spec(cfg: Stages) -> dict:
    """`stem`, `stages.s.b.convs.i`, and `stages.s.b.shortcut` where the shape changes."""
    return {
        "stages": [[_block_spec(cfg, *block[:3]) for block in blocks] for blocks in _stages(cfg)],
        "stem": conv_norm_spec(cfg.channels, cfg.width, 7 if cfg.stem == "imagenet" else 3),
    }


def _block(p: dict, x: Tensor, cfg: Stages, stride: int, dilation: int, train: bool) -> Tensor:
    """y = relu(shortcut(x) + F(x)). x: (batch, d_in, height, width) -> (batch, d_out, h, w), h = height / stride."""
    *first, last = p["convs"]
    y = x
    for i, q in enumerate(first):
        grouped = cfg.block == "bottleneck" and i == 1
        spread = grouped or cfg.block == "basic"
        options = {"stride": stride if spread else 1, "dilation": dilation if spread else 1}
        y = conv_norm(q, y, train=train, groups=cfg.groups if grouped else 1, **options)
    y = conv_norm(last, y, None, train=train, dilation=dilation if cfg.block == "basic" else 1)  # F(x)
    if "shortcut" in p:
        x = conv_norm(p["shortcut"], x, None, train=train, stride=stride)  # (batch, d_out, h, w)
    elif x.shape != y.shape:
        x = x[:, :, ::stride, ::stride]  # (batch, d_in, h, w)
        x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))  # (batch, d_out, h, w)
    return (x + y).relu()


def stage_maps(
    params: dict, x: Tensor, cfg: Stages, *, output_stride: int | None = None, train: bool = False
) -> list[Tensor]:
    """The output of the stem and of each stage, (batch, channels, height, width) each.

    Args:
        params: `stem` and `stages`.
        x: (batch, channels, height, width).
        output_stride: halve the image no further than to this part of it. Of published weights, whose stages all halve
            it, the feature maps are then finer.

    Raises:
        ValueError: images with other channels, or smaller than the net's stride.
    """
    blocks = _stages(cfg, output_stride)
    halvings = sum(stage[0].stride == 2 for stage in blocks) + (2 if cfg.stem == "imagenet" else 0)
    check_images("resnet", x, cfg.channels, 2**halvings)
    stride = 2 if cfg.stem == "imagenet" else 1
    x = conv_norm(params["stem"], x, train=train, stride=stride)  # (batch, cfg.width, height / stride, width / stride)
    maps = [x]
    if cfg.stem == "imagenet":
        x = max_pool(x, 3, stride=2, padding=1)  # (batch, cfg.width, height / 4, width / 4)
    for stage, sizes in zip(params["stages"], blocks, strict=True):
        for p, (_, _, stride, dilation) in zip(stage, sizes, strict=True):
            x = _block(p, x, cfg, stride, dilation, train)  # (batch, d of the stage, h / stride, w / stride)
        maps.append(x)
    return maps


TORCHVISION = {
    "conv": ("layer{stage}.{b}.conv{number}", "layer{stage}.{b}.bn{number}"),
    "shortcut": ("layer{stage}.{b}.downsample.0", "layer{stage}.{b}.downsample.1"),
    "stem": ("conv1", "bn1"),
}
"""Torchvision's names of the convolutions and norms of stage s, block b; `stage` and `number` count from 1, the others
from 0."""
PARTS = ("convolution", "normalization")
TRANSFORMERS = {
    "conv": tuple(f"encoder.stages.{{s}}.layers.{{b}}.layer.{{i}}.{part}" for part in PARTS),
    "shortcut": tuple(f"encoder.stages.{{s}}.layers.{{b}}.shortcut.{part}" for part in PARTS),
    "stem": tuple(f"embedder.embedder.{part}" for part in PARTS),
}
"""Those of transformers' ResNetModel."""


def stage_names(
    cfg: Stages, names: dict[str, tuple[str, str]] = TORCHVISION, ours: str = "", theirs: str = ""
) -> dict[str, Rename]:
    """Part of a rename table for `stages_spec`.

    Args:
        ours, theirs: put before all names of either side, such as "backbone.".
    """

    def conv_norm_at(name: str, part: str, **at: int) -> dict[str, Rename]:
        return conv_norm_names(ours + name, *(theirs + other.format(**at) for other in names[part]))

    table = conv_norm_at("stem", "stem")
    for s, blocks in enumerate(stages_spec(cfg)["stages"]):
        for b, block in enumerate(blocks):
            at = {"s": s, "stage": s + 1, "b": b}
            for i in range(len(block["convs"])):
                table |= conv_norm_at(f"stages.{s}.{b}.convs.{i}", "conv", **at, i=i, number=i + 1)
            if "shortcut" in block:
                table |= conv_norm_at(f"stages.{s}.{b}.shortcut", "shortcut", **at)
    return table
