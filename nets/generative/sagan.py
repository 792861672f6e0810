"""Residual generator and critic, with self-attention as an option: the nets of SNGAN, WGAN-GP and SAGAN.

SNGAN, Miyato et al. 2018, arXiv:1802.05957, tables 3 to 6 (norms of `core.spectral` on the critic); WGAN-GP, Gulrajani
et al. 2017, arXiv:1704.00028, appendix (layer norm or none in the critic); SAGAN, Zhang et al. 2019, arXiv:1805.08318
(attention in both players, spectral norm on both). Conditional on a class: the generator by the scale and shift of its
batch norms (Dumoulin et al. 2017, arXiv:1610.07629), the critic by projection (Miyato & Koyama 2018,
arXiv:1802.05637).
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from core import initializers
from core.layers import (
    average_pool,
    batch_norm,
    batch_norm_spec,
    conv,
    conv_spec,
    embedding,
    embedding_spec,
    global_average_pool,
    linear,
    linear_spec,
    upsample_nearest,
)
from core.spec import Param
from nets.blocks.conditioning import check_labels, check_latent
from nets.blocks.conv_norm import check_images
from nets.generative.dcgan import norm, norm_spec

XAVIER = initializers.xavier_uniform()
# Initialiser of the convolutions of a residual branch in Miyato et al. 2018.
RESIDUAL = initializers.xavier_uniform(2**0.5)


@dataclass(frozen=True)
class Config:
    """Sizes of both players, and where they attend."""

    size: int = 32
    """Height and width of the images, in pixels."""
    channels: int = 3
    """Channels of the images."""
    latent: int = 128
    """Dimension of z."""
    generator_widths: tuple[int, ...] = (256, 256, 256, 256)
    """Channels of the smallest feature maps and after each block, which doubles the size."""
    critic_widths: tuple[int, ...] = (128, 128, 128, 128)
    """Channels after each block of the critic."""
    halvings: int = 2
    """Number of the critic's blocks, the first ones, that halve the size."""
    norm: str = "none"
    """Norm of the critic's blocks: none, or layer or instance (with a gradient penalty)."""
    pool: str = "sum"
    """Pooling of the critic's last feature maps over space: sum or mean."""
    attention: int = 0
    """Size of the feature maps, in pixels, that both players apply self-attention to; 0 for none."""
    gamma: float = 0.0
    """Initial weight of the attention, 0 in the paper."""
    classes: int = 0
    """Number of classes that both players are conditional on; 0 for none."""

    def __post_init__(self):
        up, blocks = len(self.generator_widths) - 1, len(self.critic_widths)
        if up < 1 or self.size % 2**up:
            raise ValueError(f"sagan: images of {self.size} pixels per side cannot be halved {up} times")
        if not 1 <= self.halvings <= blocks or self.size % 2**self.halvings:
            raise ValueError(f"sagan: {self.halvings} halvings do not fit {blocks} blocks and {self.size} pixels")
        if self.norm not in ("instance", "layer", "none"):
            raise ValueError(f"sagan: norm '{self.norm}'; expected one of instance, layer, none")
        if self.pool not in ("mean", "sum"):
            raise ValueError(f"sagan: pool '{self.pool}'; expected mean or sum")
        if self.attention and not (self.attention in self._sizes_up and self.attention in self._sizes_down):
            sizes = sorted({*self._sizes_up} & {*self._sizes_down})
            raise ValueError(f"sagan: attention at {self.attention} pixels; both players have feature maps of {sizes}")

    @property
    def base(self) -> int:
        """Size of the generator's smallest feature maps, in pixels."""
        return self.size // 2 ** (len(self.generator_widths) - 1)

    @property
    def _sizes_up(self) -> list[int]:
        """Size of the feature maps after each block of the generator."""
        return [self.base * 2 ** (i + 1) for i in range(len(self.generator_widths) - 1)]

    @property
    def _sizes_down(self) -> list[int]:
        """Size of the feature maps after each block of the critic."""
        return [self.size // 2 ** min(i + 1, self.halvings) for i in range(len(self.critic_widths))]

    @property
    def generator_attention(self) -> int | None:
        """Index of the generator's block that self-attention follows."""
        return self._sizes_up.index(self.attention) if self.attention else None

    @property
    def critic_attention(self) -> int | None:
        """Index of the critic's block that self-attention follows."""
        return self._sizes_down.index(self.attention) if self.attention else None


SMALL = {"size": 8, "channels": 1, "latent": 64, "critic_widths": (32, 32, 32), "halvings": 1}
MNIST = {"size": 28, "channels": 1, "generator_widths": (64, 64, 64), "critic_widths": (64, 64, 64)}

PRESETS = {
    "digits": Config(**SMALL, generator_widths=(64, 64)),
    "mnist": Config(**MNIST),
    "attention-digits": Config(**SMALL, generator_widths=(64, 64, 64), attention=4),
    "attention-mnist": Config(**MNIST, attention=14),
    "attention-small": Config(generator_widths=(128, 128, 128, 128), critic_widths=(64, 64, 64, 64), attention=16),
    # Miyato et al., table 4: CIFAR-10.
    "cifar": Config(),
    # Gulrajani et al., appendix: the same blocks of 128 channels, the last feature maps averaged.
    "wgan-gp-cifar": Config(generator_widths=(128, 128, 128, 128), pool="mean"),
    # Zhang et al.: attention at 32 x 32 pixels, here of images of 64 x 64.
    "attention-64": Config(
        64,
        generator_widths=(512, 512, 256, 128, 64),
        critic_widths=(64, 128, 256, 512, 512),
        halvings=4,
        attention=32,
    ),
}


def attention_spec(channels: int, gamma: float = 0.0) -> dict:
    """`query`, `key`, `value` to channels / 8, `out` back, all 1 x 1 convolutions without bias; `gamma` ()."""
    depth = max(channels // 8, 1)
    parts = {name: conv_spec(channels, depth, 1, bias=False, init=XAVIER) for name in ("key", "query", "value")}
    out = conv_spec(depth, channels, 1, bias=False, init=XAVIER)
    parts |= {"gamma": Param((), initializers.constant(gamma)), "out": out}
    return {name: parts[name] for name in sorted(parts)}


def self_attention(p: dict, x: Tensor) -> Tensor:
    """Self-attention over all positions. Zhang et al. 2019, eq. 1 to 3. x: (batch, channels, height, width).

    beta_ji = softmax_i(key(x_i) . query(x_j)),   o_j = out(sum_i beta_ji value(x_i)),   y = gamma o + x
    """
    key, query, value = (conv(p[name], x).flatten(2) for name in ("key", "query", "value"))  # (batch, depth, positions)
    beta = (query.mT @ key).softmax(-1)  # (batch, positions j, positions i)
    o = (value @ beta.mT).reshape(*value.shape[:2], *x.shape[2:])  # (batch, depth, height, width)
    return p["gamma"] * conv(p["out"], o) + x  # (batch, channels, height, width)


def conditional_norm_spec(channels: int, classes: int) -> dict:
    """Batch norm; with classes, its scale and shift in tables by class (`bias`, `weight`: (classes, channels))."""
    if classes == 0:
        return batch_norm_spec(channels)
    tables = {"bias": initializers.zeros, "weight": initializers.ones}
    tables = {name: embedding_spec(classes, channels, init=init) for name, init in tables.items()}
    return {"by_class": tables, "norm": batch_norm_spec(channels, affine=False)}


def conditional_norm(p: dict, x: Tensor, labels: Tensor | None, train: bool) -> Tensor:
    """Batch norm with the class's scale and shift, scale_y (x - mean) / std + shift_y. Dumoulin et al. 2017.

    x: (batch, channels, height, width); labels y: integers (batch,), ignored without classes.
    """
    if "by_class" not in p:
        return batch_norm(p, x, train=train)
    tables = (p["by_class"][name] for name in ("weight", "bias"))
    scale, shift = (embedding(table, labels)[:, :, None, None] for table in tables)  # (batch, channels, 1, 1)
    return scale * batch_norm(p["norm"], x, train=train) + shift


def generator_spec(cfg: Config) -> dict:
    """`project` to the smallest feature maps, `blocks.i`, `norm` and `output`, and `attention` if there is any."""
    widths = cfg.generator_widths

    def block(d_in: int, d_out: int) -> dict:
        # The norms would cancel a bias, as anything that is constant over batch and space.
        return {
            "conv1": conv_spec(d_in, d_out, 3, bias=False, init=RESIDUAL),
            "conv2": conv_spec(d_out, d_out, 3, bias=False, init=RESIDUAL),
            "norm1": conditional_norm_spec(d_in, cfg.classes),
            "norm2": conditional_norm_spec(d_out, cfg.classes),
            "shortcut": conv_spec(d_in, d_out, 1, bias=False, init=XAVIER),
        }

    parts = {
        "blocks": [block(d_in, d_out) for d_in, d_out in zip(widths[:-1], widths[1:], strict=True)],
        "norm": batch_norm_spec(widths[-1]),
        "output": conv_spec(widths[-1], cfg.channels, 3, init=XAVIER),
        "project": linear_spec(cfg.latent, widths[0] * cfg.base**2, init=XAVIER),
    }
    attention = {"attention": attention_spec(widths[cfg.generator_attention + 1], cfg.gamma)} if cfg.attention else {}
    return attention | parts


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
    check_latent("sagan generator", z, cfg.latent)
    if cfg.classes:
        check_labels("sagan generator", labels, z.shape[0])
    x = linear(params["project"], z).reshape(z.shape[0], -1, cfg.base, cfg.base)  # (batch, channels, base, base)
    for i, p in enumerate(params["blocks"]):
        y = upsample_nearest(F.relu(conditional_norm(p["norm1"], x, labels, train)))  # twice the height and width
        y = conv(p["conv1"], y, padding=1)
        y = conv(p["conv2"], F.relu(conditional_norm(p["norm2"], y, labels, train)), padding=1)
        x = y + conv(p["shortcut"], upsample_nearest(x))
        x = self_attention(params["attention"], x) if i == cfg.generator_attention else x
    x = F.relu(batch_norm(params["norm"], x, train=train))
    return conv(params["output"], x, padding=1).tanh()  # (batch, channels, size, size)


def critic_spec(cfg: Config) -> dict:
    """`blocks.i`, `out`, and `attention` and `classes` (one vector per class) if there are any."""
    inputs = (cfg.channels, *cfg.critic_widths[:-1])

    def block(i: int, d_in: int, d_out: int) -> dict:
        parts = {
            # Instance norm would cancel a bias.
            "conv1": conv_spec(d_in, d_out, 3, bias=cfg.norm != "instance", init=RESIDUAL),
            "conv2": conv_spec(d_out, d_out, 3, init=RESIDUAL),
            # The image itself is not normalised.
            "norm1": norm_spec(cfg.norm, d_in) if i else {},
            "norm2": norm_spec(cfg.norm, d_out),
        }
        changes = i < cfg.halvings or d_in != d_out
        return parts | ({"shortcut": conv_spec(d_in, d_out, 1, init=XAVIER)} if changes else {})

    width = cfg.critic_widths[-1]
    blocks = [block(i, d_in, d_out) for i, (d_in, d_out) in enumerate(zip(inputs, cfg.critic_widths, strict=True))]
    parts = {"blocks": blocks, "out": linear_spec(width, 1, init=XAVIER)}
    if cfg.attention:
        parts["attention"] = attention_spec(cfg.critic_widths[cfg.critic_attention], cfg.gamma)
    if cfg.classes:
        parts["classes"] = embedding_spec(cfg.classes, width, init=XAVIER)
    return {name: parts[name] for name in sorted(parts)}


def critic_outputs(
    params: dict,
    x: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> dict[str, Tensor]:
    """`scores` (batch,), not bounded, and penultimate `features` h (batch, width).

    With classes the score is out(h) + class_y . h (Miyato & Koyama 2018, eq. 3).

    Args:
        x: (batch, channels, size, size).
        labels: integers (batch,), needed if there are classes.
        key: without effect here.

    Raises:
        ValueError: images of other channels or another size, labels missing or misshapen.
    """
    check_images("sagan critic", x, cfg.channels, 1)
    if tuple(x.shape[2:]) != (cfg.size, cfg.size):
        raise ValueError(f"sagan critic: the images are {x.shape[2]} x {x.shape[3]}; expected {cfg.size} x {cfg.size}")
    for i, p in enumerate(params["blocks"]):
        # The first block begins with a convolution, since a ReLU would cut the image at 0.
        y = F.relu(norm(cfg.norm, p["norm1"], x, train)) if i else x
        y = F.relu(norm(cfg.norm, p["norm2"], conv(p["conv1"], y, padding=1), train))
        y = conv(p["conv2"], y, padding=1)
        shortcut = conv(p["shortcut"], x) if "shortcut" in p else x
        x = average_pool(y + shortcut, 2) if i < cfg.halvings else y + shortcut  # half the height and width
        x = self_attention(params["attention"], x) if i == cfg.critic_attention else x
    x = F.relu(x)
    h = x.sum((2, 3)) if cfg.pool == "sum" else global_average_pool(x)  # (batch, width)
    scores = linear(params["out"], h)[:, 0]  # (batch,)
    if cfg.classes:
        class_y = embedding(params["classes"], check_labels("sagan critic", labels, x.shape[0]))  # (batch, width)
        scores = scores + (class_y * h).sum(1)
    return {"features": h, "scores": scores}


def critic(params: dict, x: Tensor, cfg: Config, **options) -> Tensor:
    """Scores (batch,) of `critic_outputs`; the arguments are the same."""
    return critic_outputs(params, x, cfg, **options)["scores"]
