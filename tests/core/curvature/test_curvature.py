"""Lanczos, spectral density, traces and solves against the exact dense matrix, in float64."""

import math
import re

import pytest
import torch

from core import random, tree
from core.curvature import (
    Density,
    conjugate_gradient,
    dense,
    hutchinson_diagonal,
    hutchinson_trace,
    lanczos,
    low_rank_inverse,
    probe,
    ritz_values,
    smoothed,
    spectral_density,
    top_eigenpairs,
)
from core.curvature.vectors import ravel, unravel
from core.transforms import hvp
from tests.core.curvature.test_products import PARAMS, fisher_product, ggn_product, hessian_product

F64 = torch.float64
KEY = random.key(11)
START = probe(KEY, PARAMS)
COUNT = tree.count(PARAMS)
HESSIAN = dense(hessian_product, PARAMS)
VALUES, VECTORS = torch.linalg.eigh(HESSIAN)
# Indefinite, so that what is asked of "magnitude", "both" and CG differs from what is asked of the GGN.
assert VALUES[0] < -1e-3 < 1e-3 < VALUES[-1]


def of_matrix(matrix: torch.Tensor):
    """The matrix as a function from tree to tree."""
    return lambda v: unravel(matrix @ ravel(v), v)


def with_values(values: torch.Tensor):
    """A symmetric matrix with these eigenvalues."""
    q, _ = torch.linalg.qr(random.normal(random.key(12), (len(values), len(values)), F64))
    return q @ torch.diag(values) @ q.T


# --- Lanczos


def test_lanczos_tridiagonalises():
    alphas, betas, basis = lanczos(hessian_product, START, 10)
    q = torch.stack([ravel(row) for row in tree.unstack(basis)])
    torch.testing.assert_close(q @ q.T, torch.eye(10, dtype=F64), rtol=0, atol=1e-13)
    t = torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1)
    torch.testing.assert_close(q @ HESSIAN @ q.T, t, rtol=0, atol=1e-13)
    # A Q = Q T + β q e: what is left over lies in the last column and is as long as the last beta.
    rest = HESSIAN @ q.T - q.T @ t
    torch.testing.assert_close(rest[:, :-1], torch.zeros(COUNT, 9, dtype=F64), rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.linalg.vector_norm(rest[:, -1]), betas[-1])


def test_all_steps_give_all_eigenvalues():
    alphas, betas, _ = lanczos(hessian_product, START, 1000)
    assert len(alphas) <= COUNT
    actual = ritz_values(alphas, betas)
    # Shifting the logits' biases together changes nothing: two eigenvalues are 0, and each value is found once.
    assert max(float((VALUES - value).abs().min()) for value in actual) < 1e-12
    assert max(float((actual - value).abs().min()) for value in VALUES) < 1e-8


def test_without_reorthogonalisation():
    whole, short = lanczos(hessian_product, START, 8), lanczos(hessian_product, START, 8, reorthogonalise=False)
    assert short.basis is None
    torch.testing.assert_close(short.alphas, whole.alphas, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(short.betas, whole.betas, rtol=1e-9, atol=1e-11)
    # Over many steps the orthogonality is lost: copies of the largest eigenvalue appear.
    values = torch.cat([torch.linspace(0, 1, COUNT - 1, dtype=F64), torch.tensor([100.0], dtype=F64)])
    product = of_matrix(with_values(values))
    copies = [(ritz_values(*lanczos(product, START, COUNT, keep)[:2]) > 99).sum().item() for keep in (True, False)]
    assert copies[0] == 1 < copies[1]


def test_stops_where_the_space_is_invariant():
    values = torch.zeros(COUNT, dtype=F64)
    values[:3] = torch.tensor([3.0, -1.0, 0.5])
    alphas, betas, basis = lanczos(of_matrix(with_values(values)), START, 20)
    assert len(alphas) == len(betas) == 4 and tree.leaves(basis)[0].shape[0] == 4
    expected = torch.tensor([3.0, 0.5, 0.0, -1.0], dtype=F64)
    torch.testing.assert_close(ritz_values(alphas, betas), expected, rtol=0, atol=1e-12)
    assert len(lanczos(tree_zeros, START, 5).alphas) == 1


def tree_zeros(v):
    return tree.map(torch.zeros_like, v)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("largest", VALUES.flip(0)[:4]),
        ("smallest", VALUES[:4]),
        ("both", torch.cat([VALUES.flip(0)[:2], VALUES[:2].flip(0)])),
        ("magnitude", VALUES[VALUES.abs().argsort(descending=True)][:4]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_top_eigenpairs(which, expected):
    values, vectors, residuals = top_eigenpairs(hessian_product, START, 4, COUNT - 5, which)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    rows = torch.stack([ravel(row) for row in tree.unstack(vectors)])
    torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=F64), rtol=0, atol=1e-10)
    error = torch.linalg.vector_norm(rows @ HESSIAN - values[:, None] * rows, dim=1)
    torch.testing.assert_close(residuals, error, rtol=1e-6, atol=1e-13)
    assert residuals.max() < 1e-4


