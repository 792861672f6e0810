"""Every net of the zoo, once: what `test_laws.py` holds to the laws that all nets keep.

A net with the usual face is one call,

    net("gpt2", gpt2, gpt2.Config(vocabulary=31, ...), tokens(31, 8), draws=True)

with a configuration so small that a gradient takes milliseconds; give each choice that changes the code path (with and
without dropout, norm first or last) a line of its own. What has another face (a generator and its critic, a net in
several parts) is one `Net` a part, with a function in place of the module. `published` says which sizes its presets
must have. The batch is made by one of the makers below, or any function `(key, n) -> tree of tensors`; tuples are made
with `both`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from core import random, spec, tree
from core.layers import (
    batch_norm,
    batch_norm_spec,
    conv,
    conv_spec,
    global_average_pool,
    linear,
    linear_spec,
    prelu,
    prelu_spec,
)
from core.tree import Tree
from nets import gpt2, mlp

Batch = Callable[[Tensor, int], Tree]


@dataclass(frozen=True, repr=False)
class Net:
    """A net as the laws see it.

    Args:
        spec: its parameters, in a small configuration.
        apply: (params and Stats, x, key or None, train) -> a tensor or a tree of tensors, batch leading.
        batch: (key, n) -> x, an example batch of n; floating-point leaves are cast to the precision under test.
        draws: whether training draws random numbers, and so needs a key.
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
        """Whether training mixes the examples of a batch: batch norm does."""
        return any(isinstance(leaf, spec.Stat) for leaf in tree.leaves(self.spec))


@dataclass(frozen=True)
class Published:
    """The presets of a module, and the number of parameters that each of some was published with."""

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


def published(module: ModuleType, counts: dict[str, int], spec: Callable[[Any], Tree] | None = None) -> None:
    """Register the presets of a module. The counts are without Stats; a weight used twice counts once."""
    PUBLISHED[module.__name__.removeprefix("nets.")] = Published(spec or module.spec, module.PRESETS, counts)


# Example batches.


def vectors(width: int) -> Batch:
    return lambda key, n: random.normal(key, (n, width))


def images(channels: int, height: int, width: int | None = None) -> Batch:
    return lambda key, n: random.normal(key, (n, channels, height, width or height))


def tokens(vocabulary: int, time: int) -> Batch:
    return lambda key, n: random.randint(key, (n, time), 0, vocabulary).long()


def both(*batches: Batch) -> Batch:
    """A tuple of inputs, as an encoder-decoder takes."""

    def make(key: Tensor, n: int) -> tuple:
        return tuple(f(k, n) for f, k in zip(batches, random.split(key, len(batches)).unbind(0), strict=True))

    return make


# A net of this file: until a larger one does, it shows that the laws hold for Stats, taps and outputs that are trees.

CONVOLUTIONAL = {
    "conv1": conv_spec(3, 6, 3, bias=False),
    "conv2": conv_spec(6, 8, 3),
    "head": linear_spec(8, 5),
    "norm1": batch_norm_spec(6),
    "norm2": batch_norm_spec(8),
    "prelu": prelu_spec(),
}


def convolutional(params: Tree, x: Tensor, key: Tensor | None, train: bool) -> Tree:
    x = prelu(params["prelu"], batch_norm(params["norm1"], conv(params["conv1"], x, padding=1), train=train))
    x = batch_norm(params["norm2"], conv(params["conv2"], x, stride=2), train=train).relu()
    pooled = global_average_pool(x)
    return {"features": pooled, "logits": linear(params["head"], pooled)}


# The bias of a convolution in front of batch norm is taken out by the norm.
register(Net("convolutional", CONVOLUTIONAL, convolutional, images(3, 8), zero=("conv2.bias",)))

net("mlp", mlp, mlp.Config((6, 8, 7, 3), activation="tanh"), vectors(6))
net("mlp, dropout", mlp, mlp.Config((6, 8, 7, 3), dropout=0.4), vectors(6), draws=True)
published(mlp, {"mnist": 669_706})

GPT = {"vocabulary": 31, "context": 10, "layers": 2, "heads": 2, "width": 8}
net("gpt2", gpt2, gpt2.Config(**GPT, dropout=0.2), tokens(31, 10), draws=True)
net("gpt2, no bias", gpt2, gpt2.Config(**GPT, dropout=0.0, bias=False), tokens(31, 10))
net("gpt", gpt2, gpt2.Config(**GPT, dropout=0.1, norm_first=False), tokens(31, 10), draws=True)
published(
    gpt2,
    {
        # Radford et al. 2018 and 2019, as in the published weights (tests/nets/test_gpt2.py).
        "gpt": 116_534_784,
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        # nanoGPT prints 0.80M and 10.65M, in which the positions are not counted.
        "nanogpt-cpu": 804_096,
        "nanogpt-gpu": 10_745_088,
    },
)
