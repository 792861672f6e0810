"""SRCNN: three convolutions on the enlarged picture.

Dong et al. 2014, "Image Super-Resolution Using Deep Convolutional Networks" (arXiv:1501.00092), section 3.1:

    F_1(x) = max(0, W_1 x + b_1);   F_2(x) = max(0, W_2 F_1(x) + b_2);   F(x) = W_3 F_2(x) + b_3

x is the bicubic enlargement of the luminance. The paper convolves without padding, so that the output is smaller than
the input; here, as in public versions, zeros are padded, and the border had better not count in the loss. The rename
table is to yjn870/SRCNN-pytorch.
"""

from dataclasses import dataclass

from torch import Tensor

from core import initializers
from core.layers import conv, conv_spec
from nets.blocks.conv_norm import HE, affine_names, check_images
from nets.weights import Rename, fill, read

LAST = initializers.normal(1e-3)
"""Initialiser of the last layer; the paper's of all layers (section 3.3)."""
ENLARGED = True
"""The input is the bicubic enlargement."""


@dataclass(frozen=True)
class Config:
    """Sizes of SRCNN."""

    kernels: tuple[int, int, int] = (9, 1, 5)
    """Odd kernel sizes."""
    widths: tuple[int, int] = (64, 32)
    """Feature maps of the first two layers."""
    channels: int = 1

    def __post_init__(self):
        if len(self.kernels) != 3 or len(self.widths) != 2 or min(*self.widths, self.channels) < 1:
            raise ValueError(f"srcnn: kernels {self.kernels}, widths {self.widths}; expected three and two")
        if any(kernel < 1 or kernel % 2 == 0 for kernel in self.kernels):
            raise ValueError(f"srcnn: kernels {self.kernels}; expected odd numbers")


PRESETS = {"srcnn": Config(), "srcnn-9-5-5": Config(kernels=(9, 5, 5))}


def spec(cfg: Config) -> dict:
    """`layers.i`."""
    sizes = zip((cfg.channels, *cfg.widths), (*cfg.widths, cfg.channels), cfg.kernels, (HE, HE, LAST), strict=True)
    return {"layers": [conv_spec(d_in, d_out, kernel, init=init) for d_in, d_out, kernel, init in sizes]}


def reach(cfg: Config) -> int:
    """Pixels of the input on each side that a pixel of the output depends on."""
    return sum(kernel // 2 for kernel in cfg.kernels)


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Sharpened enlargements: (batch, channels, height, width) -> the same shape.

    key and train are without effect here.

    Raises:
        ValueError: pictures with other channels.
    """
    check_images("srcnn", x, cfg.channels, 1)
    *hidden, last = params["layers"]
    for p in hidden:
        x = conv(p, x, padding="same").relu()  # max(0, W x + b), (batch, width, height, width)
    return conv(last, x, padding="same")


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of yjn870/SRCNN-pytorch."""
    return {k: v for i in range(3) for k, v in affine_names(f"layers.{i}", f"conv{i + 1}").items()}


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters from a file in the names of yjn870/SRCNN-pytorch: a local file or folder, or a hub repository."""
    return fill(spec(cfg), read(source), rename_table(cfg), source)
