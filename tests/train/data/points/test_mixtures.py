import math

import pytest
import torch

from core import random
from train.data import DataError
from train.data.points.mixtures import MIXTURES, grid, ring, sample, standardised

KEY = random.key(1)


def test_ring_lies_on_its_circle():
    centres = ring().centres
    assert centres.shape == (8, 2)
    torch.testing.assert_close(centres.norm(dim=1), torch.full((8,), 2.0))
    neighbours = (centres - centres.roll(1, 0)).norm(dim=1)
    torch.testing.assert_close(neighbours, torch.full((8,), 4 * math.sin(math.pi / 8)))


def test_grid_has_every_pair_once():
    actual = {tuple(point) for point in grid().centres.tolist()}
    assert actual == {(x, y) for x in (-4.0, -2.0, 0.0, 2.0, 4.0) for y in (-4.0, -2.0, 0.0, 2.0, 4.0)}


@pytest.mark.parametrize("name", MIXTURES)
def test_standardised_divides_by_the_papers_numbers(name):
    mixture = MIXTURES[name]()
    scaled = standardised(mixture)
    divisor = {"ring": 1.414, "grid": 2.828}[name]
    torch.testing.assert_close(scaled.centres, mixture.centres / divisor, rtol=1e-3, atol=1e-6)
    assert scaled.deviation == pytest.approx(mixture.deviation / divisor, rel=1e-3)
    points, _ = sample(scaled, KEY, 20000)
    assert abs(points.mean()) < 0.02 and points.var(0).mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", MIXTURES)
def test_samples_have_the_mixtures_moments(name):
    mixture = MIXTURES[name]()
    points, modes = sample(mixture, KEY, 20000)
    assert points.shape == (20000, 2) and points.dtype == torch.float32 and modes.dtype == torch.int64
    counts, expected = modes.bincount(minlength=len(mixture.centres)), 20000 / len(mixture.centres)
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)
    offsets = (points - mixture.centres[modes]) / mixture.deviation
    torch.testing.assert_close(offsets.T.cov(), torch.eye(2), rtol=0, atol=0.04)
    assert offsets.mean(0).abs().max() < 0.03


def test_samples_depend_on_the_key_alone():
    state = torch.get_rng_state()
    first, second = sample(ring(), KEY, 50), sample(ring(), KEY, 50)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], sample(ring(), random.key(2), 50)[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_compiles():
    torch._dynamo.reset()
    mixture = grid()
    compiled = torch.compile(lambda key: sample(mixture, key, 40), fullgraph=True, dynamic=False, backend="aot_eager")
    for a, b in zip(compiled(KEY), sample(mixture, KEY, 40), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ring(0), "a ring of 0 modes"),
        (lambda: ring(deviation=0.0), "deviation 0.0"),
        (lambda: grid(spacing=-1.0), "spacing -1.0"),
        (lambda: sample(ring(), KEY, 0), "cannot sample 0 points"),
    ],
)
def test_errors_name_the_number(call, words):
    with pytest.raises(DataError, match=words):
        call()
