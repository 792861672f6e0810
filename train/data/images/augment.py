"""Augmentation: random changes of images as functions of explicit keys.

Images are (N, channels, height, width) in [0, 1], keys (N, 2), one per example: the result for an image depends on its
key alone, not on its batch, so a resumed run sees the same pictures. With
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
    """Random horizontal flips."""
    mirrored = bernoulli(keys, probability, ()).long()  # (N,)
    example = torch.arange(len(images), device=images.device)
    # Three times as fast as torch.where for bytes.
    return torch.cat([images, images.flip(-1)]).index_select(0, example + len(images) * mirrored)


def crop(keys: Tensor, images: Tensor, padding: int, fill: float = 0.0) -> Tensor:
    """A window of the images' size anywhere in the padded images (He et al. 2016, section 4.2: 4 pixels on CIFAR)."""
    height, width = images.shape[2:]
    padded = F.pad(images, (padding,) * 4, value=fill)  # (N, channels, height + 2 padding, width + 2 padding)
    start = randint(keys, (2,), 0, 2 * padding + 1).long()
    rows = start[:, 0, None] + torch.arange(height, device=images.device)  # (N, height)
    columns = start[:, 1, None] + torch.arange(width, device=images.device)  # (N, width)
    example = torch.arange(len(images), device=images.device)[:, None, None]
    window = padded.movedim(1, -1)[example, rows[:, :, None], columns[:, None, :]]  # (N, height, width, channels)
    return window.movedim(-1, 1)  # (N, channels, height, width)


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
        height, width: sizes of the images; numbers, or (N,) where they differ.
        scale: range of the rectangle's area, as a share of the image's.
        ratio: range of width / height.
        attempts: number of random rectangles per image, of which the first that fits is used.

    Returns:
        (N, 4) top, left, height, width in whole pixels, and (N,) True where one fits; where none does, it is the
        largest one of an allowed ratio in the middle.
    """
    height, width = (torch.as_tensor(x, device=keys.device, dtype=torch.float32) for x in (height, width))
    return rectangles(torch, *rectangle_draws(keys, scale, ratio, attempts), height, width, ratio)


def rectangle_draws(
    keys: Tensor, scale: tuple[float, float], ratio: tuple[float, float], attempts: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """The random numbers of each of the `boxes`, before the image's size is known: share of the area and width /
    height (N, attempts), position (N, 2); see `rectangles`."""
    size_key, position_key = random.sites(keys, 2)
    share, quotient = uniform(size_key, (attempts, 2)).unbind(-1)  # each (N, attempts)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    quotient = (low + (high - low) * quotient).exp()
    return scale[0] + (scale[1] - scale[0]) * share, quotient, uniform(position_key, (2,))


def resized_crop(keys: Tensor, images: Tensor, size: int | tuple[int, int], **options) -> Tensor:
    """A random rectangle of each image, scaled to `size` (height, width), bilinear. Options as in `boxes`."""
    height, width = images.shape[2:]
    top, left, tall, wide = boxes(keys, height, width, **options)[0].unbind(-1)
    out = (size, size) if isinstance(size, int) else size
    rows = _positions(top, tall, out[0]).clamp(max=height - 1)  # (N, out height)
    columns = _positions(left, wide, out[1]).clamp(max=width - 1)  # (N, out width)
    x, y = (2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1
    grid = torch.stack([x[:, None, :].expand(-1, *out), y[:, :, None].expand(-1, *out)], -1)  # (N, *out, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _positions(start: Tensor, length: Tensor, count: int) -> Tensor:
    """(N, count): the middles of `count` equal parts of [start, start + length); pixels count from their middle."""
    parts = (torch.arange(count, device=start.device) + 0.5) / count
    inside = length[:, None] * parts - 0.5  # (N, count)
    return start[:, None] + torch.minimum(inside.clamp(min=0), length[:, None] - 1)


def erase(
    keys: Tensor,
    images: Tensor,
    probability: float = 0.25,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    value: float | Tensor = 0.0,
) -> Tensor:
    """Random erasing: a random rectangle painted over (Zhong et al. 2020, arXiv:1708.04896).

    Args:
        probability: probability of an image to be painted over.
        value: one for all, or (channels, 1, 1).
    """
    event_key, box_key = random.sites(keys, 2)
    height, width = images.shape[2:]
    box, fits = boxes(box_key, height, width, scale, ratio)
    inside = _inside(box, height, width) & column(fits & bernoulli(event_key, probability, ()))
    return torch.where(inside, value, images)


def _inside(box: Tensor, height: int, width: int) -> Tensor:
    """(N, 1, height, width): True for the pixels in each rectangle. box: (N, 4)."""
    top, left, tall, wide = (part[:, None] for part in box.unbind(-1))
    row = torch.arange(height, device=box.device)
    column = torch.arange(width, device=box.device)
    rows, columns = (row >= top) & (row < top + tall), (column >= left) & (column < left + wide)
    return (rows[:, :, None] & columns[:, None, :])[:, None]  # (N, 1, height, width)


# RandAugment.


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Affine maps: matrix (N, 2, 3) takes a position in the result, in pixels from the middle, to one in the image;
    outside is 0."""
    height, width = images.shape[2:]
    unit = torch.tensor([width, height], dtype=images.dtype, device=images.device) / 2
    scaled = matrix * torch.cat([unit, unit.new_ones(1)]) / unit[:, None]  # (N, 2, 3) in units of half the image
    grid = F.affine_grid(scaled, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> Tensor:
    return torch.stack([torch.stack([a, b, c], -1), torch.stack([d, e, f], -1)], -2)  # (N, 2, 3)


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


# (function, its amount at strength m in [0, 1], True for a random sign of the amount), as in torchvision.
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
    """RandAugment (Cubuk et al. 2020, arXiv:1909.13719): `operations` random changes of `OPERATIONS` one after the
    other, of the strength magnitude / 30."""
    if not 0 <= magnitude <= 30:
        raise ValueError(f"rand_augment: magnitude is {magnitude}; expected 0 to 30")
    for site in random.sites(keys, operations):
        operation_key, sign_key = random.sites(site, 2)
        operation = randint(operation_key, (), 0, len(OPERATIONS))  # (N,)
        sign = torch.where(bernoulli(sign_key, 0.5, ()), 1.0, -1.0)  # (N,)
        for number, (f, amount, signed) in enumerate(OPERATIONS.values()):
            strength = amount(magnitude / 30)
            amounts = sign * strength if signed else torch.full_like(sign, strength)
            images = apply_to(operation == number, f, images, amounts)
    return images


# Mixtures of two images.


def mixup(key: Tensor, images: Tensor, targets: Tensor, alpha: float = 0.2) -> tuple[Tensor, Tensor]:
    """Mixup: λ x_i + (1 - λ) x_j and the same of the targets, j the example before i, λ ~ Beta(alpha, alpha) (Zhang et
    al. 2018, arXiv:1710.09412).

    Args:
        key: (2,).
        targets: (N, classes), probabilities.
    """
    share = beta(key, alpha).to(images)
    return torch.lerp(images.roll(1, 0), images, share), torch.lerp(targets.roll(1, 0), targets, share.to(targets))


def cutmix(key: Tensor, images: Tensor, targets: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """CutMix: a rectangle out of the example before, targets mixed by the areas (Yun et al. 2019, arXiv:1905.04899).

    Arguments as in `mixup`: the share of the area that stays is Beta(alpha, alpha), before the rectangle is cut at the
    image's border.
    """
    share_key, position_key = random.split(key)
    height, width = images.shape[2:]
    side = (1 - beta(share_key, alpha)).sqrt().to(images)  # (1 - λ)^(1/2) of height and width
    middle = uniform(position_key, (2,))
    size = torch.tensor([height, width], dtype=images.dtype, device=images.device)
    start = (middle * size - side * size / 2).round().clamp(min=0)
    end = torch.minimum((middle * size + side * size / 2).round(), size)
    inside = _inside(torch.cat([start, end - start])[None], height, width)
    share = 1 - (end - start).prod() / (height * width)
    return torch.where(inside, images.roll(1, 0), images), torch.lerp(targets.roll(1, 0), targets, share.to(targets))


def beta(key: Tensor, alpha: float) -> Tensor:
    """A sample of Beta(alpha, alpha), 0-D float64, by the inverse of its distribution function."""
    from scipy.special import betaincinv

    if not alpha > 0:
        raise ValueError(f"beta: alpha is {alpha}; expected a positive number")
    unit = uniform(key, (), torch.float64)
    return torch.tensor(np.float64(betaincinv(alpha, alpha, float(unit))), device=key.device)


class Changes(NamedTuple):
    """The random changes of the images of a batch, in this order; 0 and False are none."""

    crop: int = 0
    """Largest shift in pixels; the border is black."""
    flip: bool = False
    """Random horizontal flips."""
    colour_jitter: float = 0.0
    """Largest factor of change of brightness, contrast and saturation; hue turns by up to a quarter of it."""
    rand_augment: int = 0
    """Magnitude of two operations of RandAugment."""
    erase: float = 0.0
    """Probability of random erasing, in the mean colour."""
    mixup: float = 0.0
    """Alpha of mixup; with `cutmix` too, each batch is mixed one way or the other."""
    cutmix: float = 0.0
    """Alpha of CutMix."""


def unit(images: Tensor) -> Tensor:
    """Bytes scaled to [0, 1]; other images as they are."""
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images


def changed(
    key: Tensor, images: Tensor, labels: Tensor, changes: Changes, classes: int, mean: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """A training batch after all changes, images and labels; a function of the key alone.

    Args:
        key: (2,).
        images: as above, or bytes, which stay bytes if pixels are only moved.
        labels: (N,) integers; if the images are mixed they come back as probabilities (N, classes).
        mean: mean of each channel, in [0, 1], by which images are normalised later.
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
    coin, mix = random.split(mix)
    targets = F.one_hot(labels, classes).to(images)  # (N, classes)
    if changes.cutmix and (not changes.mixup or bool(bernoulli(coin, 0.5, ()))):
        return cutmix(mix, images, targets, changes.cutmix)
    return mixup(mix, images, targets, changes.mixup)
