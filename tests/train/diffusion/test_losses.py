"""Losses: against torch.distributions and scipy in float64, against each other, and as pure functions."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.func import grad, vmap

from core import random
from train.diffusion import importance
from train.diffusion.losses import (
    WEIGHTS,
    bound_term,
    diffusion_loss,
    discretised_log_likelihood,
    gaussian_divergence,
    min_snr_weights,
)
from train.diffusion.process import PREDICTIONS, convert, diffuse, posterior_mean, scales, signal_to_noise
from train.diffusion.schedules import cosine

SCHEDULE = cosine(50)
TIME = torch.tensor([1, 7, 20, 48])
SHAPE = (4, 2, 3, 3)
IMAGE = torch.linspace(-1, 1, 72, dtype=torch.float64).reshape(SHAPE)
NOISE = random.normal(random.key(0), SHAPE, torch.float64)
GIVEN = {"time": TIME, "noise": NOISE}
VARIANCES = ("small", "large", "learned")


def model_of(predicts: str, params: float | Tensor = 0.8, learned: bool = False):
    """The same wrong guess at the noise, as each of the three predictions."""

    def model(x: Tensor, time: Tensor) -> Tensor:
        guess = params * torch.tanh(x)
        output = convert("noise", predicts, guess, x, *scales(SCHEDULE, time, x))
        return torch.cat([output, params * torch.cos(x)], 1) if learned else output

    return model


def mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_simple_is_the_squared_error_of_each_prediction():
    x = diffuse(SCHEDULE, IMAGE, TIME, NOISE)
    alpha_bar = SCHEDULE.alpha_bars[TIME].reshape(-1, 1, 1, 1)
    truths = {"noise": NOISE, "image": IMAGE, "velocity": alpha_bar.sqrt() * NOISE - (1 - alpha_bar).sqrt() * IMAGE}
    for predicts in PREDICTIONS:
        model = model_of(predicts)
        expected = mean((model(x, TIME) - truths[predicts]) ** 2)
        assert_same(diffusion_loss(model, SCHEDULE, IMAGE, predicts=predicts, **GIVEN), expected, 1e-9)


def test_min_snr_is_one_loss_however_it_is_predicted():
    losses = [
        diffusion_loss(model_of(p), SCHEDULE, IMAGE, predicts=p, weight="min-snr", gamma=3.0, **GIVEN)
        for p in PREDICTIONS
    ]
    assert_same(losses[0], losses[1], 1e-9)
    assert_same(losses[0], losses[2], 1e-9)
    snr = signal_to_noise(SCHEDULE)
    image_error = diffusion_loss(model_of("image"), SCHEDULE, IMAGE, predicts="image", **GIVEN)
    assert_same(losses[1], image_error * snr[TIME].minimum(torch.tensor(3.0)), 1e-9)
    assert (snr[TIME] > 3).any() and (snr[TIME] < 3).any()
    with pytest.raises(ValueError, match="gamma must be positive, got 0"):
        min_snr_weights(SCHEDULE, "noise", 0)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_bound_is_a_divergence_of_gaussians(variance):
    model = model_of("velocity", learned=variance == "learned")
    x = diffuse(SCHEDULE, IMAGE, TIME, NOISE)
    output = model(x, TIME)
    predicted = convert("velocity", "image", output[:, :2], x, *scales(SCHEDULE, TIME, x))
    beta, now, before = (
        values.reshape(-1, 1, 1, 1)
        for values in (SCHEDULE.betas[TIME], SCHEDULE.alpha_bars[TIME], SCHEDULE.alpha_bars[TIME - 1])
    )
    small = beta * (1 - before) / (1 - now)
    variances = {"small": small, "large": beta}
    if variance == "learned":
        share = (output[:, 2:] + 1) / 2
        variances["learned"] = beta**share * small ** (1 - share)
    q = Normal(posterior_mean(SCHEDULE, IMAGE, x, TIME), small.sqrt())
    p = Normal(posterior_mean(SCHEDULE, predicted, x, TIME), variances[variance].sqrt())
    expected = 50 * mean(kl_divergence(q, p)) / math.log(2)
    options = {"predicts": "velocity", "variance": variance, **GIVEN}
    ours = diffusion_loss(model, SCHEDULE, IMAGE, weight="bound", **options)
    assert_same(ours, expected, 1e-9)
    if variance == "small":
        # (SNR(t - 1) - SNR(t)) / 2 times the image's squared error (Kingma et al. 2021, arXiv:2107.00630, eq. 14).
        snr = signal_to_noise(SCHEDULE)
        weight = 50 * (snr[TIME - 1] - snr[TIME]) / 2 / math.log(2)
        assert_same(ours, weight * mean((predicted - IMAGE) ** 2), 1e-9)
    if variance == "learned":
        hybrid = diffusion_loss(model, SCHEDULE, IMAGE, weight="hybrid", bound_weight=0.01, **options)
        assert_same(hybrid, diffusion_loss(model, SCHEDULE, IMAGE, **options) + 0.01 * ours)


def test_the_hybrid_s_bound_teaches_the_variance_alone():
    def loss(parts: tuple[Tensor, Tensor], weight: str) -> Tensor:
        def model(x, time):
            return torch.cat([parts[0] * x, parts[1] * x], 1)

        return diffusion_loss(model, SCHEDULE, IMAGE, weight=weight, variance="learned", **GIVEN).sum()

    parts = (torch.tensor(0.3).double(), torch.tensor(0.2).double())
    simple, bound, hybrid = (grad(loss)(parts, weight) for weight in ("simple", "bound", "hybrid"))
    assert_same(hybrid[0], simple[0])
    assert_same(hybrid[1], 0.001 * bound[1])
    assert simple[1] == 0 and bound[0] != 0 and bound[1] != 0


def test_mass_of_a_bin():
    """Against scipy's cumulative function and survival function, far into both tails."""
    image = torch.tensor([-1.0, -1.0, -0.2, 0.0, 0.2, 1.0, 1.0, 0.6, -0.6, 0.6], dtype=torch.float64)
    mean = torch.tensor([-1.0, 0.9, -0.2, 0.1, -0.8, 1.0, -0.9, -1.0, 1.0, 0.59], dtype=torch.float64)
    spread = torch.tensor([0.1, 0.1, 0.02, 1.0, 0.05, 0.1, 0.1, 0.06, 0.06, 3.0], dtype=torch.float64)
    ours = discretised_log_likelihood(image, mean, 2 * spread.log(), levels=11)
    half, theirs = 0.1, []
    for x, m, s in zip(image.tolist(), mean.tolist(), spread.tolist(), strict=True):
        x, m = (-x, -m) if x > m else (x, m)  # Where differences are exact.
        low, high = (x - half - m) / s, (x + half - m) / s
        if abs(x) > 0.99:
            theirs.append(stats.norm.logcdf(high) if x < 0 else stats.norm.logsf(low))
        else:
            theirs.append(np.log(stats.norm.cdf(high) - stats.norm.cdf(low)))
    assert_same(ours, torch.tensor(theirs, dtype=torch.float64), 1e-9)
    # All bins are all there is.
    grid = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for m, s in ((0.3, 0.01), (-1.2, 0.5), (0.9, 2.0)):
        log_mass = discretised_log_likelihood(grid, torch.tensor(m).double(), torch.tensor(2 * math.log(s)).double())
        assert_same(log_mass.exp().sum(), torch.tensor(1.0).double())
    # So far out that float32 has no such number, the logarithm and its gradient are still there.
    far = grad(lambda m: discretised_log_likelihood(torch.tensor(-0.5), m, torch.tensor(-9.0)))(torch.tensor(0.9))
    assert torch.isfinite(far) and far < -1000
    with pytest.raises(ValueError, match="at least 2 levels, got 1"):
        discretised_log_likelihood(image, mean, spread, levels=1)


