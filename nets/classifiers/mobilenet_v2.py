"""MobileNet v2: inverted residuals, whose hidden layers are wide and whose inputs and outputs are narrow.

Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (arXiv:1801.04381). A block expands a few
channels to `expansion` times as many, filters each of them by itself with a 3x3 convolution, and projects back to a
few, with ReLU6 after the first two and nothing after the projection, since it would destroy information there:

    y = x + project(relu6(depthwise(relu6(expand(x)))))
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from core import initializers
from core.layers import dropout, global_average_pool, linear, linear_spec
from nets.blocks.conv_norm import (
    affine_names,
    check_images,
    conv_norm,
    conv_norm_names,
    conv_norm_spec,
    divisible,
    dropout_keys,
    fill_published,
    fitting_table,
    inverted_residual,
    inverted_residual_spec,
    with_base_prefix,
)
from nets.weights import Rename, read


class Stage(NamedTuple):
    """A row of the paper's table 2; only the first block of a stage has its stride."""

    expansion: int
    channels: int
    depth: int
    stride: int


TABLE = (
    Stage(1, 16, 1, 1),
    Stage(6, 24, 2, 2),
    Stage(6, 32, 3, 2),
    Stage(6, 64, 4, 2),
    Stage(6, 96, 3, 1),
    Stage(6, 160, 3, 2),
    Stage(6, 320, 1, 1),
)


@dataclass(frozen=True)
class Config:
    """Sizes of MobileNet v2; all channels are multiplied by `width` and rounded to multiples of 8."""

    width: float = 1.0
    stages: tuple[Stage, ...] = TABLE
    stem: int = 32
    last: int = 1280
    """Channels of the last convolution; a width below 1 does not scale them."""
    padding: str = "symmetric"
    """symmetric, or tensorflow for the weights that the authors published; see `nets.blocks.conv_norm`."""
    eps: float = 1e-5
    """Epsilon of the norms; the weights that the authors published are for 0.001."""
    dropout: float = 0.2
    channels: int = 3
    classes: int = 1000

    def __post_init__(self):
        if self.width <= 0:
            raise ValueError(f"mobilenet_v2: width {self.width}; expected a factor above 0")
        if not self.stages or any(min(stage) < 1 for stage in self.stages):
            raise ValueError("mobilenet_v2: stages are (expansion, channels, depth, stride), all of them at least 1")
        if self.padding not in ("symmetric", "tensorflow"):
            raise ValueError(f"mobilenet_v2: padding '{self.padding}'; expected symmetric or tensorflow")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"mobilenet_v2: dropout {self.dropout} is outside [0, 1)")


PRESETS = {
    "mobilenet_v2": Config(),
    **{f"mobilenet_v2-{width}": Config(width) for width in (0.35, 0.5, 0.75, 1.4)},
}


def _stages(cfg: Config) -> list[list[tuple[int, int, int, int]]]:
    """(input channels, expanded channels, output channels, stride) of every block."""
    d_in, stages = divisible(cfg.stem * cfg.width), []
    for expansion, channels, depth, stride in cfg.stages:
        d_out, blocks = divisible(channels * cfg.width), []
        for b in range(depth):
            blocks.append((d_in, d_in * expansion, d_out, 1 if b else stride))
            d_in = d_out
        stages.append(blocks)
    return stages


def spec(cfg: Config) -> dict:
    """`stem`, `stages.s.b` with `expand`, `depthwise` and `project`, `last` and `head`."""
    stages = _stages(cfg)
    last = divisible(cfg.last * max(1.0, cfg.width))
    return {
        "head": linear_spec(last, cfg.classes, init=initializers.normal(0.01)),
        "last": conv_norm_spec(stages[-1][-1][2], last, 1),
        "stages": [[inverted_residual_spec(*sizes) for *sizes, _ in blocks] for blocks in stages],
        "stem": conv_norm_spec(cfg.channels, divisible(cfg.stem * cfg.width), 3),
    }


