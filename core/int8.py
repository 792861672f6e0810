"""Weights of 8 bits, a function from a tree of parameters to a tree of parameters: a quarter of the memory of float32.

    W_ij ≈ s_i Q_ij        s_i = max_j |W_ij| / 127,   Q_ij = W_ij / s_i rounded to the nearest integer in [-127, 127]

One s per row, which is an output channel of a linear layer or a convolution and a token of an embedding (Jacob et al.
2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv:1712.05877;
of weights alone, symmetric). An entry is off by up to s_i / 2. All else is computed in the dtype of W.

    quantised = int8.quantise(params)                           plain data: {"int8": Q, "scale": s} in place of W
    y = apply(int8.unformed(quantised), x)                      may be inside vmap, grad by other leaves, compile
"""

from collections.abc import Callable
from typing import Any

import torch

from core import nodes, tree
from core.layers.int8 import Int8
from core.tree import Tree

LARGEST = 127


def is_matrix(name: str, leaf: Any) -> bool:
    """True of weights of two or more axes."""
    return leaf.ndim > 1 and leaf.is_floating_point()


def quantise(params: Tree, where: Callable[[str, Any], bool] = is_matrix) -> Tree:
    """The parameters with each weight W replaced by `{"int8": Q, "scale": s}`.

    Args:
        where: predicate of (name, leaf), the weights to quantise; by default all of two or more axes.

    Raises:
        ValueError: a leaf without rows.
    """

    def pack(name: str, leaf: Any) -> Any:
        if not where(name, leaf):
            return leaf
        if leaf.ndim < 1 or not leaf.is_floating_point():
            raise ValueError(
                f"int8: '{name}' of shape {tuple(leaf.shape)} and {leaf.dtype} has no rows of real numbers"
            )
        rows = leaf.detach().flatten(1) if leaf.ndim > 1 else leaf.detach()[:, None]  # (rows, n)
        scale = rows.abs().amax(1) / LARGEST  # (rows,)
        scale = torch.where(scale == 0.0, 1.0, scale)  # rows of zeros
        integers = (rows.to(wide := torch.promote_types(rows.dtype, torch.float32)) / scale.to(wide)[:, None]).round()
        return {"int8": integers.clamp(-LARGEST, LARGEST).to(torch.int8).reshape(leaf.shape), "scale": scale}

    return tree.sort(tree.map_with_names(pack, params))


def unformed(params: Tree) -> Tree:
    """The parameters of `quantise` as layers take them: each weight an `Int8`, which linear layers and embeddings apply
    without forming it; to all other code it is the tensor s Q, formed where it is needed."""
    inner = nodes.children(params)
    if inner is None:
        return params
    if isinstance(params, dict) and set(params) == {"int8", "scale"}:
        return Int8(params["int8"], params["scale"])
    return nodes.rebuild(params, [unformed(child) for _, child in inner])


def nbytes(params: Tree) -> int:
    """Bytes of all leaves."""
    return sum(leaf.nbytes for leaf in tree.leaves(params))
