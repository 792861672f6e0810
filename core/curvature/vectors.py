"""Trees of parameters as vectors, and functions of trees as functions of vectors."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from core import random, tree
from core.tree import Tree

Operator = Callable[[Tree], Tree]


def width(like: Tree) -> torch.dtype:
    """The dtype of vectors of such trees: that of the leaves, float32 at least."""
    dtype = torch.float32
    for leaf in tree.leaves(like):
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def ravel(values: Tree) -> Tensor:
    """All elements of a tree as one vector, in the order of its leaves: (parameters,)."""
    dtype = width(values)
    return torch.cat([x.reshape(-1).to(dtype) for x in tree.leaves(values)])  # (parameters,)


def unravel(vector: Tensor, like: Tree) -> Tree:
    """The inverse of `ravel`, with the shapes and dtypes of `like`; leading axes of `vector` lead each leaf."""
    leading, parts, at = vector.shape[:-1], [], 0
    for leaf in tree.leaves(like):
        parts.append(vector[..., at : at + leaf.numel()].reshape(*leading, *leaf.shape).to(leaf.dtype))
        at += leaf.numel()
    return tree.unflatten(like, parts)


def normalised(vector: Tensor) -> tuple[Tensor, float]:
    """(vector / |vector|, |vector|), at every scale; zero stays zero."""
    norm = float(tree.norm(vector))
    if norm == math.inf:  # too large for the dtype, if the vector is finite; a float is not
        largest = float(vector.abs().max())
        unit, norm = normalised(vector / largest)
        return unit, norm * largest
    return (vector / norm if norm else vector), norm


def scaled(vector: Tensor, factor: float) -> Tensor:
    """`factor * vector`, where the factor alone may be too large for the dtype."""
    root = math.sqrt(factor)
    return vector * root * root if factor > torch.finfo(vector.dtype).max else vector * factor


def check_tree(name: str, what: str, values: Tree) -> None:
    """Raise TypeError, ValueError unless `values` has leaves and all are floating-point tensors."""
    if not tree.leaves(values):
        raise ValueError(f"{name}: {what} has no leaves")
    for path, leaf in tree.items(values):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"{name}: {what}, leaf '{path}' is {kind}; expected a floating-point tensor")


def check_count(name: str, **counts: int) -> None:
    """Raise ValueError, with its name, for a count below 1."""
    for what, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: {what} is {count}; expected at least 1")


def on_vectors(name: str, product: Operator, like: Tree) -> Callable[[Tensor], Tensor]:
    """`product` as a function (parameters,) -> (parameters,) that checks its result, see `checked`."""
    check_tree(name, "the vector", like)

    def multiply(vector: Tensor) -> Tensor:
        direction = unravel(vector, like)
        return ravel(checked(name, product(direction), direction)).to(vector.dtype)

    return multiply


def checked(name: str, out: Tree, vector: Tree) -> Tree:
    """`out`, the product with `vector`, in the key order of `vector`.

    Raises:
        ValueError: another structure or shape; it names the leaf.
    """
    try:
        rows = tree.aligned(vector, out)[1]
    except ValueError as error:
        hint = "; of the pair that hvp returns, the product is the second" if isinstance(out, tuple) else ""
        raise ValueError(f"{name}: the product is not a tree like its vector: {error}{hint}") from None
    for (path, x), y in zip(tree.items(vector), rows, strict=True):
        if not isinstance(y, Tensor) or y.shape != x.shape:
            kind = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"{name}: leaf '{path}' of the product has {kind}; expected shape {tuple(x.shape)}")
    return tree.unflatten(vector, rows)


def check_finite(name: str, vector: Tensor, like: Tree, where: str) -> None:
    """Raise ValueError, with the names of the leaves, for a flat vector that is not finite."""
    if not bool(vector.isfinite().all()):
        bad = [path for path, leaf in tree.items(unravel(vector, like)) if not bool(leaf.isfinite().all())]
        raise ValueError(f"{name}: {where} is not finite in {', '.join(map(repr, bad[:5]))}")


DISTRIBUTIONS = ("rademacher", "normal")


def probe(key: Tensor, like: Tree, distribution: str = "normal") -> Tree:
    """A random tree of independent elements with mean 0 and variance 1, in the shapes of `like`.

    Args:
        key: (2,).
        distribution: "normal", or "rademacher" (1 or -1).
    """
    check_tree("probe", "the tree", like)
    return unravel(draw(key, tree.count(like), width(like), distribution), like)


def draw(key: Tensor, count: int, dtype: torch.dtype, distribution: str) -> Tensor:
    """Random vector (count,), standard normal or of independent signs ("rademacher")."""
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution '{distribution}' is unknown; expected one of {', '.join(DISTRIBUTIONS)}")
    if distribution == "normal":
        return random.normal(key, (count,), dtype)
    return 2 * random.bernoulli(key, 0.5, (count,)).to(dtype) - 1


def dense(product: Operator, like: Tree, chunk: int | None = None) -> Tensor:
    """The matrix of an operator, (parameters, parameters): entry [i, j] is the derivative of output i by input j.

    One product per parameter: for small nets, and to test with.

    Args:
        chunk: columns computed at once; all if None.
    """
    multiply = on_vectors("dense", product, like)
    eye = torch.eye(tree.count(like), dtype=width(like), device=tree.leaves(like)[0].device)
    return torch.func.vmap(multiply, out_dims=1, chunk_size=chunk)(eye)
