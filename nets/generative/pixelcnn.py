"""Gated PixelCNN: the probability of each pixel, or code, given those before it in reading order.

    p(x) = prod_i p(x_i | x_1 .. x_{i-1})

van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", arXiv:1606.05328. Two stacks of
convolutions: the vertical one sees all rows above a pixel, the horizontal one the pixels to its left and, through 1 x 1
convolutions, the vertical one; so there is no blind spot. A mask on a convolution's weight is here a smaller kernel and
padding on one side: the same function without the multiplications by zero. The numbers of an image are categories (the
codes of `nets.generative.vqvae`, grey levels), embedded as vectors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from core import initializers, random
from core.layers import conv, conv_spec, embedding, embedding_spec
from nets.blocks.conditioning import check_labels
from nets.language.decoding import choose

HE = initializers.kaiming_normal()


@dataclass(frozen=True)
class Config:
    """Images of categories.

    shape: (height, width) of what `sample` draws; `apply` takes any size.
    categories: values of a pixel.
    width: channels of both stacks.
    layers: how many, the first with `first_kernel` pixels a side, the others with `kernel`; odd numbers.
    hidden: channels of the layer in front of the logits.
    classes: conditional on a class, unless 0.
    """

    shape: tuple[int, int] = (7, 7)
    categories: int = 128
    width: int = 64
    layers: int = 6
    first_kernel: int = 7
    kernel: int = 3
    hidden: int = 128
    classes: int = 0

    def __post_init__(self):
        for name, size in (("first_kernel", self.first_kernel), ("kernel", self.kernel)):
            if size < 3 or size % 2 == 0:
                raise ValueError(f"pixelcnn: {name} {size}; expected an odd number, at least 3")
        if self.layers < 1 or self.categories < 2:
            found = f"{self.layers} layers and {self.categories} categories"
            raise ValueError(f"pixelcnn: {found}; expected at least 1 and 2")


PRESETS = {
    "digits": Config((4, 4), 64, 32, 4, 3, hidden=64),
    "mnist": Config(),
    "small": Config((8, 8), 512, 128, 12, hidden=512),
}


def spec(cfg: Config) -> dict:
    """`embedding`, `layers.i`, `hidden` and `output`; a layer has `classes`, its gates' biases, if any."""
    return {
        "embedding": embedding_spec(cfg.categories, cfg.width),
        "hidden": conv_spec(cfg.width, cfg.hidden, 1, init=HE),
        "layers": [_layer_spec(cfg, i) for i in range(cfg.layers)],
        "output": conv_spec(cfg.hidden, cfg.categories, 1),
    }


def _layer_spec(cfg: Config, i: int) -> dict:
    n, half = cfg.width, _half(cfg, i)
    # Rows above and, but for the first layer, the pixel's own; in that row, pixels to the left and, likewise, itself.
    inner = half + (i > 0)
    classes = {"classes": embedding_spec(cfg.classes, 4 * n, init=initializers.normal(0.1))} if cfg.classes else {}
    return {
        **classes,
        "horizontal": conv_spec(n, 2 * n, (1, inner)),
        "out": conv_spec(n, n, 1),
        "vertical": conv_spec(n, 2 * n, (inner, 2 * half + 1)),
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
        found = f"{codes.dtype} {tuple(codes.shape)}"
        raise ValueError(f"pixelcnn: expected codes (batch, height, width), integers, found {found}")
    if cfg.classes:
        check_labels("pixelcnn", labels, codes.shape[0])
    vertical = horizontal = embedding(params["embedding"], codes).movedim(-1, 1)
    for i, p in enumerate(params["layers"]):
        vertical, horizontal = _layer(p, vertical, horizontal, labels, _half(cfg, i), first=i == 0)
    x = conv(params["hidden"], F.relu(horizontal))
    return conv(params["output"], F.relu(x)).movedim(1, -1)


def _layer(p: dict, vertical: Tensor, horizontal: Tensor, labels: Tensor | None, half: int, first: bool):
    """Figure 2. In the first layer nothing reaches the pixel itself, in the others both stacks know only what is before
    it, and may look at themselves. (batch, width, height, width) each."""
    # Without the last row (column), and that much further down (right): each sees what is before it only.
    back = -1 if first else 0
    above = conv(p["vertical"], F.pad(vertical, (half, half, half, back)))
    left = conv(p["horizontal"], F.pad(horizontal, (half, back, 0, 0)))
    left = left + conv(p["vertical_to_horizontal"], above)
    if "classes" in p:
        by_class = embedding(p["classes"], labels)[..., None, None]
        by_vertical, by_horizontal = by_class.chunk(2, 1)
        above, left = above + by_vertical, left + by_horizontal
    new = conv(p["out"], _gate(left))
    # The pixel itself may not come in through the sum.
    return _gate(above), new if first else new + horizontal


def sample(
    params: dict,
    key: Tensor,
    cfg: Config,
    count: int,
    labels: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Images drawn pixel by pixel in reading order: (count, *cfg.shape) integers.

    Image i is the same for any count.

    Args:
        key: (2,).
        labels: integers (count,), needed if there are classes.
        temperature: the logits are divided by it; 0 takes the likeliest value.

    Raises:
        ValueError: labels missing or misshapen, a negative temperature.
    """
    height, width = cfg.shape
    codes = torch.zeros((count, height, width), dtype=torch.int64, device=key.device)
    keys = random.sites(key, height * width)
    place = torch.arange(height * width, device=key.device).reshape(height, width)
    for t in range(height * width):
        row, column = divmod(t, width)
        # The rows below have no say.
        logits = apply(params, codes[:, : row + 1], cfg, labels=labels)[:, row, column]
        drawn = choose(logits, keys[t], temperature=temperature)
        codes = torch.where(place == t, drawn[:, None, None], codes)
    return codes


def _half(cfg: Config, i: int) -> int:
    """Pixels that the i-th layer sees to each side."""
    return (cfg.first_kernel if i == 0 else cfg.kernel) // 2


def _gate(x: Tensor) -> Tensor:
    """tanh(a) sigmoid(b), a and b the halves of the channels: eq. 2. (batch, 2 n, ...) -> (batch, n, ...)."""
    a, b = x.chunk(2, 1)
    return a.tanh() * b.sigmoid()
