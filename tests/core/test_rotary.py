"""Rotary positions against rotation matrices, and Llama 3's stretching against transformers."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from core import random, rotary


def test_a_pair_is_turned_by_its_angle():
    x, positions = random.normal(random.key(0), (3, 5, 8), torch.float64), torch.tensor([0, 1, 2, 7, 1000])
    rates = rotary.frequencies(8, 100.0)
    assert rates == pytest.approx([1.0, 100**-0.25, 0.1, 100**-0.75], rel=1e-15)
    y = rotary.rotate(x, *rotary.rotation(positions, rates, torch.float64))
    for t, position in enumerate(positions.tolist()):
        for i, rate in enumerate(rates):
            turn = torch.polar(torch.ones((), dtype=torch.float64), torch.tensor(position * rate, dtype=torch.float64))
            expected = torch.complex(x[:, t, i], x[:, t, i + 4]) * turn
            torch.testing.assert_close(torch.complex(y[:, t, i], y[:, t, i + 4]), expected, rtol=0, atol=1e-12)


def test_scores_depend_on_distances_alone():
    q, k = random.normal(random.key(1), (2, 1, 16), torch.float64)
    rates = rotary.frequencies(16)

    def score(i, j):
        q_i, k_j = (rotary.rotate(x, *rotary.rotation(torch.tensor([t]), rates, x.dtype)) for x, t in ((q, i), (k, j)))
        return float(q_i[0] @ k_j[0])

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-10)
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


@pytest.mark.parametrize(
    ("depth", "theta", "stretch"),
    [(64, 500000.0, (32.0, 1.0, 4.0, 8192)), (128, 500000.0, (8.0, 1.0, 4.0, 8192)), (16, 1e4, (2.0, 1.5, 9.0, 64))],
)
def test_stretched_rates_equal_transformers(depth, theta, stretch):
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rope = {"rope_type": "llama3", "rope_theta": theta, **dict(zip(names, stretch, strict=True))}
    config = LlamaConfig(hidden_size=depth * 2, num_attention_heads=2, rope_parameters=rope)
    expected, scaling = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = rotary.frequencies(depth, theta)
    actual = rotary.stretched(plain, *stretch)
    torch.testing.assert_close(torch.tensor(actual), expected, rtol=1e-5, atol=0)
    assert scaling == 1.0 and actual[0] == plain[0] and actual[-1] == pytest.approx(plain[-1] / stretch[0], rel=1e-12)
    turns = [stretch[3] * rate / (2 * math.pi) for rate in plain]
    assert any(stretch[1] < n < stretch[2] for n in turns), "no rate between the two"


def test_odd_heads_are_refused():
    with pytest.raises(ValueError, match="a head of 7 dimensions does not divide into pairs"):
        rotary.frequencies(7)
