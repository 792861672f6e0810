"""Products with inverses of operators: conjugate gradients, and the inverse on the span of a few eigenvectors."""

from typing import NamedTuple

import torch
from torch import Tensor

from core import tree
from core.curvature.vectors import (
    Operator,
    check_count,
    check_finite,
    check_tree,
    normalised,
    on_vectors,
    ravel,
    scaled,
    unravel,
    width,
)
from core.tree import Tree


class Solution(NamedTuple):
    """`solution`, a tree, and `residual_norms` (iterations + 1,): |b - (A + damping) x|, the first of x = 0."""

    solution: Tree
    residual_norms: Tensor


def conjugate_gradient(
    product: Operator, b: Tree, damping: float = 0.0, steps: int = 100, tolerance: float = 1e-6
) -> Solution:
    """x with (A + damping I) x = b, for a symmetric positive definite A + damping I (Hestenes and Stiefel 1952).

    The scales of A and of b do not matter: it solves for b / |b|, and multiplies A with unit vectors.

    Args:
        product: `product(vector) -> A vector` on trees like b.
        steps: maximum number of products.
        tolerance: stop at a residual of `tolerance * |b|`. `residual_norms`, which the recurrence updates, shows
            whether it was reached (float32 cannot go below about 1e-6).

    Raises:
        TypeError, ValueError: a direction of negative or no curvature, so that A + damping I is not positive definite;
            a product or b that is not finite; fewer than one step, or a damping or tolerance below 0.
    """
    name = "conjugate_gradient"
    check_count(name, steps=steps)
    for what, value in (("damping", damping), ("tolerance", tolerance)):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"{name}: {what} is {value}; expected a number of at least 0")
    multiply, r = on_vectors(name, product, b), ravel(b)
    check_finite(name, r, b, "b")
    r, norm = normalised(r)
    x, direction, square = torch.zeros_like(r), r, r @ r
    norms = [square.sqrt()]  # of the residuals r = b - (A + damping) x, in units of |b|
    for step in range(1, steps + 1):
        if bool(norms[-1] <= tolerance * norms[0]):
            break
        size = torch.linalg.vector_norm(direction)
        unit = direction / size  # p / |p|
        curved = multiply(unit) + damping * unit
        check_finite(name, curved, b, f"the product of step {step}")
        curvature = unit @ curved  # pᵀ (A + damping) p / pᵀ p
        if bool(curvature.isinf()):
            raise ValueError(
                f"{name}: the curvature along step {step} is beyond {curved.dtype}; scale A, or use float64"
            )
        if not bool(curvature > 0):
            raise ValueError(
                f"{name}: negative or zero curvature, vᵀ(A + damping)v / vᵀv = {float(curvature):.3g}, along step "
                f"{step}: A + damping must be positive definite; raise damping ({damping:g}), or use the GGN"
            )
        length = square / size / curvature  # α |p|, with α = |r|² / pᵀ (A + damping) p
        x, r = x + length * unit, r - length * curved
        square, before = r @ r, square
        norms.append(square.sqrt())
        direction = r + square / before * direction  # p ← r + (|r|² / |r before|²) p
    return Solution(unravel(scaled(x, norm), b), scaled(torch.stack(norms), norm))


def low_rank_inverse(values: Tensor, vectors: Tree, damping: float = 0.0, complement: bool = False) -> Operator:
    """The inverse of an operator known by some of its eigenpairs, as a function from tree to tree:

    v -> sum_i q_i (q_iᵀ v) / (λ_i + damping)                            (+ (v - Q Qᵀ v) / damping with `complement`)

    Schioppa et al. 2021, "Scaling Up Influence Functions" (arXiv:2112.03052), apply it to gradients, with the
    eigenvalues of largest magnitude: `top_eigenpairs(..., which="magnitude")`. Components orthogonal to all of them are
    dropped; with `complement` they form an eigenspace of eigenvalue 0, which gives the inverse of Q Λ Qᵀ + damping I.

    Args:
        values: (count,).
        vectors: orthonormal, stacked along a leading axis of each leaf.

    Raises:
        TypeError, ValueError: not `count` vectors, an eigenvalue that damping makes 0, or `complement` without a
            positive damping; from the function, another tree than the vectors.
    """
    name = "low_rank_inverse"
    check_tree(name, "the vectors", vectors)
    if complement and not damping > 0.0:
        raise ValueError(f"{name}: complement divides by damping, which is {damping}; expected a positive number")
    factors = reciprocals(name, values, vectors, damping)
    like = tree.map(lambda x: x[0], vectors)
    dtype = width(like)
    rows = torch.cat([x.reshape(len(values), -1).to(dtype) for x in tree.leaves(vectors)], 1)  # (count, parameters)
    factors = factors.to(rows)

    def apply(vector: Tree) -> Tree:
        v = ravel(_like(name, vector, like))
        coefficients = rows @ v  # q_iᵀ v, (count,)
        out = (coefficients * factors) @ rows  # (parameters,)
        if complement:
            out = out + (v - coefficients @ rows) / damping
        return unravel(out, vector)

    return apply


def reciprocals(name: str, values: Tensor, vectors: Tree, damping: float) -> Tensor:
    """1 / (λ_i + damping), (count,). While compiling, the values themselves are not checked.

    Raises:
        ValueError: not one vector per value; an eigenvalue that damping makes 0.
    """
    for path, leaf in tree.items(vectors):
        if values.ndim != 1 or leaf.shape[:1] != values.shape:
            shapes = f"values {tuple(values.shape)}, vectors '{path}' {tuple(leaf.shape)}"
            raise ValueError(f"{name}: {shapes}; expected (count,) and (count, ...)")
    damped = values + damping
    if not torch.compiler.is_compiling() and not bool((damped.isfinite() & (damped != 0)).all()):
        raise ValueError(f"{name}: an eigenvalue plus damping is zero or not finite: {damped.tolist()}")
    return 1 / damped


def _like(name: str, vector: Tree, like: Tree) -> Tree:
    """`vector`, checked to have the structure and shapes of `like`."""
    try:
        leaves = tree.aligned(like, vector)[1]
    except ValueError as error:
        raise ValueError(f"{name}: the vector is not a tree like the eigenvectors: {error}") from None
    for (path, x), y in zip(tree.items(like), leaves, strict=True):
        if y.shape != x.shape:
            raise ValueError(f"{name}: leaf '{path}' has shape {tuple(y.shape)}; expected {tuple(x.shape)}")
    return vector
