"""Segmentation nets by name: any preset of any family, fitted to the images and classes at hand.

    net, cfg = configured("unet-small", classes=11, size=64, width=12)
    params = spec.init(random.key(0), net.spec(cfg))
    logits = net.apply(params, images, cfg)  # (batch, classes, height, width)

A family is a module with `PRESETS`, `spec(cfg)` and `apply(params, x, cfg, *, key, train)`; with auxiliary heads, in
training, that gives a tuple, whose losses after the first are weighed by `AUX_WEIGHT`.
"""

import difflib
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

from nets.dense import deeplab, fcn, transunet, unet

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
