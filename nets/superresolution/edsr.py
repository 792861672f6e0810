"""EDSR and MDSR: residual blocks without norms on the small picture, then pixel shuffles.

Lim et al. 2017, "Enhanced Deep Residual Networks for Single Image Super-Resolution" (arXiv:1707.02921):

    x_0 = W x;   x_{b+1} = x_b + a W_2 relu(W_1 x_b),  b = 0 ... B - 1;   y = W up(x_0 + W x_B)

with a residual scale a of 0.1 in the large net; `up` is, for powers of two, a convolution to four times the feature
maps and a shuffle by 2 per doubling, for 3 one to nine times and a shuffle by 3. In and out is R'G'B', from which the
mean of DIV2K is subtracted. A net with several `scales` is MDSR: two residual blocks of 5x5 kernels first, and the
shuffles, are each scale's own; the rest is shared.

The authors count pixels from 0 to 255 within the net (`white`). The rename table is to their sanghyun-son/EDSR-PyTorch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers
from core.layers import conv, conv_spec
from nets.blocks.conv_norm import HE, affine_names, check_images
from nets.weights import Rename, WeightsError, fill, read

BRANCH = initializers.normal(1e-3)
"""Initialiser of the last layer and of the second convolution of each block: the blocks start near the identity. Short
runs gain half a dB by it; the authors leave torch's initialisation."""
MEAN = (0.4488, 0.4371, 0.4040)
"""Mean red, green and blue of DIV2K."""
ENLARGED = False
"""The input is the small picture itself."""


@dataclass(frozen=True)
class Config:
    """Sizes of EDSR and MDSR."""

    scales: tuple[int, ...] = (2,)
    """Factors of enlargement, each 3 or a power of 2; several are MDSR."""
    blocks: int = 16
    """Residual blocks."""
    width: int = 64
    """Feature maps."""
    residual_scale: float = 1.0
    """Factor on the branch of a residual block."""
    white: float = 255.0
    """Value of white within the net."""
    channels: int = 3

    def __post_init__(self):
        for scale in self.scales:
            factors(scale)
        if not self.scales or len(set(self.scales)) < len(self.scales):
            raise ValueError(f"edsr: scales {self.scales}; expected different ones")
        if min(self.width, self.channels) < 1 or self.blocks < 0:
            raise ValueError(f"edsr: {self.blocks} blocks, width {self.width}; expected at least 0 and 1")


def factors(scale: int) -> tuple[int, ...]:
    """The factors of the shuffles of a scale. Raises ValueError for one that is not 3 or a power of 2."""
    if scale == 3:
        return (3,)
    if scale < 2 or scale & (scale - 1):
        raise ValueError(f"edsr: no scale {scale}; expected 3 or a power of 2")
    return (2,) * (scale.bit_length() - 1)


PRESETS = {
    "edsr-baseline": Config(),
    "edsr": Config(blocks=32, width=256, residual_scale=0.1),
    "edsr-small": Config(blocks=4, width=32),
    "mdsr": Config(scales=(2, 3, 4), blocks=80),
    "mdsr-baseline": Config(scales=(2, 3, 4)),
}
"""edsr-small is for minutes on a CPU; the others are the authors' sizes."""


def spec(cfg: Config) -> dict:
    """`head`, `blocks.b` of two convolutions, `body`, `up.i.j` of each scale, `tail`; of MDSR `own.i`, a scale's two
    blocks."""

    def block(kernel: int) -> list:
        return [conv_spec(cfg.width, cfg.width, kernel, init=init) for init in (HE, BRANCH)]

    def up(scale: int) -> list:
        return [conv_spec(cfg.width, factor**2 * cfg.width, 3, init=HE) for factor in factors(scale)]

    own = {"own": [[block(5), block(5)] for _ in cfg.scales]} if len(cfg.scales) > 1 else {}
    return {
        "blocks": [block(3) for _ in range(cfg.blocks)],
        "body": conv_spec(cfg.width, cfg.width, 3, init=HE),
        "head": conv_spec(cfg.channels, cfg.width, 3, init=HE),
        **own,
        "tail": conv_spec(cfg.width, cfg.channels, 3, init=BRANCH),
        "up": [up(scale) for scale in cfg.scales],
    }


