"""Parts of vae.py and vqvae.py: their images, and a trained autoencoder as functions of batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random
from train.data import batching
from train.data.images import sets as image_sets
from train.data.images.arrays import Labelled
from train.data.images.sets import ImageSet
from train.losses import variational


class Autoencoder(NamedTuple):
    """A trained autoencoder as functions; labels (N,) have no effect on nets without classes.

    encode: (images (N, channels, height, width), labels) -> codes (N, ...); a point between two codes is a code.
    decode: (codes, labels) -> expected pixels (N, channels, height, width).
    sample: (key (2,), labels, temperature) -> one image per label; None if there is no prior.
    corrupt: (images, keys (N, 2)) -> the images that the encoder sees; None if it sees them as they are.
    conditional: whether a sample can be of a class.
    """

    encode: Callable[[Tensor, Tensor], Tensor]
    decode: Callable[[Tensor, Tensor], Tensor]
    classes: tuple[str, ...]
    conditional: bool
    sample: Callable[[Tensor, Tensor, float], Tensor] | None = None
    corrupt: Callable[[Tensor, Tensor], Tensor] | None = None


def read(args: Any, labelled: bool) -> ImageSet:
    """The images of `--data` and `--size`. Raises ValueError if they are too few for a batch, or for the pictures."""
    images = image_sets.read_all(args.data, args.size, labelled=labelled)
    if args.batch > len(images.train.labels):
        raise ValueError(f"--batch is {args.batch}, but there are {len(images.train.labels)} images")
    if len(images.test.labels) < 3:
        count = f"'{args.data}' has {len(images.test.labels)} images to test on"
        raise ValueError(f"{count}; expected at least 3, for the pictures of the codes")
    return images


def style(side: int) -> str:
    """The presets that fit images of `side` pixels per side: digits, mnist or small (coloured ones)."""
    return "digits" if side < 16 else "mnist" if side <= 28 else "small"


def expected_images(words: dict[str, str]) -> tuple[str, bool]:
    """(style, whether they are grey) of the images that `--data` and `--size` name, before any is read."""
    kind = image_sets.kind_of(words.get("data", "digits"))
    side = words.get("size", "")
    side = int(side) if side.isdecimal() else {"digits": 8, "mnist": 28, "cifar10": 32}.get(kind, 64)
    return style(side), kind in ("digits", "mnist")


@torch.no_grad()
def in_parts(f: Callable[..., Tensor], *inputs: Tensor, size: int = 256) -> Tensor:
    """f of tensors (N, ...), `size` rows at a time."""
    return torch.cat([f(*(x[part] for x in inputs)) for part in batching.evaluation_batches(len(inputs[0]), size)])


@torch.no_grad()
def averages(per_image: Callable[..., dict[str, Tensor]], test: Labelled, key: Tensor) -> dict[str, float]:
    """Means over the test images of `per_image(images, labels, keys (N, 2)) -> {name: (N,)}`."""
    total, keys = {}, random.sites(key, len(test.labels))
    for part in batching.evaluation_batches(len(test.labels), 500):
        for name, values in per_image(test.images[part], test.labels[part], keys[part]).items():
            total[name] = total.get(name, 0.0) + float(values.double().sum())
    return {name: value / len(test.labels) for name, value in total.items()}


def mean_image_error(train: Labelled, test: Labelled) -> float:
    """Squared error per pixel of the mean training image in place of a reconstruction."""
    return float(variational.squared_error(train.images.mean(0).expand_as(test.images), test.images).mean())


def every_class(model: Autoencoder, count: int, device: torch.device) -> Tensor:
    """Labels (count,): each class in turn."""
    return torch.arange(count, device=device) % max(len(model.classes), 1)