def test_residual_bounds_the_error_of_few_steps():
    values, _, residuals = top_eigenpairs(hessian_product, START, 3, 6)
    nearest = (values[:, None] - VALUES).abs().min(1).values
    assert (nearest <= residuals).all() and residuals.max() > 1e-6


def test_odd_count_of_both_ends():
    actual = top_eigenpairs(hessian_product, START, 3, COUNT, "both").values
    torch.testing.assert_close(actual, torch.stack([VALUES[-1], VALUES[-2], VALUES[0]]), rtol=1e-10, atol=0)


def test_single_precision_and_other_dtypes():
    def product(v):
        assert all(x.dtype == p.dtype for x, p in zip(tree.leaves(v), tree.leaves(params), strict=True))
        return tree.map(lambda x: (2.0 + tree.norm(tree.map(torch.zeros_like, v))) * x, v)

    params = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2)}
    values, vectors, _ = top_eigenpairs(product, probe(KEY, params), 1, 1)
    assert values.dtype == torch.float32 and vectors["a"].dtype == torch.bfloat16
    torch.testing.assert_close(values, torch.tensor([2.0]), rtol=1e-2, atol=0)
    single = tree.cast(PARAMS, torch.float32)
    actual = top_eigenpairs(lambda v: tree.cast(hessian_product(tree.cast(v, F64)), torch.float32), single, 2, 30)
    torch.testing.assert_close(actual.values, VALUES.flip(0)[:2].float(), rtol=1e-5, atol=0)


# --- density


def test_spectral_density_has_the_moments_of_the_spectrum():
    """E sum_i w_i λ_i^k = tr A^k / n, and for one probe exactly vᵀ A^k v up to k = 2 steps - 1."""
    density = spectral_density(hessian_product, PARAMS, KEY, probes=1, steps=6)
    assert len(density.nodes) == 6 and density.weights.sum() == pytest.approx(1)
    v = ravel(probe(random.sites(KEY, 1)[0], PARAMS))
    v = v / torch.linalg.vector_norm(v)
    for power in range(12):
        moment = v @ torch.linalg.matrix_power(HESSIAN, power) @ v
        torch.testing.assert_close((density.weights * density.nodes**power).sum(), moment, rtol=1e-9, atol=1e-13)


@pytest.mark.slow
def test_mean_over_probes_approaches_the_exact_density():
    exact = Density(VALUES, torch.full((COUNT,), 1 / COUNT, dtype=F64))
    grid = torch.linspace(float(VALUES[0]) - 1, float(VALUES[-1]) + 1, 1001, dtype=F64)
    reference, distance = smoothed(exact, grid, 0.05), []
    assert torch.trapezoid(reference, grid) == pytest.approx(1, abs=1e-6)
    for probes in (4, 400):
        density = spectral_density(of_matrix(HESSIAN), PARAMS, KEY, probes, 20)
        assert density.weights.sum() == pytest.approx(1)
        distance.append(float(torch.trapezoid((smoothed(density, grid, 0.05) - reference).abs(), grid)))
    assert distance[1] < 0.06 and distance[1] < distance[0] / 3


# --- trace and diagonal


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_trace_and_diagonal_within_their_standard_errors(distribution):
    probes = 400
    square = HESSIAN.square().sum()
    rest = square - HESSIAN.diagonal().square().sum()
    trace = hutchinson_trace(of_matrix(HESSIAN), PARAMS, KEY, probes, distribution)
    deviation = (2 * (rest if distribution == "rademacher" else square) / probes).sqrt()
    assert abs(trace.value - HESSIAN.trace()) < 3 * deviation
    torch.testing.assert_close(trace.standard_error, deviation, rtol=0.2, atol=0)
    diagonal = hutchinson_diagonal(of_matrix(HESSIAN), PARAMS, KEY, probes, distribution)
    assert tree.names(diagonal.value) == tree.names(PARAMS)
    error, standard = ravel(diagonal.value) - HESSIAN.diagonal(), ravel(diagonal.standard_error)
    # The rows of the matrix share the probes, so the z-scores are dependent, but each has variance 1.
    z = (error / standard)[standard > 1e-12]
    assert len(z) > 0.9 * COUNT and 0.5 < z.square().mean() < 2 and z.abs().max() < 5


