"""StyleGAN: a generator with a style as input of every layer, grown from small images to large ones.

Karras et al. 2019, "A Style-Based Generator Architecture for Generative Adversarial Networks" (arXiv:1812.04948):

    w = f(z / rms(z))                                       the mapping network, 8 linear layers
    x_i = AdaIN(lrelu(conv(x) + scale_i * noise_i + bias_i), A_i w)
    AdaIN(x, (s, t)) = (1 + s) (x - mean(x)) / std(x) + t   over the pixels of each channel

x starts as a learned constant of 4 x 4 pixels; every level but the first doubles its size and blurs. Growing (Karras et
al. 2018, arXiv:1710.10196) is a matter of arguments: at `level` l the images have 4 * 2**l pixels on each side, and
`alpha` fades from the level below (0) to this one (1). The critic is that of the same paper, with the blur of StyleGAN;
the loss (non-saturating with R1) is not part of this module.

Learning rates are equalised (`nets.blocks.style_blocks`). Generated images come from a linear layer: they are about,
not strictly, within [-1, 1].

The public PyTorch version by rosinality differs: it scales all weights for a leaky ReLU (also where there is none), has
no learning-rate factor in the mapping network, blurs after the bias, uses one noise for both layers of a level, takes
the standard deviation over the whole batch and shrinks the values of fused doublings (128 pixels on) by 4.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers, random
from core.layers import average_pool, conv_spec, linear_spec, upsample_nearest
from core.spec import Param
from nets.blocks.conditioning import check_latent
from nets.blocks.conv_norm import check_images
from nets.blocks.style_blocks import (
    RELU_GAIN,
    adaptive_instance_norm,
    blur,
    equalised_conv,
    equalised_linear,
    minibatch_std,
    pixel_norm,
)

NORMAL = initializers.normal()
SMALLEST = 4
"""Height and width of the images at level 0, in pixels."""


@dataclass(frozen=True)
class Config:
    """Sizes of StyleGAN's generator and critic."""

    size: int = 64
    """Height and width of the images at the highest level, in pixels: 4 * 2**levels."""
    channels: int = 3
    """Channels of the images."""
    latent: int = 512
    """Dimension of z."""
    style: int = 512
    """Dimension of w."""
    mapping_layers: int = 8
    """Number of layers of the mapping network."""
    mapping_rate: float = 0.01
    """Learning rate of the mapping network, as a factor of the other layers' (section C)."""
    width: int = 8192
    """Level l has width / 2**(l + 1) channels, up to `most`."""
    most: int = 512
    """Maximal number of channels of a level."""
    mixing: float = 0.9
    """Probability of mixing in training: an example has one style up to a random layer and another from there on."""
    group: int = 4
    """Examples per group of the critic's minibatch standard deviation; 1 for none."""

    def __post_init__(self):
        for name in ("channels", "latent", "style", "mapping_layers", "most", "group"):
            if getattr(self, name) < 1:
                raise ValueError(f"stylegan: {name} is {getattr(self, name)}; expected at least 1")
        if self.size < 2 * SMALLEST or self.size & (self.size - 1):
            raise ValueError(f"stylegan: size is {self.size}; expected a power of 2 from {2 * SMALLEST} on")
        if self.width < self.size // 2:
            raise ValueError(f"stylegan: width {self.width} leaves no channel at {self.size} pixels")
        if not 0.0 <= self.mixing <= 1.0 or not self.mapping_rate > 0.0:
            values = f"mixing {self.mixing}, mapping_rate {self.mapping_rate}"
            raise ValueError(f"stylegan: {values}; expected a probability and a positive factor")


PRESETS = {
    "paper": Config(size=1024),
    "photographs-128": Config(size=128, latent=256, style=256, width=4096, most=256),
    "photographs-64": Config(latent=256, style=256, width=2048, most=256),
    "small": Config(size=32, latent=64, style=64, mapping_layers=4, width=512, most=64),
}


