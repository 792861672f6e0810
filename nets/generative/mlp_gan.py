"""Fully connected generator and critic, for small images and for points in the plane.

Goodfellow et al. 2014, "Generative Adversarial Nets", arXiv:1406.2661: both players are MLPs. Conditional on a class:
Mirza & Osindero 2014, arXiv:1411.1784 (`nets.blocks.conditioning`). The widths of the presets for images are those of
the public PyTorch-GAN collection; its `BatchNorm1d(width, 0.8)` there sets eps, not the momentum that was meant, and is
an ordinary batch norm here. In 100 lines of plain torch, training included: `nets/explained/gan.py`.
"""

from dataclasses import dataclass
from math import prod

from torch import Tensor
from torch.nn import functional as F

from core import initializers
from core.layers import batch_norm, batch_norm_spec, dropout, linear, linear_spec
from nets.blocks.conditioning import check_latent, with_labels
from nets.blocks.conv_norm import dropout_keys


@dataclass(frozen=True)
class Config:
    """Sizes of both players."""

    shape: tuple[int, ...] = (1, 8, 8)
    """Shape of an example, without the batch."""
    latent: int = 64
    """Dimension of z."""
    generator_widths: tuple[int, ...] = (128, 256)
    """Hidden units per layer of the generator."""
    critic_widths: tuple[int, ...] = (256, 128)
    """Hidden units per layer of the critic."""
    slope: float = 0.2
    """Slope of the leaky ReLU below 0; 0 is a ReLU."""
    norm: str = "batch"
    """Norm after the generator's hidden layers but the first: batch or none."""
    tanh: bool = True
    """End the generator in a tanh, for images in [-1, 1]; points in the plane want none."""
    classes: int = 0
    """Number of classes that both players are conditional on; 0 for none."""
    dropout: float = 0.0
    """Dropout rate of the critic's hidden layers."""

    def __post_init__(self):
        if self.norm not in ("batch", "none"):
            raise ValueError(f"mlp_gan: norm '{self.norm}'; expected batch or none")
        if not self.generator_widths or not self.critic_widths or not self.shape:
            raise ValueError("mlp_gan: each player needs a hidden layer, and examples need a shape")


POINTS = {"latent": 2, "slope": 0.0, "norm": "none", "tanh": False}

PRESETS = {
    "digits": Config(),
    "mnist": Config((1, 28, 28), 100, (128, 256, 512, 1024), (512, 256)),
    # Gulrajani et al. 2017 have 512 hidden units per layer for the mixtures of their figure 1.
    "points": Config((2,), generator_widths=(128, 128, 128), critic_widths=(128, 128, 128), **POINTS),
    "points-512": Config((2,), generator_widths=(512, 512, 512), critic_widths=(512, 512, 512), **POINTS),
}


def _normed(cfg: Config, layer: int) -> bool:
    return cfg.norm == "batch" and layer > 0


def generator_spec(cfg: Config) -> dict:
    """`layers.i` with `linear` and, unless it has none, `norm`; `out`."""
    he = initializers.kaiming_normal(a=cfg.slope)
    layers, d_in = [], cfg.latent + cfg.classes
    for i, width in enumerate(cfg.generator_widths):
        # Batch norm would cancel a bias.
        layers.append({"linear": linear_spec(d_in, width, bias=not _normed(cfg, i), init=he)})
        if _normed(cfg, i):
            layers[-1]["norm"] = batch_norm_spec(width)
        d_in = width
    return {"layers": layers, "out": linear_spec(d_in, prod(cfg.shape))}


def generator(
    params: dict,
    z: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> Tensor:
    """Examples from noise: z (batch, latent) -> (batch, *shape).

    Args:
        labels: integers (batch,), needed if there are classes.
        key: without effect here.

    Raises:
        ValueError: z of another width, labels missing or misshapen.
    """
    check_latent("mlp_gan generator", z, cfg.latent)
    x = with_labels("mlp_gan generator", z, labels, cfg.classes)  # (batch, latent + classes)
    for p in params["layers"]:
        x = linear(p["linear"], x)  # (batch, width)
        if "norm" in p:
            x = batch_norm(p["norm"], x, train=train)
        x = F.leaky_relu(x, cfg.slope)
    x = linear(params["out"], x)
    return (x.tanh() if cfg.tanh else x).reshape(x.shape[0], *cfg.shape)  # (batch, *shape)


def critic_spec(cfg: Config) -> dict:
    """`layers.i` and `out`."""
    he = initializers.kaiming_normal(a=cfg.slope)
    widths = (prod(cfg.shape) + cfg.classes, *cfg.critic_widths)
    layers = [linear_spec(d_in, d_out, init=he) for d_in, d_out in zip(widths[:-1], widths[1:], strict=True)]
    return {"layers": layers, "out": linear_spec(widths[-1], 1)}


def critic_outputs(
    params: dict,
    x: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> dict[str, Tensor]:
    """`scores` (batch,), not bounded, and penultimate `features` (batch, width).

    Args:
        x: (batch, *shape).
        labels: integers (batch,), needed if there are classes.
        key: (2,) or one per example (batch, 2); needed in training with dropout.

    Raises:
        ValueError: x of another shape, labels missing or misshapen, no key.
    """
    if tuple(x.shape[1:]) != cfg.shape:
        raise ValueError(f"mlp_gan critic: expected x of shape (batch, {str(cfg.shape)[1:]}, found {tuple(x.shape)}")
    keys = dropout_keys("mlp_gan critic", cfg.dropout, key, len(params["layers"]), train)
    x = with_labels("mlp_gan critic", x.flatten(1), labels, cfg.classes)  # (batch, values + classes)
    for p, k in zip(params["layers"], keys, strict=True):
        x = dropout(F.leaky_relu(linear(p, x), cfg.slope), cfg.dropout, k, train)  # (batch, width)
    return {"features": x, "scores": linear(params["out"], x)[:, 0]}


def critic(params: dict, x: Tensor, cfg: Config, **options) -> Tensor:
    """Scores (batch,) of `critic_outputs`; the arguments are the same."""
    return critic_outputs(params, x, cfg, **options)["scores"]
