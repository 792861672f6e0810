"""Likelihoods, divergences and bounds against torch.distributions and a model whose likelihood is known exactly."""

import math

import pytest
import torch
from torch import distributions
from torch.func import grad, vmap

from core import random
from train.losses import variational


def normal(seed, *shape):
    return random.normal(random.key(seed), shape, torch.float64)


LOGITS, MEAN, LOG_VARIANCE = 3 * normal(0, 5, 2, 3), normal(1, 5, 4), normal(2, 5, 4)
X = random.uniform(random.key(3), (5, 2, 3), torch.float64)


def test_bernoulli_equals_torch():
    bits = (X > 0.5).double()
    expected = distributions.Independent(distributions.Bernoulli(logits=LOGITS), 2).log_prob(bits)
    torch.testing.assert_close(variational.bernoulli_log_likelihood(LOGITS, bits), expected)
    expected = -torch.nn.functional.binary_cross_entropy(LOGITS.sigmoid(), X, reduction="none").sum((1, 2))
    torch.testing.assert_close(variational.bernoulli_log_likelihood(LOGITS, X), expected)
    # Where a probability would be 0 or 1.
    far = torch.tensor([[800.0, -800.0]])
    actual = variational.bernoulli_log_likelihood(torch.cat([far, far]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    torch.testing.assert_close(actual, torch.tensor([0.0, -800.0]))


@pytest.mark.parametrize("log_variance", [0.3, torch.tensor(-1.2), normal(4, 5, 2, 3)], ids=["number", "one", "each"])
def test_gaussian_equals_torch(log_variance):
    scale = torch.as_tensor(log_variance, dtype=torch.float64).mul(0.5).exp()
    expected = distributions.Independent(distributions.Normal(LOGITS, scale.expand_as(LOGITS)), 2).log_prob(X)
    torch.testing.assert_close(variational.gaussian_log_likelihood(LOGITS, log_variance, X), expected)


def test_kl_and_elbo_equal_torch():
    q, p = distributions.Normal(MEAN, (0.5 * LOG_VARIANCE).exp()), distributions.Normal(0.0, 1.0)
    expected = distributions.kl_divergence(q, p)
    kl = variational.kl_divergence(MEAN, LOG_VARIANCE)
    torch.testing.assert_close(kl, expected)
    likelihood = normal(5, 5)
    torch.testing.assert_close(variational.elbo(likelihood, kl, 4.0), likelihood - 4 * expected.sum(1))


def test_squared_error_equals_torch():
    expected = torch.stack([torch.nn.functional.mse_loss(a, b) for a, b in zip(LOGITS, X, strict=True)])
    torch.testing.assert_close(variational.squared_error(LOGITS, X), expected)
    half = variational.squared_error(LOGITS.bfloat16(), X.bfloat16())
    assert half.dtype == torch.float32


# Probabilistic PCA (Tipping & Bishop 1999): x = W z + b + noise, so x ~ N(b, W W^T + s^2 I), and the posterior of z is
# N(M^-1 W^T (x - b), s^2 M^-1) with M = W^T W + s^2 I.
W, B, NOISE = 0.7 * normal(6, 4, 2), normal(7, 4), 0.6
MARGINAL = distributions.MultivariateNormal(B, W @ W.T + NOISE**2 * torch.eye(4))
DATA = B + normal(8, 6, 2) @ W.T + NOISE * normal(9, 6, 4)
PRECISION = W.T @ W + NOISE**2 * torch.eye(2)
POSTERIOR = (DATA - B) @ W @ PRECISION.inverse()
# Independent Gaussians that are not the posterior: too narrow, and off by a little.
Q = POSTERIOR + 0.2, torch.full((6, 2), -1.0, dtype=torch.float64)


def likelihood(z, x=DATA):
    return variational.gaussian_log_likelihood(z @ W.T + B, 2 * math.log(NOISE), x)


def bound(samples, key, chunk=None):
    return variational.importance_weighted_bound(likelihood, *Q, key, samples, chunk)


def mean_bound(samples, key, times):
    """The mean over all samples: (6,)."""
    x, mean, log_variance = (t.repeat(times, 1) for t in (DATA, *Q))
    actual = variational.importance_weighted_bound(lambda z: likelihood(z, x), mean, log_variance, key, samples)
    return actual.reshape(times, 6).mean(0)


def test_bound_of_many_samples_is_the_exact_likelihood():
    actual = bound(20_000, random.key(0), 5_000)
    torch.testing.assert_close(actual, MARGINAL.log_prob(DATA), rtol=0, atol=0.02)


def test_bound_grows_with_the_samples():
    means = [mean_bound(k, random.key(1), 300).mean() for k in (1, 4, 16)]
    steps = torch.stack(means).diff()
    assert (steps > 0.01).all() and means[-1] < MARGINAL.log_prob(DATA).mean()


def test_bound_of_one_sample_is_the_elbo():
    # E[log p(x | z)] under q, in closed form: at the mean, less the variance of W z.
    reconstruction = likelihood(Q[0]) - 0.5 * (Q[1].exp() @ W.square().T).sum(1) / NOISE**2
    expected = variational.elbo(reconstruction, variational.kl_divergence(*Q))
    torch.testing.assert_close(mean_bound(1, random.key(2), 10_000), expected, rtol=0, atol=0.05)


def test_bound_by_hand():
    """The weights of three samples through torch.distributions, and their gradient by q."""
    keys = random.split(random.key(3), 3)
    noise = torch.stack([random.normal(key, (6, 2), torch.float64) for key in keys])

    def by_hand(mean, log_variance):
        q = distributions.Normal(mean, (0.5 * log_variance).exp(), validate_args=False)
        z = q.mean + q.stddev * noise
        prior = distributions.Normal(0.0, 1.0).log_prob(z)
        weights = torch.stack([likelihood(one) for one in z]) + (prior - q.log_prob(z)).sum(-1)
        return weights.exp().mean(0).log()

    def ours(mean, log_variance):
        return variational.importance_weighted_bound(likelihood, mean, log_variance, random.key(3), 3)

    torch.testing.assert_close(ours(*Q), by_hand(*Q))
    actual, expected = (grad(lambda *q, f=f: f(*q).sum(), (0, 1))(*Q) for f in (ours, by_hand))
    torch.testing.assert_close(actual, expected)


def test_bound_does_not_depend_on_chunks_or_the_batch():
    whole = bound(7, random.key(4))
    for chunk in (1, 3, 100):
        torch.testing.assert_close(bound(7, random.key(4), chunk), whole)
    keys = random.split(random.key(5), 6)

    def alone(x, mean, log_variance, key):
        one = mean[None], log_variance[None], key[None]
        return variational.importance_weighted_bound(lambda z: likelihood(z, x[None]), *one, 5)[0]

    torch.testing.assert_close(bound(5, keys, 2), torch.stack(list(map(alone, DATA, *Q, keys))))
    torch.testing.assert_close(bound(5, keys), vmap(alone)(DATA, *Q, keys))


def test_active_units():
    """For a linear model: the variance of the posterior means is known, and latents that say nothing have none."""
    means = torch.cat([normal(10, 4000, 2) * torch.tensor([0.5, 0.2]), 1e-3 * normal(11, 4000, 3) + 2], 1)
    torch.testing.assert_close(variational.activity(means)[:2], torch.tensor([0.25, 0.04]).double(), rtol=0.1, atol=0)
    assert variational.active_units(means) == 2 and variational.active_units(means, 0.1) == 1


def test_half_precision_is_widened():
    half = LOGITS.bfloat16(), X.bfloat16()
    assert variational.bernoulli_log_likelihood(*half).dtype == torch.float32
    assert variational.gaussian_log_likelihood(half[0], 0.0, half[1]).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: variational.bernoulli_log_likelihood(LOGITS, X[:1]), r"one shape \(N, ...\), got \(5, 2, 3\) and \(1"),
        (lambda: variational.gaussian_log_likelihood(LOGITS, normal(0, 9, 5, 2, 3), X), "log_variance .* broadcast"),
        (lambda: variational.elbo(X.sum((1, 2)), MEAN.sum(1)), r"divergences \(N, latent\), found \(5,\) and \(5,\)"),
        (lambda: bound(0, random.key(0)), "0 samples in chunks of 0"),
        (lambda: variational.activity(MEAN[:1]), r"2 or more, latent\), found \(1, 4\)"),
        (lambda: variational.squared_error(X, X[0]), "output and x must have one shape"),
        (lambda: variational.codebook_loss(X, X[0]), "encodings and nearest must have one shape"),
    ],
    ids=["bernoulli", "gaussian", "elbo", "bound", "activity", "squared error", "codebook"],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
