"""Changes of the colours of images, with one amount per example.

Images are (N, channels, height, width) in [0, 1], and so are the results. `factor` is (N,): 1 leaves an image as it is,
0 removes its brightness, contrast, colour. The values are those of torchvision.transforms.functional.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from core import random
from core.random import uniform

GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the perceived brightness, luma (ITU-R 601)."""


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """factor x: images (N, 3, height, width) in [0, 1], factor per image; clipped to [0, 1]."""
    return _blend(images, torch.zeros_like(images), factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """m + factor (x - m) with m the mean grey of the image; shapes as in `brightness`."""
    return _blend(images, grey(images).mean((1, 2, 3), keepdim=True).expand_as(images), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """g + factor (x - g) with g the grey of each pixel; shapes as in `brightness`."""
    return _blend(images, grey(images).expand_as(images), factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Sharpness: towards (below 1) or away from (above 1) the image smoothed by a 3x3 kernel; its border stays."""
    kernel = torch.tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]], device=images.device) / 13
    channels = images.shape[1]
    inner = F.conv2d(images, kernel.to(images.dtype).expand(channels, 1, 3, 3), groups=channels)
    smooth = torch.cat([images[:, :, 1:-1, :1], inner, images[:, :, 1:-1, -1:]], 3)  # (N, channels, height - 2, width)
    smooth = torch.cat([images[:, :, :1], smooth, images[:, :, -1:]], 2)  # (N, channels, height, width)
    return _blend(images, smooth, factor)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Hue rotation by a share `turn` (N,) of the colour circle: 0 and 1 leave colours as they are. Grey images stay."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)  # each (N, height, width)
    value, low = images.amax(1), images.amin(1)
    spread = value - low
    safe = torch.where(spread > 0, spread, 1.0)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    angle = (sixth / 6 + turn[:, None, None]) % 1.0
    # HSV to RGB: each channel is the value, less `spread` where the angle is far from it: a trapezium on the circle.
    channels = []
    for offset in (5, 3, 1):
        k = (offset + 6 * angle) % 6
        channels.append(value - spread * torch.minimum(torch.minimum(k, 4 - k), torch.ones_like(k)).clamp(min=0))
    return torch.stack(channels, 1)  # (N, 3, height, width)


def grey(images: Tensor) -> Tensor:
    """Luma, (N, 1, height, width)."""
    if images.shape[1] == 1:
        return images
    weights = torch.tensor(GREY, dtype=images.dtype, device=images.device)
    return (images * weights[:, None, None]).sum(1, keepdim=True)  # (N, 1, height, width)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, images, column(factor).to(images.dtype)).clamp(0, 1)


def colour_jitter(
    keys: Tensor,
    images: Tensor,
    brightness_by: float = 0.4,
    contrast_by: float = 0.4,
    saturation_by: float = 0.4,
    hue_by: float = 0.1,
) -> Tensor:
    """Colour jitter: brightness, contrast and saturation times a factor in [1 - s, 1 + s], hue turned by up to s, in a
    random order."""
    order_key, *site = random.sites(keys, 5)
    changes = []
    by = {brightness: brightness_by, contrast: contrast_by, saturation: saturation_by}
    for (f, s), k in zip(by.items(), site, strict=False):
        changes.append((f, uniform(k, (), minval=max(0.0, 1 - s), maxval=1 + s)))
    changes.append((hue, uniform(site[3], (), minval=-hue_by, maxval=hue_by) if hue_by else torch.zeros(len(images))))
    order = uniform(order_key, (4,)).argsort(-1)  # (N, 4)
    for turn in range(4):
        for number, (f, amount) in enumerate(changes):
            images = apply_to(order[:, turn] == number, f, images, amount)
    return images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """The first `bits` of the 8 bits of each value. bits: (N,)."""
    step = column(2.0 ** (8 - bits))
    return ((images * 255).round() / step).floor() * step / 255


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Solarization: values from the threshold on are inverted. threshold: (N,)."""
    return torch.where(images >= column(threshold), 1 - images, images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Each channel stretched to [0, 1]."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = high == low
    return torch.where(flat, images, (images - low) / torch.where(flat, 1.0, high - low))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Histogram equalization of each channel, in 256 steps (as PIL's ImageOps.equalize)."""
    levels = (images * 255).round().long()
    flat = levels.flatten(2)  # (N, channels, pixels)
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts = counts.scatter_add(2, flat, torch.ones_like(flat))  # (N, channels, 256)
    pixels = flat.shape[2]
    last = counts.gather(2, flat.amax(2, keepdim=True))
    step = (pixels - last) // 255
    table = ((counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where((step == 0)[..., None], levels, table.gather(2, flat).view_as(levels)) / 255


def apply_to(mask: Tensor, f: Callable[[Tensor, Tensor], Tensor], images: Tensor, amount: Tensor) -> Tensor:
    """f on the images where `mask` is True; the rest stay as they are. mask, amount: (N,)."""
    indices = mask.nonzero()[:, 0]
    return images.index_copy(0, indices, f(images[indices], amount[indices].to(images))) if len(indices) else images


def column(x: Tensor) -> Tensor:
    """(N,) -> (N, 1, 1, 1), which broadcasts with images."""
    return x.reshape(-1, 1, 1, 1)
