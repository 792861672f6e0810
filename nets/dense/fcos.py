"""FCOS: every place of a feature map predicts a class, the box around it, and how central it is in it.

Tian et al. 2019, "FCOS: Fully Convolutional One-Stage Object Detection" (arXiv:1904.01355), on a ResNet with a feature
pyramid (Lin et al. 2017, arXiv:1612.03144). With the stride s of a level, at its place (x, y):

    p = sigmoid(classes);   l, t, r, b = s relu(distances);   box = (x - l, y - t, x + r, y + b)
    score = sqrt(p sigmoid(centreness))

Its losses are `train.losses.detection`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from core import boxes, initializers
from core.layers import conv, conv_spec, group_norm, group_norm_spec, upsample_nearest
from core.tree import Tree
from nets.blocks.conv_norm import fill_published
from nets.blocks.residual_stages import Stages, stage_maps, stage_names, stages_spec
from nets.weights import Rename, read

SMALL = initializers.normal(0.01)
START = 2.0
"""Distances at first, in strides: a side that is 0 for all pictures has no gradient by its relu, and stays so."""
RESNET50 = Stages((3, 4, 6, 3), "bottleneck")


@dataclass(frozen=True)
class Config:
    """Sizes of FCOS, and the limits on its detections."""

    classes: int = 91
    backbone: Stages = RESNET50
    """Stages of the ResNet."""
    first: int = 1
    """Stage of the ResNet, from 0, that the finest level of the pyramid is made of."""
    extra: int = 2
    """Levels above those of the stages, each of half the size."""
    width: int = 256
    """Channels of the pyramid and the heads."""
    convolutions: int = 4
    """Convolutions of each head before its outputs."""
    groups: int = 32
    """Groups of the heads' norms."""
    offset: float = 0.5
    """Position of a place in its square of s pixels: 0.5 for the middle (the paper), 0 for the corner (torchvision)."""
    prior: float = 0.01
    """Initial probability of each class."""
    frozen_norms: bool = False
    """The ResNet's batch norms use their running statistics in training too, for small batches."""

    def __post_init__(self):
        for name in ("classes", "width", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"fcos: {name} is {getattr(self, name)}; expected at least 1")
        for name in ("first", "extra", "convolutions"):
            if getattr(self, name) < 0:
                raise ValueError(f"fcos: {name} is {getattr(self, name)}; expected at least 0")
        if self.first >= len(self.backbone.depths):
            raise ValueError(f"fcos: first is {self.first}; expected one of the {len(self.backbone.depths)} stages")
        if self.width % self.groups:
            raise ValueError(f"fcos: width {self.width} is not divisible by {self.groups} groups")
        if not 0.0 < self.prior < 1.0:
            raise ValueError(f"fcos: prior is {self.prior}; expected a probability between 0 and 1")

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between the places of each level."""
        start = 4 if self.backbone.stem == "imagenet" else 1
        return tuple(start * 2**s for s in range(self.first, len(self.backbone.depths) + self.extra))


PRESETS = {
    "resnet50": Config(),
    "resnet18": Config(backbone=Stages()),
    "medium": Config(10, Stages((2, 2, 2, 2), width=32), width=64, convolutions=2, groups=8, extra=1),
    "small": Config(
        10, Stages((1, 1, 1), width=32, stem="cifar"), first=2, extra=1, width=64, convolutions=2, groups=8
    ),
}
"""resnet50: torchvision's fcos_resnet50_fpn. medium: a few hundred pictures of 256 pixels. small: scenes of digits."""


def _head_spec(cfg: Config, outputs: dict[str, tuple[int, float]]) -> Tree:
    """A tower of convolutions and norms, and convolutions to outputs, {name: (channels, initial bias)}."""

    def convolution(d_out: int, bias: float = 0.0) -> Tree:
        return conv_spec(cfg.width, d_out, 3, init=SMALL, bias_init=initializers.constant(bias))

    tower = [{"conv": convolution(cfg.width), "norm": group_norm_spec(cfg.width)}] * cfg.convolutions
    return {**{name: convolution(*sizes) for name, sizes in sorted(outputs.items())}, "tower": tower}


