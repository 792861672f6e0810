"""Count sketches of gradients: short vectors whose inner products estimate those of the gradients.

A count sketch (Charikar, Chen and Farach-Colton 2002) adds up the entries of a vector, each with a random sign, in
`size` random buckets. It is linear, and the inner product of two sketches is unbiased:

    E <s(g), s(h)> = <g, h>,    Var <s(g), s(h)> <= (|g|^2 |h|^2 + <g, h>^2) / size

as for the dense random projections of TRAK (Park et al. 2023, arXiv:2303.14186), at the cost of one addition per entry.
So the Gram matrix of the gradients of a whole data set fits into (N, size) numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random, tree
from core.per_example.arguments import batch_size
from core.per_example.custom_functions import check_while_compiling
from core.per_example.exact import alone
from core.spec import name_hash
from core.tree import Tree


class Hash(NamedTuple):
    """The bucket of each entry of a leaf, int64 in [0, size), and its sign, +1 or -1; both flat."""

    bucket: Tensor
    sign: Tensor


def hashes(key: Tensor, like: Tree, size: int) -> Tree:
    """A `Hash` for each leaf of `like`, from the key and the leaf's name. Needs 12 bytes per entry.

    Args:
        key: (2,).
        like: a tree of tensors, such as the parameters.
        size: number of buckets.
    """
    if size < 1:
        raise ValueError(f"hashes: size must be at least 1, got {size}")

    def of_leaf(name: str, leaf: Tensor) -> Hash:
        buckets, signs = random.split(random.fold_in(key, name_hash(name))).unbind(0)
        bucket = random.randint(buckets, (leaf.numel(),), 0, size).long()
        return Hash(bucket, 1 - 2 * random.bernoulli(signs, 0.5, (leaf.numel(),)).to(torch.float32))

    return tree.map_with_names(of_leaf, like)


def sketch(hashes: Tree, values: Tree, size: int) -> Tensor:
    """The sketch (size,) of a tree of tensors; under vmap, of many.

    Args:
        hashes: from `hashes`, of the structure of `values`, for the same size.
    """
    total: Any = None
    for leaf, (bucket, sign) in zip(*tree.aligned(values, hashes), strict=True):
        wide = leaf.flatten().to(torch.promote_types(leaf.dtype, torch.float32)) * sign  # (entries,)
        part = wide.new_zeros(size).index_add(0, bucket, wide)
        total = part if total is None else total + part
    return total


def gradient_sketches(
    loss: Callable[[Tree, Tree], Tensor],
    params: Tree,
    batch: Tree,
    hashes: Tree,
    size: int,
    *,
    chunk: int | None = None,
) -> Tensor:
    """The sketch of the gradient of every example, (N, size).

    Args:
        loss: `loss(params, batch) -> (N,)`, as in `core.per_example.reports`.
        params: a tree of floating-point tensors.
        batch: a tree of tensors with leading axis N.
        hashes: `hashes(key, params, size)`.
        chunk: examples at a time, whose gradients are held at once; all if None.

    Raises:
        PerExampleError: as in `core.per_example.each`.
    """
    params, batch = tree.sort(params), tree.sort(batch)
    batch_size(batch)
    check_while_compiling(loss, params, batch)

    def of_one(params: Tree, example: Tree) -> Tensor:
        gradient = torch.func.grad(lambda params: alone(loss, params, example))(params)
        return sketch(hashes, gradient, size)

    return torch.func.vmap(of_one, (None, 0), chunk_size=chunk)(params, batch)