def test_time_0_of_the_bound_is_the_likelihood_of_the_pixels():
    time = torch.tensor([0, 0, 0, 5])
    x = diffuse(SCHEDULE, IMAGE, time, NOISE)
    grid = (IMAGE * 127.5).round() / 127.5
    terms = bound_term(SCHEDULE, 0.9 * x, None, grid, x, time, predicts="image", clip=True)
    # The mean is the predicted image itself, the variance the posterior's one step later.
    spread = (SCHEDULE.betas[1] * (1 - SCHEDULE.alpha_bars[0]) / (1 - SCHEDULE.alpha_bars[1])).sqrt()
    log_mass = discretised_log_likelihood(grid, (0.9 * x).clamp(-1, 1), 2 * spread.log())
    assert_same(terms[:3], -mean(log_mass)[:3] / math.log(2))
    assert (terms[3] - -mean(log_mass)[3] / math.log(2)).abs() > 0.1


def test_gaussian_divergence():
    a, b, c, d = random.normal(random.key(1), (4, 10), torch.float64)
    theirs = kl_divergence(Normal(a, (b / 2).exp()), Normal(c, (d / 2).exp()))
    assert_same(gaussian_divergence(a, b, c, d), theirs)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_an_example_s_gradient_is_its_own(weight):
    keys = random.split(random.key(4), 4)

    def loss(params: Tensor, image: Tensor, keys: Tensor) -> Tensor:
        model = model_of("noise", params, learned=True)
        return diffusion_loss(model, SCHEDULE, image, keys, weight=weight, variance="learned")

    params = torch.tensor(0.8).double()
    alone = vmap(grad(lambda p, x, k: loss(p, x[None], k[None]).sum()), (None, 0, 0))(params, IMAGE, keys)
    assert loss(params, IMAGE, keys).shape == (4,)
    assert_same(alone.sum(), grad(lambda p: loss(p, IMAGE, keys).sum())(params))
    assert diffusion_loss(model_of("noise"), SCHEDULE, IMAGE.bfloat16(), keys[0]).dtype == torch.float32


