"""ESPCN: convolutions on the small picture, whose last feature maps are the pixels of the large one, shuffled.

Shi et al. 2016, "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural
Network" (arXiv:1609.05158), eqs. 1 to 4:

    f_1 = tanh(W_1 x + b_1);   f_2 = tanh(W_2 f_1 + b_2);   y = PS(W_3 f_2 + b_3)
    PS(T)[c, s i + a, s j + b] = T[c s² + a s + b, i, j]

PS is the order of torch's pixel shuffle; the paper counts the channels last. The rename table is to
yjn870/ESPCN-pytorch. In short runs `activation="relu"` learns faster than the paper's tanh.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from core import initializers
from core.layers import activation, conv, conv_spec
from nets.blocks.conv_norm import HE, affine_names, check_images
from nets.weights import Rename, fill, read

LAST = initializers.normal(1e-3)
"""Initialiser of the last layer: so small that no checkerboard is seen at the beginning."""
ENLARGED = False
"""The input is the small picture itself."""


@dataclass(frozen=True)
class Config:
    """Sizes of ESPCN."""

    scale: int = 3
    """Factor of enlargement."""
    widths: tuple[int, ...] = (64, 32)
    """Feature maps of the hidden layers, the first with 5x5 kernels, the others with 3x3."""
    activation: str = "tanh"
    """tanh as in the paper, or another name of `core.layers.ACTIVATIONS`."""
    channels: int = 1

    def __post_init__(self):
        if not self.widths or min(self.scale, self.channels, *self.widths) < 1:
            raise ValueError(f"espcn: scale {self.scale}, widths {self.widths}, {self.channels} channels; expected 1+")
        activation(self.activation)


PRESETS = {"espcn": Config(), "espcn-relu": Config(activation="relu")}


def spec(cfg: Config) -> dict:
    """`layers.i`."""
    widths = (cfg.channels, *cfg.widths)
    pairs = zip(widths, cfg.widths, strict=False)
    hidden = [conv_spec(d_in, d_out, 3 if i else 5, init=HE) for i, (d_in, d_out) in enumerate(pairs)]
    return {"layers": [*hidden, conv_spec(widths[-1], cfg.channels * cfg.scale**2, 3, init=LAST)]}


def reach(cfg: Config) -> int:
    """Pixels of the input on each side that a pixel of the output depends on."""
    return 2 + len(cfg.widths)


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Enlarged pictures: (batch, channels, height, width) -> (batch, channels, scale height, scale width).

    key and train are without effect here.

    Raises:
        ValueError: pictures with other channels.
    """
    check_images("espcn", x, cfg.channels, 1)
    *hidden, last = params["layers"]
    for p in hidden:
        x = activation(cfg.activation)(conv(p, x, padding="same"))  # (batch, width, height, width)
    return F.pixel_shuffle(conv(last, x, padding="same"), cfg.scale)


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of yjn870/ESPCN-pytorch, whose activations count in the same list."""
    table = affine_names(f"layers.{len(cfg.widths)}", "last_part.0")
    for i in range(len(cfg.widths)):
        table |= affine_names(f"layers.{i}", f"first_part.{2 * i}")
    return table


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters from a file in the names of yjn870/ESPCN-pytorch: a local file or folder, or a hub repository."""
    return fill(spec(cfg), read(source), rename_table(cfg), source)
