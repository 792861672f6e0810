"""Schedules against optax and torch.optim.lr_scheduler, at every step."""

import numpy as np
import optax
import pytest
import torch

from train.optimizers import recipes, schedules

COUNTS = torch.arange(120)


def values(schedule):
    out = [schedule(count) for count in COUNTS]
    assert all(x.shape == () and x.dtype == torch.float32 for x in out)
    return np.array([float(x) for x in out])


def of_torch(make, peak):
    """The learning rates that a torch scheduler uses at each step, for a peak learning rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], peak)
    scheduler = make(optimizer)
    rates = []
    for _ in COUNTS:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def a_step_early(warmup, schedule):
    """optax's warm-up gives the first step a rate of 0; ours is a step ahead of it."""
    return lambda count: schedule(count + 1) if count < warmup else schedule(count)


OPTAX = {
    "constant": (schedules.constant(0.3), optax.constant_schedule(0.3)),
    "linear": (schedules.linear(0.1, 0.7, 40), optax.linear_schedule(0.1, 0.7, 40)),
    "cosine": (schedules.cosine(0.5, 80, 0.1), optax.cosine_decay_schedule(0.5, 80, 0.1)),
    "warmup cosine": (
        schedules.warmup_cosine(0.5, 20, 100, final=0.1, start=0.05),
        a_step_early(20, optax.warmup_cosine_decay_schedule(0.05, 0.5, 20, 100, 0.05)),
    ),
    "warmup": (
        schedules.warmup(schedules.exponential(0.5, 0.9, 10), 20),
        a_step_early(20, optax.warmup_exponential_decay_schedule(0.0, 0.5, 20, 10, 0.9)),
    ),
    "step decay": (schedules.step_decay(0.5, 30, 0.2), optax.exponential_decay(0.5, 30, 0.2, staircase=True)),
    "milestones": (
        schedules.milestones(0.5, [30, 60], 0.1),
        optax.piecewise_constant_schedule(0.5, {30: 0.1, 60: 0.1}),
    ),
    "exponential": (schedules.exponential(0.5, 0.5, 25), optax.exponential_decay(0.5, 25, 0.5)),
    "join": (
        schedules.join([schedules.linear(0.0, 1.0, 10), schedules.constant(0.5), schedules.cosine(0.5, 40)], [10, 50]),
        optax.join_schedules(
            [optax.linear_schedule(0.0, 1.0, 10), optax.constant_schedule(0.5), optax.cosine_decay_schedule(0.5, 40)],
            [10, 50],
        ),
    ),
    "warmup stable decay": (
        schedules.warmup_stable_decay(0.5, 10, 50, 40, final=0.1, decay="cosine"),
        a_step_early(
            10,
            optax.join_schedules(
                [
                    optax.linear_schedule(0.0, 0.5, 10),
                    optax.constant_schedule(0.5),
                    optax.cosine_decay_schedule(0.5, 40, 0.1),
                ],
                [10, 60],
            ),
        ),
    ),
    "no warmup": (schedules.warmup_cosine(0.5, 0, 100), optax.cosine_decay_schedule(0.5, 100)),
}

SCHEDULERS = torch.optim.lr_scheduler
TORCH = {
    "linear": (schedules.linear(0.1, 0.5, 40), lambda o: SCHEDULERS.LinearLR(o, 0.2, 1.0, 40)),
    "cosine": (schedules.cosine(0.5, 119), lambda o: SCHEDULERS.CosineAnnealingLR(o, 119)),
    "step decay": (schedules.step_decay(0.5, 30), lambda o: SCHEDULERS.StepLR(o, 30)),
    "milestones": (schedules.milestones(0.5, [10, 15, 90]), lambda o: SCHEDULERS.MultiStepLR(o, [10, 15, 90])),
    "exponential": (schedules.exponential(0.5, 0.97), lambda o: SCHEDULERS.ExponentialLR(o, 0.97)),
    "noam": (
        schedules.noam(64, 20, 2.0),
        lambda o: SCHEDULERS.LambdaLR(o, lambda i: 2 * 2 * 64**-0.5 * min((i + 1) ** -0.5, (i + 1) * 20**-1.5)),
    ),
    "one cycle": (schedules.one_cycle(0.5, 121), lambda o: SCHEDULERS.OneCycleLR(o, 0.5, 121)),
    "one cycle, options": (
        schedules.one_cycle(0.5, 150, 0.4, 10.0, 100.0),
        lambda o: SCHEDULERS.OneCycleLR(o, 0.5, 150, pct_start=0.4, div_factor=10.0, final_div_factor=100.0),
    ),
    "sqrt": (
        schedules.warmup_stable_decay(0.5, 10, 50, 40, final=0.1, decay="sqrt"),
        lambda o: SCHEDULERS.LambdaLR(
            o, lambda i: (i + 1) / 10 if i < 10 else 1.0 if i < 60 else 1 - 0.9 * min(1.0, (i - 60) / 40) ** 0.5
        ),
    ),
}


