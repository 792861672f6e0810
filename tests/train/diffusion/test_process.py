"""Schedules, the noising process and what is predicted of it: against diffusers, and against Bayes' rule."""

import pytest
import torch
from diffusers.schedulers import DDPMScheduler

from core import random
from train.diffusion import process, schedules
from train.diffusion.process import PREDICTIONS, convert, diffuse, scales, target
from train.diffusion.schedules import SCHEDULES, from_betas, make

SCHEDULE = schedules.cosine(50)
TIME = torch.tensor([0, 3, 49])
IMAGE, NOISE = random.normal(random.key(0), (2, 3, 2, 4, 4), torch.float64)


@pytest.mark.parametrize(
    ("ours", "theirs", "steps"),
    [("linear", "linear", 1000), ("cosine", "squaredcos_cap_v2", 300), ("sigmoid-betas", "sigmoid", 1000)],
)
def test_schedules_are_those_of_diffusers(ours, theirs, steps):
    scheduler = DDPMScheduler(num_train_timesteps=steps, beta_schedule=theirs)
    schedule = make(ours, steps)
    assert schedule.betas.dtype == schedule.alpha_bars.dtype == torch.float64
    torch.testing.assert_close(schedule.betas, scheduler.betas.double(), rtol=1e-5, atol=1e-9)
    # Their float32 products: one rounding a step.
    torch.testing.assert_close(schedule.alpha_bars, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-9)
    noisy = scheduler.add_noise(IMAGE, NOISE, TIME * 5)
    torch.testing.assert_close(diffuse(schedule, IMAGE, TIME * 5, NOISE), noisy, rtol=1e-4, atol=1e-5)


def test_the_sigmoid_falls_as_its_formula_says():
    """alpha_bar is symmetric: at half the steps half is left, and what is lost after u is left at 1 - u."""
    alpha_bars = schedules.sigmoid(1000).alpha_bars
    assert alpha_bars[499].item() == pytest.approx(0.5, abs=1e-12)
    torch.testing.assert_close(alpha_bars[:999], 1 - alpha_bars[:999].flip(0), rtol=1e-7, atol=1e-12)
    steep = schedules.sigmoid(1000, temperature=0.3).alpha_bars
    assert steep[249] > alpha_bars[249] > schedules.sigmoid(1000, temperature=100.0).alpha_bars[249] > 0.749


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_number_of_steps_ends_in_noise(name):
    for steps in (25, 200, 1000):
        schedule = make(name, steps)
        assert len(schedule.betas) == steps and (schedule.alpha_bars.diff() < 0).all()
        assert 0 < schedule.alpha_bars[-1] < 1e-4, steps


def test_errors():
    for call, message in (
        (
            lambda: make("quadratic", 10),
            "no schedule 'quadratic': choose one of linear, cosine, sigmoid, sigmoid-betas",
        ),
        (lambda: make("cosine", 1), "at least 2 steps, got 1"),
        (lambda: make("linear", 15), "inside \\(0, 1\\): of 15 steps, beta 11 is 1.04"),
        (lambda: from_betas(torch.tensor([0.1, 0.0])), "beta 1 is 0.0"),
        (lambda: from_betas(torch.tensor(0.1)), "shape \\(\\)"),
        (lambda: make("sigmoid", 10, start=3.0), "start < end"),
        (lambda: convert("score", "noise", IMAGE, IMAGE, 1.0, 1.0), "one of noise, image, velocity, got 'score'"),
        (lambda: process.heads(IMAGE[:, :1], IMAGE), "twice its channels"),
        (lambda: process.model_log_variance(SCHEDULE, TIME, IMAGE, "learned"), "twice the channels"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_predictions_give_each_other():
    x = diffuse(SCHEDULE, IMAGE, TIME, NOISE)
    alpha, sigma = scales(SCHEDULE, TIME, IMAGE)
    truth = {name: target(name, IMAGE, NOISE, alpha, sigma) for name in PREDICTIONS}
    for source in PREDICTIONS:
        for result in PREDICTIONS:
            actual = convert(source, result, truth[source], x, alpha, sigma)
            torch.testing.assert_close(actual, truth[result], rtol=1e-6, atol=1e-9)
    theirs = DDPMScheduler(50, trained_betas=SCHEDULE.betas.tolist())
    torch.testing.assert_close(truth["velocity"], theirs.get_velocity(IMAGE, NOISE, TIME), rtol=1e-3, atol=1e-5)


def test_posterior_is_that_of_bayes():
    """q(y | x, image) of y = x_{t-1}, by the precision form: two Gaussian factors in y multiplied."""
    time = torch.tensor([1, 20, 49])
    x = diffuse(SCHEDULE, IMAGE, time, NOISE)
    beta, before = (
        values[time - back].reshape(-1, 1, 1, 1) for values, back in ((SCHEDULE.betas, 0), (SCHEDULE.alpha_bars, 1))
    )
    prior_precision, seen_precision = 1 / (1 - before), (1 - beta) / beta
    variance = 1 / (prior_precision + seen_precision)
    mean = variance * (prior_precision * before.sqrt() * IMAGE + seen_precision * x / (1 - beta).sqrt())
    torch.testing.assert_close(process.posterior_mean(SCHEDULE, IMAGE, x, time), mean, rtol=1e-9, atol=1e-12)
    log_variance = process.posterior_log_variance(SCHEDULE, time, x)
    torch.testing.assert_close(log_variance, variance.log(), rtol=1e-9, atol=1e-12)

    at = {v: process.model_log_variance(SCHEDULE, time, x, v, torch.full_like(x, 0.25)) for v in process.VARIANCES}
    torch.testing.assert_close(at["small"], variance.log())
    torch.testing.assert_close(at["large"], beta.log())
    torch.testing.assert_close(at["learned"], (0.25 * beta.log() + 0.75 * variance.log()).expand_as(x))
    # At time 0 the posterior is a point; its variance is then that at time 1, of both fixed kinds.
    first = torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(process.posterior_mean(SCHEDULE, IMAGE, x, first), IMAGE)
    for kind in ("small", "large"):
        assert torch.equal(
            process.model_log_variance(SCHEDULE, first, x, kind),
            process.posterior_log_variance(SCHEDULE, first + 1, x),
        )


def test_noise_and_times_by_one_key_or_a_key_an_example():
    keys = random.split(random.key(0), 3)
    torch.testing.assert_close(process.draw_noise(keys, IMAGE)[1:2], process.draw_noise(keys[1:2], IMAGE[1:2]))
    assert process.draw_noise(keys[0], IMAGE).shape == IMAGE.shape
    assert torch.equal(process.draw_time(keys, SCHEDULE, 3)[2:], process.draw_time(keys[2:], SCHEDULE, 1))
    time = process.draw_time(keys[0], SCHEDULE, 5000)
    assert time.dtype == torch.int64 and torch.equal(time.unique(), torch.arange(50))
