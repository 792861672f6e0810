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
)
from core.spec import Param
from nets.blocks.conditioning import check_labels, check_latent
from nets.blocks.conv_norm import check_images
from nets.generative.dcgan import norm, norm_spec

XAVIER = initializers.xavier_uniform()
# Miyato et al. draw the convolutions inside a block so.
RESIDUAL = initializers.xavier_uniform(2**0.5)


@dataclass(frozen=True)
class Config:
    """Images of size x size pixels.

    generator_widths: channels of the smallest maps and behind each block, which doubles the size.
    critic_widths: channels behind each block.
    halvings: how many of the critic's blocks, the first ones, halve the size.
    norm: of the critic's blocks: "none", or "layer" or "instance" (with a gradient penalty).
    pool: of the critic's last maps over space, "sum" or "mean".
    attention: size of the maps behind which both players have self-attention; 0 is none.
    gamma: how strong attention is at first, 0 in the paper.
    classes: both players are conditional on a class, unless 0.
    """

    size: int = 32
    channels: int = 3
    latent: int = 128
    generator_widths: tuple[int, ...] = (256, 256, 256, 256)
    critic_widths: tuple[int, ...] = (128, 128, 128, 128)
    halvings: int = 2
    norm: str = "none"
    pool: str = "sum"
    attention: int = 0
    gamma: float = 0.0
    classes: int = 0

    def __post_init__(self):
        up, blocks = len(self.generator_widths) - 1, len(self.critic_widths)
        if up < 1 or self.size % 2**up:
            raise ValueError(f"sagan: images of {self.size} pixels a side cannot be halved {up} times")
        if not 1 <= self.halvings <= blocks or self.size % 2**self.halvings:
            raise ValueError(f"sagan: {self.halvings} halvings do not fit {blocks} blocks and {self.size} pixels")
        if self.norm not in ("instance", "layer", "none"):
            raise ValueError(f"sagan: norm '{self.norm}'; expected one of instance, layer, none")
        if self.pool not in ("mean", "sum"):
            raise ValueError(f"sagan: pool '{self.pool}'; expected mean or sum")
        if self.attention and not (self.attention in self._sizes_up and self.attention in self._sizes_down):
            sizes = sorted({*self._sizes_up} & {*self._sizes_down})
            raise ValueError(f"sagan: attention at {self.attention} pixels; both players have maps of {sizes}")

    @property
    def base(self) -> int:
        """Pixels a side of the generator's smallest maps."""
        return self.size // 2 ** (len(self.generator_widths) - 1)

    @property
    def _sizes_up(self) -> list[int]:
        """Pixels a side behind each block of the generator."""
        return [self.base * 2 ** (i + 1) for i in range(len(self.generator_widths) - 1)]

    @property
    def _sizes_down(self) -> list[int]:
        """Pixels a side behind each block of the critic."""
        return [self.size // 2 ** min(i + 1, self.halvings) for i in range(len(self.critic_widths))]

    @property
    def generator_attention(self) -> int | None:
        """The block behind which the generator attends."""
        return self._sizes_up.index(self.attention) if self.attention else None

    @property
    def critic_attention(self) -> int | None:
        """The block behind which the critic attends."""
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
    # Gulrajani et al., appendix: the same blocks of 128 channels, the last maps averaged.
    "wgan-gp-cifar": Config(generator_widths=(128, 128, 128, 128), pool="mean"),
    # Zhang et al.: attention at 32 pixels, here of images of 64.
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
    inside = max(channels // 8, 1)
    parts = {name: conv_spec(channels, inside, 1, bias=False, init=XAVIER) for name in ("key", "query", "value")}
    out = conv_spec(inside, channels, 1, bias=False, init=XAVIER)
    parts |= {"gamma": Param((), initializers.constant(gamma)), "out": out}
    return {name: parts[name] for name in sorted(parts)}


def self_attention(p: dict, x: Tensor) -> Tensor:
    """Each place of the maps looks at all places. Zhang et al. 2019, eq. 1 to 3. x: (batch, channels, height, width).

    beta_ji = softmax_i(key(x_i) . query(x_j)),   o_j = out(sum_i beta_ji value(x_i)),   y = gamma o + x
    """
    key, query, value = (conv(p[name], x).flatten(2) for name in ("key", "query", "value"))  # (batch, inside, places)
    beta = (query.mT @ key).softmax(-1)  # (batch, places j, places i)
    o = (value @ beta.mT).reshape(*value.shape[:2], *x.shape[2:])
    return p["gamma"] * conv(p["out"], o) + x


def conditional_norm_spec(channels: int, classes: int) -> dict:
    """Batch norm, its scale and shift in a table by class (`bias`, `weight`: (classes, channels)) if there are any."""
    if classes == 0:
        return batch_norm_spec(channels)
    tables = {"bias": initializers.zeros, "weight": initializers.ones}
    tables = {name: embedding_spec(classes, channels, init=init) for name, init in tables.items()}
    return {"by_class": tables, "norm": batch_norm_spec(channels, affine=False)}


def conditional_norm(p: dict, x: Tensor, labels: Tensor | None, train: bool) -> Tensor:
    """x: (batch, channels, height, width); labels: integers (batch,), not looked at without classes."""
    if "by_class" not in p:
        return batch_norm(p, x, train=train)
    scale, shift = (embedding(p["by_class"][name], labels)[:, :, None, None] for name in ("weight", "bias"))
    return scale * batch_norm(p["norm"], x, train=train) + shift


def generator_spec(cfg: Config) -> dict:
    """`project` to the smallest maps, `blocks.i`, `norm` and `output`, and `attention` if there is any."""
    widths = cfg.generator_widths

    def block(d_in: int, d_out: int) -> dict:
        # Whatever is constant over batch and space, as a bias is, the norms take out again.
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
    """Images in (-1, 1) from noise. z: (batch, latent) -> (batch, channels, size, size).

    Args:
        labels: integers (batch,), needed if there are classes.
        key: without effect here.

    Raises:
        ValueError: z of another width, labels missing or misshapen.
    """
    check_latent("sagan generator", z, cfg.latent)
    if cfg.classes:
        check_labels("sagan generator", labels, z.shape[0])
    x = linear(params["project"], z).reshape(z.shape[0], -1, cfg.base, cfg.base)
    for i, p in enumerate(params["blocks"]):
        y = conv(p["conv1"], _twice(F.relu(conditional_norm(p["norm1"], x, labels, train))), padding=1)
        y = conv(p["conv2"], F.relu(conditional_norm(p["norm2"], y, labels, train)), padding=1)
        x = y + conv(p["shortcut"], _twice(x))
        x = self_attention(params["attention"], x) if i == cfg.generator_attention else x
    x = F.relu(batch_norm(params["norm"], x, train=train))
    return conv(params["output"], x, padding=1).tanh()


def critic_spec(cfg: Config) -> dict:
    """`blocks.i`, `out`, and `attention` and `classes` (a vector a class) if there are any."""
    inputs = (cfg.channels, *cfg.critic_widths[:-1])

    def block(i: int, d_in: int, d_out: int) -> dict:
        parts = {
            # Instance norm would take a bias out again.
            "conv1": conv_spec(d_in, d_out, 3, bias=cfg.norm != "instance", init=RESIDUAL),
            "conv2": conv_spec(d_out, d_out, 3, init=RESIDUAL),
            # The image itself is not normalised.
            "norm1": norm_spec(cfg.norm, d_in) if i else {},
            "norm2": norm_spec(cfg.norm, d_out),
        }
        needed = i < cfg.halvings or d_in != d_out
        return parts | ({"shortcut": conv_spec(d_in, d_out, 1, init=XAVIER)} if needed else {})

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
    """`scores` (batch,), not bounded, and `features` (batch, width), what the last layer sees.

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
        x = average_pool(y + shortcut, 2) if i < cfg.halvings else y + shortcut
        x = self_attention(params["attention"], x) if i == cfg.critic_attention else x
    x = F.relu(x)
    h = x.sum((2, 3)) if cfg.pool == "sum" else global_average_pool(x)
    scores = linear(params["out"], h)[:, 0]
    if cfg.classes:
        scores = scores + (embedding(params["classes"], check_labels("sagan critic", labels, x.shape[0])) * h).sum(1)
    return {"features": h, "scores": scores}


def critic(params: dict, x: Tensor, cfg: Config, **options) -> Tensor:
    """The scores (batch,) of `critic_outputs`, which takes the same arguments."""
    return critic_outputs(params, x, cfg, **options)["scores"]


def _twice(x: Tensor) -> Tensor:
    """The nearest neighbour at twice the size."""
    return F.interpolate(x, scale_factor=2)