@pytest.mark.parametrize("name", OPTAX)
def test_equals_optax(name):
    ours, theirs = OPTAX[name]
    np.testing.assert_allclose(values(ours), [float(theirs(int(c))) for c in COUNTS], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", TORCH)
def test_equals_torch(name):
    ours, make = TORCH[name]
    np.testing.assert_allclose(values(ours), of_torch(make, 0.5), rtol=1e-5, atol=1e-7)


ALL = {**{f"optax {k}": v[0] for k, v in OPTAX.items()}, **{f"torch {k}": v[0] for k, v in TORCH.items()}}


@pytest.mark.parametrize("name", ALL)
def test_vmap_over_counts(name):
    mapped = torch.func.vmap(ALL[name])(COUNTS.to(torch.int32))
    np.testing.assert_allclose(mapped.numpy(), values(ALL[name]), rtol=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.warmup_cosine(0.5, 4, 4),
        schedules.warmup_stable_decay(0.5, 4, 0, 0),
        *(recipes.rate(name, 0.5, 4 + left, 4) for name in recipes.SCHEDULES for left in (0, 1)),
    ],
)
def test_a_warm_up_that_leaves_no_steps_reaches_the_peak(schedule):
    """The schedule after it is at its end from the beginning: a warm-up to its first value would stay at 0."""
    np.testing.assert_allclose(values(schedule)[:4], [0.125, 0.25, 0.375, 0.5])


def test_one_compiled_graph_serves_all_counts():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda count: [s(count) for s in ALL.values()], fullgraph=True, dynamic=False, backend="aot_eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in COUNTS[::40]:
            expected = [s(count) for s in ALL.values()]
            torch.testing.assert_close(compiled(count.clone()), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.linear(0.0, 1.0, -1), "steps must be at least 0, got -1"),
        (lambda: schedules.cosine(1.0, -5), "steps must be at least 0"),
        (lambda: schedules.warmup(schedules.constant(1.0), -1), "steps must be at least 0"),
        (lambda: schedules.warmup_cosine(1.0, 10, 5), "at least 10, got 5"),
        (lambda: schedules.warmup_cosine(1.0, -1, 5), "warmup_steps"),
        (lambda: schedules.noam(512, 0), "warmup_steps must be positive"),
        (lambda: schedules.step_decay(1.0, 0), "every must be positive"),
        (lambda: schedules.milestones(1.0, [-1]), "a milestone must be at least 0"),
        (lambda: schedules.exponential(1.0, 0.0), "factor must be positive"),
        (lambda: schedules.one_cycle(1.0, 0), "steps must be positive"),
        (lambda: schedules.one_cycle(1.0, 10, rise=2.0), "rise must be in"),
        (lambda: schedules.warmup_stable_decay(1.0, 1, 1, -1), "decay_steps"),
        (lambda: schedules.warmup_stable_decay(1.0, 1, 1, 1, decay="step"), "linear, cosine, sqrt, got 'step'"),
        (lambda: schedules.join([schedules.constant(1.0)], [3]), "1 schedules need 0 boundaries, got 1"),
        (lambda: schedules.join([schedules.constant(1.0)] * 3, [5, 3]), "increase"),
    ],
)
def test_errors_name_the_fault(make, message):
    with pytest.raises(ValueError, match=message):
        make()
