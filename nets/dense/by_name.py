"""Segmentation nets by name: any preset of any family, fitted to the images and classes at hand.

    net, cfg = configured("unet-small", classes=11, size=64, width=12)
    params = spec.init(random.key(0), net.spec(cfg))
    logits = net.apply(params, images, cfg)  # (batch, classes, height, width)

A family is a module with `PRESETS`, `spec(cfg)` and `apply(params, x, cfg, *, key, train)`; with auxiliary heads, in
training, that gives a tuple, whose losses after the first are weighed by `AUX_WEIGHT`.
"""

import difflib
import math
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

from core.tree import Tree
from nets.blocks.conv_norm import fill_published
from nets.dense import deeplab, fcn, transunet, unet
from nets.weights import WeightsError, fetch, read

FAMILIES: dict[str, ModuleType] = {net.__name__.rpartition(".")[2]: net for net in (deeplab, fcn, transunet, unet)}


def find(name: str) -> tuple[ModuleType, Any]:
    """(module, Config) of a preset. Raises ValueError: no family has it; the message lists similar names."""
    for net in FAMILIES.values():
        if name in net.PRESETS:
            return net, net.PRESETS[name]
    names = [preset for net in FAMILIES.values() for preset in net.PRESETS]
    close = difflib.get_close_matches(name, names, 3) or names
    raise ValueError(f"no segmentation net is named '{name}'; expected one such as {', '.join(close)}")


def configured(name: str, *, classes: int, size: int, **changes: Any) -> tuple[ModuleType, Any]:
    """(module, Config) of a preset for other classes and images.

    Args:
        size: pixels per side of the images, for a net that takes no others.
        changes: fields of its Config; None leaves one as it is.

    Raises:
        ValueError: no such preset, or it has no such field.
    """
    net, cfg = find(name)
    changes = {field: value for field, value in changes.items() if value is not None}
    unknown = changes.keys() - {field.name for field in fields(cfg)}
    if unknown:
        raise ValueError(f"'{name}' has no {', '.join(sorted(unknown))} to choose")
    changes |= {"image": size} if net is transunet else {}
    return net, replace(cfg, classes=classes, **changes)


URL = "https://download.pytorch.org/models"
PUBLISHED = {
    "deeplabv3_resnet101": "deeplabv3_resnet101_coco-586e9e4e.pth",
    "deeplabv3_resnet50": "deeplabv3_resnet50_coco-cd0a2569.pth",
    "fcn_resnet101": "fcn_resnet101_coco-7ecb50ca.pth",
    "fcn_resnet50": "fcn_resnet50_coco-1167a1af.pth",
}
"""Torchvision's files: trained on those pictures of COCO that have one of the classes of Pascal VOC."""
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""Classes of torchvision's files."""


def from_pretrained(name: str, source: str | None = None, base_url: str = URL) -> tuple[Tree, Any]:
    """(parameters and Stats, Config) of a preset, from a file of torchvision, of milesial's U-Net, or of TransUNet's
    authors; its classes, and of a U-Net and of TransUNet its sizes, are those of the file.

    Args:
        source: a local file or folder, or a hub repository; by default torchvision's file, by download.
        base_url: another server of torchvision's files (their checksums are compared).

    Raises:
        ValueError: no such preset.
        WeightsError: nothing is published or there, it cannot be read, or it is of another net.
    """
    net, cfg = find(name)
    if source is None and name not in PUBLISHED:
        raise WeightsError(f"no weights of '{name}' are published that are known here; give a file")
    source = str(fetch(f"{base_url.rstrip('/')}/{PUBLISHED[name]}")) if source is None else source
    state = read(source)
    if net is unet:
        cfg = unet.config_of(state, source)
    else:
        table = net.rename_table(cfg)
        head = table.get("head.weight") or table["head.out.weight"]
        if head.theirs not in state:
            raise WeightsError(f"'{source}' is of another net than {name}: it has no {head.theirs}")
        cfg = replace(cfg, classes=len(state[head.theirs]))
        if net is transunet:
            positions = state[table["positions"].theirs].shape[1] if table["positions"].theirs in state else 1
            cfg = replace(cfg, image=16 * math.isqrt(positions))
        else:
            cfg = replace(cfg, aux=any(key.startswith("aux_classifier.") for key in state))
    return fill_published(net.spec(cfg), state, net.rename_table(cfg), source), cfg
