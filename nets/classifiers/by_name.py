"""Image classifiers by name: any preset of any family, fitted to the images at hand; and new heads for old nets.

    net, cfg = configured("resnet18", channels=1, classes=10, size=28)
    params = spec.init(random.key(0), net.spec(cfg))
    logits = net.apply(params, images, cfg)

A family is a module with `PRESETS`, `spec(cfg)`, `apply(params, x, cfg, *, key, train)`, `features` (penultimate
features, (batch, d)) and `feature_maps` (a list, from fine to coarse). Published weights:
`nets.classifiers.torchvision_weights`.
"""

import difflib
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from core import spec, tree
from core.tree import Tree
from nets.classifiers import (
    alexnet,
    convnext,
    densenet,
    googlenet,
    inception,
    lenet,
    mlp,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    resnet,
    squeezenet,
    vgg,
    vit,
)

FAMILIES: dict[str, ModuleType] = {
    net.__name__.rpartition(".")[2]: net
    for net in (
        alexnet,
        convnext,
        densenet,
        googlenet,
        inception,
        lenet,
        mlp,
        mobilenet_v1,
        mobilenet_v2,
        mobilenet_v3,
        resnet,
        squeezenet,
        vgg,
        vit,
    )
}


def find(name: str) -> tuple[ModuleType, Any]:
    """(module, Config) of a preset.

    Args:
        name: a key of a family's PRESETS, such as "resnet18", "vit_b_16" or "lenet5".

    Raises:
        ValueError: no family has it; the message lists similar names and the families.
    """
    for net in FAMILIES.values():
        if name in net.PRESETS:
            return net, net.PRESETS[name]
    names = [preset for net in FAMILIES.values() for preset in net.PRESETS]
    close = list(FAMILIES[name].PRESETS) if name in FAMILIES else difflib.get_close_matches(name, names, 3)
    near = f"; close to it: {', '.join(close)}" if close else ""
    raise ValueError(f"no net is named '{name}'{near}; families: {', '.join(FAMILIES)}")


def configured(name: str, *, channels: int, classes: int, size: int) -> tuple[ModuleType, Any]:
    """(module, Config) of a preset for other images and classes.

    Args:
        size: pixels per side of the images, which are square.

    Raises:
        ValueError: no such preset, or images that it cannot take.
    """
    net, cfg = find(name)
    return net, fitted(net, cfg, channels=channels, classes=classes, size=size)


def fitted(net: ModuleType, cfg: Any, *, channels: int, classes: int, size: int) -> Any:
    """A Config for other images and classes; see `configured`."""
    if min(channels, classes, size) < 1:
        raise ValueError(f"channels {channels}, classes {classes}, size {size}; expected at least 1 of each")
    if net is mlp:
        cfg = replace(cfg, widths=(channels * size**2, *cfg.widths[1:-1], classes))
    else:
        cfg = _sized(net, replace(cfg, channels=channels, classes=classes), size)
    # A pass without values, which raises if the images are too small.
    net.apply(spec.abstract(net.spec(cfg)), torch.empty(1, channels, size, size, device="meta"), cfg)
    return cfg


def _sized(net: ModuleType, cfg: Any, size: int) -> Any:
    """Set the size of images in the Configs that have one; most nets take any size."""
    if net is inception:
        return inception.fitted(cfg, size)
    return replace(cfg, **{lenet: {"size": size}, vit: {"image": size}}.get(net, {}))


def weighted_logits(net: ModuleType, output: Tensor | tuple[Tensor, ...]) -> list[tuple[float, Tensor]]:
    """(weight, logits) of every head: the loss is the sum of weight * loss(logits). The first are the net's own.

    Args:
        output: of `net.apply`; in training googlenet and inception give a tuple, with their auxiliary heads.
    """
    if isinstance(output, Tensor):
        return [(1.0, output)]
    own, *auxiliary = output
    return [(1.0, own), *((net.AUX_WEIGHT, logits) for logits in auxiliary)]


def head_names(params: Tree) -> set[str]:
    """Names of the leaves of a net's head and auxiliary heads; `params` may be its spec."""
    if "head" not in params and "layers" in params:  # an mlp
        last = f"layers.{len(params['layers']) - 1}."
        return {name for name in tree.names(params) if name.startswith(last)}
    return {name for name in tree.names(params) if name.split(".")[0] in ("aux", "head")}


def adopt(model: Tree, values: Tree, key: Tensor, what: str = "weights") -> tuple[Tree, list[str]]:
    """Values for a net from those of one with different heads or none, for fine-tuning.

    Args:
        model: the spec of the net.
        values: parameters and Stats of the other net.
        key: (2,); draws the leaves of the heads that `values` lacks, or has in another shape.

    Returns:
        The values, and the names of the leaves that were drawn.

    Raises:
        ValueError: any leaf outside the heads is missing, misshapen or left over: the values are of another net.
    """
    heads, theirs = head_names(model), head_names(values)
    body, _ = tree.partition(model, lambda name, _: name not in heads)
    try:
        spec.check(body, tree.partition(values, lambda name, _: name not in theirs)[0], what)
    except ValueError as error:
        raise ValueError(f"{error}; only the head may differ") from None
    old = tree.flatten(values)
    shapes = {name: tuple(x.shape) for name, x in old.items()}
    new_names = [name for name, leaf in tree.items(model) if shapes.get(name) != tuple(leaf.shape)]
    new = tree.flatten(spec.init(key, tree.partition(model, lambda name, _: name in new_names)[0]))
    leaves = {name: new[name] if name in new else old[name] for name in tree.names(model)}
    return tree.sort(tree.nest(leaves, like=model)), new_names