def spec(cfg: Config) -> Tree:
    """`backbone`, `pyramid` (lateral, smooth, extra) and the heads `classification` and `regression`."""
    stages = range(cfg.first, len(cfg.backbone.depths))
    channels = [cfg.backbone.outputs(s) for s in stages]
    init = initializers.kaiming_uniform(a=1.0)
    logit = torch.tensor(cfg.prior).double().logit().item()
    return {
        "backbone": stages_spec(cfg.backbone),
        "classification": _head_spec(cfg, {"logits": (cfg.classes, logit)}),
        "pyramid": {
            "extra": [conv_spec(cfg.width, cfg.width, 3, init=init)] * cfg.extra,
            "lateral": [conv_spec(d, cfg.width, 1, init=init) for d in channels],
            "smooth": [conv_spec(cfg.width, cfg.width, 3, init=init)] * len(channels),
        },
        "regression": _head_spec(cfg, {"centreness": (1, 0.0), "distances": (4, START)}),
    }


def pyramid(params: Tree, x: Tensor, cfg: Config, *, train: bool = False) -> list[Tensor]:
    """Feature maps of each level, the finest first: (batch, width, height / stride, width / stride), rounded up."""
    maps = stage_maps(params["backbone"], x, cfg.backbone, train=train and not cfg.frozen_norms)
    p, levels, above = params["pyramid"], [], None
    parts = list(zip(p["lateral"], p["smooth"], maps[1 + cfg.first :], strict=True))
    for lateral, smooth, features in reversed(parts):
        inner = conv(lateral, features)  # (batch, width, h, w)
        if above is not None:
            inner = inner + upsample_nearest(above)[:, :, : inner.shape[2], : inner.shape[3]]  # stages round up
        above = inner
        levels.insert(0, conv(smooth, inner, padding=1))
    for i, one in enumerate(p["extra"]):
        levels.append(conv(one, levels[-1].relu() if i else levels[-1], stride=2, padding=1))
    return levels


def _tower(p: Tree, x: Tensor, cfg: Config) -> Tensor:
    for one in p["tower"]:
        x = group_norm(one["norm"], conv(one["conv"], x, padding=1), cfg.groups).relu()
    return x


