"""core.scores.sketched and suspicion: dense formulas in numpy, scikit-learn's neighbours."""

import numpy as np
import pytest
import sklearn.neighbors
import torch

from core import random
from core.scores import label_suspicion, neighbour_agreement, sketched_neighbours, sketched_self_influence
from core.scores import sketched as module


@pytest.fixture
def rows():
    return random.normal(random.key(0), (60, 12))


@pytest.fixture
def blocks(monkeypatch):
    """Several blocks in place of one."""
    monkeypatch.setattr(module, "BLOCK", 500)


def test_self_influence_is_the_dense_one(rows, blocks):
    x = rows.double().numpy()
    fisher = x.T @ x / 60
    inverse = np.linalg.inv(fisher + 0.3 * np.trace(fisher) / 12 * np.eye(12))
    expected = np.einsum("ni,ij,nj->n", x, inverse, x)
    np.testing.assert_allclose(sketched_self_influence(rows, 0.3).numpy(), expected, rtol=1e-10)
    assert sketched_self_influence(rows, 1e-9).max() <= 60
    assert torch.equal(sketched_self_influence(torch.zeros(3, 4)), torch.zeros(3, dtype=torch.float64))


def test_neighbours_are_those_of_scikit_learn(rows, blocks):
    distances, expected = sklearn.neighbors.NearestNeighbors(n_neighbors=4, metric="cosine").fit(rows).kneighbors()
    out = sketched_neighbours(rows, 4)
    assert np.array_equal(out.indices.numpy(), expected)
    np.testing.assert_allclose(out.cosines.numpy(), 1 - distances, atol=1e-5)
    assert out.redundant.shape == out.conflicting.shape == (0, 2)


@pytest.mark.parametrize("among", [None, torch.arange(60) % 3 > 0], ids=["all", "some"])
def test_pairs_are_the_extreme_ones_and_share_no_example(rows, blocks, among):
    unit = torch.nn.functional.normalize(rows, dim=1).double()
    cosines = (unit @ unit.T).fill_diagonal_(0)
    out = sketched_neighbours(rows, 3, 5, among)
    allowed = torch.ones(60, dtype=torch.bool) if among is None else among
    for pairs, sign in ((out.redundant, 1), (out.conflicting, -1)):
        left = torch.where(allowed & allowed[:, None], sign * cosines, -2.0)
        for pair in pairs.tolist():
            best = divmod(int(left.argmax()), 60)
            assert pair == sorted(best)
            left[best, :] = left[:, best] = -2.0
    assert out.redundant.shape == out.conflicting.shape == (5, 2)


def test_neighbours_without_gradients_and_with_few_examples():
    out = sketched_neighbours(torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]]), 9, 9)
    assert out.indices.shape == (3, 2) and out.indices[0, 0] == 2
    assert out.cosines[1].tolist() == [0.0, 0.0] and out.redundant[0].tolist() == [0, 2]


def test_agreement_is_the_weighted_share_of_the_neighbours():
    key = random.key(1)
    logits, labels = random.normal(key, (40, 5)), random.randint(key, (40,), 0, 5).long()
    x = logits.double().numpy()
    x = x - x.mean(1, keepdims=True)
    distances, nearest = sklearn.neighbors.NearestNeighbors(n_neighbors=7, metric="cosine").fit(x).kneighbors()
    weights = (1 - distances).clip(min=0)
    expected = (weights * (labels.numpy()[nearest] == labels.numpy()[:, None])).sum(1) / weights.sum(1)
    np.testing.assert_allclose(neighbour_agreement(logits, labels, 7).numpy(), expected, atol=1e-5)
    probabilities = logits.softmax(1).numpy()[np.arange(40), labels]
    held = logits.flip(0).log_softmax(1)
    support = [probabilities, expected, held.exp().numpy()[np.arange(40), labels]]
    suspicion = label_suspicion(logits.log_softmax(1), labels, held, 7)
    np.testing.assert_allclose(suspicion.numpy(), 1 - np.mean(support, 0), atol=1e-5)


def test_refusals(rows):
    with pytest.raises(ValueError, match="sketched_self_influence: damping is 0.0; expected above 0"):
        sketched_self_influence(rows, 0.0)
    with pytest.raises(ValueError, match="sketched_neighbours: 1 examples, k = 1"):
        sketched_neighbours(rows[:1], 1)
    with pytest.raises(ValueError, match=r"the sketches are torch.int64 \(3,\); expected floating-point \(N, size\)"):
        sketched_self_influence(torch.arange(3))
    with pytest.raises(ValueError, match="neighbour_agreement: the labels have shape"):
        neighbour_agreement(rows, torch.zeros(3, dtype=torch.int64))