def feature_maps(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> list[Tensor]:
    """The output of the stem, of each stage and of the last convolution, (batch, channels, height, width) each.

    Args:
        x: (batch, channels, height, width) of any size, as each stride rounds up.

    Raises:
        ValueError: images with other channels, or without a pixel.
    """
    check_images("mobilenet_v2", x, cfg.channels, 1)
    options = {"train": train, "padding": cfg.padding, "eps": cfg.eps}
    maps = [conv_norm(params["stem"], x, "relu6", stride=2, **options)]  # (batch, d, height / 2, width / 2)
    for blocks, sizes in zip(params["stages"], _stages(cfg), strict=True):
        x = maps[-1]
        for p, (*_, stride) in zip(blocks, sizes, strict=True):
            x = inverted_residual(p, x, "relu6", stride=stride, **options)  # (batch, next d, h / stride, w / stride)
        maps.append(x)
    return [*maps, conv_norm(params["last"], maps[-1], "relu6", **options)]


def features(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """Penultimate features: the last feature maps, global-average-pooled. (batch, channels, h, w) -> (batch, d)."""
    return global_average_pool(feature_maps(params, x, cfg, train=train)[-1])


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of images.

    Args:
        x: (batch, channels, height, width).
        key: (2,) or one per example (batch, 2); needed in training if there is dropout.

    Returns:
        (batch, classes).
    """
    (key,) = dropout_keys("mobilenet_v2", cfg.dropout, key, 1, train)
    return linear(params["head"], dropout(features(params, x, cfg, train=train), cfg.dropout, key, train))


def rename_table(cfg: Config, source: str = "torchvision") -> dict[str, Rename]:
    """Our names -> torchvision's, or those of transformers' MobileNetV2ForImageClassification.

    Raises:
        ValueError: a source that is neither.
    """
    if source not in NAMES:
        raise ValueError(f"mobilenet_v2: source '{source}' is unknown; expected one of {', '.join(NAMES)}")
    return NAMES[source](spec(cfg)["stages"])


def _torchvision(stages: list) -> dict[str, Rename]:
    """Torchvision counts all blocks in one list with the stem and the last convolution."""
    table = {**affine_names("head", "classifier.1"), **conv_norm_names("stem", "features.0.0", "features.0.1")}
    index = 1
    for s, blocks in enumerate(stages):
        for b, block in enumerate(blocks):
            ours, theirs = f"stages.{s}.{b}", f"features.{index}.conv"
            expanded = [part for part in ("expand", "depthwise") if part in block]
            for i, part in enumerate(expanded):
                table |= conv_norm_names(f"{ours}.{part}", f"{theirs}.{i}.0", f"{theirs}.{i}.1")
            table |= conv_norm_names(f"{ours}.project", f"{theirs}.{len(expanded)}", f"{theirs}.{len(expanded) + 1}")
            index += 1
    return table | conv_norm_names("last", f"features.{index}.0", f"features.{index}.1")


def _transformers(stages: list) -> dict[str, Rename]:
    """In transformers the first block is part of the stem."""

    def names(ours: str, theirs: str) -> dict[str, Rename]:
        return conv_norm_names(ours, f"mobilenet_v2.{theirs}.convolution", f"mobilenet_v2.{theirs}.normalization")

    table = {**affine_names("head", "classifier"), **names("stem", "conv_stem.first_conv"), **names("last", "conv_1x1")}
    blocks = [(f"stages.{s}.{b}", block) for s, blocks in enumerate(stages) for b, block in enumerate(blocks)]
    for i, (ours, block) in enumerate(blocks):
        for part, theirs in (("expand", "expand_1x1"), ("depthwise", "conv_3x3"), ("project", "reduce_1x1")):
            if part in block:
                table |= names(f"{ours}.{part}", f"layer.{i - 1}.{theirs}" if i else f"conv_stem.{theirs}")
    return table


NAMES = {"torchvision": _torchvision, "transformers": _transformers}


def recognise(state: dict[str, Tensor], cfg: Config) -> tuple[dict[str, Tensor], dict[str, Rename]]:
    """(tensors, rename table of the library that wrote them)."""
    transformers = rename_table(cfg, "transformers")
    state = with_base_prefix(state, "mobilenet_v2.", transformers)
    return state, fitting_table(state, rename_table(cfg), transformers)


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters and Stats from torchvision's or transformers' file: a local file or folder, or a hub repository.

    Those of "google/mobilenet_v2_1.0_224" have 1001 classes, the first of which is the background, and need
    padding="tensorflow" and eps=0.001.
    """
    return fill_published(spec(cfg), *recognise(read(source), cfg), source)
