"""DRRN: residual units that share their weights within a block, each added to the block's first feature maps.

Tai et al. 2017, "Image Super-Resolution via Deep Recursive Residual Network" (CVPR 2017), eqs. 4 to 6. Of each of B
blocks, with the ReLU before the convolution:

    h_0 = W_0 relu(x);   h_u = h_0 + W_2 relu(W_1 relu(h_{u-1})),  u = 1 ... U, always the same W_1 and W_2

    y = x + W relu(h_U of the last block)

x is the bicubic enlargement of the luminance. The authors' own net has a batch norm of its own before every ReLU; here,
as in public versions, there is none. The rename table is to yjn870/DRRN-pytorch. There, and in other public versions,
the first ReLU of a block works in place and so rectifies h_0 itself, wherever it is added: `rectified`.
"""

from dataclasses import dataclass

from torch import Tensor

from core import initializers
from core.layers import conv, conv_spec
from nets.blocks.conv_norm import HE, check_images
from nets.weights import Rename, WeightsError, fill, read

LAST = initializers.normal(1e-3)
"""Initialiser of the last layer: the net starts as the bicubic enlargement."""
ENLARGED = True
"""The input is the bicubic enlargement."""


@dataclass(frozen=True)
class Config:
    """Sizes of DRRN."""

    blocks: int = 1
    """Recursive blocks; B in the paper."""
    units: int = 9
    """Residual units of a block, all of the same weights; U in the paper."""
    width: int = 128
    """Feature maps."""
    rectified: bool = False
    """relu(h_0) in place of h_0, as in public versions."""
    channels: int = 1

    def __post_init__(self):
        if min(self.blocks, self.units, self.width, self.channels) < 1:
            raise ValueError(f"drrn: {self.blocks} blocks, {self.units} units, width {self.width}; expected at least 1")


PRESETS = {
    "drrn": Config(),
    "drrn-b1u25": Config(units=25),
    "drrn-public": Config(rectified=True),
    "drrn-small": Config(units=5, width=48),
}


def spec(cfg: Config) -> dict:
    """`blocks.b` with `first` and `unit.0`, `unit.1`; `last`. No biases."""

    def conv3(d_in: int, d_out: int, init: initializers.Initializer = HE) -> dict:
        return conv_spec(d_in, d_out, 3, bias=False, init=init)

    def block(d_in: int) -> dict:
        return {"first": conv3(d_in, cfg.width), "unit": [conv3(cfg.width, cfg.width, UNIT[i]) for i in range(2)]}

    widths = [cfg.channels, *(cfg.width for _ in range(cfg.blocks - 1))]
    return {"blocks": [block(d_in) for d_in in widths], "last": conv3(cfg.width, cfg.channels, LAST)}


UNIT = (HE, initializers.normal(1e-3))
"""Initialisers of a unit's two convolutions: its branch starts near 0, so that 25 of them do not add up."""


def reach(cfg: Config) -> int:
    """Pixels of the input on each side that a pixel of the output depends on."""
    return cfg.blocks * (1 + 2 * cfg.units) + 1


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Sharpened enlargements: (batch, channels, height, width) -> the same shape.

    key and train are without effect here.

    Raises:
        ValueError: pictures with other channels.
    """
    check_images("drrn", x, cfg.channels, 1)
    h = x
    for block in params["blocks"]:
        first, second = block["unit"]
        h_0 = conv(block["first"], h.relu(), padding=1)  # (batch, width, height, width)
        h = h_0 = h_0.relu() if cfg.rectified else h_0
        for _ in range(cfg.units):
            h = h_0 + conv(second, conv(first, h.relu(), padding=1).relu(), padding=1)  # h_0 + W_2 relu(W_1 relu(h))
    return x + conv(params["last"], h.relu(), padding=1)


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of yjn870/DRRN-pytorch."""
    names = {"last.weight": "rec.module.1.weight"}
    for b in range(cfg.blocks):
        names[f"blocks.{b}.first.weight"] = f"rbs.{b}.h0.module.1.weight"
        names |= {f"blocks.{b}.unit.{i}.weight": f"rbs.{b}.ru.module.{i}.module.1.weight" for i in range(2)}
    return {ours: Rename(theirs) for ours, theirs in names.items()}


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters from a file in the names of yjn870/DRRN-pytorch: a local file or folder, or a hub repository.

    Raises:
        WeightsError: besides what `nets.weights.fill` raises, the net computes something else than that version.
    """
    if not cfg.rectified:
        raise WeightsError(f"{source}: a file in these names needs `rectified`, as in the preset drrn-public")
    return fill(spec(cfg), read(source), rename_table(cfg), source)
