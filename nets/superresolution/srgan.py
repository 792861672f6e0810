"""SRGAN: SRResNet enlarges, and a critic that has seen large pictures judges.

Ledig et al. 2017, "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network"
(arXiv:1609.04802). SRResNet (figure 4), with a PReLU of one slope each:

    x_0 = PReLU(conv9(x));   x_{b+1} = x_b + BN(conv3(PReLU(BN(conv3(x_b)))));   x = x_0 + BN(conv3(x_B))
    x = PReLU(shuffle(conv3(x))) per doubling;   y = conv9(x)

Alone it minimises the mean squared error. In the game, from there, the content loss and 1e-3 of the adversarial loss:

    l = E|phi(y) - phi(G(x))|² + 1e-3 E[-log D(G(x))]

phi being feature maps of a VGG-19 (VGG_{5,4}: the fifth stage's last, after its ReLU, divided by 12.75). Here in and
out is R'G'B' in [0, 1]; the paper's output goes from -1 to 1. The public PyTorch-GAN collection has ReLUs, a norm
before each shuffle, a tanh at the end and the third stage's first feature maps. The rename table is to
Lornatang/SRGAN-PyTorch, whose SRResNet also clips its output to [0, 1].
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from core import initializers
from core.layers import conv, conv_spec, linear, linear_spec, prelu, prelu_spec
from nets.blocks.conv_norm import (
    HE,
    affine_names,
    check_images,
    conv_norm,
    conv_norm_names,
    conv_norm_spec,
    fill_published,
)
from nets.superresolution.edsr import factors, shuffled_reach
from nets.weights import Rename, read

LAST = initializers.normal(1e-4)
"""Initialiser of the last layer, which sums 5184 values."""
ENLARGED = False
"""The input is the small picture itself."""
HALVINGS = 4
"""Number of halvings of the critic."""


@dataclass(frozen=True)
class Config:
    """Sizes of SRResNet, and of SRGAN's critic."""

    scale: int = 4
    """Factor of enlargement, 3 or a power of 2."""
    blocks: int = 16
    """Residual blocks; B in the paper."""
    width: int = 64
    """Feature maps."""
    channels: int = 3
    size: int = 96
    """Pixels per side of the critic's images, a multiple of 16."""
    critic_width: int = 64
    """The critic's feature maps at full size; they double with each halving but the last."""
    hidden: int = 1024
    """Hidden units of the critic."""

    def __post_init__(self):
        factors(self.scale)
        if min(self.blocks, self.width, self.channels, self.critic_width, self.hidden) < 1:
            raise ValueError(
                f"srgan: {self.blocks} blocks, widths {self.width}, {self.critic_width}; expected 1 or more"
            )
        if self.size < 2**HALVINGS or self.size % 2**HALVINGS:
            raise ValueError(f"srgan: images of {self.size} pixels; expected a multiple of {2**HALVINGS}")


_SMALL = Config(blocks=4, width=32, size=48, critic_width=16, hidden=128)
PRESETS = {"srresnet": Config(), "srresnet-small": _SMALL, "srgan": Config(), "srgan-small": _SMALL}
"""The small ones are for minutes on a CPU; srgan is srresnet beside a critic."""


def spec(cfg: Config) -> dict:
    """SRResNet: `head`, `blocks.b` with `first`, `act` and `second`, `body`, `up.i`, `tail`."""

    def normed() -> dict:
        return conv_norm_spec(cfg.width, cfg.width, 3)

    def up(factor: int) -> dict:
        return {"act": prelu_spec(), "conv": conv_spec(cfg.width, factor**2 * cfg.width, 3, init=HE)}

    return {
        "blocks": [{"act": prelu_spec(), "first": normed(), "second": normed()} for _ in range(cfg.blocks)],
        "body": normed(),
        "head": {"act": prelu_spec(), "conv": conv_spec(cfg.channels, cfg.width, 9, init=HE)},
        "tail": conv_spec(cfg.width, cfg.channels, 9, init=LAST),
        "up": [up(factor) for factor in factors(cfg.scale)],
    }


