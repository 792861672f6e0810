"""Influence functions: the change of the loss elsewhere if an example had a little more weight in training.

Koh and Liang 2017, "Understanding Black-box Predictions via Influence Functions", arXiv:1703.04730. With parameters
that minimise the mean loss of the training examples, giving example z the additional weight ε changes them by
-ε H⁻¹ g_z to first order, and so

I(z, z') = d L(z') / dε = -g_z'ᵀ (H + damping)⁻¹ g_z

Leaving z out of N examples is ε = -1/N: the loss of z' changes by about -I(z, z') / N. The curvature H is the Hessian
of the mean training loss (`core.transforms.hvp`) or, positive semi-definite and better behaved where training has not
converged, its Gauss-Newton matrix (`core.curvature.ggn_vp`). `inverse` is a function from tree to tree:

    product = lambda v: ggn_vp(outputs, mean_loss, params, v)
    inverse = inverse_by_conjugate_gradient(product, damping=0.01)
    inverse = low_rank_inverse(values, vectors, damping=0.01)     # of top_eigenpairs(product, ..., which="magnitude")

In all functions loss is `loss(params, batch) -> (N,)`, batches are trees with leading axis N, as in
`core.per_example.reports`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from core import tree
from core.curvature import conjugate_gradient
from core.curvature.solve import reciprocals
from core.per_example import each, reports
from core.transforms import grad, jvp
from core.tree import Tree

Loss = Callable[[Tree, Tree], Tensor]
Operator = Callable[[Tree], Tree]


def inverse_by_conjugate_gradient(
    product: Operator, damping: float = 0.0, steps: int = 1000, tolerance: float = 1e-5
) -> Operator:
    """v -> (A + damping)⁻¹ v by `core.curvature.conjugate_gradient`, which must converge.

    It looks at values, so it does not compile; compile the product.

    Raises:
        ValueError: from the function: as `conjugate_gradient`, or a residual above tolerance * |v| after the steps.
    """

    def inverse(vector: Tree) -> Tree:
        solution, norms = conjugate_gradient(product, vector, damping, steps, tolerance)
        if not bool(norms[-1] <= tolerance * norms[0]):
            left = float(norms[-1] / norms[0])
            raise ValueError(
                f"inverse_by_conjugate_gradient: the relative residual is {left:.1e} after {steps} steps, above the "
                f"tolerance {tolerance:.1e}; raise steps or damping ({damping:g})"
            )
        return solution

    return inverse


def influence(loss: Loss, params: Tree, train: Tree, test: Tree, inverse: Operator) -> Tensor:
    """I(z, mean loss of the test examples) of every training example z: one solve, one pass over the training examples.

    Positive: more weight on z raises the test loss, so z harms.

    Returns:
        (training examples,).

    Raises:
        PerExampleError: as in `reports`; and what `inverse` raises.
    """
    direction = inverse(grad(lambda p: loss(p, test).mean())(params))
    return -reports(loss, params, train, ("dot",), direction=direction).total_dot


def self_influence(loss: Loss, params: Tree, batch: Tree, inverse: Operator, *, chunk: int | None = None) -> Tensor:
    """-I(z, z) = g_zᵀ (H + damping)⁻¹ g_z >= 0 of every example: about N times the rise of its own loss without it.

    One solve per example: see `low_rank_self_influence` for many. It is large for mislabelled examples (section 5.4 of
    the paper).

    Args:
        chunk: examples whose gradients are formed at once; all if None.

    Returns:
        (N,).

    Raises:
        PerExampleError: as in `core.per_example.each`; and what `inverse` raises.
    """
    scores, count = [], tree.leaves(batch)[0].shape[0]
    for start in range(0, count, chunk or count):
        part = tree.map(lambda x, start=start: x[start : start + (chunk or count)], batch)
        for g in tree.unstack(each(loss, params, part)):
            solved = inverse(g)
            scores.append(sum((a * b).sum() for a, b in zip(tree.leaves(g), tree.leaves(solved), strict=True)))
    return torch.stack(scores)


def projections(loss: Loss, params: Tree, batch: Tree, vectors: Tree, *, chunk: int | None = None) -> Tensor:
    """<g_n, q_i>, the projections of per-example gradients on some directions: forward mode, so no gradient is formed.

    Args:
        vectors: like the parameters with a leading axis, one entry per direction, such as those of `top_eigenpairs`.
        chunk: directions at a time; all if None.

    Returns:
        (N, directions).

    Raises:
        TypeError, ValueError: as `core.transforms.jvp`.
    """

    def slopes(vector: Tree) -> Tensor:
        return jvp(lambda p: loss(p, batch), (params,), (vector,))[1]

    return torch.func.vmap(slopes, out_dims=1, chunk_size=chunk)(vectors)


def low_rank_influence(
    loss: Loss,
    params: Tree,
    train: Tree,
    test: Tree,
    values: Tensor,
    vectors: Tree,
    damping: float = 0.0,
    *,
    chunk: int | None = None,
) -> Tensor:
    """I(z, z') of every training example z with every test example z', H known by some of its eigenpairs.

    Schioppa et al. 2021, "Scaling Up Influence Functions", arXiv:2112.03052: gradients are projected on the
    eigenvectors, I(z, z') = -sum_i <g_z', q_i> <q_i, g_z> / (λ_i + damping); what lies outside of them is dropped.
    Arnoldi iteration, by which the paper finds them, is Lanczos iteration where the matrix is symmetric.

    Args:
        values, vectors: (k,), and like the parameters with leading axis k: of
            `core.curvature.top_eigenpairs(product, start, k, steps, which="magnitude")`.
        chunk: as in `projections`.

    Returns:
        (training examples, test examples).

    Raises:
        ValueError: not one vector for each value; an eigenvalue that damping makes 0.
    """
    factors = reciprocals("low_rank_influence", values, vectors, damping)
    left, right = (projections(loss, params, batch, vectors, chunk=chunk) for batch in (train, test))
    return -(left * factors.to(left)) @ right.T  # (training examples, test examples)


def low_rank_self_influence(
    loss: Loss,
    params: Tree,
    batch: Tree,
    values: Tensor,
    vectors: Tree,
    damping: float = 0.0,
    *,
    complement: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """-I(z, z) = sum_i <g_z, q_i>² / (λ_i + damping) of every example, H known by some of its eigenpairs.

    With `complement`, H is taken as 0 outside of the eigenvectors: (|g_z|² - sum_i <g_z, q_i>²) / damping is added.

    Args: as in `low_rank_influence`.

    Returns:
        (N,).

    Raises:
        ValueError: as `low_rank_influence`; `complement` without a positive damping.
        PerExampleError: with `complement`, as in `reports`.
    """
    if complement and not damping > 0.0:
        raise ValueError(
            f"low_rank_self_influence: complement divides by damping, which is {damping}; expected above 0"
        )
    factors = reciprocals("low_rank_self_influence", values, vectors, damping)
    squares = projections(loss, params, batch, vectors, chunk=chunk).square()  # <g_z, q_i>², (N, count)
    scores = squares @ factors.to(squares)  # (N,)
    if not complement:
        return scores
    outside = reports(loss, params, batch).total_norm.square() - squares.sum(1)
    return scores + outside.clamp(min=0) / damping
