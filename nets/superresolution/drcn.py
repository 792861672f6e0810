"""DRCN: one convolution applied again and again, whose every result is a prediction; they are averaged.

Kim et al. 2016, "Deeply-Recursive Convolutional Network for Image Super-Resolution" (arXiv:1511.04491), section 3:

    H_0 = relu(W_0 relu(W_-1 x));   H_d = relu(W H_{d-1}),  d = 1 ... D, always the same W
    y_d = x + W_{D+2} relu(W_{D+1} H_d);   y = sum_d w_d y_d

x is the bicubic enlargement of the luminance. The objective is a weighted sum of the mean squared errors of all y_d and
of y (eq. 8); the weight of the first falls to 0. The paper's eq. 4 has another ReLU around y_d, which cannot be meant:
what is added to x may be negative.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from core import initializers
from core.layers import conv, conv_spec
from core.spec import Param
from nets.blocks.conv_norm import HE, check_images

LAST = initializers.normal(1e-3)
"""Initialiser of the last layer: the net starts as the bicubic enlargement."""
ENLARGED = True
"""The input is the bicubic enlargement."""


@dataclass(frozen=True)
class Config:
    """Sizes of DRCN."""

    recursions: int = 16
    """Applications of the shared convolution; D in the paper."""
    width: int = 256
    """Feature maps."""
    channels: int = 1

    def __post_init__(self):
        if min(self.recursions, self.width, self.channels) < 1:
            raise ValueError(f"drcn: {self.recursions} recursions, width {self.width}; expected at least 1")


PRESETS = {"drcn": Config(), "drcn-small": Config(recursions=6, width=64)}


def spec(cfg: Config) -> dict:
    """`embedding.i` and `reconstruction.i`, two each, `recursion`, which starts as the identity, and `weights`."""

    def conv3(d_in: int, d_out: int, init: initializers.Initializer = HE) -> dict:
        return conv_spec(d_in, d_out, 3, init=init)

    return {
        "embedding": [conv3(cfg.channels, cfg.width), conv3(cfg.width, cfg.width)],
        "reconstruction": [conv3(cfg.width, cfg.width), conv3(cfg.width, cfg.channels, LAST)],
        "recursion": conv3(cfg.width, cfg.width, initializers.dirac),
        "weights": Param((cfg.recursions,), initializers.constant(1 / cfg.recursions), (None,)),
    }


def reach(cfg: Config) -> int:
    """Pixels of the input on each side that a pixel of the output depends on."""
    return cfg.recursions + 4


def predictions(params: dict, x: Tensor, cfg: Config) -> Tensor:
    """y_d of all recursions: (batch, channels, height, width) -> (batch, recursions, channels, height, width).

    Raises:
        ValueError: pictures with other channels.
    """
    check_images("drcn", x, cfg.channels, 1)
    h, out = x, []
    for p in params["embedding"]:
        h = conv(p, h, padding=1).relu()  # (batch, width, height, width)
    first, last = params["reconstruction"]
    for _ in range(cfg.recursions):
        h = conv(params["recursion"], h, padding=1).relu()  # H_d = relu(W H_{d-1})
        out.append(x + conv(last, conv(first, h, padding=1).relu(), padding=1))  # y_d
    return torch.stack(out, 1)


def averaged(params: dict, predictions: Tensor) -> Tensor:
    """y = sum_d w_d y_d: (batch, recursions, channels, height, width) -> (batch, channels, height, width)."""
    return (params["weights"].reshape(-1, 1, 1, 1) * predictions).sum(1)


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Sharpened enlargements: (batch, channels, height, width) -> the same shape.

    key and train are without effect here.

    Raises:
        ValueError: pictures with other channels.
    """
    return averaged(params, predictions(params, x, cfg))
