"""Random changes of images, as functions of explicit keys.

Images are (N, channels, height, width) in [0, 1], keys (N, 2), one an example: what happens to an image is a function
of its key alone, whatever batch it is in, so a resumed run sees the same pictures. With
`keys = random.sites(random.fold_in(key, step), N)` it is a function of key and step. `mixup` and `cutmix` take one key,
since they mix the images of a batch.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core import random
from core.random import bernoulli, randint, uniform

GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness that is seen (ITU-R 601)."""


def flip(keys: Tensor, images: Tensor, probability: float = 0.5) -> Tensor:
    """Left and right changed over, with the given chance."""
    return torch.where(_column(bernoulli(keys, probability, ())), images.flip(-1), images)


def crop(keys: Tensor, images: Tensor, padding: int, fill: float = 0.0) -> Tensor:
    """A window of the images' size anywhere in the padded images (He et al. 2016, section 4.2: 4 pixels on CIFAR)."""
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4, value=fill)
    start = randint(keys, (2,), 0, 2 * padding + 1).long()
    rows = start[:, 0, None] + torch.arange(height, device=images.device)
    columns = start[:, 1, None] + torch.arange(width, device=images.device)
    example = torch.arange(len(images), device=images.device)[:, None, None]
    # The channels' axis goes behind for the lookup, and back.
    return padded.movedim(1, -1)[example, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def boxes(
    keys: Tensor,
    height: int | Tensor,
    width: int | Tensor,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    attempts: int = 10,
) -> tuple[Tensor, Tensor]:
    """Random rectangles in images (Szegedy et al. 2015, arXiv:1409.4842, section 6): area uniform, log ratio uniform.

    Args:
        height, width: of the images; numbers, or (N,) where they differ.
        scale: range of the area, as a share of the image's.
        ratio: range of width / height.
        attempts: how often one that does not fit is drawn again.

    Returns:
        (N, 4) top, left, height, width in whole pixels, and (N,) whether one was found; where not, it is the largest
        one of an allowed ratio in the middle.
    """
    size_key, place_key = random.sites(keys, 2)
    height, width = (torch.as_tensor(x, device=keys.device, dtype=torch.float32) for x in (height, width))
    draws = uniform(size_key, (attempts, 2))
    area = (height * width)[..., None] * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    quotient = (low + (high - low) * draws[..., 1]).exp()
    tall, wide = (area / quotient).sqrt().round(), (area * quotient).sqrt().round()
    fits = (tall > 0) & (wide > 0) & (tall <= height[..., None]) & (wide <= width[..., None])
    found = fits.any(-1)
    first = fits.to(torch.int8).argmax(-1, keepdim=True)
    tall, wide = tall.gather(-1, first)[..., 0], wide.gather(-1, first)[..., 0]
    whole = torch.minimum(height, (width / ratio[0]).round()), torch.minimum(width, (height * ratio[1]).round())
    tall, wide = torch.where(found, tall, whole[0]), torch.where(found, wide, whole[1])
    room = torch.stack([height - tall, width - wide], -1)
    place = torch.where(found[..., None], (uniform(place_key, (2,)) * (room + 1)).floor(), (room / 2).floor())
    return torch.cat([torch.minimum(place, room), tall[..., None], wide[..., None]], -1), found


def resized_crop(keys: Tensor, images: Tensor, size: int | tuple[int, int], **options) -> Tensor:
    """A random rectangle of each image, scaled to `size` (height, width), bilinear. Options as in `boxes`."""
    height, width = images.shape[2:]
    top, left, tall, wide = boxes(keys, height, width, **options)[0].unbind(-1)
    out = (size, size) if isinstance(size, int) else size
    rows = _places(top, tall, out[0]).clamp(max=height - 1)
    columns = _places(left, wide, out[1]).clamp(max=width - 1)
    x, y = (2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1
    grid = torch.stack([x[:, None, :].expand(-1, *out), y[:, :, None].expand(-1, *out)], -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _places(start: Tensor, length: Tensor, count: int) -> Tensor:
    """(N, count): the middles of `count` equal parts of [start, start + length); pixels count from their middle."""
    parts = (torch.arange(count, device=start.device) + 0.5) / count
    inside = length[:, None] * parts - 0.5
    return start[:, None] + torch.minimum(inside.clamp(min=0), length[:, None] - 1)


def erase(
    keys: Tensor,
    images: Tensor,
    probability: float = 0.25,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    value: float = 0.0,
) -> Tensor:
    """A random rectangle painted over, with the given chance (Zhong et al. 2020, arXiv:1708.04896)."""
    whether, where = random.sites(keys, 2)
    height, width = images.shape[2:]
    box, found = boxes(where, height, width, scale, ratio)
    inside = _inside(box, height, width) & _column(found & bernoulli(whether, probability, ()))
    return torch.where(inside, value, images)


def _inside(box: Tensor, height: int, width: int) -> Tensor:
    """(N, 1, height, width): which pixels lie in each rectangle. box: (N, 4)."""
    top, left, tall, wide = (part[:, None] for part in box.unbind(-1))
    row = torch.arange(height, device=box.device)
    column = torch.arange(width, device=box.device)
    rows, columns = (row >= top) & (row < top + tall), (column >= left) & (column < left + wide)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


# Colours. `factor` is (N,): 1 leaves an image as it is, 0 is without brightness, contrast, colour.


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(images), factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, grey(images).mean((1, 2, 3), keepdim=True).expand_as(images), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, grey(images).expand_as(images), factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Away from, or towards, the image smoothed by a 3x3 kernel; its border stays."""
    kernel = torch.tensor([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]], device=images.device) / 13
    channels = images.shape[1]
    inner = F.conv2d(images, kernel.to(images.dtype).expand(channels, 1, 3, 3), groups=channels)
    smooth = torch.cat([images[:, :, 1:-1, :1], inner, images[:, :, 1:-1, -1:]], 3)
    smooth = torch.cat([images[:, :, :1], smooth, images[:, :, -1:]], 2)
    return _blend(images, smooth, factor)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Colours turned on their circle: 0 and 1 leave them as they are. turn: (N,). Grey images stay."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    spread = value - low
    safe = torch.where(spread > 0, spread, 1.0)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    angle = (sixth / 6 + turn[:, None, None]) % 1.0
    # Each channel is the value, less `spread` where the angle is far from it: a trapezium on the circle.
    turned = []
    for offset in (5, 3, 1):
        k = (offset + 6 * angle) % 6
        turned.append(value - spread * torch.minimum(torch.minimum(k, 4 - k), torch.ones_like(k)).clamp(min=0))
    return torch.stack(turned, 1)


def grey(images: Tensor) -> Tensor:
    """(N, 1, height, width)."""
    if images.shape[1] == 1:
        return images
    weights = torch.tensor(GREY, dtype=images.dtype, device=images.device)
    return (images * weights[:, None, None]).sum(1, keepdim=True)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, images, _column(factor).to(images.dtype)).clamp(0, 1)


def colour_jitter(
    keys: Tensor,
    images: Tensor,
    brightness_by: float = 0.4,
    contrast_by: float = 0.4,
    saturation_by: float = 0.4,
    hue_by: float = 0.1,
) -> Tensor:
    """Brightness, contrast and saturation by a factor in [1 - s, 1 + s], hue turned by up to s, in a random order."""
    order_key, *site = random.sites(keys, 5)
    changes = []
    by = {brightness: brightness_by, contrast: contrast_by, saturation: saturation_by}
    for (f, s), k in zip(by.items(), site, strict=False):
        changes.append((f, uniform(k, (), minval=max(0.0, 1 - s), maxval=1 + s)))
    changes.append((hue, uniform(site[3], (), minval=-hue_by, maxval=hue_by) if hue_by else torch.zeros(len(images))))
    order = uniform(order_key, (4,)).argsort(-1)
    for place in range(4):
        for number, (f, amount) in enumerate(changes):
            images = _apply(order[:, place] == number, f, images, amount)
    return images


# RandAugment.


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Only the first `bits` of the 8 bits of a value. bits: (N,)."""
    step = _column(2.0 ** (8 - bits))
    return ((images * 255).round() / step).floor() * step / 255


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Values from the threshold on are inverted. threshold: (N,)."""
    return torch.where(images >= _column(threshold), 1 - images, images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Each channel stretched to [0, 1]."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = high == low
    return torch.where(flat, images, (images - low) / torch.where(flat, 1.0, high - low))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """The values of each channel so that all occur alike, in 256 steps (as PIL's ImageOps.equalize)."""
    levels = (images * 255).round().long()
    flat = levels.flatten(2)
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts = counts.scatter_add(2, flat, torch.ones_like(flat))
    pixels = flat.shape[2]
    last = counts.gather(2, flat.amax(2, keepdim=True))
    step = (pixels - last) // 255
    table = ((counts.cumsum(2) - counts + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where((step == 0)[..., None], levels, table.gather(2, flat).view_as(levels)) / 255


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """matrix (N, 2, 3) takes a place of the result, in pixels from the middle, to one of the image; outside is 0."""
    height, width = images.shape[2:]
    unit = torch.tensor([width, height], dtype=images.dtype, device=images.device) / 2
    scaled = matrix * torch.cat([unit, unit.new_ones(1)]) / unit[:, None]
    grid = F.affine_grid(scaled, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> Tensor:
    return torch.stack([torch.stack([a, b, c], -1), torch.stack([d, e, f], -1)], -2)


def _shear_x(images: Tensor, s: Tensor) -> Tensor:
    one, zero = torch.ones_like(s), torch.zeros_like(s)
    return affine(images, _matrix(one, -s, zero, zero, one, zero))


def _shear_y(images: Tensor, s: Tensor) -> Tensor:
    one, zero = torch.ones_like(s), torch.zeros_like(s)
    return affine(images, _matrix(one, zero, zero, -s, one, zero))


def _translate_x(images: Tensor, share: Tensor) -> Tensor:
    one, zero = torch.ones_like(share), torch.zeros_like(share)
    return affine(images, _matrix(one, zero, -(share * images.shape[3]).trunc(), zero, one, zero))


def _translate_y(images: Tensor, share: Tensor) -> Tensor:
    one, zero = torch.ones_like(share), torch.zeros_like(share)
    return affine(images, _matrix(one, zero, zero, zero, one, -(share * images.shape[2]).trunc()))


def _rotate(images: Tensor, degrees: Tensor) -> Tensor:
    angle, zero = torch.deg2rad(degrees), torch.zeros_like(degrees)
    return affine(images, _matrix(angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero))


def _by_factor(f: Callable) -> Callable:
    return lambda images, change: f(images, 1 + change)


# (function, its amount at strength m in [0, 1], whether the amount has a random sign), as in torchvision.
OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float], float], bool]] = {
    "identity": (lambda images, _: images, lambda m: 0.0, False),
    "shear_x": (_shear_x, lambda m: 0.3 * m, True),
    "shear_y": (_shear_y, lambda m: 0.3 * m, True),
    "translate_x": (_translate_x, lambda m: 150 / 331 * m, True),
    "translate_y": (_translate_y, lambda m: 150 / 331 * m, True),
    "rotate": (_rotate, lambda m: 30 * m, True),
    "brightness": (_by_factor(brightness), lambda m: 0.9 * m, True),
    "saturation": (_by_factor(saturation), lambda m: 0.9 * m, True),
    "contrast": (_by_factor(contrast), lambda m: 0.9 * m, True),
    "sharpness": (_by_factor(sharpness), lambda m: 0.9 * m, True),
    "posterize": (posterize, lambda m: 8 - round(4 * m), False),
    "solarize": (solarize, lambda m: 1 - m, False),
    "autocontrast": (autocontrast, lambda m: 0.0, False),
    "equalize": (equalize, lambda m: 0.0, False),
}


def rand_augment(keys: Tensor, images: Tensor, operations: int = 2, magnitude: int = 9) -> Tensor:
    """RandAugment (Cubuk et al. 2020, arXiv:1909.13719): `operations` changes of `OPERATIONS` after one another, each
    drawn anew, of the strength magnitude / 30."""
    if not 0 <= magnitude <= 30:
        raise ValueError(f"rand_augment: magnitude is {magnitude}; expected 0 to 30")
    for site in random.sites(keys, operations):
        which_key, sign_key = random.sites(site, 2)
        which = randint(which_key, (), 0, len(OPERATIONS))
        sign = torch.where(bernoulli(sign_key, 0.5, ()), 1.0, -1.0)
        for number, (f, amount, signed) in enumerate(OPERATIONS.values()):
            strength = amount(magnitude / 30)
            images = _apply(which == number, f, images, sign * strength if signed else torch.full_like(sign, strength))
    return images


def _apply(chosen: Tensor, f: Callable[[Tensor, Tensor], Tensor], images: Tensor, amount: Tensor) -> Tensor:
    """f on the chosen images alone. chosen, amount: (N,)."""
    places = chosen.nonzero()[:, 0]
    return images.index_copy(0, places, f(images[places], amount[places].to(images))) if len(places) else images


def _column(x: Tensor) -> Tensor:
    """(N,) beside (N, channels, height, width)."""
    return x.reshape(-1, 1, 1, 1)


# Mixtures of two images.


def mixup(key: Tensor, images: Tensor, targets: Tensor, alpha: float = 0.2) -> tuple[Tensor, Tensor]:
    """λ x_i + (1 - λ) x_j and the same of the targets, j the example before i, λ ~ Beta(alpha, alpha) (Zhang et al.
    2018, arXiv:1710.09412).

    Args:
        key: (2,).
        targets: (N, classes), probabilities.
    """
    share = beta(key, alpha).to(images)
    return torch.lerp(images.roll(1, 0), images, share), torch.lerp(targets.roll(1, 0), targets, share.to(targets))


def cutmix(key: Tensor, images: Tensor, targets: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """A rectangle out of the example before; targets mixed by the areas (Yun et al. 2019, arXiv:1905.04899).

    Arguments as in `mixup`: the share of the area that stays is Beta(alpha, alpha), before the rectangle is cut at the
    image's border.
    """
    share_key, place_key = random.split(key)
    height, width = images.shape[2:]
    side = (1 - beta(share_key, alpha)).sqrt().to(images)
    middle = uniform(place_key, (2,))
    size = torch.tensor([height, width], dtype=images.dtype, device=images.device)
    start = (middle * size - side * size / 2).round().clamp(min=0)
    end = torch.minimum((middle * size + side * size / 2).round(), size)
    inside = _inside(torch.cat([start, end - start])[None], height, width)
    share = 1 - (end - start).prod() / (height * width)
    return torch.where(inside, images.roll(1, 0), images), torch.lerp(targets.roll(1, 0), targets, share.to(targets))


def beta(key: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha), 0-D float64, by the inverse of its distribution function."""
    from scipy.special import betaincinv

    if not alpha > 0:
        raise ValueError(f"beta: alpha is {alpha}; expected a positive number")
    unit = uniform(key, (), torch.float64)
    return torch.tensor(np.float64(betaincinv(alpha, alpha, float(unit))), device=key.device)
