"""FSRCNN: an hourglass of narrow convolutions on the small picture, and one transposed convolution that enlarges it.

Dong et al. 2016, "Accelerating the Super-Resolution Convolutional Neural Network" (arXiv:1608.00367), section 3, where
`width`, `shrunk` and `mappings` are d, s and m:

    x = PReLU(conv5_d(x));   x = PReLU(conv1_s(x));   x = PReLU(conv3_s(x)), m times;   x = PReLU(conv1_d(x))
    y = deconv9(x), with a stride of the scale

In and out is luminance, one channel. The rename table is to yjn870/FSRCNN-pytorch.
"""

from dataclasses import dataclass

from torch import Tensor

from core import initializers
from core.layers import conv, conv_spec, conv_transpose, prelu, prelu_spec
from nets.blocks.conv_norm import HE, affine_names, check_images
from nets.weights import Rename, fill, read

LAST = initializers.normal(1e-3)
"""Initialiser of the transposed convolution (section 3.5)."""
ENLARGED = False
"""The input is the small picture itself."""


@dataclass(frozen=True)
class Config:
    """Sizes of FSRCNN."""

    scale: int = 3
    """Factor of enlargement, 2 to 4 in the paper."""
    width: int = 56
    """Feature maps of the first and the last but one layer; d in the paper."""
    shrunk: int = 12
    """Feature maps in between; s in the paper."""
    mappings: int = 4
    """3x3 convolutions in between; m in the paper."""
    channels: int = 1

    def __post_init__(self):
        for name in ("scale", "width", "shrunk", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"fsrcnn: {name} is {getattr(self, name)}; expected at least 1")
        if self.mappings < 0:
            raise ValueError(f"fsrcnn: {self.mappings} mappings; expected at least 0")


PRESETS = {"fsrcnn": Config(), "fsrcnn-s": Config(width=32, shrunk=5, mappings=1)}


def spec(cfg: Config) -> dict:
    """`first`, `shrink`, `mapping.i`, `expand` with `conv` and `act`, and `last`."""

    def layer(d_in: int, d_out: int, kernel: int) -> dict:
        return {"act": prelu_spec(d_out), "conv": conv_spec(d_in, d_out, kernel, init=HE)}

    return {
        "expand": layer(cfg.shrunk, cfg.width, 1),
        "first": layer(cfg.channels, cfg.width, 5),
        "last": conv_spec(cfg.width, cfg.channels, 9, transposed=True, init=LAST),
        "mapping": [layer(cfg.shrunk, cfg.shrunk, 3) for _ in range(cfg.mappings)],
        "shrink": layer(cfg.width, cfg.shrunk, 1),
    }


def reach(cfg: Config) -> int:
    """Pixels of the input on each side that a pixel of the output depends on."""
    return 2 + cfg.mappings + -(-4 // cfg.scale)


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Enlarged pictures: (batch, channels, height, width) -> (batch, channels, scale height, scale width).

    key and train are without effect here.

    Raises:
        ValueError: pictures with other channels.
    """
    check_images("fsrcnn", x, cfg.channels, 1)
    for p in (params["first"], params["shrink"], *params["mapping"], params["expand"]):
        x = prelu(p["act"], conv(p["conv"], x, padding=p["conv"]["weight"].shape[-1] // 2))  # same height and width
    return conv_transpose(params["last"], x, stride=cfg.scale, padding=4, output_padding=cfg.scale - 1)


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of yjn870/FSRCNN-pytorch."""
    layers = ["shrink", *(f"mapping.{i}" for i in range(cfg.mappings)), "expand"]
    table = affine_names("last", "last_part")
    for ours, theirs, index in [("first", "first_part", 0)] + [(n, "mid_part", 2 * i) for i, n in enumerate(layers)]:
        table |= affine_names(f"{ours}.conv", f"{theirs}.{index}")
        table[f"{ours}.act.weight"] = Rename(f"{theirs}.{index + 1}.weight")
    return table


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters from a file in the names of yjn870/FSRCNN-pytorch: a local file or folder, or a hub repository."""
    return fill(spec(cfg), read(source), rename_table(cfg), source)
