"""The noising process of published diffusion models: scheduler_config.json of diffusers (DDPM and DDIM schedulers).

beta_schedule      linear, scaled_linear (square roots equally spaced), squaredcos_cap_v2 (cosine), sigmoid; or the
                   numbers in trained_betas
prediction_type    epsilon, sample, v_prediction
variance_type      fixed_small, fixed_large, learned_range
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from train.diffusion import schedules
from train.diffusion.schedules import Schedule
from train.diffusion.tables import SPACINGS

PREDICTIONS = {"epsilon": "noise", "sample": "image", "v_prediction": "velocity"}
# The two forms of fixed_small differ in whether the standard deviation is computed from a logarithm.
VARIANCES = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned"}
SCHEDULES: dict[str, Callable[[int, float, float], Schedule]] = {
    "linear": lambda steps, first, last: schedules.linear(steps, first, last, scaled=False),
    "scaled_linear": lambda steps, first, last: schedules.from_betas(
        torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    ),
    "sigmoid": lambda steps, first, last: schedules.sigmoid_betas(steps, first, last, scaled=False),
    "squaredcos_cap_v2": lambda steps, first, last: schedules.cosine(steps),
}
FIXED = {
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "thresholding": False,
}
"""Fields with one supported value, which is also their default."""


class Scheduler(NamedTuple):
    """A noising process, the prediction target, and how to sample: `clip` predicted images to [-1, 1], `spacing`."""

    schedule: Schedule
    predicts: str
    variance: str
    clip: bool
    spacing: str


def read(config: dict[str, Any], what: str) -> Scheduler:
    """The process of a scheduler_config.json.

    Args:
        what: the beginning of error messages.

    Raises ValueError naming the first field whose value means something that is not computed here.
    """

    def choice(name: str, usual: Any, known: Any) -> Any:
        value = config.get(name, usual)
        if value not in known:
            raise ValueError(f"{what}: {name} is {value!r}; expected {' or '.join(map(repr, known))}")
        return value

    choice("_class_name", "DDPMScheduler", ("DDPMScheduler", "DDIMScheduler"))
    for name, value in FIXED.items():
        choice(name, value, (value,))
    clip = choice("clip_sample", True, (True, False))
    if clip:
        choice("clip_sample_range", 1.0, (1.0,))
    steps, first, last = (
        config.get(name, usual)
        for name, usual in (("num_train_timesteps", 1000), ("beta_start", 0.0001), ("beta_end", 0.02))
    )
    betas = config.get("trained_betas")
    try:
        if betas is not None:
            schedule = schedules.from_betas(torch.tensor(betas, dtype=torch.float64))
        else:
            schedule = SCHEDULES[choice("beta_schedule", "linear", tuple(SCHEDULES))](steps, first, last)
    except TypeError as error:
        raise ValueError(f"{what}: its betas make no schedule: {error}") from None
    predicts = PREDICTIONS[choice("prediction_type", "epsilon", tuple(PREDICTIONS))]
    variance = VARIANCES[choice("variance_type", "fixed_small", tuple(VARIANCES))]
    return Scheduler(schedule, predicts, variance, clip, choice("timestep_spacing", "leading", SPACINGS))
