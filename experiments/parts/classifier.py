"""A classifier that `experiments/classify.py` has trained, to be used: for its own `evaluate` and `predict`, to begin a
finetuning from, or for what it sees in images (`features` of its net)."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core import tree
from nets.classifiers import by_name, torchvision_weights
from train.data import batching
from train.data.images import augment
from train.data.images import sets as image_sets
from train.data.images.arrays import Labelled
from train.data.images.files import Decoder, Files
from train.metrics import classification
from train.run import run as runs


@dataclass(frozen=True)
class Trained:
    """What a run needs to know of its net and images to be used later; the entry "trained" of its configuration."""

    net: str
    channels: int
    size: int
    resize: int
    """Pixels that the shorter side of a picture is scaled to; the middle of it is what the net sees."""
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    choices: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What is other in the net's Config than in the preset: weights of another library may want another padding."""
    averaged: bool = False
    """Whether the moving average of the parameters is what counts."""


def net_of(trained: Trained) -> tuple[ModuleType, Any]:
    """(module of nets, Config)."""
    sizes = {"channels": trained.channels, "classes": len(trained.classes), "size": trained.size}
    net, cfg = by_name.configured(trained.net, **sizes)
    return net, dataclasses.replace(cfg, **trained.choices)


def is_run(folder: str | Path) -> bool:
    return (Path(folder) / "checkpoints").is_dir()


def load(folder: Path) -> tuple[Trained, tree.Tree]:
    """What a run has learned: its net, and the values and Stats of its last checkpoint.

    Raises ValueError: there is no checkpoint, or it is of another experiment, or damaged.
    """
    trained = runs.read_config(folder, "trained", Trained)
    net, cfg = net_of(trained)
    return trained, runs.learned(folder, net.spec(cfg), averaged=trained.averaged)


def normalised(pixels: Tensor, trained: Trained) -> Tensor:
    """Bytes, or numbers in [0, 1], (batch, channels, size, size), as the net wants them."""
    return torchvision_weights.preprocess(augment.unit(pixels), trained)


@torch.no_grad()
def predictions(
    values: tree.Tree, trained: Trained, test: Labelled | Files, decoder: Decoder | None = None
) -> tuple[Tensor, Tensor]:
    """Log probabilities (images, classes) and labels (images,) of all images, on the CPU.

    decoder: for files.
    """
    net, cfg = net_of(trained)
    device = tree.leaves(values)[0].device
    found, labels = [], []
    for pixels, numbers in image_sets.test_batches(test, trained.size, trained.resize, decoder):
        logits = net.apply(values, normalised(pixels.to(device), trained), cfg)
        found.append(logits.float().log_softmax(-1).cpu())
        labels.append(numbers)
    return torch.cat(found), torch.cat(labels)


@torch.no_grad()
def features(values: tree.Tree, trained: Trained, pixels: Tensor) -> Tensor:
    """What the head of the net sees of images in [0, 1], (images, channels, height, width) -> (images, d), on the CPU.

    They are scaled to the size that the net has learned from.
    """
    net, cfg = net_of(trained)
    device, found = tree.leaves(values)[0].device, []
    for part in batching.evaluation_batches(len(pixels), image_sets.EVALUATED):
        x, size = pixels[part].to(device), (trained.size, trained.size)
        if tuple(x.shape[2:]) != size:
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        found.append(net.features(values, normalised(x, trained), cfg).cpu())
    return torch.cat(found)


def study(
    folder: Path, values: tree.Tree, trained: Trained, test: Labelled | Files, decoder: Decoder
) -> dict[str, float]:
    """The figures of the test images; `report.txt` and pictures go to the folder."""

    def pixels(chosen: Tensor) -> Tensor:
        return image_sets.some(test, chosen, trained.size, trained.resize, decoder)

    return classification.study(folder, values, *predictions(values, trained, test, decoder), trained.classes, pixels)
