"""Random changes of images, as functions of explicit keys.

Images are (N, channels, height, width) in [0, 1], keys (N, 2), one an example: what happens to an image is a function
of its key alone, whatever batch it is in, so a resumed run sees the same pictures. With
`keys = random.sites(random.fold_in(key, step), N)` it is a function of key and step. `mixup` and `cutmix` take one key,
since they mix the images of a batch.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core import random
from core.random import bernoulli, randint, uniform
from train.data.images import colours
from train.data.images.colours import apply_to, column
from train.data.images.rectangles import rectangles


def flip(keys: Tensor, images: Tensor, probability: float = 0.5) -> Tensor:
    """Left and right changed over, with the given chance."""
    chosen = bernoulli(keys, probability, ()).long()
    count = torch.arange(len(images), device=images.device)
    # Three times as fast as torch.where for bytes.
    return torch.cat([images, images.flip(-1)]).index_select(0, count + len(images) * chosen)


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
    height, width = (torch.as_tensor(x, device=keys.device, dtype=torch.float32) for x in (height, width))
    return rectangles(torch, *rectangle_draws(keys, scale, ratio, attempts), height, width, ratio)


def rectangle_draws(
    keys: Tensor, scale: tuple[float, float], ratio: tuple[float, float], attempts: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """What chance says of each of the `boxes`, before the image's size is known: share of the area and width / height
    (N, attempts), place (N, 2); see `rectangles`."""
    size_key, place_key = random.sites(keys, 2)
    share, quotient = uniform(size_key, (attempts, 2)).unbind(-1)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    quotient = (low + (high - low) * quotient).exp()
    return scale[0] + (scale[1] - scale[0]) * share, quotient, uniform(place_key, (2,))


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
    value: float | Tensor = 0.0,
) -> Tensor:
    """A random rectangle painted over, with the given chance (Zhong et al. 2020, arXiv:1708.04896).

    value: one for all, or (channels, 1, 1).
    """
    whether, where = random.sites(keys, 2)
    height, width = images.shape[2:]
    box, found = boxes(where, height, width, scale, ratio)
    inside = _inside(box, height, width) & column(found & bernoulli(whether, probability, ()))
    return torch.where(inside, value, images)


def _inside(box: Tensor, height: int, width: int) -> Tensor:
    """(N, 1, height, width): which pixels lie in each rectangle. box: (N, 4)."""
    top, left, tall, wide = (part[:, None] for part in box.unbind(-1))
    row = torch.arange(height, device=box.device)
    column = torch.arange(width, device=box.device)
    rows, columns = (row >= top) & (row < top + tall), (column >= left) & (column < left + wide)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


# RandAugment.


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
    "brightness": (_by_factor(colours.brightness), lambda m: 0.9 * m, True),
    "saturation": (_by_factor(colours.saturation), lambda m: 0.9 * m, True),
    "contrast": (_by_factor(colours.contrast), lambda m: 0.9 * m, True),
    "sharpness": (_by_factor(colours.sharpness), lambda m: 0.9 * m, True),
    "posterize": (colours.posterize, lambda m: 8 - round(4 * m), False),
    "solarize": (colours.solarize, lambda m: 1 - m, False),
    "autocontrast": (colours.autocontrast, lambda m: 0.0, False),
    "equalize": (colours.equalize, lambda m: 0.0, False),
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
            images = apply_to(
                which == number, f, images, sign * strength if signed else torch.full_like(sign, strength)
            )
    return images


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


class Changes(NamedTuple):
    """Which random changes the images of a batch undergo, in this order; 0 and False are none."""

    crop: int = 0
    """Shifted by up to this many pixels, black behind."""
    flip: bool = False
    colour_jitter: float = 0.0
    """Brightness, contrast and saturation change by up to this factor, hue by a quarter of it."""
    rand_augment: int = 0
    """The strength of two changes."""
    erase: float = 0.0
    """The chance of a rectangle in the mean colour."""
    mixup: float = 0.0
    """Alpha; with `cutmix` too, each batch is mixed one way or the other."""
    cutmix: float = 0.0


def unit(images: Tensor) -> Tensor:
    """Bytes as numbers in [0, 1]; other images as they are."""
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images


def changed(
    key: Tensor, images: Tensor, labels: Tensor, changes: Changes, classes: int, mean: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """A batch to learn from: the images changed, and their labels; a function of the key alone.

    Args:
        key: (2,).
        images: as above, or bytes, which they stay if pixels are only moved.
        labels: (N,) integers; if the images are mixed they come back as probabilities (N, classes).
        mean: of each channel, in [0, 1]: what images are normalised with later.
    """
    *single, mix = random.sites(key, 6)
    keys = [random.sites(site, len(images)) for site in single]
    if changes.crop:
        images = crop(keys[0], images, changes.crop)
    if changes.flip:
        images = flip(keys[1], images)
    if any(changes[2:]):
        images = unit(images)
    if changes.colour_jitter:
        by = changes.colour_jitter
        images = colours.colour_jitter(keys[2], images, by, by, by, by / 4)
    if changes.rand_augment:
        images = rand_augment(keys[3], images, magnitude=changes.rand_augment)
    if changes.erase:
        images = erase(keys[4], images, changes.erase, value=images.new_tensor(mean)[:, None, None])
    if not changes.mixup and not changes.cutmix:
        return images, labels
    which, mix = random.split(mix)
    targets = F.one_hot(labels, classes).to(images)
    if changes.cutmix and (not changes.mixup or bool(bernoulli(which, 0.5, ()))):
        return cutmix(mix, images, targets, changes.cutmix)
    return mixup(mix, images, targets, changes.mixup)
