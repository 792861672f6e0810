"""Short vectors in the place of gradients, whose inner products estimate those of the gradients.

A count sketch (Charikar, Chen and Farach-Colton 2002) adds up the entries of a vector, each with a random sign, in
`size` random buckets. It is linear, and the inner product of two sketches is unbiased:

    E <s(g), s(h)> = <g, h>,    Var <s(g), s(h)> <= (|g|^2 |h|^2 + <g, h>^2) / size

as for the dense random projections of TRAK (Park et al. 2023, arXiv:2303.14186), at the cost of one addition an entry.
So the Gram matrix of the gradients of a whole data set fits into (N, size) numbers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core import random, tree
from core.per_example import plan as planning
from core.per_example.exact import alone
from core.spec import name_hash
from core.tree import Tree


class Hash(NamedTuple):
    """Of each entry of a leaf: its bucket, int64 in [0, size), and its sign, +1 or -1; both flat."""

    bucket: Tensor
    sign: Tensor


def hashes(key: Tensor, like: Tree, size: int) -> Tree:
    """A `Hash` for each leaf of `like`, drawn from the key and the leaf's name. Needs 12 bytes an entry.

    Args:
        key: (2,).
        like: a tree of tensors, such as the parameters.
        size: how many buckets.
    """
    if size < 1:
        raise ValueError(f"hashes: size must be at least 1, got {size}")

    def drawn(name: str, leaf: Tensor) -> Hash:
        buckets, signs = random.split(random.fold_in(key, name_hash(name))).unbind(0)
        bucket = random.randint(buckets, (leaf.numel(),), 0, size).long()
        return Hash(bucket, 1 - 2 * random.bernoulli(signs, 0.5, (leaf.numel(),)).to(torch.float32))

    return tree.map_with_names(drawn, like)


def sketch(hashes: Tree, values: Tree, size: int) -> Tensor:
    """The sketch (size,) of one tree of tensors; under vmap of many.

    Args:
        hashes: from `hashes`, of the structure of `values`, for the same size.
    """
    found, total = tree.aligned(values, hashes), None
    for leaf, (bucket, sign) in zip(*found, strict=True):
        wide = leaf.flatten().to(torch.promote_types(leaf.dtype, torch.float32)) * sign
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
    """The sketch of every example's gradient, (N, size).

    Args:
        loss: `loss(params, batch) -> (N,)`, as in `core.per_example.reports`.
        params: a tree of floating-point tensors.
        batch: a tree of tensors with leading axis N.
        hashes: `hashes(key, params, size)`.
        chunk: how many examples at a time; as many gradients are held at once. All if None.

    Raises:
        PerExampleError: the loss of a batch of one is not (1,), or the leaves of the batch disagree.
    """
    params, batch = tree.sort(params), tree.sort(batch)
    planning.examples(batch)

    def of_one(params: Tree, example: Tree) -> Tensor:
        gradient = torch.func.grad(lambda params: alone(loss, params, example))(params)
        return sketch(hashes, gradient, size)

    return torch.func.vmap(of_one, (None, 0), chunk_size=chunk)(params, batch)