def reach(cfg: Config) -> int:
    """Pixels of the input on each side that a pixel of the output depends on."""
    own = 8 if len(cfg.scales) > 1 else 0
    return 2 + own + 2 * cfg.blocks + max(shuffled_reach(scale, 1) for scale in cfg.scales)


def shuffled_reach(scale: int, last: int) -> int:
    """Reach of the convolutions before the shuffles and of one of `last` pixels a side after them."""
    reach, size = last, scale  # in pixels of the output
    for factor in factors(scale):
        reach, size = reach + size, size // factor
    return -(-reach // scale)


def apply(
    params: dict,
    x: Tensor,
    cfg: Config,
    *,
    scale: int | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> Tensor:
    """Enlarged pictures: (batch, channels, height, width) in [0, 1] -> (batch, channels, scale height, scale width).

    Args:
        scale: one of `cfg.scales`; needed if there are several.
        key, train: without effect here.

    Raises:
        ValueError: pictures with other channels; a scale that the net has not.
    """
    check_images("edsr", x, cfg.channels, 1)
    scale = cfg.scales[0] if scale is None and len(cfg.scales) == 1 else scale
    if scale not in cfg.scales:
        raise ValueError(f"edsr: the scale is {scale}; the net has {', '.join(map(str, cfg.scales))}")
    number = cfg.scales.index(scale)
    mean = mean_colour(x)
    x = conv(params["head"], cfg.white * (x - mean), padding=1)  # (batch, width, height, width)
    for p in params["own"][number] if "own" in params else ():
        x = _block(p, x, 1.0)
    y = x
    for p in params["blocks"]:
        y = _block(p, y, cfg.residual_scale)
    x = x + conv(params["body"], y, padding=1)
    for p, factor in zip(params["up"][number], factors(scale), strict=True):
        x = F.pixel_shuffle(conv(p, x, padding=1), factor)  # (batch, width, factor height, factor width)
    return conv(params["tail"], x, padding=1) / cfg.white + mean


def _block(p: list, x: Tensor, scale: float) -> Tensor:
    """x + a W_2 relu(W_1 x)"""
    return x + scale * conv(p[1], conv(p[0], x, padding="same").relu(), padding="same")


def mean_colour(x: Tensor) -> Tensor:
    """(channels, 1, 1), the mean of DIV2K that `apply` adds to its last layer; of other than three channels green's."""
    mean = MEAN if x.shape[1] == 3 else (MEAN[1],) * x.shape[1]
    return torch.tensor(mean, dtype=x.dtype, device=x.device)[:, None, None]


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> those of sanghyun-son/EDSR-PyTorch, without its constant `sub_mean` and `add_mean`."""
    several = len(cfg.scales) > 1
    table = affine_names("head", "head.0") | affine_names("body", f"body.{cfg.blocks}")
    table |= affine_names("tail", "tail.0" if several else "tail.1")
    for b in range(cfg.blocks):
        for i in range(2):
            table |= affine_names(f"blocks.{b}.{i}", f"body.{b}.body.{2 * i}")
    for s, scale in enumerate(cfg.scales):
        for j in range(len(factors(scale))):
            table |= affine_names(f"up.{s}.{j}", f"upsample.{s}.{2 * j}" if several else f"tail.0.{2 * j}")
        for j in range(2 if several else 0):
            for i in range(2):
                table |= affine_names(f"own.{s}.{j}.{i}", f"pre_process.{s}.{j}.body.{2 * i}")
    return table


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters from a file in the names of sanghyun-son/EDSR-PyTorch: a local file or folder, or a hub repository.

    Raises:
        WeightsError: besides what `nets.weights.fill` raises, another mean or another value of white.
    """
    state = read(source)
    shift = cfg.white * torch.tensor(MEAN)
    for name, bias in (("sub_mean", -shift), ("add_mean", shift)):
        weight, shifted = state.pop(f"{name}.weight", None), state.pop(f"{name}.bias", None)
        if shifted is not None and not torch.allclose(shifted, bias, atol=1e-3 * cfg.white):
            raise WeightsError(f"{source}: '{name}.bias' is {shifted.tolist()}, expected {bias.tolist()}")
        if weight is not None and not torch.equal(weight, torch.eye(3)[..., None, None]):
            raise WeightsError(f"{source}: '{name}.weight' scales the colours; expected the identity")
    return fill(spec(cfg), state, rename_table(cfg), source)