def top(cfg: Config) -> int:
    """Highest level; the lowest, 4 x 4 pixels, is 0."""
    return int(math.log2(cfg.size // SMALLEST))


def widths(cfg: Config) -> list[int]:
    """Channels of each level."""
    return [min(cfg.width // 2 ** (level + 1), cfg.most) for level in range(top(cfg) + 1)]


# The generator.


def generator_spec(cfg: Config) -> dict:
    """`mapping.i`, `constant`, and `blocks.level` of two `layers` and a 1x1 convolution to `image`."""

    def layer_spec(channels: int) -> dict:
        return {
            "bias": Param((channels,)),
            "noise": Param((channels,)),
            "style": linear_spec(cfg.style, 2 * channels, init=NORMAL),
        }

    sizes, blocks = widths(cfg), []
    for level, channels in enumerate(sizes):
        first, second = layer_spec(channels), layer_spec(channels)
        second["conv"] = conv_spec(channels, channels, 3, bias=False, init=NORMAL)
        if level:
            first["conv"] = conv_spec(sizes[level - 1], channels, 3, bias=False, init=NORMAL)
        image = conv_spec(channels, cfg.channels, 1, init=NORMAL)
        blocks.append({"image": image, "layers": [dict(sorted(p.items())) for p in (first, second)]})
    inputs = [cfg.latent, *(cfg.style,) * (cfg.mapping_layers - 1)]
    start = initializers.normal(1 / cfg.mapping_rate)
    return {
        "blocks": blocks,
        "constant": Param((sizes[0], SMALLEST, SMALLEST), NORMAL),
        "mapping": [linear_spec(d_in, cfg.style, init=start) for d_in in inputs],
    }


def mapping(params: dict, z: Tensor, cfg: Config) -> Tensor:
    """Mapping network, latents to styles: (batch, latent) -> (batch, style). Raises ValueError on another width."""
    check_latent("stylegan", z, cfg.latent)
    w = pixel_norm(z)  # (batch, latent)
    for p in params["mapping"]:
        w = F.leaky_relu(equalised_linear(p, w, RELU_GAIN, cfg.mapping_rate), 0.2)  # (batch, style)
    return w


def mean_style(params: dict, key: Tensor, cfg: Config, count: int = 4096) -> Tensor:
    """Mean style over `count` latents, (style,): the centre for `truncated`."""
    weight = params["mapping"][0]["weight"]
    return mapping(params, random.normal(key, (count, cfg.latent), weight.dtype), cfg).mean(0)


def truncated(w: Tensor, mean: Tensor, psi: float, layers: int | None = None) -> Tensor:
    """Truncation trick, mean + psi (w - mean): less variety, fewer unrealistic images (section B).

    Args:
        w: (batch, style), or (batch, layers, style).
        mean: (style,), see `mean_style`.
        layers: number of layers of the latter that are truncated, from the first; by default all. The paper's images
            have 8.
    """
    closer = mean + psi * (w - mean)  # the shape of w
    return closer if layers is None else torch.cat([closer[:, :layers], w[:, layers:]], 1)


def mixed(first: Tensor, second: Tensor, crossover: Tensor | int, layers: int) -> Tensor:
    """Style mixing: the first style in the layers before `crossover`, the second from there on (section 3.1).

    first, second: (batch, style); crossover: (batch,) or one number -> (batch, layers, style).
    """
    crossover = torch.as_tensor(crossover, device=first.device).reshape(-1, 1, 1)  # (batch or 1, 1, 1)
    before = torch.arange(layers, device=first.device)[:, None] < crossover  # (batch or 1, layers, 1)
    return torch.where(before, first[:, None], second[:, None])  # (batch, layers, style)


def noises(key: Tensor, batch: int, level: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Noise of `synthesis`, from N(0, 1): for each of the 2 * (level + 1) layers (batch, 1, size, size).

    key: (2,), or one per example (batch, 2).
    """
    sizes = [SMALLEST * 2 ** (i // 2) for i in range(2 * (level + 1))]
    shape = (batch,) if key.ndim == 1 else ()
    # One call for all layers: a Threefry is many nodes of a compiled graph.
    values = _normal(key, (*shape, sum(size**2 for size in sizes)), dtype)  # (batch, values of all layers)
    return [x.reshape(batch, 1, n, n) for x, n in zip(values.split([n**2 for n in sizes], 1), sizes, strict=True)]


def synthesis(
    params: dict, styles: Tensor, noise: list[Tensor], cfg: Config, *, level: int, alpha: float | Tensor = 1.0
) -> Tensor:
    """Synthesis network, styles to images.

    Args:
        styles: (batch, 2 * (level + 1), style), two layers per level.
        noise: (batch or 1, 1, size, size) for each layer, see `noises`.
        alpha: weight of this level, the rest is that of the level below. 0-D if it is to change between the calls of a
            compiled function.

    Returns:
        (batch, channels, 4 * 2**level, 4 * 2**level)

    Raises:
        ValueError: not as many styles or noises as layers.
    """
    layers = 2 * (level + 1)
    if styles.ndim != 3 or styles.shape[1:] != (layers, cfg.style) or len(noise) != layers:
        shapes = f"styles {tuple(styles.shape)} and {len(noise)} noises"
        raise ValueError(f"stylegan: {shapes}; expected (batch, {layers}, {cfg.style}) and {layers} at level {level}")
    x = before = params["constant"]  # (channels, 4, 4)
    for i in range(layers):
        p = params["blocks"][i // 2]["layers"][i % 2]
        if i and i % 2 == 0:
            before, x = x, blur(equalised_conv(p["conv"], upsample_nearest(x)))  # twice the height and width
        elif i:
            x = equalised_conv(p["conv"], x)
        x = x + _channel(p["noise"]) * noise[i] + _channel(p["bias"])  # (batch, channels, size, size)
        x = adaptive_instance_norm(F.leaky_relu(x, 0.2), equalised_linear(p["style"], styles[:, i]))
    image = equalised_conv(params["blocks"][level]["image"], x, 1.0)  # (batch, channels, size, size)
    if level == 0 or _whole(alpha):
        return image
    below = upsample_nearest(equalised_conv(params["blocks"][level - 1]["image"], before, 1.0))
    return torch.lerp(below, image, _weight(alpha, image))


def _normal(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """From N(0, 1), in half precision the rounded values of single precision: bfloat16 itself has only 128 of them."""
    return random.normal(key, shape, torch.promote_types(dtype, torch.float32)).to(dtype)


def _channel(x: Tensor) -> Tensor:
    return x[:, None, None]  # (channels, 1, 1)


def _whole(alpha: float | Tensor) -> bool:
    """No fading: alpha is the number 1."""
    return not isinstance(alpha, Tensor) and alpha == 1


def _weight(alpha: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(alpha, dtype=like.dtype, device=like.device)


def generator(
    params: dict,
    z: Tensor,
    cfg: Config,
    *,
    labels: None = None,
    key: Tensor | None = None,
    train: bool = False,
    level: int | None = None,
    alpha: float | Tensor = 1.0,
    noise: list[Tensor] | None = None,
) -> Tensor:
    """Images of latents. Training also mixes the styles of some examples with random ones.

    Args:
        z: (batch, latent), from N(0, 1).
        labels: without effect here.
        key: (2,), or one per example (batch, 2). Without it, outside training, the noise is always the same.
        level: by default the highest; the images have 4 * 2**level pixels on each side.
        alpha: see `synthesis`.
        noise: noise of all layers, by default that of the key.

    Returns:
        (batch, channels, size, size)

    Raises:
        ValueError: z of another width, a level that the net does not have, no key in training.
    """
    level = _level("stylegan", cfg, level)
    layers, batch = 2 * (level + 1), z.shape[0]
    if train and key is None:
        raise ValueError("stylegan: training draws random numbers (noise and mixed styles); pass key=")
    w = mapping(params, z, cfg)  # (batch, style)
    fixed = random.key(0, z.device) if key is None else key
    noise_key, mix_key, crossover_key, latent_key = random.sites(fixed, 4).unbind(0)
    if train and cfg.mixing:
        shape = (batch,) if key.ndim == 1 else ()
        other = mapping(params, _normal(latent_key, (*shape, cfg.latent), z.dtype), cfg)
        crossover = random.randint(crossover_key, shape, 1, layers)  # (batch,)
        mix = random.bernoulli(mix_key, cfg.mixing, shape)  # (batch,)
        styles = mixed(w, other, torch.where(mix, crossover, layers), layers)  # (batch, layers, style)
    else:
        styles = w[:, None].expand(batch, layers, cfg.style)
    if noise is None:
        noise = noises(noise_key, 1 if key is None else batch, level, z.dtype)
    return synthesis(params, styles, noise, cfg, level=level, alpha=alpha)


# The critic.


def critic_spec(cfg: Config) -> dict:
    """`blocks.level` of two convolutions and a 1x1 convolution from the `image`; after level 0, `hidden` and `head`."""
    sizes, blocks = widths(cfg), []
    for level, channels in enumerate(sizes):
        # The lowest level also has the channel of the standard deviation, and its second layer is `hidden`.
        convs = [conv_spec(channels + (level == 0), channels, 3, init=NORMAL)]
        if level:
            convs.append(conv_spec(channels, sizes[level - 1], 3, init=NORMAL))
        blocks.append({"convs": convs, "image": conv_spec(cfg.channels, channels, 1, init=NORMAL)})
    return {
        "blocks": blocks,
        "head": linear_spec(sizes[0], 1, init=NORMAL),
        "hidden": linear_spec(sizes[0] * SMALLEST**2, sizes[0], init=NORMAL),
    }


def critic_outputs(
    params: dict,
    x: Tensor,
    cfg: Config,
    *,
    labels: None = None,
    key: Tensor | None = None,
    train: bool = False,
    level: int | None = None,
    alpha: float | Tensor = 1.0,
) -> dict:
    """`scores` (batch,), not bounded, and penultimate `features` (batch, width). Arguments as in `critic`."""
    level = _level("stylegan critic", cfg, level)
    check_images("stylegan critic", x, cfg.channels, 1)
    size = SMALLEST * 2**level
    if tuple(x.shape[2:]) != (size, size):
        sides = f"{x.shape[2]} x {x.shape[3]}"
        raise ValueError(f"stylegan critic: the images are {sides}; expected {size} x {size} at level {level}")
    blocks = params["blocks"]
    y = F.leaky_relu(equalised_conv(blocks[level]["image"], x), 0.2)  # (batch, channels of the level, size, size)
    for i in range(level, 0, -1):
        first, second = blocks[i]["convs"]
        y = blur(F.leaky_relu(equalised_conv(first, y), 0.2))
        y = F.leaky_relu(average_pool(equalised_conv(second, y), 2), 0.2)  # half the height and width
        if i == level and not _whole(alpha):
            below = F.leaky_relu(equalised_conv(blocks[i - 1]["image"], average_pool(x, 2)), 0.2)
            y = torch.lerp(below, y, _weight(alpha, y))
    y = F.leaky_relu(equalised_conv(blocks[0]["convs"][0], minibatch_std(y, cfg.group)), 0.2)  # (batch, width, 4, 4)
    features = F.leaky_relu(equalised_linear(params["hidden"], y.flatten(1), RELU_GAIN), 0.2)  # (batch, width)
    return {"features": features, "scores": equalised_linear(params["head"], features).squeeze(1)}


def critic(
    params: dict,
    x: Tensor,
    cfg: Config,
    *,
    labels: None = None,
    key: Tensor | None = None,
    train: bool = False,
    level: int | None = None,
    alpha: float | Tensor = 1.0,
) -> Tensor:
    """Scores of images, (batch,), high for real ones.

    Args:
        x: (batch, channels, size, size) with size = 4 * 2**level.
        labels, key, train: without effect here.
        level, alpha: as in `generator`.

    Raises:
        ValueError: images of another size or with other channels, a level that the net does not have, a batch that
            cannot be divided into groups.
    """
    return critic_outputs(params, x, cfg, level=level, alpha=alpha)["scores"]


def _level(name: str, cfg: Config, level: int | None) -> int:
    level = top(cfg) if level is None else level
    if not 0 <= level <= top(cfg):
        raise ValueError(f"{name}: level is {level}; expected 0 to {top(cfg)} for {cfg.size} pixels")
    return level


# Growing.


def growth(shown: int, phase: int, cfg: Config, first: int = 1) -> tuple[int, float]:
    """(level, alpha) after training on `shown` images.

    Each level is faded in for `phase` images and then trained for as many, the highest to the end (Karras et al. 2018,
    appendix A: 800,000 each).

    Args:
        first: level to start with, which is not faded in; 1 is 8 x 8 pixels, as in the paper.
    """
    stage, progress = divmod(shown + phase, 2 * phase)
    level = first + stage
    if level > top(cfg):
        return top(cfg), 1.0
    return level, 1.0 if stage == 0 else min(1.0, progress / phase)


def reals(images: Tensor, level: int, alpha: float | Tensor, cfg: Config) -> Tensor:
    """Real images for the critic at a level, blended with the level below as generated ones are while it is faded in.

    images: (batch, channels, size, size) -> (batch, channels, 4 * 2**level, 4 * 2**level), by average pooling.
    """
    level = _level("stylegan", cfg, level)
    by = cfg.size // (SMALLEST * 2**level)
    x = average_pool(images, by) if by > 1 else images
    if level == 0 or _whole(alpha):
        return x
    return torch.lerp(upsample_nearest(average_pool(x, 2)), x, _weight(alpha, x))
