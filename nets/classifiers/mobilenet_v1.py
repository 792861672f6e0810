"""MobileNet v1: every 3x3 convolution in two, one in space and one across channels.

Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications"
(arXiv:1704.04861). A depthwise convolution filters each channel by itself, a 1x1 convolution mixes them, with batch
norm and ReLU6 after both:

    y = relu6(norm(pointwise(relu6(norm(depthwise(x))))))

For k x k windows and n output channels that takes 1/n + 1/k^2 of the arithmetic of one convolution that does both.
"""

from dataclasses import dataclass

from torch import Tensor

from core import initializers
from core.layers import dropout, global_average_pool, linear, linear_spec
from core.tree import Tree
from nets.blocks.conv_norm import (
    affine_names,
    check_images,
    conv_norm,
    conv_norm_names,
    conv_norm_spec,
    dropout_keys,
    fill_published,
    with_base_prefix,
)
from nets.weights import Rename, read

LEAST_WIDTH = 8


@dataclass(frozen=True)
class Config:
    """Sizes of MobileNet v1: `stages` are the output channels of each pair of convolutions, and all but the first halve
    the image."""

    width: float = 1.0
    """Factor of all channels, which are at least 8."""
    stages: tuple[tuple[int, ...], ...] = ((64,), (128,) * 2, (256,) * 2, (512,) * 6, (1024,) * 2)
    stem: int = 32
    padding: str = "symmetric"
    """symmetric, or tensorflow for the weights that the authors published; see `nets.blocks.conv_norm`."""
    dropout: float = 0.001
    channels: int = 3
    classes: int = 1000

    def __post_init__(self):
        if self.width <= 0:
            raise ValueError(f"mobilenet_v1: width {self.width}; expected a factor above 0")
        if not self.stages or not all(self.stages):
            raise ValueError(f"mobilenet_v1: stages {self.stages}; expected at least one pair of convolutions in each")
        if self.padding not in ("symmetric", "tensorflow"):
            raise ValueError(f"mobilenet_v1: padding '{self.padding}'; expected symmetric or tensorflow")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"mobilenet_v1: dropout {self.dropout} is outside [0, 1)")


PRESETS = {
    "mobilenet_v1": Config(),
    **{f"mobilenet_v1-{width}": Config(width) for width in (0.25, 0.5, 0.75)},
}


def _widen(cfg: Config, channels: int) -> int:
    return max(int(channels * cfg.width), LEAST_WIDTH)


def spec(cfg: Config) -> dict:
    """`stem`, `stages.s.b` with `depthwise` and `pointwise`, and `head`."""
    d_in, stages = _widen(cfg, cfg.stem), []
    for widths in cfg.stages:
        stage = []
        for d_out in (_widen(cfg, width) for width in widths):
            pair = {
                "depthwise": conv_norm_spec(d_in, d_in, 3, groups=d_in),
                "pointwise": conv_norm_spec(d_in, d_out, 1),
            }
            stage.append(pair)
            d_in = d_out
        stages.append(stage)
    return {
        "head": linear_spec(d_in, cfg.classes, init=initializers.normal(0.01)),
        "stages": stages,
        "stem": conv_norm_spec(cfg.channels, _widen(cfg, cfg.stem), 3),
    }


def _conv_norm(p: Tree, x: Tensor, cfg: Config, train: bool, stride: int = 1, groups: int = 1) -> Tensor:
    return conv_norm(p, x, "relu6", train=train, stride=stride, padding=cfg.padding, groups=groups, eps=1e-3)


def feature_maps(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> list[Tensor]:
    """The output of the stem and of each stage, (batch, channels, height, width) each.

    Args:
        x: (batch, channels, height, width) of any size, as each stride rounds up.

    Raises:
        ValueError: images with other channels, or without a pixel.
    """
    check_images("mobilenet_v1", x, cfg.channels, 1)
    maps = [_conv_norm(params["stem"], x, cfg, train, stride=2)]  # (batch, d, height / 2, width / 2)
    for s, pairs in enumerate(params["stages"]):
        x = maps[-1]
        for b, p in enumerate(pairs):
            x = _conv_norm(p["depthwise"], x, cfg, train, stride=2 if s and not b else 1, groups=x.shape[1])
            x = _conv_norm(p["pointwise"], x, cfg, train)  # (batch, next d, h, w), halved by the first of a stage
        maps.append(x)
    return maps


def features(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> Tensor:
    """Penultimate features: the last stage's output, global-average-pooled. (batch, channels, h, w) -> (batch, d)."""
    return global_average_pool(feature_maps(params, x, cfg, train=train)[-1])


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Logits of images.

    Args:
        x: (batch, channels, height, width).
        key: (2,) or one per example (batch, 2); needed in training if there is dropout.

    Returns:
        (batch, classes).
    """
    (key,) = dropout_keys("mobilenet_v1", cfg.dropout, key, 1, train)
    return linear(params["head"], dropout(features(params, x, cfg, train=train), cfg.dropout, key, train))


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of transformers' MobileNetV1ForImageClassification."""

    def names(ours: str, theirs: str) -> dict[str, Rename]:
        return conv_norm_names(ours, f"mobilenet_v1.{theirs}.convolution", f"mobilenet_v1.{theirs}.normalization")

    table = {**affine_names("head", "classifier"), **names("stem", "conv_stem")}
    index = 0
    for s, widths in enumerate(cfg.stages):
        for b in range(len(widths)):
            for part in ("depthwise", "pointwise"):
                table |= names(f"stages.{s}.{b}.{part}", f"layer.{index}")
                index += 1
    return table


def recognise(state: dict[str, Tensor], cfg: Config) -> tuple[dict[str, Tensor], dict[str, Rename]]:
    """(tensors, rename table)."""
    table = rename_table(cfg)
    return with_base_prefix(state, "mobilenet_v1.", table), table


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters and Stats from transformers' files of this net: a local file or folder, or a hub repository.

    Those of "google/mobilenet_v1_1.0_224" have 1001 classes, the first of which is the background, and need
    padding="tensorflow".
    """
    return fill_published(spec(cfg), *recognise(read(source), cfg), source)
