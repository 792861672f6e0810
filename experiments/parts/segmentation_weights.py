"""Weights that `experiments/segment.py` starts from or predicts with: published files, classifiers, its own runs."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from core import random, spec, tree
from experiments.parts.classifier import is_run
from experiments.parts.segmenter import Segmenter, Trained, load
from nets.classifiers import torchvision_weights
from nets.classifiers.by_name import adopt
from nets.dense import by_name, fcn, unet
from nets.weights import WeightsError, read
from train.optimizers import Optimizer
from train.run import open_run
from train.step import TrainState, start

IMAGENET = torchvision_weights.IMAGENET["mean"], torchvision_weights.IMAGENET["std"]
PLAIN = (0.0,) * 3, (1.0,) * 3
"""Preparation of pictures for milesial's U-Net and TransUNet: numbers in [0, 1]."""


def preparation(net: ModuleType) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of the pictures of published weights."""
    return IMAGENET if hasattr(net, "AUX_WEIGHT") else PLAIN


def initial(source: str, name: str, net: ModuleType, cfg: Any, root: Path) -> tuple[Callable[[Tensor], tree.Tree], Any]:
    """(key -> values of the net, (mean, standard deviation) of its pictures) from `--weights`; heads for other classes
    are drawn from the key.

    Args:
        source: "published", a file or hub repository, of a ResNet too for the backbone, or a run of segment.py.
        name: the net's preset.
        root: folder of the runs.

    Raises ValueError: it is not there, or of another net.
    """
    model = net.spec(cfg)
    if is_run(source):
        own = load(open_run(Path(source), root), torch.device("cpu"))
        values = tree.map(lambda leaf: leaf[0], own.values) if own.trained.members > 1 else own.values
        prepared = own.trained.mean, own.trained.std
    elif source != "published" and hasattr(cfg, "backbone") and "fc.weight" in read(source):
        values, prepared = {"backbone": fcn.backbone_from_pretrained(source, cfg.backbone)}, IMAGENET
    else:
        values, _ = by_name.from_pretrained(name, None if source == "published" else source)
        prepared = preparation(net)

    def draw(key: Tensor) -> tree.Tree:
        moved = tree.move(values, key.device)
        return adopt(model, moved, key, f"--weights '{source}'")[0]

    draw(random.key(0))  # an error now, if they do not fit
    return draw, prepared


def state_from(
    key: Tensor, values: Callable[[Tensor], tree.Tree], model: tree.Tree, optimizer: Optimizer
) -> TrainState:
    """The state before the first step, as `train.step.create`, from given values."""
    init_key, run_key = random.split(key).unbind(0)
    return start(run_key, values(init_key), model, optimizer)


def prepared_before(folder: Path, root: Path, means: tuple) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of the pictures of a run that is resumed, which may have begun from weights; `means`
    without a checkpoint."""
    if not is_run(folder) or not any((folder / "checkpoints").iterdir()):
        return means
    trained = open_run(folder, root).read("trained", Trained)
    return tuple(trained.mean), tuple(trained.std)


def published(source: str, name: str, device: torch.device, longest: int | None) -> Segmenter:
    """The net of `--weights`, for `predict`. Raises ValueError: it is not there, or of another net."""
    if is_run(source):
        raise ValueError(f"--weights '{source}' is a run's folder; expected it as --run")
    net, _ = by_name.find(name)
    values, cfg = by_name.from_pretrained(name, None if source == "published" else source)
    classes = by_name.VOC if cfg.classes == 21 and net is not unet else tuple(map(str, range(cfg.classes)))
    classes = ("background", "object") if cfg.classes == 2 else classes
    if cfg.classes < 2:
        raise WeightsError(f"--weights '{source}' have one class; expected two, with that of the background")
    pairs = tuple((i, i) for i in range(len(classes)))
    trained = Trained(name, classes, pairs, False, *preparation(net), longest)
    spec.check(net.spec(cfg), values)
    return Segmenter(tree.move(values, device), net, cfg, trained)
