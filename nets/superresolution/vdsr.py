"""VDSR: twenty convolutions that learn what the enlarged picture lacks, one net for all scales.

Kim et al. 2016, "Accurate Image Super-Resolution Using Very Deep Convolutional Networks" (arXiv:1511.04587), section 3:

    y = x + W_D relu(W_{D-1} ... relu(W_1 x))

x is the bicubic enlargement of the luminance. No biases, as in the public twtygqyy/pytorch-vdsr, to whose names the
rename table is. The paper trains by SGD with a rate of 0.1 and clips each value of the gradient to [-t / rate, t /
rate], which is not the same as the usual clipping of the norm.
"""

from dataclasses import dataclass

from torch import Tensor

from core import initializers
from core.layers import conv, conv_spec
from nets.blocks.conv_norm import HE, check_images
from nets.weights import Rename, fill, read

LAST = initializers.normal(1e-3)
"""Initialiser of the last layer: the net starts as the bicubic enlargement. The paper starts it as the others."""
ENLARGED = True
"""The input is the bicubic enlargement."""


@dataclass(frozen=True)
class Config:
    """Sizes of VDSR."""

    depth: int = 20
    """Number of convolutions; D in the paper."""
    width: int = 64
    """Feature maps."""
    channels: int = 1

    def __post_init__(self):
        if self.depth < 2 or min(self.width, self.channels) < 1:
            raise ValueError(f"vdsr: depth {self.depth}, width {self.width}; expected at least 2 and 1")


PRESETS = {"vdsr": Config()}


def spec(cfg: Config) -> dict:
    """`layers.i`."""
    widths = [cfg.channels, *(cfg.width for _ in range(cfg.depth - 1))]
    hidden = [conv_spec(d_in, cfg.width, 3, bias=False, init=HE) for d_in in widths[:-1]]
    return {"layers": [*hidden, conv_spec(cfg.width, cfg.channels, 3, bias=False, init=LAST)]}


def reach(cfg: Config) -> int:
    """Pixels of the input on each side that a pixel of the output depends on."""
    return cfg.depth


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Sharpened enlargements: (batch, channels, height, width) -> the same shape.

    key and train are without effect here.

    Raises:
        ValueError: pictures with other channels.
    """
    check_images("vdsr", x, cfg.channels, 1)
    *hidden, last = params["layers"]
    residual = x
    for p in hidden:
        residual = conv(p, residual, padding=1).relu()  # (batch, width, height, width)
    return x + conv(last, residual, padding=1)


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of twtygqyy/pytorch-vdsr."""
    names = ["input", *(f"residual_layer.{i}.conv" for i in range(cfg.depth - 2)), "output"]
    return {f"layers.{i}.weight": Rename(f"{name}.weight") for i, name in enumerate(names)}


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters from a file in the names of twtygqyy/pytorch-vdsr: a local file or folder, or a hub repository."""
    return fill(spec(cfg), read(source), rename_table(cfg), source)
