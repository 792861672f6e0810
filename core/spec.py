"""Parameters declared as data: a spec is a tree of `Param` and `Stat` leaves.

From the spec alone come the initial values, the count and table of parameters (`tree.count`, `tree.table`; nothing is
allocated), masks by name, the sharding of each leaf, and the template for checkpoints and pretrained files.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from core import initializers, random, threefry, tree
from core.compiling import assume_constant_result
from core.tree import Tree


@dataclass(frozen=True)
class Param:
    """A parameter: its shape, its initialiser, and one logical axis name (or None) per dimension.

    `parts`: sizes along the first dimension of what stands in one leaf and is cut part by part, such as queries, keys
    and values; () for one part.
    """

    shape: tuple[int, ...]
    init: initializers.Initializer = initializers.zeros
    axes: tuple[str | None, ...] = ()
    dtype: torch.dtype = torch.float32
    parts: tuple[int, ...] = ()

    def __post_init__(self):
        if not isinstance(self.shape, (tuple, list)):
            raise TypeError(
                f"{type(self).__name__}: the shape is {self.shape}; expected a tuple of integers, as in (3,)"
            )
        if not callable(self.init) or isinstance(self.init, Tensor):
            kind = type(self.init).__name__
            raise TypeError(
                f"{type(self).__name__}: init is {kind}; expected an initialiser, such as initializers.zeros"
            )
        if not isinstance(self.dtype, torch.dtype):
            raise TypeError(f"{type(self).__name__}: dtype is {self.dtype!r}; expected a torch.dtype")
        if self.parts and (not self.shape or sum(self.parts) != self.shape[0]):
            raise ValueError(f"the parts {self.parts} do not add up to the first dimension of the shape {self.shape}")
        if self.axes and len(self.axes) != len(self.shape):
            raise ValueError(f"axes {self.axes} name {len(self.axes)} dimensions, but the shape is {self.shape}")


@dataclass(frozen=True)
class Table(Param):
    """A parameter whose rows are looked up by ids, as those of an embedding are."""


@dataclass(frozen=True)
class Stat(Param):
    """A running statistic, measured in training instead of learned (batch norm's mean); only ever a dict value.

    The Stats of a layer have a Stat `count` beside them, the number of their updates (see `core.stats`). The name is
    reserved: an optimizer recognises by it a tree from which the Stats were not split off.
    """


@assume_constant_result
def name_hash(name: str) -> int:
    """32-bit hash of a name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")


def init(key: Tensor, spec: Tree, dtype: torch.dtype | None = None) -> Tree:
    """Initial values for a spec, drawn on the key's device; same key, same bits.

    Each leaf draws from `fold_in(key, hash of its name)`, so adding a layer changes no other layer's values, and
    `vmap(init, in_dims=(0, None))(keys, spec)` gives an ensemble.

    Args:
        key: (2,), see `core.random.key`.
        dtype: replaces the dtype of every floating-point `Param`; a `Stat` keeps its own.

    Raises:
        ValueError: two leaves of one name (a dict key with a dot in it), or a random key that is not (2,).
        TypeError: a leaf that is not a `Param` (it is named), or a random key that is not a tensor.
    """
    threefry.check_key(key)
    if key.shape != (2,):
        raise ValueError(f"init: expected one key (2,), found {tuple(key.shape)}; vmap it over keys for an ensemble")
    _check_leaves("init", spec)
    names = list(tree.flatten(spec))
    if not names:
        return tree.sort(spec)
    hashes = torch.tensor([name_hash(name) for name in names], dtype=torch.int64, device=key.device)
    keys = dict(zip(names, random.fold_in(key, hashes).unbind(-2), strict=True))  # each (2,)

    def value(name: str, leaf: Param) -> Tensor:
        keeps = isinstance(leaf, Stat) or not leaf.dtype.is_floating_point
        return leaf.init(keys[name], leaf.shape, leaf.dtype if dtype is None or keeps else dtype)

    return tree.sort(tree.map_with_names(value, spec))


def _check_leaves(what: str, spec: Tree) -> None:
    """Raise TypeError at the first leaf that is not a Param."""
    for name, leaf in tree.items(spec, none_is_leaf=True):
        if isinstance(leaf, Param):
            continue
        kind = "None" if leaf is None else type(leaf).__name__
        if not name:
            raise TypeError(
                f"{what}: the spec is {kind}; expected a tree of Param and Stat, as spec(cfg) of a net returns"
            )
        hint = ": leave the key out" if leaf is None else ""
        raise TypeError(f"{what}: '{name}' is {kind}; a spec's leaves are Param or Stat{hint}")


def abstract(spec: Tree) -> Tree:
    """The spec as a tree of meta tensors: shapes and dtypes without memory."""
    return tree.sort(tree.map(lambda leaf: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta"), spec))


def mask(spec: Tree, predicate: Callable[[str, Param], bool]) -> Tree:
    """A tree of bools, `predicate(name, leaf)` at each leaf."""
    return tree.sort(tree.map_with_names(lambda name, leaf: bool(predicate(name, leaf)), spec))


def split(spec: Tree, values: Tree) -> tuple[Tree, Tree]:
    """(params, stats) of the values of a spec; `tree.merge(params, stats)` joins them again.

    Raises:
        TypeError: `spec` is not one, such as the values themselves.
    """
    _check_leaves("split", spec)
    stats = {name for name, leaf in tree.items(spec) if isinstance(leaf, Stat)}
    return tree.partition(values, lambda name, _: name not in stats)


def check(spec: Tree, values: Tree, what: str = "parameters") -> None:
    """Compare values with their spec: names, shapes, and lists as lists. Dtypes are free (see `init`).

    Raises:
        ValueError: the first leaf of `values` that is missing, misshapen or left over, by name.
    """
    expected, named = tree.flatten(spec), tree.flatten(values)
    for name, leaf in expected.items():
        if name not in named:
            raise ValueError(f"{what}: '{name}' is missing; expected shape {tuple(leaf.shape)}")
        shape = tuple(getattr(named[name], "shape", (type(named[name]).__name__,)))
        if shape != tuple(leaf.shape):
            raise ValueError(f"{what}: '{name}' has shape {shape}, expected {tuple(leaf.shape)}")
    for name in named:
        if name not in expected:
            raise ValueError(f"{what}: '{name}' is left over; the model has no such parameter")
    try:
        tree.aligned(spec, values)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
