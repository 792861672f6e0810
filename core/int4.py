"""Weights of 4 bits in groups: a sixth of the memory of float32, with a scale for every few columns.

    W_ij ≈ s_ig Q_ij    g = j // group,   s_ig = max over the group of |W_ij| / 7,   Q_ij in [-7, 7]

One scale per row, as `core.int8` has, leaves too much error at 4 bits, so each row is cut into groups (Dettmers and
Zettlemoyer 2023, "The case for 4-bit precision: k-bit Inference Scaling Laws", arXiv:2212.09720, section 3). Two
integers share a byte: in groups of 32 an entry takes 4 + 32 / 32 = 5 bits.

    quantised = int4.quantise(params)                           plain data: {"int4": Q, "scale": s} in place of W
    y = apply(int4.unformed(quantised), x)
"""

from collections.abc import Callable
from typing import Any

import torch

from core import nodes, tree
from core.layers.int4 import Int4
from core.tree import Tree

LARGEST = 7


def is_even_matrix(name: str, leaf: Any) -> bool:
    """True of weights of two axes with an even number of columns; those of convolutions have four."""
    return leaf.ndim == 2 and leaf.shape[1] % 2 == 0 and leaf.shape[1] > 0 and leaf.is_floating_point()


def quantise(params: Tree, group: int = 32, where: Callable[[str, Any], bool] = is_even_matrix) -> Tree:
    """The parameters with each weight W (rows, columns) replaced by `{"int4": Q, "scale": s}`.

    Q: (rows, columns / 2) uint8, two integers in each; s: (rows, groups), in the dtype of W.

    Args:
        group: columns that share a scale, at most; of columns that it does not divide, the largest even divisor below.
        where: predicate of (name, leaf), the weights to quantise.

    Raises:
        ValueError: a group below 2, or a leaf that is no matrix with an even number of columns.
    """
    if group < 2:
        raise ValueError(f"int4: group is {group}; expected at least 2, since two integers share a byte")

    def pack(name: str, leaf: Any) -> Any:
        if not where(name, leaf):
            return leaf
        if not is_even_matrix(name, leaf):
            wanted = "expected real numbers (rows, even number of columns)"
            raise ValueError(f"int4: '{name}' has shape {tuple(leaf.shape)} and {leaf.dtype}; {wanted}")
        size = next(n for n in range(group, 1, -1) if n % 2 == 0 and leaf.shape[1] % n == 0)
        parts = leaf.detach().unflatten(1, (-1, size))  # (rows, groups, size)
        scale = parts.abs().amax(2) / LARGEST  # (rows, groups)
        scale = torch.where(scale == 0.0, 1.0, scale)  # groups of zeros
        wide = torch.promote_types(leaf.dtype, torch.float32)
        q = (parts.to(wide) / scale.to(wide)[..., None]).round().clamp(-LARGEST, LARGEST) + 8  # 1 to 15
        low, high = q.to(torch.uint8).flatten(1).unflatten(1, (-1, 2)).unbind(2)  # each (rows, columns / 2)
        return {"int4": low + 16 * high, "scale": scale}

    return tree.sort(tree.map_with_names(pack, params))


def unformed(params: Tree) -> Tree:
    """The parameters of `quantise` as layers take them: each weight an `Int4`, which is the tensor s Q to all code,
    formed where it is needed; an embedding forms the rows that it reads."""
    inner = nodes.children(params)
    if inner is None:
        return params
    if isinstance(params, dict) and set(params) == {"int4", "scale"}:
        return Int4(params["int4"], params["scale"])
    return nodes.rebuild(params, [unformed(child) for _, child in inner])
