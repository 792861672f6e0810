"""Lanczos iteration: a few eigenvalues and eigenvectors of a symmetric operator, and the density of all of them.

    A Q = Q T + β_k q_{k+1} e_kᵀ                             after k products with A from a start q_1

The columns of Q are an orthonormal basis of the Krylov space, T is tridiagonal with α on its diagonal and β beside it,
and its eigenvalues, the Ritz values, approach those of A, the outermost first. The scale of A does not matter: products
are normalised before they are compared. These functions look at values, so compile the product, not them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core import random, tree
from core.curvature.vectors import (
    Operator,
    check_count,
    check_finite,
    draw,
    normalised,
    on_vectors,
    ravel,
    unravel,
    width,
)
from core.tree import Tree


class Lanczos(NamedTuple):
    """`alphas` (k,) and `betas` (k,), of which the last is the distance of the Krylov space from an invariant one;
    `basis`, a tree whose leaves have a leading axis of length k, is None without reorthogonalisation."""

    alphas: Tensor
    betas: Tensor
    basis: Tree | None


class Eigenpairs(NamedTuple):
    """`values` (count,), `vectors` of norm 1, stacked along a leading axis of each leaf, and `residuals` (count,),
    |A v - λ v|: a symmetric A has an eigenvalue within that distance of λ."""

    values: Tensor
    vectors: Tree
    residuals: Tensor


class Density(NamedTuple):
    """A distribution of eigenvalues: `nodes` (m,) and their `weights` (m,), which sum to 1."""

    nodes: Tensor
    weights: Tensor


def lanczos(product: Operator, start: Tree, steps: int, reorthogonalise: bool = True) -> Lanczos:
    """Lanczos iteration (Lanczos 1950).

    Args:
        product: `product(vector) -> A vector` on trees like `start`; A is symmetric.
        start: any tree but zero; `core.curvature.probe(key, params)` is a random one.
        steps: products, up to the number of parameters. It stops earlier where the Krylov space is invariant, as it is
            after r + 1 steps for a matrix of rank r.
        reorthogonalise: keep the whole basis and make each vector orthogonal to all before it. Without, memory does
            not grow with the steps, but converged eigenvalues appear again as copies.

    Raises:
        TypeError, ValueError: a product that is not finite or not a tree like its vector, a start that is zero, or
            fewer than one step.
    """
    check_count("lanczos", steps=steps)
    multiply = on_vectors("lanczos", product, start)
    alphas, betas, basis = _iterate("lanczos", multiply, ravel(start), start, steps, reorthogonalise)
    return Lanczos(alphas, betas, unravel(basis, start) if reorthogonalise else None)


def _iterate(
    name: str, multiply: Callable, start: Tensor, like: Tree, steps: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`lanczos` on vectors: (alphas, betas, basis (k, parameters), or its last two rows)."""
    check_finite(name, start, like, "the start")
    q, norm = normalised(start)
    if norm == 0.0:
        raise ValueError(f"{name}: the start is zero")
    count, previous = min(steps, len(start)), torch.zeros_like(q)
    rows = start.new_empty((count if keep else 0, len(start)))  # (k, parameters)
    alphas: list[float] = []
    betas: list[float] = []
    scale = 0.0
    for step in range(count):
        w = multiply(q)
        check_finite(name, w, like, f"the product of step {step + 1}")
        w, norm = normalised(w)  # everything below is about A q / |A q|, of norm 1
        alpha = float(w @ q)
        if keep:
            rows[step] = q
            for _ in range(2):  # once is not enough where almost nothing remains (Parlett: "twice is enough")
                w = w - (rows[: step + 1] @ w) @ rows[: step + 1]
        else:
            w = w - alpha * q
            if step and norm:
                w = w - betas[-1] / norm * previous
        previous, (q, beta) = q, normalised(w)
        alphas.append(alpha * norm)
        betas.append(beta * norm)
        scale = max(scale, abs(alphas[-1]), betas[-1])
        # Nothing but rounding remains: the space is invariant.
        if betas[-1] <= 10 * torch.finfo(w.dtype).eps * scale:
            break
    # In double precision, for eigh of T; not every device has it.
    diagonal, beside = (torch.tensor(x, dtype=torch.float64) for x in (alphas, betas))
    return diagonal, beside, rows[: len(alphas)]


def _ritz(alphas: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """(Ritz values (k,) in ascending order, eigenvectors (k, k) of T as columns)."""
    return torch.linalg.eigh(torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1))


def ritz_values(alphas: Tensor, betas: Tensor) -> Tensor:
    """The eigenvalues (k,) of T in descending order, float64; `betas` as `lanczos` returns them."""
    return _ritz(alphas, betas)[0].flip(0)


