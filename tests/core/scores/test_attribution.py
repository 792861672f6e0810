"""Integrated gradients against closed forms."""

import pytest
import torch
from torch.nn import functional as F

from core import random
from core.scores import integrated_gradients

X, B = (random.normal(key, (2, 3), torch.float64) for key in random.split(random.key(0), 2))
close = torch.testing.assert_close


def test_linear_function_gives_each_entry_its_term():
    w = random.normal(random.key(1), (2, 3), torch.float64)
    out = integrated_gradients(lambda x: (w * x).sum(), X, B, 1)
    close(out.values, w * (X - B))
    close(out.difference, (w * (X - B)).sum())


def test_factors_of_a_product_share_it():
    """Symmetry: from a baseline of zeros the six factors have a sixth each; degree 6 is exact with three points."""
    out = integrated_gradients(torch.prod, X, torch.zeros_like(X), 3)
    close(out.values, X.prod().expand(2, 3) / 6)
    assert float(out.error) < 1e-12


def test_quadratic_form():
    """IG_i = (x_i - b_i) times the mean of the gradients at both ends."""
    a = random.normal(random.key(2), (6, 6), torch.float64)

    def function(x):
        return x.flatten() @ a @ x.flatten()

    out = integrated_gradients(function, X, B, 4, chunk=3)
    mean = (X + B).flatten() / 2
    close(out.values, (X - B) * ((a + a.T) @ mean).reshape(2, 3))


def test_sum_is_the_difference_of_the_outputs():
    w = random.normal(random.key(3), (8, 3), torch.float64)

    def function(x):
        return torch.tanh(F.linear(torch.tanh(x), w)).square().sum().log()

    errors = [float(integrated_gradients(function, X, B, points).error) for points in (2, 8, 64)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-9
    out = integrated_gradients(function, X, B, 64)
    close(out.values.sum(), function(X) - function(B))


def test_errors():
    with pytest.raises(ValueError, match=r"x is \(2, 3\), the baseline \(3,\)"):
        integrated_gradients(torch.sum, X, B[0])
    with pytest.raises(ValueError, match="points is 0"):
        integrated_gradients(torch.sum, X, B, 0)