def test_estimates_are_those_of_numpy():
    vectors = [ravel(probe(key, PARAMS, "rademacher")) for key in random.sites(KEY, 5)]
    assert all(set(v.tolist()) == {1.0, -1.0} for v in vectors)
    samples = torch.stack([v @ HESSIAN @ v for v in vectors])
    actual = hutchinson_trace(hessian_product, PARAMS, KEY, 5)
    torch.testing.assert_close(actual.value, samples.mean())
    torch.testing.assert_close(actual.standard_error, samples.std() / math.sqrt(5))
    single = hutchinson_trace(hessian_product, PARAMS, KEY, 1)
    assert single.value == pytest.approx(float(samples[0])) and single.standard_error.isnan()
    # A diagonal matrix has no variance under Rademacher probes.
    exact = hutchinson_diagonal(lambda v: tree.map(lambda x: 3 * x, v), PARAMS, KEY, 3)
    torch.testing.assert_close(ravel(exact.value), torch.full((COUNT,), 3.0, dtype=F64))
    assert ravel(exact.standard_error).max() < 1e-12


@pytest.mark.slow
def test_trace_compiles_and_has_a_gradient():
    def penalty(scale):
        return hutchinson_trace(lambda v: tree.map(lambda x: scale**2 * x, v), torch.ones(COUNT, dtype=F64), KEY, 2)[0]

    torch._dynamo.reset()
    scale = torch.tensor(1.5, dtype=F64)
    slope = torch.compile(torch.func.grad(penalty), fullgraph=True, backend="aot_eager")(scale)
    torch._dynamo.reset()
    assert slope == pytest.approx(2 * 1.5 * COUNT)


# --- solves


def test_conjugate_gradient_solves():
    ggn, b = dense(ggn_product, PARAMS), probe(random.key(13), PARAMS)
    solution, norms = conjugate_gradient(ggn_product, b, damping=0.1, steps=200, tolerance=1e-10)
    expected = torch.linalg.solve(ggn + 0.1 * torch.eye(COUNT, dtype=F64), ravel(b))
    torch.testing.assert_close(ravel(solution), expected, rtol=1e-8, atol=1e-9)
    assert norms[0] == pytest.approx(float(tree.norm(b))) and norms[-1] <= 1e-10 * norms[0] < norms[-2]
    # The recurrence's residual is that of the solution.
    early, norms = conjugate_gradient(ggn_product, b, damping=0.1, steps=4, tolerance=0.0)
    assert len(norms) == 5
    residual = ravel(b) - ggn @ ravel(early) - 0.1 * ravel(early)
    torch.testing.assert_close(torch.linalg.vector_norm(residual), norms[-1])


def test_conjugate_gradient_of_zero_is_zero():
    solution, norms = conjugate_gradient(ggn_product, tree_zeros(PARAMS))
    assert not ravel(solution).any() and norms.tolist() == [0.0]


def test_conjugate_gradient_names_negative_curvature():
    b = unravel(VECTORS[:, 0], PARAMS)
    match = rf"negative or zero curvature, .* = {float(VALUES[0]):.3g}, along step 1: A \+ damping must be positive"
    with pytest.raises(ValueError, match=match):
        conjugate_gradient(hessian_product, b)
    damping = 1.1 * abs(float(VALUES[0]))
    solution, _ = conjugate_gradient(hessian_product, b, damping)
    torch.testing.assert_close(ravel(solution), VECTORS[:, 0] / (VALUES[0] + damping), rtol=1e-4, atol=1e-6)