WHICH = ("largest", "smallest", "both", "magnitude")


def top_eigenpairs(product: Operator, start: Tree, count: int, steps: int, which: str = "largest") -> Eigenpairs:
    """Eigenvalues at the ends of the spectrum and their eigenvectors, by Lanczos iteration.

    Look at the residuals: more steps make them smaller. A repeated eigenvalue gives one vector.

    Args:
        product, start: as in `lanczos`.
        steps: products, besides the `count` for the residuals.
        which: "largest" by algebraic value, in descending order; "smallest", in ascending order; "both", half of them
            from each end, in descending order; "magnitude", by absolute value, the largest first.

    Raises:
        TypeError, ValueError: as `lanczos`; more eigenvalues than steps, or than the Krylov space has.
    """
    name = "top_eigenpairs"
    check_count(name, count=count, steps=steps)
    if which not in WHICH:
        raise ValueError(f"{name}: which '{which}' is unknown; expected one of {', '.join(WHICH)}")
    multiply = on_vectors(name, product, start)
    alphas, betas, basis = _iterate(name, multiply, ravel(start), start, steps, keep=True)
    if count > len(alphas):
        ended = "" if len(alphas) == steps else ", after which nothing new is reached from this start"
        raise ValueError(f"{name}: {count} eigenvalues need as many steps; it took {len(alphas)}{ended}")
    values, weights = _ritz(alphas, betas)
    order = torch.arange(len(values))
    if which == "largest":
        order = order.flip(0)
    elif which == "both":
        order = torch.cat([order[len(order) - (count + 1) // 2 :], order[: count // 2]]).sort(descending=True).values
    elif which == "magnitude":
        order = values.abs().argsort(descending=True)
    top = order[:count]
    values, vectors = values[top].to(basis), weights[:, top].T.to(basis) @ basis  # (count,), (count, parameters)
    residuals = [tree.norm(multiply(v) - value * v) for value, v in zip(values, vectors, strict=True)]
    return Eigenpairs(values, unravel(vectors, start), torch.stack(residuals))


def spectral_density(product: Operator, like: Tree, key: Tensor, probes: int = 10, steps: int = 80) -> Density:
    """The density of all eigenvalues, by stochastic Lanczos quadrature.

    Lin, Saad and Yang 2016, "Approximating Spectral Densities of Large Matrices"; for the Hessian of a network Ghorbani
    et al. 2019, arXiv:1901.10159.

    For a random unit vector v, E vᵀ f(A) v = tr f(A) / n, and Lanczos from v gives the Gauss quadrature of vᵀ f(A) v:
    nodes are the Ritz values, weights the squared first components of the eigenvectors of T. It is exact for
    polynomials f of degree below twice the steps; the remaining error is the variance of the probes.

    Args:
        product: as in `lanczos`.
        like: a tree like its vectors, such as the parameters.
        key: (2,).
        probes: random vectors. Each takes `steps` products and, while it is used, `steps` vectors of memory.

    Returns:
        nodes and weights of all probes, float64; `smoothed` turns them into a curve.

    Raises:
        TypeError, ValueError: as `lanczos`, or fewer than one probe.
    """
    name = "spectral_density"
    check_count(name, probes=probes, steps=steps)
    multiply, count = on_vectors(name, product, like), tree.count(like)
    nodes, weights = [], []
    for probe_key in random.sites(key, probes):
        start = draw(probe_key, count, width(like), "normal")
        alphas, betas, _ = _iterate(name, multiply, start, like, steps, keep=True)
        values, vectors = _ritz(alphas, betas)
        nodes.append(values)
        weights.append(vectors[0].square() / probes)
    return Density(torch.cat(nodes), torch.cat(weights))  # (probes * steps,)


def smoothed(density: Density, grid: Tensor, sigma: float) -> Tensor:
    """The density at the points `grid` (points,), with every node blurred by a Gaussian of standard deviation sigma:

    φ(t) = sum_i w_i exp(-(t - λ_i)² / 2σ²) / (σ sqrt(2π)),   whose integral is 1

    With `Density(eigenvalues, 1 / n)` it shows a known spectrum in the same way.
    """
    if not sigma > 0.0:
        raise ValueError(f"smoothed: sigma is {sigma}; expected a positive number")
    nodes, weights = density.nodes.to(grid), density.weights.to(grid)
    distance = (grid[:, None] - nodes) / sigma  # (points, m)
    return (-0.5 * distance.square()).exp() @ weights / (sigma * math.sqrt(2 * math.pi))  # (points,)
