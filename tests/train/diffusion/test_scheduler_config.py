"""Noising processes of diffusers' DDPMScheduler: the same betas, and samples with the same noise."""

import pytest
import torch

from core import random
from train.diffusion import samplers, scheduler_config

diffusers = pytest.importorskip("diffusers")
X = random.normal(random.key(0), (2, 1, 4, 4), torch.float64)
NOISE = random.normal(random.key(1), (5, 2, 1, 4, 4), torch.float64)


@pytest.mark.parametrize("name", [*scheduler_config.SCHEDULES, "trained"])
def test_betas_are_those_of_diffusers(name):
    options = {"beta_schedule": name, "beta_start": 1e-3, "beta_end": 0.03, "num_train_timesteps": 200}
    options = {"trained_betas": [0.1, 0.2, 0.3]} if name == "trained" else options
    scheduler = diffusers.DDPMScheduler(**options)
    out = scheduler_config.read(dict(scheduler.config), "scheduler")
    torch.testing.assert_close(out.schedule.betas.float(), scheduler.betas, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_variance_is_that_of_diffusers(variance, monkeypatch):
    """Ancestral sampling in 5 of 20 steps, by a net that is a function of image and time."""
    library = diffusers.DDPMScheduler(num_train_timesteps=20, variance_type=variance, beta_end=0.2)
    scheduler = scheduler_config.read(dict(library.config), "scheduler")
    options = {"predicts": scheduler.predicts, "variance": scheduler.variance, "clip": scheduler.clip}

    def net(x, time):
        return torch.sin(x + time.reshape(-1, 1, 1, 1))

    sampler = samplers.ddpm(scheduler.schedule, 5, spacing=scheduler.spacing, **options)
    ours = samplers.sample(sampler, net, X, noise=NOISE)
    library.set_timesteps(5)
    remaining, x = iter(NOISE), X
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(remaining))
    for time in library.timesteps:
        x = library.step(net(x, time), time, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)
