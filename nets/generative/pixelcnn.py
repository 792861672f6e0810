"""Gated PixelCNN: the probability of each pixel, or code, given those before it in raster order.

    p(x) = prod_i p(x_i | x_1 .. x_{i-1})

van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", arXiv:1606.05328. Two stacks of
convolutions: the receptive field of the vertical one is all rows above a pixel, that of the horizontal one the pixels
to its left and, through 1 x 1 convolutions, the vertical one's; so there is no blind spot. A mask on a convolution's
weight is here a smaller kernel and padding on one side: the same function without the multiplications by zero. The
values of an image are categories (the codes of `nets.generative.vqvae`, grey levels), embedded as vectors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers, random
from core.layers import conv, conv_spec, embedding, embedding_spec
from nets.blocks.conditioning import check_labels

HE = initializers.kaiming_normal()


@dataclass(frozen=True)
class Config:
    """Sizes of a gated PixelCNN."""

    shape: tuple[int, int] = (7, 7)
    """(height, width) of the images that `sample` draws; `apply` takes any size."""
    categories: int = 128
    """Number of values that a pixel may have."""
    width: int = 64
    """Channels of both stacks."""
    layers: int = 6
    """Number of layers."""
    first_kernel: int = 7
    """Kernel size of the first layer, odd."""
    kernel: int = 3
    """Kernel size of the other layers, odd."""
    hidden: int = 128
    """Channels of the layer before the logits."""
    classes: int = 0
    """Number of classes that the net is conditional on; 0 for none."""

    def __post_init__(self):
        for name, size in (("first_kernel", self.first_kernel), ("kernel", self.kernel)):
            if size < 3 or size % 2 == 0:
                raise ValueError(f"pixelcnn: {name} {size}; expected an odd number, at least 3")
        if self.layers < 1 or self.categories < 2:
            sizes = f"{self.layers} layers and {self.categories} categories"
            raise ValueError(f"pixelcnn: {sizes}; expected at least 1 and 2")


PRESETS = {
    "digits": Config((4, 4), 64, 32, 4, 3, hidden=64),
    "mnist": Config(),
    "small": Config((8, 8), 512, 128, 12, hidden=512),
}


def spec(cfg: Config) -> dict:
    """`embedding`, `layers.i`, `hidden` and `output`; with classes each layer has `classes`, biases of its gates."""
    return {
        "embedding": embedding_spec(cfg.categories, cfg.width),
        "hidden": conv_spec(cfg.width, cfg.hidden, 1, init=HE),
        "layers": [_layer_spec(cfg, i) for i in range(cfg.layers)],
        "output": conv_spec(cfg.hidden, cfg.categories, 1),
    }


def _layer_spec(cfg: Config, i: int) -> dict:
    n, half = cfg.width, _half(cfg, i)
    # Rows above and, but for the first layer, the pixel's own; in that row, pixels to the left and, likewise, itself.
    side = half + (i > 0)
    classes = {"classes": embedding_spec(cfg.classes, 4 * n, init=initializers.normal(0.1))} if cfg.classes else {}
    return {
        **classes,
        "horizontal": conv_spec(n, 2 * n, (1, side)),
        "out": conv_spec(n, n, 1),
        "vertical": conv_spec(n, 2 * n, (side, 2 * half + 1)),
        "vertical_to_horizontal": conv_spec(2 * n, 2 * n, 1),
    }


def apply(
    params: dict,
    codes: Tensor,
    cfg: Config,
    *,
    labels: Tensor | None = None,
    key: Tensor | None = None,
    train: bool = False,
) -> Tensor:
    """Logits of each pixel, from those before it: (batch, height, width) -> (batch, height, width, categories).

    Args:
        codes: integers in [0, categories).
        labels: integers (batch,), needed if there are classes.
        key, train: without effect here.

    Raises:
        ValueError: codes that are not integers of three axes, labels missing or misshapen.
    """
    if codes.ndim != 3 or codes.is_floating_point():
        kind = f"{codes.dtype} {tuple(codes.shape)}"
        raise ValueError(f"pixelcnn: expected codes (batch, height, width), integers, found {kind}")
    if cfg.classes:
        check_labels("pixelcnn", labels, codes.shape[0])
    vertical = horizontal = embedding(params["embedding"], codes).movedim(-1, 1)  # (batch, channels, height, width)
    for i, p in enumerate(params["layers"]):
        vertical, horizontal = _layer(p, vertical, horizontal, labels, _half(cfg, i), first=i == 0)
    x = conv(params["hidden"], F.relu(horizontal))  # (batch, hidden, height, width)
    return conv(params["output"], F.relu(x)).movedim(1, -1)  # (batch, height, width, categories)


def _layer(
    p: dict, vertical: Tensor, horizontal: Tensor, labels: Tensor | None, half: int, first: bool
) -> tuple[Tensor, Tensor]:
    """Figure 2: both stacks, each (batch, channels, height, width) -> the same shapes.

    In the first layer nothing reaches the pixel itself; in later ones both stacks depend on earlier pixels only, so a
    pixel's own position may be under the kernel.
    """
    # Without the last row (column), and that much further down (right): each position gets earlier ones only.
    back = -1 if first else 0
    above = conv(p["vertical"], F.pad(vertical, (half, half, half, back)))  # (batch, 2 channels, height, width)
    left = conv(p["horizontal"], F.pad(horizontal, (half, back, 0, 0)))  # (batch, 2 channels, height, width)
    left = left + conv(p["vertical_to_horizontal"], above)
    if "classes" in p:
        biases = embedding(p["classes"], labels)[..., None, None]  # (batch, 4 channels, 1, 1)
        vertical_bias, horizontal_bias = biases.chunk(2, 1)
        above, left = above + vertical_bias, left + horizontal_bias
    new = conv(p["out"], _gate(left))  # (batch, channels, height, width)
    # In the first layer the residual connection would pass the pixel itself on.
    return _gate(above), new if first else new + horizontal


def sample(
    params: dict,
    key: Tensor,
    cfg: Config,
    count: int,
    labels: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Sample images pixel by pixel in raster order: (count, *cfg.shape) integers.

    Image i is the same for any count.

    Args:
        key: (2,).
        labels: integers (count,), needed if there are classes.
        temperature: divisor of the logits; 0 takes the most probable value.

    Raises:
        ValueError: labels missing or misshapen, a negative temperature.
    """
    if not temperature >= 0.0:
        raise ValueError(f"pixelcnn: temperature {temperature}; expected at least 0")
    height, width = cfg.shape
    codes = torch.zeros((count, height, width), dtype=torch.int64, device=key.device)
    position = torch.arange(height * width, device=key.device).reshape(height, width)
    for t in range(height * width):
        row, column = divmod(t, width)
        # The rows below have no influence.
        logits = apply(params, codes[:, : row + 1], cfg, labels=labels)[:, row, column]  # (count, categories)
        if temperature > 0.0:
            # argmax(logits / T + Gumbel noise) is a sample of softmax(logits / T).
            keys = random.sites(random.fold_in(key, t), count)  # (count, 2)
            logits = logits.float() / temperature + random.gumbel(keys, (cfg.categories,))
        codes = torch.where(position == t, logits.argmax(-1)[:, None, None], codes)  # (count, height, width)
    return codes


def _half(cfg: Config, i: int) -> int:
    """Pixels to each side under the kernel of layer i."""
    return (cfg.first_kernel if i == 0 else cfg.kernel) // 2


def _gate(x: Tensor) -> Tensor:
    """Equation 2, tanh(a) sigmoid(b), for the halves a and b of the channels: (batch, 2 n, ...) -> (batch, n, ...)."""
    a, b = x.chunk(2, 1)  # each (batch, n, ...)
    return a.tanh() * b.sigmoid()