def reach(cfg: Config) -> int:
    """Pixels of the input on each side that a pixel of the output depends on."""
    return 4 + 2 * cfg.blocks + 1 + shuffled_reach(cfg.scale, 4)


def apply(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Enlarged pictures: (batch, channels, height, width) in [0, 1] -> (batch, channels, scale height, scale width).

    key is without effect here.

    Raises:
        ValueError: pictures with other channels.
    """
    check_images("srresnet", x, cfg.channels, 1)

    x = prelu(params["head"]["act"], conv(params["head"]["conv"], x, padding=4))  # (batch, width, height, width)
    y = x
    for p in params["blocks"]:
        z = prelu(p["act"], conv_norm(p["first"], y, None, train=train))
        y = y + conv_norm(p["second"], z, None, train=train)
    x = x + conv_norm(params["body"], y, None, train=train)
    for p, factor in zip(params["up"], factors(cfg.scale), strict=True):
        # (batch, width, factor height, factor width)
        x = prelu(p["act"], F.pixel_shuffle(conv(p["conv"], x, padding=1), factor))
    return conv(params["tail"], x, padding=4)


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names of SRResNet -> those of Lornatang/SRGAN-PyTorch."""
    table = affine_names("head.conv", "conv1.0") | affine_names("tail", "conv3")
    table |= {"head.act.weight": Rename("conv1.1.weight")} | conv_norm_names("body", "conv2.0", "conv2.1")
    for b in range(cfg.blocks):
        theirs = f"trunk.{b}.rcb"
        table |= conv_norm_names(f"blocks.{b}.first", f"{theirs}.0", f"{theirs}.1")
        table |= conv_norm_names(f"blocks.{b}.second", f"{theirs}.3", f"{theirs}.4")
        table[f"blocks.{b}.act.weight"] = Rename(f"{theirs}.2.weight")
    for i in range(len(factors(cfg.scale))):
        table |= affine_names(f"up.{i}.conv", f"upsampling.{i}.upsample_block.0")
        table[f"up.{i}.act.weight"] = Rename(f"upsampling.{i}.upsample_block.2.weight")
    return table


def from_pretrained(source: str, cfg: Config) -> dict:
    """Parameters and Stats of SRResNet from a file in the names of Lornatang/SRGAN-PyTorch, or a hub repository."""
    return fill_published(spec(cfg), read(source), rename_table(cfg), source)


def critic_spec(cfg: Config) -> dict:
    """`layers.i` with `conv` and, after the first, `norm`; `hidden`, `head`."""
    widths = [cfg.critic_width * 2**i for i in range(HALVINGS) for _ in range(2)]
    layers = [{"conv": conv_spec(cfg.channels, widths[0], 3, init=HE)}]
    for d_in, d_out in zip(widths, widths[1:], strict=False):
        layers.append(conv_norm_spec(d_in, d_out, 3))
    return {
        "head": linear_spec(cfg.hidden, 1),
        "hidden": linear_spec(widths[-1] * (cfg.size // 2**HALVINGS) ** 2, cfg.hidden),
        "layers": layers,
    }


def critic(params: dict, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> Tensor:
    """Scores of images, high for real ones: (batch, channels, size, size) in [0, 1] -> (batch,).

    key is without effect here.

    Raises:
        ValueError: images of other channels or another size.
    """
    check_images("srgan critic", x, cfg.channels, cfg.size)
    if x.shape[2:] != (cfg.size, cfg.size):
        raise ValueError(f"srgan critic: the images are {x.shape[2]} x {x.shape[3]}; expected {cfg.size} a side")
    for i, p in enumerate(params["layers"]):
        stride = 1 + i % 2  # every second one halves
        if "norm" in p:
            x = conv_norm(p, x, None, train=train, stride=stride)
        else:
            x = conv(p["conv"], x, padding=1)
        x = F.leaky_relu(x, 0.2)
    x = F.leaky_relu(linear(params["hidden"], x.flatten(1)), 0.2)  # (batch, hidden)
    return linear(params["head"], x)[:, 0]
