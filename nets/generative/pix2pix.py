"""pix2pix: image-to-image translation learned from pairs.

Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks" (arXiv:1611.07004). The generator
is a U-Net: it halves the source `depth` times and doubles it again; the feature maps of each halving are also an input
of the doubling from the same size (skip connections). The critic scores patches of (source, target). The objective is

    G* = arg min_G max_D  E[log D(x, y)] + E[log(1 - D(x, G(x)))] + 100 E|y - G(x)|_1

There is no latent: the only noise is dropout in the first three doublings, which the authors keep when they sample
(`noise=True`).

Layers are those of the authors' code: no norm in the middle of the U, where batches of one would be normalised to zero,
and the ReLU of a doubling also applies to the skip connection. The public PyTorch-GAN collection differs: dropout in
the halvings too, skip connections after a leaky ReLU, nearest neighbours in the last doubling, and a critic that halves
a fourth time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from core.layers import conv, conv_spec, conv_transpose, dropout
from nets.blocks.conv_norm import check_images, dropout_keys
from nets.generative.dcgan import WEIGHT
from nets.generative.patch_critic import check_norm, norm, norm_spec, patch_critic, patch_critic_spec


@dataclass(frozen=True)
class Config:
    """Sizes of pix2pix's generator, a U-Net."""

    source_channels: int = 3
    """Channels of the source images."""
    channels: int = 3
    """Channels of the generated images."""
    width: int = 64
    """Channels after the first halving; they double with each further one, up to eight times the width."""
    depth: int = 8
    """Number of halvings; heights and widths are multiples of 2**depth."""
    norm: str = "instance"
    """batch as in the paper; instance, without scale and shift, is the same for batches of one image; or none."""
    dropout: float = 0.5
    """Dropout rate of the first three doublings."""
    critic_width: int = 64
    """Channels after the critic's first halving."""
    critic_layers: int = 3
    """Halvings of the critic; 3 gives the paper's patches of 70 x 70 pixels."""

    def __post_init__(self):
        check_norm("pix2pix", self.norm)
        for name in ("source_channels", "channels", "width", "critic_width", "critic_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"pix2pix: {name} is {getattr(self, name)}; expected at least 1")
        if self.depth < 2:
            raise ValueError(f"pix2pix: depth is {self.depth}; expected at least 2")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"pix2pix: dropout {self.dropout} is outside [0, 1)")


PRESETS = {
    "paper": Config(norm="batch"),
    "instance": Config(),
    "small": Config(width=32, depth=6, critic_width=32, critic_layers=2),
}
"""paper and instance for 256 x 256 pixels, small for 64 x 64."""

DROPPED = 3
"""Number of doublings with dropout, the first ones."""


def generator_spec(cfg: Config) -> dict:
    """`down.i` from fine to coarse and `up.i` from coarse to fine."""
    widths = [cfg.width * min(2**i, 8) for i in range(cfg.depth)]
    last = cfg.depth - 1

    def normed(i: int) -> str:
        return cfg.norm if 0 < i < last else "none"

    down = [
        {"conv": conv_spec(d_in, d_out, 4, bias=False, init=WEIGHT), **norm_spec(normed(i), d_out)}
        for i, (d_in, d_out) in enumerate(zip([cfg.source_channels, *widths], widths, strict=False))
    ]
    up = []
    for i in range(cfg.depth):
        d_in = widths[last - i] * (2 if i else 1)
        d_out = widths[last - i - 1] if i < last else cfg.channels
        parts = norm_spec(cfg.norm if i < last else "none", d_out)
        up.append({"conv": conv_spec(d_in, d_out, 4, bias=i == last, transposed=True, init=WEIGHT), **parts})
    return {"down": down, "up": up}


def generator(
    params: dict,
    z: Tensor,
    cfg: Config,
    *,
    labels: None = None,
    key: Tensor | None = None,
    train: bool = False,
    noise: bool | None = None,
) -> Tensor:
    """Translated images.

    Args:
        z: source images, (batch, source_channels, height, width), in [-1, 1].
        labels: without effect here.
        key: (2,), or one per example (batch, 2); needed with noise.
        noise: apply dropout; by default in training only.

    Returns:
        (batch, channels, height, width), in [-1, 1].

    Raises:
        ValueError: images with other channels, or sides that are no multiples of 2**depth; no key where one is needed.
    """
    check_images("pix2pix", z, cfg.source_channels, 2**cfg.depth)
    if z.shape[2] % 2**cfg.depth or z.shape[3] % 2**cfg.depth:
        raise ValueError(
            f"pix2pix: the images are {z.shape[2]} x {z.shape[3]}; expected multiples of {2**cfg.depth}, since they "
            f"are halved {cfg.depth} times"
        )
    noise = train if noise is None else noise
    keys = dropout_keys("pix2pix", cfg.dropout, key, DROPPED, noise)
    last, x, skips = cfg.depth - 1, z, []
    for i, p in enumerate(params["down"]):
        x = conv(p["conv"], F.leaky_relu(x, 0.2) if i else x, stride=2, padding=1)  # half the height and width
        x = norm(p, x, cfg.norm if 0 < i < last else "none", train)
        skips.append(x)
    for i, p in enumerate(params["up"]):
        x = torch.cat([skips[last - i], x], 1) if i else x  # twice the channels
        x = conv_transpose(p["conv"], x.relu(), stride=2, padding=1)  # twice the height and width
        if i < last:
            x = norm(p, x, cfg.norm, train)
            x = dropout(x, cfg.dropout, keys[i], noise) if i < DROPPED else x
    return x.tanh()


def critic_spec(cfg: Config) -> dict:
    """Parameters of `nets.generative.patch_critic` for source and target side by side in the channels."""
    return patch_critic_spec(cfg.source_channels + cfg.channels, cfg.critic_width, cfg.critic_layers, cfg.norm)


def critic_outputs(
    params: dict,
    x: tuple[Tensor, Tensor],
    cfg: Config,
    *,
    labels: None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> dict:
    """`scores` (batch, 1, h, w), one per patch, and penultimate `features`. Arguments as in `critic`."""
    source, target = x
    if source.shape[::2] != target.shape[::2] or source.shape[3:] != target.shape[3:]:
        raise ValueError(f"pix2pix: source {tuple(source.shape)} and target {tuple(target.shape)} differ in size")
    return patch_critic(params, torch.cat([source, target], 1), cfg.norm, name="pix2pix critic", train=train)


def critic(
    params: dict,
    x: tuple[Tensor, Tensor],
    cfg: Config,
    *,
    labels: None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> Tensor:
    """Scores of the patches of (source, target) pairs, high for real ones: (batch, 1, h, w).

    Args:
        x: (source, target), (batch, source_channels, height, width) and (batch, channels, height, width).
        labels, key: without effect here.

    Raises:
        ValueError: pairs of different sizes, other channels, or too small.
    """
    return critic_outputs(params, x, cfg, train=train)["scores"]
