"""Bits per dimension of Gaussian data, where the best model is linear and both figures are known exactly."""

import math

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from core import random
from train.diffusion.likelihood import dequantise, flow_bits, flow_log_density, flow_step, prior_bits, variational_bound
from train.diffusion.process import PREDICTIONS, convert, posterior_log_variance, scales
from train.diffusion.schedules import Schedule, cosine, linear

SCHEDULE = linear(1000)
MIXING = torch.tensor([[0.5, 0.0], [0.3, 0.2]], dtype=torch.float64)
COVARIANCE = MIXING @ MIXING.T
X = random.normal(random.key(0), (5, 2), torch.float64) @ MIXING.T


def gaussian(schedule: Schedule, covariance: Tensor, predicts: str = "noise"):
    """E[noise | x] for x of covariance alpha_bar C + (1 - alpha_bar) I, (batch, width)."""

    def model(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = scales(schedule, time, x)
        identity = torch.eye(x.shape[1], dtype=x.dtype)
        whole = alpha[..., None] ** 2 * covariance.to(x.dtype) + sigma[..., None] ** 2 * identity
        noise = sigma * torch.linalg.solve(whole, x)
        return convert("noise", predicts, noise, x, alpha, sigma)

    return model


def density(schedule: Schedule, covariance: Tensor) -> MultivariateNormal:
    """Density of the data after the first noising."""
    first, width = schedule.alpha_bars[0], len(covariance)
    whole = first * covariance + (1 - first) * torch.eye(width, dtype=torch.float64)
    return MultivariateNormal(torch.zeros(width, dtype=torch.float64), whole)


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_the_flow_s_density_is_the_gaussian_s(predicts):
    """Where the Jacobian is diagonal, random signs give its trace exactly."""
    covariance = torch.diag(torch.tensor([0.5, 0.1], dtype=torch.float64))
    model, exact = gaussian(SCHEDULE, covariance, predicts), density(SCHEDULE, covariance).log_prob(X)
    errors = []
    for steps in (50, 100, 250):
        actual = flow_log_density(model, SCHEDULE, X, random.key(1), steps=steps, predicts=predicts)
        errors.append((actual - exact).abs().max().item())
    # Second order, down to the little that is left of the data where the flow ends.
    assert errors[0] < 0.02 and errors[1] < errors[0] / 3.5 and errors[2] < 1e-3


def test_random_signs_have_the_trace_as_their_mean():
    """Correlated data: e^T J e of one example is off, its mean over signs is not."""
    model, exact = gaussian(SCHEDULE, COVARIANCE), density(SCHEDULE, COVARIANCE).log_prob(X[:1])
    x = X[:1].expand(400, 2)
    options = {"steps": 100}
    by_example = flow_log_density(model, SCHEDULE, x, random.split(random.key(1), 400), **options)
    spread = by_example.std() / 400**0.5
    assert (by_example.mean() - exact).abs() < 4 * spread and by_example.std() > 0.5
    # The mean over 9 draws is off by a third of that.
    by_probe = flow_log_density(model, SCHEDULE, x, random.split(random.key(1), 400), probes=9, **options)
    assert (by_probe.mean() - exact).abs() < 4 * spread / 3
    assert (by_probe.std() / by_example.std()).item() == pytest.approx(1 / 3, rel=0.2)


def test_the_flow_s_bits_are_those_of_the_bins():
    """For a smooth density, bins between their dequantised density and their exact mass there is little."""
    covariance, levels = torch.tensor([[0.3]], dtype=torch.float64), 16
    schedule = linear(1000, first=1e-6)
    image = torch.linspace(-1, 1, levels, dtype=torch.float64)[3:13, None]
    scale = density(schedule, covariance).covariance_matrix.sqrt().item()
    mass = Normal(0.0, scale).cdf(image + 1 / (levels - 1)) - Normal(0.0, scale).cdf(image - 1 / (levels - 1))
    many = image.repeat(200, 1)
    options = {"steps": 300, "levels": levels}
    actual = flow_bits(gaussian(schedule, covariance), schedule, many, random.key(2), **options)
    assert actual.reshape(200, 10).mean(0) == pytest.approx(-mass[:, 0].log2(), abs=0.02)
    noisy = dequantise(random.key(3), many, levels) - many
    assert -1 / 15 <= noisy.min() < -0.066 and 0.066 < noisy.max() < 1 / 15
    assert dequantise(random.key(3), torch.zeros(1000, 1)).abs().max() <= 1 / 255


S = 0.4
SHORT = cosine(12)


def reverse(x: Tensor, time: Tensor) -> Tensor:
    """E[noise | x] and, as a fraction, the exact variance of the step back, of pixels N(0, S^2)."""
    noise = gaussian(SHORT, torch.eye(x.shape[1], dtype=x.dtype) * S**2)(x, time)
    beta = SHORT.betas[time].reshape(-1, 1)
    before = torch.cat([torch.ones(1).double(), SHORT.alpha_bars])[time].reshape(-1, 1)
    variance = before * S**2 + 1 - before
    log_exact = (variance * beta / ((1 - beta) * variance + beta)).log()
    small, large = posterior_log_variance(SHORT, time, x), beta.log()
    fraction = (log_exact - small) / (large - small)
    return torch.cat([noise, 2 * fraction.expand_as(x) - 1], 1)


def test_the_bound_is_tight_where_the_model_is_exact():
    """Then the terms of each image add up, on average, to minus the logarithm of its bin's mass."""
    levels, count = 256, 4000
    image = (torch.tensor([-0.5, 0.1, 0.7]).double() * 127.5).round() / 127.5
    exact = -torch.log2(Normal(0.0, S).cdf(image + 1 / 255) - Normal(0.0, S).cdf(image - 1 / 255))
    many = image[:, None, None].expand(3, count, 1).reshape(-1, 1)
    actual = variational_bound(reverse, SHORT, many, random.key(4), variance="learned", clip=False, levels=levels)
    assert actual.terms.shape == actual.times.shape == (3 * count, 12)
    torch.testing.assert_close(actual.total, actual.prior + actual.terms.sum(1))
    by_image = actual.total.reshape(3, count)
    spread = by_image.std(1) / count**0.5
    assert ((by_image.mean(1) - exact).abs() < 4 * spread).all() and (spread < 0.03).all()
    # Over the data's distribution, a model with another variance does worse.
    data = ((S * random.normal(random.key(6), (6000, 1), torch.float64)).clamp(-1, 1) * 127.5).round() / 127.5
    right = variational_bound(reverse, SHORT, data, random.key(7), variance="learned", clip=False).total
    for variance in ("small", "large"):
        options = {"variance": variance, "clip": False}
        wrong = variational_bound(lambda x, t: reverse(x, t)[:, :1], SHORT, data, random.key(7), **options).total
        assert (wrong - right).mean() > 4 * (wrong - right).std() / 6000**0.5

    # Random times, as many as there are terms: the same on average.
    sampled = variational_bound(
        reverse, SHORT, many, random.key(5), variance="learned", clip=False, levels=levels, draws=2
    )
    assert sampled.terms.shape == (3 * count, 2) and sampled.times.unique().tolist() == list(range(12))
    spread = sampled.total.reshape(3, count).std(1) / count**0.5
    assert ((sampled.total.reshape(3, count).mean(1) - exact).abs() < 4 * spread).all()


def test_the_prior_s_bits():
    image = random.normal(random.key(6), (3, 2, 2), torch.float64)
    last = SHORT.alpha_bars[-3]
    short = Schedule(SHORT.betas[:-2], SHORT.alpha_bars[:-2])
    theirs = kl_divergence(Normal(last.sqrt() * image, (1 - last).sqrt()), Normal(0.0, 1.0))
    torch.testing.assert_close(prior_bits(short, image), theirs.mean((1, 2)) / math.log(2), rtol=1e-10, atol=1e-12)


def test_one_compiled_graph_serves_all_steps_of_the_flow():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def model(x: Tensor, time: Tensor) -> Tensor:
        return torch.tanh(x.flip(1)) * torch.cos(time / 150.0)[:, None]

    step = torch.compile(flow_step("velocity"), fullgraph=True, dynamic=False, backend=counter)
    options = {"steps": 5, "predicts": "velocity", "probes": 2}
    calls = []
    actual = flow_log_density(
        model, SCHEDULE, X.float(), random.key(1), step=step, callback=lambda i: calls.append(i), **options
    )
    expected = flow_log_density(model, SCHEDULE, X.float(), random.key(1), **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1 and calls == [0, 1, 2, 3, 4]
    torch._dynamo.reset()


def test_errors():
    key = random.key(0)
    for call, message in (
        (
            lambda: flow_log_density(reverse, SHORT, X, key, steps=12),
            "a flow over 11 times of the schedule takes 1 to 10 steps, got 12",
        ),
        (lambda: flow_log_density(reverse, SHORT, X, key, probes=0), "probes must be at least 1, got 0"),
        (lambda: flow_log_density(reverse, SHORT, X, key, steps=5, predicts="score"), "predicts must be one of"),
        (lambda: variational_bound(reverse, SHORT, X, key, draws=0), "draws must be at least 1, got 0"),
        (lambda: variational_bound(reverse, SHORT, X, key, predicts="score"), "predicts must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
