"""DCGAN: strided convolutions down, transposed ones up, a norm after each.

Radford et al. 2016, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks",
arXiv:1511.06434. Conditional on a class: Mirza & Osindero 2014 (`nets.blocks.conditioning`). The critic may have
further heads: the class (Odena et al. 2017, ACGAN, arXiv:1610.09585) or the codes (Chen et al. 2016, InfoGAN,
arXiv:1606.03657).
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from core import initializers
from core.layers import (
    batch_norm,
    batch_norm_spec,
    conv,
    conv_spec,
    conv_transpose,
    dropout_channels,
    group_norm,
    group_norm_spec,
    instance_norm,
    instance_norm_spec,
    linear,
    linear_spec,
)
from nets.blocks.conditioning import check_latent, with_labels
from nets.blocks.conv_norm import check_images, dropout_keys

# "All weights were initialized from a zero-centered Normal distribution with standard deviation 0.02", section 4.
WEIGHT = initializers.normal(0.02)
# In the authors' code a norm's weight starts around one.
SCALE = initializers.normal(0.02, 1.0)

NORMS = ("batch", "instance", "layer", "none")


@dataclass(frozen=True)
class Config:
    """Sizes of both players, and the heads of the critic."""

    size: int = 8
    """Height and width of the images, in pixels."""
    channels: int = 1
    """Channels of the images."""
    latent: int = 64
    """Dimension of z; for InfoGAN, with the codes."""
    width: int = 32
    """Channels at half the size; they double with each further stage. The two players mirror each other."""
    stages: int = 2
    """Number of halvings; feature maps of size / 2**stages pixels are the input of a linear layer."""
    kernel: int = 4
    """Kernel size, 3, 4 or 5. The paper has 5, the authors' later code 4."""
    norm: str = "batch"
    """Norm of the critic after each convolution but the first: batch, layer (as in WGAN-GP, with a scale per channel),
    instance or none. The generator's is batch norm."""
    classes: int = 0
    """Number of classes that both players are conditional on; 0 for none."""
    heads: tuple[tuple[str, int], ...] = ()
    """Further heads of the critic, (name, width). With a head "classes" it predicts the class and does not get it."""
    dropout: float = 0.0
    """Dropout rate of the critic's channels, after each convolution."""

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"dcgan: norm '{self.norm}'; expected one of {', '.join(NORMS)}")
        if self.stages < 1 or self.size % 2**self.stages:
            raise ValueError(f"dcgan: images of {self.size} pixels per side cannot be halved {self.stages} times")
        if self.kernel not in (3, 4, 5):
            raise ValueError(f"dcgan: kernel {self.kernel}; expected 3, 4 or 5")
        names = [name for name, _ in self.heads]
        if {"features", "scores"} & set(names) or len(set(names)) != len(names):
            raise ValueError(f"dcgan: heads {self.heads} need names of their own, not features or scores")

    @property
    def base(self) -> int:
        """Size of the smallest feature maps, in pixels."""
        return self.size // 2**self.stages

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage, from the image inwards."""
        return tuple(self.width * 2**i for i in range(self.stages))

    @property
    def critic_classes(self) -> int:
        """Number of classes whose labels the critic gets."""
        return 0 if "classes" in dict(self.heads) else self.classes


PRESETS = {
    "digits": Config(),
    "mnist": Config(28, latent=100, width=64),
    "small": Config(32, 3, latent=100, width=64, stages=3),
    # Figure 1: 1024 feature maps of 4 x 4 pixels.
    "paper": Config(64, 3, latent=100, width=128, stages=4, kernel=5),
}


def norm_spec(kind: str, channels: int) -> dict:
    """Parameters of `norm`; `{}` for "none"."""
    specs = {"batch": batch_norm_spec, "instance": instance_norm_spec, "layer": group_norm_spec}
    return specs[kind](channels, init=SCALE) if kind in specs else {}


def norm(kind: str, p: dict, x: Tensor, train: bool) -> Tensor:
    """x (batch, channels, *space) normalised as `Config.norm` says."""
    if kind == "batch":
        return batch_norm(p, x, train=train)
    if kind == "instance":
        return instance_norm(p, x)
    # Layer norm is group norm with one group: over channels and space of each example.
    return group_norm(p, x, 1) if kind == "layer" else x


def generator_spec(cfg: Config) -> dict:
    """`project` to the smallest feature maps, `convs.i` upwards with `norms.i` before each."""
    inner = cfg.widths[::-1]
    outputs = (*inner[1:], cfg.channels)
    return {
        "convs": [
            # Batch norm would cancel a bias; none follows the last convolution.
            conv_spec(d_in, d_out, cfg.kernel, transposed=True, bias=i == cfg.stages - 1, init=WEIGHT)
            for i, (d_in, d_out) in enumerate(zip(inner, outputs, strict=True))
        ],
        "norms": [norm_spec("batch", width) for width in inner],
        "project": linear_spec(cfg.latent + cfg.classes, inner[0] * cfg.base**2, bias=False, init=WEIGHT),
    }


def generator(
    params: dict,
    z: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> Tensor:
    """Images in (-1, 1) from noise: z (batch, latent) -> (batch, channels, size, size).

    Args:
        labels: integers (batch,), needed if there are classes.
        key: without effect here.

    Raises:
        ValueError: z of another width, labels missing or misshapen.
    """
    check_latent("dcgan generator", z, cfg.latent)
    x = linear(params["project"], with_labels("dcgan generator", z, labels, cfg.classes))
    x = x.reshape(x.shape[0], -1, cfg.base, cfg.base)  # (batch, channels, base, base)
    for p, p_norm in zip(params["convs"], params["norms"], strict=True):
        x = F.relu(batch_norm(p_norm, x, train=train))
        padding = {"padding": (cfg.kernel - 1) // 2, "output_padding": cfg.kernel % 2}
        x = conv_transpose(p, x, stride=2, **padding)  # twice the height and width
    return x.tanh()


def critic_spec(cfg: Config) -> dict:
    """`convs.i` downwards, `norms.i` after each but the first, `out` and the `heads`."""
    inputs = (cfg.channels + cfg.critic_classes, *cfg.widths[:-1])
    features = cfg.widths[-1] * cfg.base**2
    biased = cfg.norm in ("layer", "none")  # batch and instance norm would cancel a bias
    return {
        "convs": [
            conv_spec(d_in, d_out, cfg.kernel, bias=biased or i == 0, init=WEIGHT)
            for i, (d_in, d_out) in enumerate(zip(inputs, cfg.widths, strict=True))
        ],
        "heads": {name: linear_spec(features, width, init=WEIGHT) for name, width in sorted(cfg.heads)},
        "norms": [{}, *(norm_spec(cfg.norm, width) for width in cfg.widths[1:])],
        "out": linear_spec(features, 1, init=WEIGHT),
    }


def features(
    params: dict,
    x: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> Tensor:
    """Penultimate features: (batch, channels, size, size) -> (batch, d). Arguments as in `critic_outputs`."""
    check_images("dcgan critic", x, cfg.channels, 1)
    if tuple(x.shape[2:]) != (cfg.size, cfg.size):
        raise ValueError(f"dcgan critic: the images are {x.shape[2]} x {x.shape[3]}; expected {cfg.size} x {cfg.size}")
    keys = dropout_keys("dcgan critic", cfg.dropout, key, cfg.stages, train)
    x = with_labels("dcgan critic", x, labels, cfg.critic_classes)  # (batch, channels + classes, size, size)
    for i, (p, p_norm, k) in enumerate(zip(params["convs"], params["norms"], keys, strict=True)):
        x = conv(p, x, stride=2, padding=(cfg.kernel - 1) // 2)  # half the height and width
        x = norm(cfg.norm, p_norm, x, train) if i > 0 else x
        x = dropout_channels(F.leaky_relu(x, 0.2), cfg.dropout, k, train)
    return x.flatten(1)  # (batch, d)


def critic_outputs(
    params: dict,
    x: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> dict[str, Tensor]:
    """`scores` (batch,), not bounded; penultimate `features` (batch, d); (batch, width) of each head.

    Args:
        x: (batch, channels, size, size).
        labels: integers (batch,), needed if there are classes and no head "classes"; otherwise ignored.
        key: (2,) or one per example (batch, 2); needed in training with dropout.

    Raises:
        ValueError: images of other channels or another size, labels missing or misshapen, no key.
    """
    x = features(params, x, cfg, labels=labels, key=key, train=train)
    heads = {name: linear(p, x) for name, p in params["heads"].items()}
    return {**heads, "features": x, "scores": linear(params["out"], x)[:, 0]}


def critic(params: dict, x: Tensor, cfg: Config, **options) -> Tensor:
    """Scores (batch,) of `critic_outputs`; the arguments are the same."""
    return critic_outputs(params, x, cfg, **options)["scores"]
