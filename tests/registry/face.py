"""Registration of a net: `net`, `player`, `published`, and functions that make example batches."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from core import random, spec, tree
from core.tree import Tree

Batch = Callable[[Tensor, int], Tree]


@dataclass(frozen=True, repr=False)
class Net:
    """A net in the form that the laws use.

    Args:
        spec: its parameters, in a small configuration.
        apply: (params and Stats, x, key or None, train) -> a tensor or a tree of tensors, batch leading.
        batch: (key, n) -> x, an example batch of n; floating-point leaves are cast to the precision under test.
        draws: training draws random numbers, and so needs a key.
        zero: patterns (as in a shell) of the leaves whose gradient in training is identically zero.
    """

    name: str
    spec: Tree
    apply: Callable[[Tree, Tree, Tensor | None, bool], Tree]
    batch: Batch
    draws: bool = False
    zero: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return self.name

    @property
    def mixes(self) -> bool:
        """Training mixes the examples of a batch: there is batch norm."""
        return any(isinstance(leaf, spec.Stat) for leaf in tree.leaves(self.spec))


@dataclass(frozen=True)
class Published:
    """The presets of a module, and the parameter counts that some of them were published with."""

    spec: Callable[[Any], Tree]
    presets: dict[str, Any]
    counts: dict[str, int]


NETS: dict[str, Net] = {}
PUBLISHED: dict[str, Published] = {}


def register(net: Net) -> None:
    if net.name in NETS:
        raise ValueError(f"there are two nets of the name '{net.name}'")
    NETS[net.name] = net


def net(name: str, module: ModuleType, cfg: Any, batch: Batch, **options) -> None:
    """Register a module with the face `spec(cfg)`, `apply(params, x, cfg, *, key, train)`."""

    def apply(params: Tree, x: Tree, key: Tensor | None, train: bool) -> Tree:
        return module.apply(params, x, cfg, key=key, train=train)

    register(Net(name, module.spec(cfg), apply, batch, **options))


def player(name: str, module: ModuleType, part: str, cfg: Any, batch: Batch, **options) -> None:
    """Register a `generator` or `critic_outputs`. The batch is (z or images, labels) where it is conditional."""
    face = getattr(module, part)

    def apply(params: Tree, x: Tree, key: Tensor | None, train: bool) -> Tree:
        x, labels = x if isinstance(x, tuple) else (x, None)
        return face(params, x, cfg, labels=labels, key=key, train=train)

    parameters = getattr(module, part.removesuffix("_outputs") + "_spec")(cfg)
    register(Net(name, parameters, apply, batch, **options))


def two_players(module: ModuleType) -> Callable[[Any], Tree]:
    """The specs of both as one, for `published`."""
    return lambda cfg: {"critic": module.critic_spec(cfg), "generator": module.generator_spec(cfg)}


def published(module: ModuleType, counts: dict[str, int], spec: Callable[[Any], Tree] | None = None) -> None:
    """Register the presets of a module. The counts are without Stats; a weight used twice counts once."""
    name = module.__name__.partition(".")[2].replace(".", "/")  # generative/unet
    if unknown := counts.keys() - module.PRESETS.keys():
        raise ValueError(f"'{name}' has no presets {', '.join(sorted(unknown))}")
    PUBLISHED[name] = Published(spec or module.spec, module.PRESETS, counts)


# Example batches.


def vectors(width: int) -> Batch:
    return lambda key, n: random.normal(key, (n, width))


def images(channels: int, height: int, width: int | None = None) -> Batch:
    return lambda key, n: random.normal(key, (n, channels, height, width or height))


def tokens(vocabulary: int, time: int) -> Batch:
    return lambda key, n: random.randint(key, (n, time), 0, vocabulary).long()


def sequences(time: int, width: int) -> Batch:
    return lambda key, n: random.normal(key, (n, time, width))


def labels(classes: int) -> Batch:
    return lambda key, n: random.randint(key, (n,), 0, classes).long()


def both(*batches: Batch) -> Batch:
    """A tuple of inputs, as an encoder-decoder takes."""

    def make(key: Tensor, n: int) -> tuple:
        return tuple(f(k, n) for f, k in zip(batches, random.split(key, len(batches)).unbind(0), strict=True))

    return make
