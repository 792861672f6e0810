"""Figures of generated examples against scipy, scikit-learn and formulas written out with numpy."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.neighbors import NearestNeighbors

from core import random
from train.data.points import mixtures
from train.metrics import generative

GENERATOR = torch.Generator().manual_seed(0)


def features(count, width, shift=0.0, scale=1.0):
    mixing = torch.randn(width, width, generator=GENERATOR, dtype=torch.float64)
    return shift + scale * torch.randn(count, width, generator=GENERATOR, dtype=torch.float64) @ mixing


def frechet_of_scipy(a, b):
    a, b = a.numpy(), b.numpy()
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1])
    distance = np.sum((a.mean(0) - b.mean(0)) ** 2)
    return distance + np.trace(covariances[0] + covariances[1] - 2 * root.real)


@pytest.mark.parametrize(("width", "counts"), [(5, (60, 60)), (5, (60, 33)), (2, (7, 300)), (32, (200, 150))])
def test_frechet_distance_is_scipys(width, counts):
    real, fake = features(counts[0], width), features(counts[1], width, shift=0.5, scale=1.3)
    actual = generative.frechet_distance(real, fake)
    assert actual.dtype == torch.float64 and actual.ndim == 0
    assert float(actual) == pytest.approx(frechet_of_scipy(real, fake), rel=1e-9)
    torch.testing.assert_close(actual, generative.frechet_distance(fake, real))


def test_frechet_distance_of_known_gaussians():
    """Between N(0, s^2) and N(m, t^2) on a line it is m^2 + (s - t)^2."""
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)  # variance 2 with n - 1
    actual = generative.frechet_distance(x, 3 * x + 5)
    torch.testing.assert_close(actual, torch.tensor(25 + (2 * math.sqrt(2)) ** 2, dtype=torch.float64))


def test_frechet_distance_with_fewer_examples_than_features():
    """The covariances are singular; their roots live in the data's span. Reference: a common basis of both sets."""
    real, fake = features(6, 40), features(9, 40, shift=1.0)
    basis = torch.linalg.qr(torch.cat([real - real.mean(0), fake - fake.mean(0)]).T).Q
    s1, s2 = (torch.cov((x @ basis).T) for x in (real, fake))
    values = torch.linalg.eigvals(s1 @ s2).real.clamp(min=0).sqrt().sum()
    expected = (real.mean(0) - fake.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * values
    torch.testing.assert_close(generative.frechet_distance(real, fake), expected, rtol=1e-6, atol=0)
    same = generative.frechet_distance(real, real)
    assert 0 <= same < 1e-10 * s1.trace()


def neighbour_radii(x, k):
    """Neighbours by scikit-learn, without the example itself."""
    return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(x).kneighbors()[0][:, -1]


def distances_of(a, b):
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 1.0, 30.0])
def test_neighbourhood_figures_are_those_written_out(k, shift):
    real, fake = features(80, 4), features(50, 4, shift=shift)
    a, b = real.numpy(), fake.numpy()
    near = distances_of(b, a) <= neighbour_radii(a, k)  # (fake, real): in the balls of the real
    back = distances_of(a, b) <= neighbour_radii(b, k)
    precision, recall = generative.precision_recall(real, fake, k)
    assert float(precision) == pytest.approx(near.any(1).mean()) and float(recall) == pytest.approx(back.any(1).mean())
    density, coverage = generative.density_coverage(real, fake, k)
    assert float(density) == pytest.approx(near.sum() / (k * len(b)))
    assert float(coverage) == pytest.approx(near.any(0).mean())


def test_many_examples_are_taken_in_parts():
    """More than the 1024 rows that are compared at once, far from the origin, in single precision."""
    real = 1000 + torch.randn(1500, 3, generator=GENERATOR)
    fake = 1000 + torch.randn(1100, 3, generator=GENERATOR)
    a, b = real.double().numpy(), fake.double().numpy()
    near = distances_of(b, a) <= neighbour_radii(a, 3)
    assert float(generative.precision_recall(real, fake).precision) == pytest.approx(near.any(1).mean())
    density, coverage = generative.density_coverage(real, fake, 3)
    assert float(density) == pytest.approx(near.sum() / 3300) and float(coverage) == pytest.approx(near.any(0).mean())


