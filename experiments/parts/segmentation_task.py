"""Data and losses of `experiments/segment.py`: batches of generated scenes, or of folders of pictures with masks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random, tree
from experiments.parts.segmenter import Trained, normalised
from nets.classifiers.by_name import weighted_logits
from train.data import DataError
from train.data.images import arrays, mask_sets
from train.data.images.mask_sets import MaskSet, Segmented
from train.data.images.masks import VOID, Table
from train.data.images.scenes import Scenes, scenes
from train.data.images.windows import Changes, windows
from train.losses import dense
from train.losses.weighted import WeightedLoss, positive

SCENES = Table(("background", *map(str, range(10))), {i: i for i in range(11)}, False)
SAMPLE = 200
"""Generated scenes to test on, and as many to measure means and baselines on."""


DIGITS = 8
"""Digits of a scene, at most; those that find no room are left out."""
SMALLEST, LARGEST = 14, 24
"""Pixels per side of a digit."""


class Source(NamedTuple):
    """`batch(key, step)` gives images (batch, 3, side, side), bytes or floats in [0, 1], and masks (batch, side, side)
    uint8; `data.train` of generated scenes is a sample."""

    data: MaskSet
    facts: dict[str, Any]
    batch: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    per_epoch: int


def _segmented(samples: Scenes) -> Segmented:
    images = (255 * samples.images).round().byte()
    return Segmented(tuple(images), tuple(samples.masks.byte()), ())


def generated(args: Any) -> Source:
    """Scenes of scikit-learn's digits; those of the test scenes are not among the others. Raises DataError."""
    if args.size < LARGEST:
        raise DataError(f"--size is {args.size}; expected at least {LARGEST}, the largest digit of the scenes")
    digits, others = arrays.digits()
    keys = random.split(random.key(1), 2)
    sizes = {"side": args.size, "least": 3, "most": DIGITS, "sizes": (SMALLEST, LARGEST)}
    parts = [_segmented(scenes(k, SAMPLE, d, **sizes)) for k, d in zip(keys, (digits, others), strict=True)]
    data = MaskSet(*parts, SCENES, ("drawn as they are needed", "of digits not learned from"))
    facts = {"pictures": f"scenes of {args.size} x {args.size} pixels with 3 to {DIGITS} digits, {data.origin[0]}"}
    facts |= {"classes": list(SCENES.classes), "scenes to test on": f"{SAMPLE} {data.origin[1]}"}

    def batch(key: Tensor, step: int) -> tuple[Tensor, Tensor]:
        samples = scenes(random.fold_in(key, step), args.batch, digits, **sizes)
        return samples.images, samples.masks.byte()

    return Source(data, facts, batch, -(-SAMPLE // args.batch))


def source_of(args: Any) -> Source:
    """The data that the flags of segment.py name. Raises DataError."""
    if args.data == "scenes":
        return generated(args)
    data = mask_sets.open_masks(args.data, args.longest)
    changes = Changes(args.zoom, args.flip, args.turn, args.colour_jitter)

    def batch(key: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return windows(key, step, args.batch, args.size, data.train, changes)

    return Source(data, mask_sets.facts(data, args.data), batch, -(-len(data.train.images) // args.batch))


def batch_of(source: Source, keys: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step; of several members, with a key each (members, 2), stacked."""
    images, masks = zip(*(source.batch(key, step) for key in keys), strict=True)
    return (images[0], masks[0]) if len(keys) == 1 else (torch.stack(images), torch.stack(masks))


def means(part: Segmented) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each channel of all pixels, in [0, 1]."""
    pixels = torch.cat([image.flatten(1).double() / 255 for image in part.images], 1)  # (3, pixels)
    std, mean = torch.std_mean(pixels, 1)
    return tuple(mean.tolist()), tuple(std.clamp(min=1e-3).tolist())


def _each(loss: WeightedLoss) -> Tensor:
    """(batch,): the mean over the pixels of each picture."""
    return loss.values / positive(loss.weights)


def _region(loss: Callable, logits: Tensor, labels: Tensor, weight: Tensor | None, share: float = 0.0) -> WeightedLoss:
    """A loss of regions plus `share` of the cross-entropy, both per picture."""
    values = loss(logits, labels, ignore_id=VOID)
    if share:
        values = values + share * _each(dense.pixel_cross_entropy(logits, labels, weight=weight, ignore_id=VOID))
    return WeightedLoss(values, torch.ones_like(values))


def _focal(logits: Tensor, labels: Tensor, weight: Tensor | None) -> WeightedLoss:
    return dense.focal(logits, labels, ignore_id=VOID)


def _cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None) -> WeightedLoss:
    return dense.pixel_cross_entropy(logits, labels, weight=weight, ignore_id=VOID)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], WeightedLoss]] = {
    "cross-entropy": _cross_entropy,
    "focal": _focal,
    "dice": partial(_region, dense.dice),
    "lovasz": partial(_region, dense.lovasz),
    "cross-entropy+dice": partial(_region, dense.dice, share=1.0),
    "cross-entropy+lovasz": partial(_region, dense.lovasz, share=1.0),
}


@dataclass(frozen=True)
class Loss:
    """The loss of a batch (images, masks), as `train.step.make_step` takes it."""

    net: ModuleType
    cfg: Any
    trained: Trained
    name: str
    weight: Tensor | None
    dtype: torch.dtype

    def __call__(self, params: tree.Tree, batch: tuple[Tensor, Tensor], keys: Tensor):
        pixels, masks = batch
        labels = masks.long()
        x = normalised(pixels, self.trained).to(self.dtype)
        heads = weighted_logits(self.net, self.net.apply(params, x, self.cfg, key=keys, train=True))
        losses = [(share, LOSSES[self.name](logits, labels, self.weight)) for share, logits in heads]
        value = WeightedLoss(sum(share * loss.values for share, loss in losses), losses[0][1].weights)
        hits, valid = heads[0][1].detach().argmax(1) == labels, labels != VOID  # each (batch, side, side)
        return value, {"accuracy": WeightedLoss((hits & valid).flatten(1).sum(1), valid.flatten(1).sum(1))}
