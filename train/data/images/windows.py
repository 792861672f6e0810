"""Windows: batches of random crops of pictures with masks, of any sizes, as functions of key and step.

    images, masks = windows(key, step, 8, 128, part, Changes(flip=True))  # (8, 3, 128, 128), (8, 128, 128), bytes

Where a picture is smaller than the window, the rest is black and void.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import random
from train.data.batching import epoch_batch
from train.data.images import augment, colours
from train.data.images.mask_sets import Segmented
from train.data.images.masks import VOID


class Changes(NamedTuple):
    """Random changes of a window; 0 and False are none."""

    zoom: float = 0.0
    """Pictures are enlarged by a factor from 1 / (1 + zoom) to 1 + zoom, its logarithm uniform."""
    flip: bool = False
    """Horizontal flips."""
    turn: bool = False
    """Quarter turns and both flips, where a picture has no upper side: of microscopes, from above."""
    colour_jitter: float = 0.0
    """Largest factor of change of brightness, contrast and saturation; hue turns by up to a quarter of it."""


NO_CHANGES = Changes()


def windows(
    key: Tensor, step: int, batch: int, side: int, part: Segmented, changes: Changes = NO_CHANGES
) -> tuple[Tensor, Tensor]:
    """The batch of a step, a function of key and step.

    With `order, site = random.sites(key, 2)`, the pictures are `epoch_batch(order, step, ...)`; where there are fewer
    than the batch, each comes several times per epoch. The keys of the examples are
    `random.sites(random.fold_in(site, step), batch)`.

    Args:
        key: (2,).
        side: pixels per side.

    Returns:
        images (batch, 3, side, side), bytes or, if their colours change, floats in [0, 1]; masks (batch, side, side)
        uint8.
    """
    order, site = random.sites(key, 2)
    count = len(part.images)
    indices = epoch_batch(order, step, count * -(-batch // count), batch) % count
    keys = random.sites(random.fold_in(site, step), batch)  # (batch, 2)
    place_key, zoom_key, turn_key, colour_key = random.sites(keys, 4).unbind(0)
    reach = math.log1p(changes.zoom)
    sides = (side / random.uniform(zoom_key, (), minval=-reach, maxval=reach).exp()).round().clamp(min=1)  # (batch,)
    places = random.uniform(place_key, (2,))  # (batch, 2)
    quarters = random.randint(turn_key, (2,), 0, torch.tensor([4, 2]))  # (batch, 2): quarter turns, flips
    images, masks = [], []
    rows = zip(indices.tolist(), sides.long().tolist(), places.tolist(), quarters.tolist(), strict=True)
    for i, cut, place, (turns, flipped) in rows:
        image, mask = _window(part.images[i], part.masks[i], cut, place)
        if cut != side:
            image = F.interpolate(image[None].float(), (side, side), mode="bilinear", antialias=True)[0]
            image = image.round().clamp(0, 255).byte()
            mask = F.interpolate(mask[None, None], (side, side), mode="nearest-exact")[0, 0]
        if changes.turn:
            image, mask = image.rot90(turns, (1, 2)), mask.rot90(turns)
        if flipped and (changes.flip or changes.turn):
            image, mask = image.flip(-1), mask.flip(-1)
        images.append(image)
        masks.append(mask)
    pixels = torch.stack(images)
    if changes.colour_jitter:
        by = changes.colour_jitter
        pixels = colours.colour_jitter(colour_key, augment.unit(pixels), by, by, by, by / 4)
    return pixels, torch.stack(masks)


def _window(image: Tensor, mask: Tensor, side: int, place: list[float]) -> tuple[Tensor, Tensor]:
    """A square of a picture and its mask, padded where they are smaller. place: in [0, 1), within the room there is."""
    height, width = mask.shape
    below, beside = max(0, side - height), max(0, side - width)
    if below or beside:
        image = F.pad(image, (0, beside, 0, below))
        mask = F.pad(mask, (0, beside, 0, below), value=VOID)
    top, left = (int(share * (n - side + 1)) for share, n in zip(place, mask.shape, strict=True))
    return image[:, top : top + side, left : left + side], mask[top : top + side, left : left + side]
