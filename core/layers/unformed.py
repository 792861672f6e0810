"""Weights that layers apply without forming them; to all other code they are tensors, formed where they are needed.

Such a leaf takes the place of a weight in a tree of parameters: `LowRank`, `Int8` and `Int4` of their modules.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core import tree
from core.tree import Tree


class Unformed:
    """A weight with a `shape`, `dtype` and `device`, formed by `dense`. `fields`: the names of its own attributes."""

    fields: tuple[str, ...] = ()

    def dense(self) -> Tensor:
        """The tensor."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Number of dimensions of the weight."""
        return len(self.shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in type(self).fields:  # while it is copied or inspected
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.dense() @ other

    def __mul__(self, other: Any) -> Tensor:
        return self.dense() * other

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Tensor:
        return self.dense() + other

    __radd__ = __add__

    def __truediv__(self, other: Any) -> Tensor:
        return self.dense() / other

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def dense(x: Any) -> Any:
            return x.dense() if isinstance(x, Unformed) else x

        return func(*tree.map(dense, list(args)), **tree.map(dense, kwargs or {}))


class Scaled(Unformed):
    """Integers times a `scale`, in the dtype and on the device of which the weight is; the bytes are those of both."""

    scale: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the scales, and of the formed weight."""
        return self.scale.dtype

    @property
    def device(self) -> torch.device:
        """Device of the scales."""
        return self.scale.device

    @property
    def nbytes(self) -> int:
        """Bytes of the integers and their scales."""
        return sum(getattr(self, field).nbytes for field in self.fields)


def formed(params: Tree) -> Tree:
    """The parameters with every such weight formed."""
    return tree.map(lambda leaf: leaf.dense() if isinstance(leaf, Unformed) else leaf, params)
