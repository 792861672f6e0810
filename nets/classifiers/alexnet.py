"""AlexNet: the convolutional net that won ImageNet 2012, in the form of 2014 that fits one device.

Krizhevsky, Sutskever and Hinton 2012, "ImageNet Classification with Deep Convolutional Neural Networks" (NeurIPS): five
convolutions, the first with large windows and a large stride, three overlapping poolings, ReLU throughout, and dropout
in the large hidden layers:

    x_i = relu(conv_i(x_(i-1))), max-pooled for i = 1, 2, 5;   h = relu(W_2 drop(relu(W_1 drop(x_5))));   logits = W_3 h

The widths are those of "One weird trick for parallelizing convolutional neural networks" (Krizhevsky 2014,
arXiv:1404.5997), without the split over two devices and without response normalisation, as in torchvision.
"""

from dataclasses import dataclass

from torch import Tensor

from core.layers import (
    adaptive_average_pool,
    conv,
    conv_spec,
    dropout,
    linear,
    linear_spec,
    max_pool,
)
from nets.blocks.conv_norm import affine_names, check_images, dropout_keys, fan_uniform
from nets.weights import Rename, fill, read

KERNELS = (11, 5, 3, 3, 3)
PADDING = (2, 2, 1, 1, 1)
POOLED = (1, 2)
"""Indices of the convolutions whose input is max-pooled; the last feature maps are pooled too."""
LEAST = 63
"""Side of the smallest image of which the strides leave a pixel."""


@dataclass(frozen=True)
class Config:
    """Sizes of AlexNet; `widths` are the channels of the five convolutions."""

    widths: tuple[int, int, int, int, int] = (64, 192, 384, 256, 256)
    pooled: int = 6
    """Side that the last feature maps are average-pooled to, so that images may be larger."""
    hidden: int = 4096
    dropout: float = 0.5
    channels: int = 3
    classes: int = 1000

    def __post_init__(self):
        if len(self.widths) != len(KERNELS) or min(self.widths) < 1:
            raise ValueError(f"alexnet: widths {self.widths}; expected the channels of {len(KERNELS)} convolutions")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"alexnet: dropout {self.dropout} is outside [0, 1)")


PRESETS = {"alexnet": Config()}


def spec(cfg: Config) -> dict:
    """`convs.i`, `hidden.0`, `hidden.1` and `head`."""
    sizes = cfg.widths[-1] * cfg.pooled**2, cfg.hidden, cfg.hidden
    inputs = (cfg.channels, *cfg.widths[:-1])
    return {
        "convs": [
            conv_spec(d_in, d_out, kernel, **fan_uniform(d_in * kernel**2))
            for d_in, d_out, kernel in zip(inputs, cfg.widths, KERNELS, strict=True)
        ],
        "head": linear_spec(cfg.hidden, cfg.classes, **fan_uniform(cfg.hidden)),
        "hidden": [
            linear_spec(d_in, d_out, **fan_uniform(d_in)) for d_in, d_out in zip(sizes[:-1], sizes[1:], strict=True)
        ],
    }


def feature_maps(params: dict, x: Tensor, cfg: Config, *, train: bool = False) -> list[Tensor]:
    """The output of each convolution after its ReLU and before any pooling, (batch, channels, height, width) each.

    Args:
        x: (batch, channels, height, width).
        train: without effect here.

    Raises:
        ValueError: images with other channels, or smaller than 63 pixels per side.
    """
    check_images("alexnet", x, cfg.channels, LEAST)
    maps = []
    for i, p in enumerate(params["convs"]):
        x = max_pool(x, 3, stride=2) if i in POOLED else x
        x = conv(p, x, stride=1 if i else 4, padding=PADDING[i]).relu()  # (batch, widths[i], height', width')
        maps.append(x)
    return maps


def features(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Penultimate features: the second hidden layer. (batch, channels, h, w) -> (batch, hidden)."""
    keys = dropout_keys("alexnet", cfg.dropout, key, 2, train)
    x = max_pool(feature_maps(params, x, cfg, train=train)[-1], 3, stride=2)  # (batch, widths[-1], height', width')
    x = adaptive_average_pool(x, cfg.pooled).flatten(1)  # (batch, widths[-1] * pooled**2)
    for p, k in zip(params["hidden"], keys, strict=True):
        x = linear(p, dropout(x, cfg.dropout, k, train)).relu()  # (batch, hidden)
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
    """Our names -> torchvision's, which counts activations, poolings and dropout in one list with the layers."""
    layers = {"head": "classifier.6", "hidden.0": "classifier.1", "hidden.1": "classifier.4"}
    layers |= {f"convs.{i}": f"features.{index}" for i, index in enumerate((0, 3, 6, 8, 10))}
    return {ours: rename for layer in layers.items() for ours, rename in affine_names(*layer).items()}


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters from torchvision's file of this net: a local file or folder, or a hub repository."""
    return fill(spec(cfg), read(source), rename_table(cfg), source)