def test_low_rank_inverse():
    b = probe(random.key(14), PARAMS)
    pairs = top_eigenpairs(hessian_product, START, 5, COUNT, "magnitude")
    top = VALUES.abs().argsort(descending=True)[:5]
    q, values = VECTORS[:, top], VALUES[top]
    expected = q @ ((q.T @ ravel(b)) / (values + 0.2))
    actual = low_rank_inverse(pairs.values, pairs.vectors, 0.2)(b)
    torch.testing.assert_close(ravel(actual), expected, rtol=1e-9, atol=1e-10)
    whole = torch.linalg.solve(q @ torch.diag(values) @ q.T + 0.2 * torch.eye(COUNT, dtype=F64), ravel(b))
    actual = low_rank_inverse(pairs.values, pairs.vectors, 0.2, complement=True)(b)
    torch.testing.assert_close(ravel(actual), whole, rtol=1e-9, atol=1e-10)


def test_low_rank_inverse_of_a_fisher_of_full_rank_is_its_pseudo_inverse():
    b = fisher_product(probe(random.key(15), PARAMS))  # in the range
    pairs = top_eigenpairs(fisher_product, START, 7, 20)
    actual = ravel(low_rank_inverse(pairs.values, pairs.vectors)(b))
    torch.testing.assert_close(actual, torch.linalg.pinv(dense(fisher_product, PARAMS)) @ ravel(b))


# --- refusals


def lengthened(v):
    return {**v, "a": {**v["a"], "bias": torch.zeros(6, dtype=F64)}}


def infinite(v):
    return {**v, "a": {**v["a"], "weight": v["a"]["weight"] / 0}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lanczos(hessian_product, START, 0), "lanczos: steps is 0; expected at least 1"),
        (lambda: lanczos(hessian_product, tree_zeros(START), 3), "lanczos: the start is zero"),
        (lambda: lanczos(hessian_product, infinite(START), 3), "the start is not finite in 'a.weight'"),
        (lambda: lanczos(infinite, START, 3), "the product of step 1 is not finite in 'a.weight'"),
        (lambda: lanczos(lambda v: v["a"], START, 3), "the product is not a tree like its vector: .*'a' is missing"),
        (
            lambda: lanczos(lengthened, START, 3),
            r"leaf 'a.bias' of the product has shape \(6,\); expected shape \(5,\)",
        ),
        (
            lambda: lanczos(lambda v: hvp(lambda p: tree.norm(p), PARAMS, v), START, 3),
            "expected dict, found tuple; of the pair that hvp returns, the product is the second",
        ),
        (lambda: top_eigenpairs(hessian_product, START, 5, 4), "5 eigenvalues need as many steps; it took 4$"),
        (
            lambda: top_eigenpairs(fisher_product, START, 20, 30),
            "20 eigenvalues need as many steps; it took 8, after which nothing new is reached",
        ),
        (lambda: top_eigenpairs(hessian_product, START, 1, 4, "top"), "which 'top' is unknown; expected one of larg"),
        (lambda: spectral_density(hessian_product, PARAMS, KEY, 0), "spectral_density: probes is 0"),
        (lambda: smoothed(Density(VALUES, VALUES), VALUES, 0.0), "sigma is 0.0; expected a positive number"),
        (lambda: hutchinson_trace(hessian_product, PARAMS, KEY, 0), "hutchinson_trace: probes is 0"),
        (lambda: hutchinson_trace(hessian_product, PARAMS, KEY, 1, "cauchy"), "distribution 'cauchy' is unknown"),
        (lambda: hutchinson_diagonal(lengthened, PARAMS, KEY), "leaf 'a.bias' of the product has shape"),
        (lambda: conjugate_gradient(hessian_product, START, steps=0), "conjugate_gradient: steps is 0"),
        (lambda: conjugate_gradient(hessian_product, START, -1.0), "damping is -1.0; expected a number of at least 0"),
        (lambda: conjugate_gradient(infinite, START), "the product of step 1 is not finite in 'a.weight'"),
        (lambda: low_rank_inverse(VALUES[:3], tree.stack([START] * 2)), r"values \(3,\), vectors 'a.bias' \(2, 5\)"),
        (lambda: low_rank_inverse(VALUES[:2], tree.stack([START] * 2), 0.0, True), "complement divides by damping"),
        (lambda: low_rank_inverse(0 * VALUES[:2], tree.stack([START] * 2)), "an eigenvalue plus damping is zero"),
        (
            lambda: low_rank_inverse(VALUES[:2], tree.stack([START] * 2))(START["a"]),
            "the vector is not a tree like the",
        ),
        (lambda: low_rank_inverse(VALUES[:2], tree.stack([START] * 2))(lengthened(START)), "leaf 'a.bias' has shape"),
    ],
    ids=lambda value: "_".join(re.findall("[a-z]+", value)[:5]) if isinstance(value, str) else "",
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
