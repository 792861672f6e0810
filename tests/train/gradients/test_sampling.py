"""Random batches of private training: statistics of Poisson samples and of samples of a fixed size."""

import math

import pytest
import torch

from core import random
from train.gradients import sampling


def test_every_example_has_the_same_probability_independently():
    count, rate, steps = 200, 0.3, 400
    picks = torch.zeros(steps, count)
    for step in range(steps):
        sample = sampling.poisson_sample(random.key(7), step, count, rate)
        picks[step, sample.indices[sample.mask]] = 1
    variance = rate * (1 - rate)
    # Standard errors: of a share, and of the variance of the size of the sample, which is binomial.
    assert abs(picks.mean() - rate) < 5 * math.sqrt(variance / (steps * count))
    assert (picks.mean(0) - rate).abs().max() < 5 * math.sqrt(variance / steps)
    assert abs(picks.sum(1).var() / (count * variance) - 1) < 5 * math.sqrt(2 / steps)
    # No two examples go together, no two steps either.
    assert (torch.corrcoef(picks.T) - torch.eye(count)).abs().max() < 6 / math.sqrt(steps)
    assert (torch.corrcoef(picks) - torch.eye(steps)).abs().max() < 6 / math.sqrt(count)


def test_sample_is_filled_up():
    for step in range(20):
        plain = sampling.poisson_sample(random.key(7), step, 50, 0.2)
        filled = sampling.poisson_sample(random.key(7), step, 50, 0.2, multiple=8)
        assert len(filled.mask) % 8 == 0 and len(filled.mask) - filled.mask.sum() < 8
        assert torch.equal(filled.indices[filled.mask], plain.indices[plain.mask])
        assert len(plain.indices[plain.mask].unique()) == plain.mask.sum()
    everything = sampling.poisson_sample(random.key(7), 0, 50, 1.0)
    assert torch.equal(everything.indices, torch.arange(50)) and everything.mask.all()
    nothing = sampling.poisson_sample(random.key(7), 0, 50, 1e-9, multiple=8)
    assert not nothing.mask.any() and len(nothing.mask) == 8


@pytest.mark.parametrize(("rate", "threshold"), [(2.0**-33, 0), (1e-300, 0), (2.0**-32, 1), (0.5, 2**31), (1.0, 2**32)])
def test_rates_down_to_none(rate, threshold, monkeypatch):
    """Bits that are the lowest `threshold` values of 32 are in the sample: none below a rate of 2^-32."""
    edge = torch.tensor([threshold - 1, threshold, 0, 2**32 - 1]).clamp(0, 2**32 - 1) - 2**31
    monkeypatch.setattr(random, "bits", lambda key, shape: edge.to(torch.int32))
    sample = sampling.poisson_sample(random.key(0), 0, 4, rate)
    assert sample.indices[sample.mask].tolist() == [i for i in range(4) if edge[i] + 2**31 < threshold]


def test_fixed_samples_are_uniform():
    count, size, steps = 40, 10, 600
    picks = torch.zeros(steps, count)
    for step in range(steps):
        sample = sampling.fixed_sample(random.key(7), step, count, size)
        assert sample.mask.all() and len(sample.indices.unique()) == size
        picks[step, sample.indices] = 1
    rate = size / count
    variance = rate * (1 - rate)
    assert (picks.mean(0) - rate).abs().max() < 5 * math.sqrt(variance / steps)
    # Without replacement, two examples are a little less often together: correlation -1 / (count - 1).
    pairs = torch.corrcoef(picks.T)[~torch.eye(count, dtype=torch.bool)]
    assert abs(pairs.mean() + 1 / (count - 1)) < 1e-3 and (pairs + 1 / (count - 1)).abs().max() < 6 / math.sqrt(steps)
    again = sampling.fixed_sample(random.key(7), 3, count, size, multiple=8)
    assert torch.equal(again.indices[again.mask], picks[3].nonzero().squeeze(1)) and len(again.mask) == 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampling.poisson_sample(random.key(0), 0, 10, 0.0), "poisson_sample: rate is 0.0"),
        (lambda: sampling.poisson_sample(random.key(0), 0, 10, None), "poisson_sample: rate is None"),
        (lambda: sampling.poisson_sample(random.key(0), 0, 0, 0.5), "poisson_sample: count is 0; expected at least 1"),
        (lambda: sampling.poisson_sample(random.key(0), 0, 9, 0.5, 0), "multiple is 0; expected at least 1"),
        (lambda: sampling.fixed_sample(random.key(0), 0, 9, 10), "size is 10; expected 1 to 9, the number of examples"),
        (lambda: sampling.fixed_sample(random.key(0), 0, 9, 0), "size is 0; expected 1 to 9"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