def test_a_compiled_gradient_equals_the_eager_one():
    """The gradient is that of the hybrid loss, which has all parts."""

    def gradient(params: Tensor, image: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        def loss(params):
            options = {"time": time, "noise": noise, "weight": "hybrid", "variance": "learned"}
            return diffusion_loss(model_of("noise", params, learned=True), SCHEDULE, image, **options).mean()

        return grad(loss)(params)

    arguments = (torch.tensor(0.8), IMAGE.float(), TIME, NOISE.float())
    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same(compiled(*arguments), gradient(*arguments), 1e-5)
    torch._dynamo.reset()


def test_errors():
    model = model_of("noise")
    for options, message in (
        ({}, "needs a key, or both time and noise"),
        ({"time": TIME}, "needs a key"),
        ({**GIVEN, "weight": "snr"}, "weight must be one of simple, min-snr, bound, hybrid, got 'snr'"),
        ({**GIVEN, "predicts": "x"}, "predicts must be one of"),
        ({**GIVEN, "weight": "bound", "variance": "x"}, "variance must be one of"),
        ({**GIVEN, "weight": "hybrid"}, "for a learned variance, got variance 'small'"),
        ({**GIVEN, "weight": "bound", "variance": "learned"}, "a learned variance needs a model"),
    ):
        with pytest.raises(ValueError, match=message):
            diffusion_loss(model, SCHEDULE, IMAGE, **options)


def test_times_by_their_losses():
    """Uniform until each time has a full history, then by the root mean square of its last losses, as in a loop."""
    steps, length = 6, 3
    history, past = importance.init(steps, length), [[] for _ in range(steps)]
    for i in range(40):
        time = random.randint(random.fold_in(random.key(1), i), (16,), 0, steps if i % 2 else 3).to(torch.int64)
        losses = random.uniform(random.fold_in(random.key(2), i), (16,)) * (1 + time)
        before = importance.probabilities(history, uniform=0.1)
        full = all(len(losses) >= length for losses in past)
        root = np.array([np.sqrt(np.mean(np.square(losses[-length:]))) for losses in past]) if full else None
        expected = 0.9 * root / root.sum() + 0.1 / steps if full else np.full(steps, 1 / steps)
        assert_same(before, torch.from_numpy(expected), 1e-7)
        history = importance.update(history, time, losses)
        for t, value in zip(time.tolist(), losses.tolist(), strict=True):
            past[t].append(value)
    assert full and history.counts.tolist() == [len(losses) for losses in past]

    time, weights = importance.draw(history, random.key(3), 20_000)
    p = importance.probabilities(history)
    torch.testing.assert_close(time.bincount().double() / 20_000, p, rtol=0.1, atol=0)
    # Weighted, any function of the time keeps its uniform mean.
    value = torch.arange(6.0) ** 2
    assert (weights * value[time]).mean().item() == pytest.approx(value.mean().item(), rel=0.03)
    with pytest.raises(ValueError, match="at least 1 step"):
        importance.init(0)