def _flat(maps: list[Tensor]) -> Tensor:
    """(batch, channels, h, w) of each level -> (batch, places of all levels, channels)."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)


def apply(params: Tree, x: Tensor, cfg: Config, *, key: Tensor | None = None, train: bool = False) -> dict[str, Tensor]:
    """Predictions at every place.

    Args:
        x: (batch, channels, height, width).
        key: nothing is drawn; the argument is there as in other nets.

    Returns:
        logits (batch, places, classes); distances (batch, places, 4) to the left, top, right and bottom in units of the
        stride, not negative; centreness (batch, places), logits. `places` has where the places are.
    """
    levels = pyramid(params, x, cfg, train=train)
    classification = [_tower(params["classification"], level, cfg) for level in levels]
    regression = [_tower(params["regression"], level, cfg) for level in levels]

    def outputs(head: str, name: str, towers: list[Tensor]) -> Tensor:
        return _flat([conv(params[head][name], y, padding=1) for y in towers])

    return {
        "centreness": outputs("regression", "centreness", regression)[..., 0],
        "distances": outputs("regression", "distances", regression).relu(),
        "logits": outputs("classification", "logits", classification),
    }


class Places(NamedTuple):
    """centres (places, 2), x and y in pixels; strides (places,); levels (places,), from 0."""

    centres: Tensor
    strides: Tensor
    levels: Tensor


def places(cfg: Config, height: int, width: int, device: torch.device | str | None = None) -> Places:
    """The places of images of a size, in the order of `apply`.

    Strides are those of the levels, whatever the size; torchvision rounds them where the size is no multiple of the
    largest.
    """
    centres, strides, levels = [], [], []
    for level, stride in enumerate(cfg.strides):
        rows, columns = -(-height // stride), -(-width // stride)
        y = (torch.arange(rows, device=device) + cfg.offset) * stride
        x = (torch.arange(columns, device=device) + cfg.offset) * stride
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)  # (rows * columns, 2)
        centres.append(grid.float())
        strides.append(torch.full((len(grid),), float(stride), device=device))
        levels.append(torch.full((len(grid),), level, device=device))
    return Places(torch.cat(centres), torch.cat(strides), torch.cat(levels))


def decode(distances: Tensor, at: Places) -> Tensor:
    """Boxes in pixels: distances (..., places, 4) in units of the stride -> (..., places, 4)."""
    far = distances * at.strides[:, None]
    return torch.cat([at.centres - far[..., :2], at.centres + far[..., 2:]], -1)


class Detections(NamedTuple):
    """Objects in one image, by descending score: boxes (count, 4) in pixels, scores and labels (count,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@torch.no_grad()
def detect(
    params: Tree,
    x: Tensor,
    cfg: Config,
    *,
    score: float = 0.2,
    threshold: float = 0.6,
    candidates: int = 1000,
    most: int = 100,
) -> list[Detections]:
    """Objects in each image.

    Args:
        x: (batch, channels, height, width).
        score: boxes need a higher one.
        threshold: IoU from which on boxes of a class suppress each other.
        candidates: best boxes of each level that are compared, at most.
        most: objects per image, at most.
    """
    out, (height, width) = apply(params, x, cfg), x.shape[2:]
    at = places(cfg, height, width, x.device)
    scores = (out["logits"].sigmoid() * out["centreness"].sigmoid()[..., None]).sqrt()  # (batch, places, classes)
    frames = boxes.clip(decode(out["distances"], at), height, width)  # (batch, places, 4)
    return [
        _select(*one, at.levels, cfg, score, threshold, candidates, most) for one in zip(scores, frames, strict=True)
    ]


def _select(
    scores: Tensor,
    frames: Tensor,
    levels: Tensor,
    cfg: Config,
    score: float,
    threshold: float,
    candidates: int,
    most: int,
) -> Detections:
    """Detections of one image: scores (places, classes), frames (places, 4)."""
    best, rows, classes = [], [], []
    for level in range(len(cfg.strides)):
        where, kinds = ((scores > score) & (levels == level)[:, None]).nonzero(as_tuple=True)
        values = scores[where, kinds]
        order = values.argsort(descending=True, stable=True)[:candidates]
        best.append(values[order])
        rows.append(where[order])
        classes.append(kinds[order])
    values, where, kinds = torch.cat(best), torch.cat(rows), torch.cat(classes)
    stays = boxes.suppress(frames[where], values, kinds, threshold)[:most]
    return Detections(frames[where][stays], values[stays], kinds[stays])


def rename_table(cfg: Config) -> dict[str, Rename]:
    """Our names -> torchvision's fcos_resnet50_fpn."""
    table = stage_names(cfg.backbone, ours="backbone.", theirs="backbone.body.")
    heads = {"classification": ("classification_head", {"logits": "cls_logits"})}
    heads["regression"] = ("regression_head", {"centreness": "bbox_ctrness", "distances": "bbox_reg"})
    for part in ("bias", "weight"):
        for i in range(len(cfg.backbone.depths) - cfg.first):
            table[f"pyramid.lateral.{i}.{part}"] = Rename(f"backbone.fpn.inner_blocks.{i}.0.{part}")
            table[f"pyramid.smooth.{i}.{part}"] = Rename(f"backbone.fpn.layer_blocks.{i}.0.{part}")
        for i in range(cfg.extra):
            level = len(cfg.backbone.depths) + 2 + i
            table[f"pyramid.extra.{i}.{part}"] = Rename(f"backbone.fpn.extra_blocks.p{level}.{part}")
        for head, (theirs, outputs) in heads.items():
            for i in range(cfg.convolutions):
                table[f"{head}.tower.{i}.conv.{part}"] = Rename(f"head.{theirs}.conv.{3 * i}.{part}")
                table[f"{head}.tower.{i}.norm.{part}"] = Rename(f"head.{theirs}.conv.{3 * i + 1}.{part}")
            for ours, name in outputs.items():
                table[f"{head}.{ours}.{part}"] = Rename(f"head.{theirs}.{name}.{part}")
    return table


def from_published(state: dict[str, Tensor], cfg: Config, what: str = "FCOS weights") -> Tree:
    """Parameters and Stats from the tensors of torchvision's FCOS, whose norms count no batches.

    Raises:
        WeightsError: naming the first tensor that is missing, left over or misshapen.
    """
    return fill_published(spec(cfg), state, rename_table(cfg), what)


def from_pretrained(source: str, cfg: Config) -> Tree:
    """Parameters and Stats from torchvision's file: a local file or folder, or a hub repository."""
    return from_published(read(source, prefixes=("module.", "_orig_mod.")), cfg, source)
