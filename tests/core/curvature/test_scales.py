"""Curvature in float32 at scales whose squares it cannot hold: the results scale with the operator and the vector."""

import pytest
import torch

from core import random, tree
from core.curvature import (
    conjugate_gradient,
    hutchinson_diagonal,
    hutchinson_trace,
    lanczos,
    probe,
    ritz_values,
    spectral_density,
    top_eigenpairs,
)
from core.curvature.vectors import ravel, unravel

F32 = torch.float32
LIKE = {"a": torch.zeros(4, 3), "b": torch.zeros(8)}
COUNT = tree.count(LIKE)
START = probe(random.key(0), LIKE)
Q = torch.linalg.qr(random.normal(random.key(1), (COUNT, COUNT), torch.float64))[0]
EIGENVALUES = torch.linspace(1.0, 3.0, COUNT, dtype=torch.float64)
MATRIX = (Q @ torch.diag(EIGENVALUES) @ Q.T).float()

scales = pytest.mark.parametrize("scale", [1e-35, 1e-30, 1e-20, 1.0, 1e20, 1e35])


def operator(scale):
    return lambda v: unravel(scale * (MATRIX @ ravel(v)), v)


def scaled(values, scale):
    return tree.map(lambda x: x * scale, values)


@scales
@pytest.mark.parametrize("reorthogonalise", [True, False])
def test_lanczos(scale, reorthogonalise):
    for product, start in ((operator(scale), START), (operator(1.0), scaled(START, scale))):
        alphas, betas, basis = lanczos(product, start, 8, reorthogonalise)
        expected = lanczos(operator(1.0), START, 8)
        unit = scale if start is START else 1.0
        assert len(alphas) == 8
        torch.testing.assert_close(alphas / unit, expected.alphas, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(betas / unit, expected.betas, rtol=1e-4, atol=1e-5)
        if reorthogonalise:
            rows = torch.stack([ravel(row) for row in tree.unstack(basis)])
            torch.testing.assert_close(rows @ rows.T, torch.eye(8), rtol=0, atol=1e-6)


@scales
def test_lanczos_stops_by_relative_size(scale):
    """A matrix of rank 2 leaves an invariant space after 3 steps, whatever its scale."""
    low_rank = (Q[:, :2] @ torch.diag(torch.tensor([1.0, 2.0], dtype=Q.dtype)) @ Q[:, :2].T).float()
    alphas, betas, _ = lanczos(lambda v: unravel(scale * (low_rank @ ravel(v)), v), START, 10)
    assert len(alphas) == 3
    torch.testing.assert_close(
        ritz_values(alphas, betas)[:2] / scale, torch.tensor([2.0, 1.0]).double(), atol=1e-5, rtol=0
    )


@scales
def test_top_eigenpairs_and_density(scale):
    values, vectors, residuals = top_eigenpairs(operator(scale), START, 2, COUNT)
    torch.testing.assert_close(values / scale, EIGENVALUES.flip(0)[:2].float(), rtol=1e-4, atol=0)
    rows = torch.stack([ravel(row) for row in tree.unstack(vectors)])
    error = torch.linalg.vector_norm(rows @ MATRIX - (values / scale)[:, None] * rows, dim=1)
    torch.testing.assert_close(residuals / scale, error, rtol=0.1, atol=2e-6)
    density, expected = (spectral_density(operator(s), LIKE, random.key(2), 2, 6) for s in (scale, 1.0))
    torch.testing.assert_close(density.nodes / scale, expected.nodes, rtol=1e-4, atol=0)
    torch.testing.assert_close(density.weights, expected.weights, rtol=0, atol=1e-4)


@scales
@pytest.mark.parametrize("of", ["b", "A", "both"])
def test_conjugate_gradient(of, scale):
    """x of A x = b scales as b / A does, and so do the residuals with b; the number of steps does not change."""
    of_b, of_a = (scale if of in ("b", "both") else 1.0), (scale if of in ("A", "both") else 1.0)
    b = probe(random.key(3), LIKE)
    expected, expected_norms = conjugate_gradient(operator(1.0), b, tolerance=1e-5)
    solution, norms = conjugate_gradient(operator(of_a), scaled(b, of_b), tolerance=1e-5)
    assert 4 < len(norms) == len(expected_norms)
    torch.testing.assert_close(ravel(solution) / (of_b / of_a), ravel(expected), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(norms / of_b, expected_norms, rtol=1e-2, atol=1e-5)
    truth = torch.linalg.solve(MATRIX.double(), ravel(b).double())
    torch.testing.assert_close(ravel(solution).double() / (of_b / of_a), truth, rtol=0, atol=1e-4)


def test_norm_beyond_the_dtype():
    """Every element fits float32, their norm does not."""
    b = tree.map(lambda x: torch.full_like(x, 1e38), LIKE)
    assert tree.norm(b).isinf()
    unit = scaled(b, 1e-38)
    expected, _ = conjugate_gradient(operator(1.0), unit)
    solution, norms = conjugate_gradient(operator(1.0), b)
    torch.testing.assert_close(ravel(solution) / 1e38, ravel(expected), rtol=1e-3, atol=1e-5)
    assert norms[0].isinf() and norms[-1] < 1e-5 * 1e38
    torch.testing.assert_close(lanczos(operator(1.0), b, 8)[:2], lanczos(operator(1.0), unit, 8)[:2])
    with pytest.raises(ValueError, match="the curvature along step 1 is beyond torch.float32; scale A"):
        conjugate_gradient(lambda v: tree.map(lambda x: 3e38 * x / x.abs().max(), v), unit)


@scales
@pytest.mark.parametrize("f", [hutchinson_trace, hutchinson_diagonal])
def test_standard_errors(f, scale):
    estimate, expected = (f(operator(s), LIKE, random.key(4), 6) for s in (scale, 1.0))
    for part, reference in zip(estimate, expected, strict=True):
        torch.testing.assert_close(ravel(part) / scale, ravel(reference), rtol=1e-4, atol=1e-5)
    assert (ravel(expected.standard_error) > 0).all()
