"""Lanczos iteration: a few eigenvalues and eigenvectors of a symmetric operator, and the density of all of them.

After k products with A from a start q_1, A Q = Q T + β_k q_{k+1} e_kᵀ: the columns of Q are an orthonormal basis of the
Krylov space, T is tridiagonal with α on its diagonal and β beside it, and its eigenvalues, the Ritz values, approach
those of A, the outermost first. These functions look at the numbers they get, so compile the product, not them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from core import random, tree
from core.curvature.vectors import Operator, check_count, check_finite, draw, on_vectors, ravel, unravel, width
from core.tree import Tree


class Lanczos(NamedTuple):
    """`alphas` (k,) and `betas` (k,), of which the last is how far the Krylov space is from being invariant; `basis`,
    a tree whose leaves have a leading axis of length k, is None without reorthogonalisation."""

    alphas: Tensor
    betas: Tensor
    basis: Tree | None


class Eigenpairs(NamedTuple):
    """`values` (count,), `vectors` of norm 1, stacked along a leading axis of each leaf, and `residuals` (count,),
    |A v - λ v|: an eigenvalue of a symmetric A lies at most that far from λ."""

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
        steps: products, at most as many as there are parameters. It stops earlier where the Krylov space is invariant,
            as it is after r + 1 steps for a matrix of rank r.
        reorthogonalise: keep the whole basis and make each vector orthogonal to all before it. Without, memory does
            not grow with the steps, but converged eigenvalues appear again as copies.

    Raises:
        TypeError, ValueError: a product that is not finite or no tree like its vector, a start that is zero, or fewer
            than one step.
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
    if not bool(start.any()):
        raise ValueError(f"{name}: the start is zero")
    basis = [start / torch.linalg.vector_norm(start)]
    rows = start.new_empty((min(steps, len(start)) if keep else 0, len(start)))
    alphas, betas, scale = [], [], 0.0
    for step in range(min(steps, len(start))):
        q = basis[-1]
        w = multiply(q)
        check_finite(name, w, like, f"the product of step {step + 1}")
        alphas.append(float(w @ q))
        if keep:
            rows[step] = q
            for _ in range(2):  # once is not enough where almost nothing is left (Parlett: "twice is enough")
                w = w - (rows[: step + 1] @ w) @ rows[: step + 1]
        else:
            w = w - alphas[-1] * q
            if step:
                w = w - betas[-1] * basis[-2]
        betas.append(float(torch.linalg.vector_norm(w)))
        scale = max(scale, abs(alphas[-1]), betas[-1])
        # What is left is rounding: the space is invariant.
        if betas[-1] <= 10 * torch.finfo(w.dtype).eps * scale:
            break
        basis = [q, w / betas[-1]]
    # In double precision, for eigh of T; not every device has it.
    return *(torch.tensor(x, dtype=torch.float64) for x in (alphas, betas)), rows[: len(alphas)]


def _ritz(alphas: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """(Ritz values (k,) in ascending order, eigenvectors (k, k) of T as columns)."""
    return torch.linalg.eigh(torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1))


def ritz_values(alphas: Tensor, betas: Tensor) -> Tensor:
    """The eigenvalues (k,) of T in descending order, float64; `betas` as `lanczos` returns them."""
    return _ritz(alphas, betas)[0].flip(0)


WHICH = ("largest", "smallest", "both", "magnitude")


def top_eigenpairs(product: Operator, start: Tree, count: int, steps: int, which: str = "largest") -> Eigenpairs:
    """Eigenvalues at the ends of the spectrum and their eigenvectors, by Lanczos iteration.

    Look at the residuals: more steps make them smaller. Of an eigenvalue that occurs several times one vector is found.

    Args:
        product, start: as in `lanczos`.
        steps: products, besides the `count` that the residuals take.
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
    chosen = order[:count]
    found, vectors = values[chosen].to(basis), weights[:, chosen].T.to(basis) @ basis
    residuals = [torch.linalg.vector_norm(multiply(v) - value * v) for value, v in zip(found, vectors, strict=True)]
    return Eigenpairs(found, unravel(vectors, start), torch.stack(residuals))


def spectral_density(product: Operator, like: Tree, key: Tensor, probes: int = 10, steps: int = 80) -> Density:
    """The density of all eigenvalues, by stochastic Lanczos quadrature.

    Lin, Saad and Yang 2016, "Approximating Spectral Densities of Large Matrices"; for the Hessian of a network Ghorbani
    et al. 2019, arXiv:1901.10159.

    For a random unit vector v, E vᵀ f(A) v = tr f(A) / n, and Lanczos from v gives the Gauss quadrature of vᵀ f(A) v:
    nodes are the Ritz values, weights the squared first components of the eigenvectors of T. It is exact for
    polynomials f of degree below twice the steps; what remains is the chance of the probes.

    Args:
        product: as in `lanczos`.
        like: a tree like its vectors, such as the parameters.
        key: (2,).
        probes: random vectors. Each takes `steps` products and, while it is used, `steps` vectors of memory.

    Returns:
        nodes and weights of all probes, float64; `smoothed` makes a curve of them.

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
    return Density(torch.cat(nodes), torch.cat(weights))


def smoothed(density: Density, grid: Tensor, sigma: float) -> Tensor:
    """The density at the points `grid` (points,), every node blurred by a Gaussian of width sigma:

    φ(t) = sum_i w_i exp(-(t - λ_i)² / 2σ²) / (σ sqrt(2π)),   whose integral is 1

    With `Density(eigenvalues, 1 / n)` it draws a known spectrum in the same way.
    """
    if not sigma > 0.0:
        raise ValueError(f"smoothed: sigma is {sigma}; expected a positive number")
    nodes, weights = density.nodes.to(grid), density.weights.to(grid)
    distance = (grid[:, None] - nodes) / sigma
    return (-0.5 * distance.square()).exp() @ weights / (sigma * math.sqrt(2 * math.pi))