def test_what_the_figures_tell_apart():
    """A generator that knows one mode of two: precise, without recall. One that adds far noise: the other way."""
    two = torch.cat([torch.randn(150, 2, generator=GENERATOR), 20 + torch.randn(150, 2, generator=GENERATOR)])
    one = torch.randn(300, 2, generator=GENERATOR)
    precision, recall = generative.precision_recall(two, one)
    assert precision > 0.9 and 0.3 < recall < 0.55
    assert generative.density_coverage(two, one).coverage < 0.55
    noisy = torch.cat([two + 0.01, 300 * torch.randn(300, 2, generator=GENERATOR)])
    assert generative.precision_recall(two, noisy).precision < 0.6
    assert generative.density_coverage(two, noisy).coverage == 1
    again = generative.precision_recall(two, two)
    assert again.precision == 1 and again.recall == 1


def test_modes_of_points_put_by_hand():
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    points = torch.tensor([[0.29, 0.0], [0.0, -0.29], [0.31, 0.0], [1.0, 0.0], [5.0, 5.0], [torch.nan, 0.0]])
    actual = generative.modes(points, centres, 0.1)
    assert actual.counts.tolist() == [2, 1, 0] and actual.covered == 2 and float(actual.good) == 0.5
    assert generative.modes(points, centres, 0.1, within=4.0).counts.tolist() == [3, 1, 0]


@pytest.mark.parametrize("name", mixtures.MIXTURES)
def test_of_the_mixture_itself_989_in_1000_samples_are_good(name):
    mixture = mixtures.standardised(mixtures.MIXTURES[name]())
    points, modes = mixtures.sample(mixture, random.key(0), 20000)
    actual = generative.modes(points, mixture.centres, mixture.deviation)
    assert actual.covered == len(mixture.centres)
    assert float(actual.good) == pytest.approx(1 - math.exp(-4.5), abs=0.003)
    near = (points - mixture.centres[modes]).norm(dim=1) <= 3 * mixture.deviation
    assert actual.counts.tolist() == modes[near].bincount().tolist()


def test_modes_of_several_seeds_at_once():
    mixture = mixtures.ring()
    points = torch.stack([mixtures.sample(mixture, random.key(i), 60)[0] for i in range(3)])
    actual = torch.vmap(lambda p: generative.modes(p, mixture.centres, mixture.deviation))(points)
    for i in range(3):
        alone = generative.modes(points[i], mixture.centres, mixture.deviation)
        assert all(torch.equal(a[i], b) for a, b in zip(actual, alone, strict=True))


FINE = torch.randn(8, 3, generator=GENERATOR)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: generative.frechet_distance(FINE, FINE[:1]),
            r"fake features have shape \(1, 3\), expected \(2 or more",
        ),
        (lambda: generative.frechet_distance(FINE[0], FINE), r"real features have shape \(3,\)"),
        (lambda: generative.frechet_distance(FINE, FINE[:, :2]), "width 3, the fake ones 2"),
        (lambda: generative.frechet_distance(FINE, FINE / 0), "fake features hold values that are not finite"),
        (lambda: generative.precision_recall(FINE, FINE, 8), r"expected \(9 or more"),
        (lambda: generative.precision_recall(FINE, FINE, 0), "k is 0"),
        (lambda: generative.density_coverage(FINE, FINE, 8), "8 real examples have no 8-th"),
        (lambda: generative.modes(FINE, FINE[:, :2], 0.1), r"points \(8, 3\) and centres \(8, 2\)"),
        (lambda: generative.modes(FINE, FINE, 0.0), "must be positive"),
        (lambda: generative.modes(FINE[:0], FINE, 0.1), r"expected points \(1 or more, dimensions\)"),
    ],
)
def test_errors_name_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()
