"""Samplers against diffusers' schedulers along whole trajectories, and against Gaussian data solved on paper."""

import pytest
import torch
import torch._dynamo.testing
from diffusers.schedulers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
)
from torch import Tensor

from core import random
from train.diffusion.guidance import guided, guided_together
from train.diffusion.inpainting import inpaint
from train.diffusion.inversion import ddim_inversion, slerp
from train.diffusion.process import PREDICTIONS, convert, scales
from train.diffusion.samplers import SAMPLERS, ddim, ddpm, dpm_solver, heun, make, sample
from train.diffusion.schedules import Schedule, linear
from train.diffusion.tables import SPACINGS, spaced

SCHEDULE = linear(1000)
SHAPE = (2, 3, 4, 4)
X = random.normal(random.key(0), SHAPE, torch.float64)
# What numpy 2 says where a scheduler of diffusers gives it a tensor.
numpy_copies = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
THEIR_NAMES = {"noise": "epsilon", "image": "sample", "velocity": "v_prediction"}


def model(x: Tensor, time: Tensor) -> Tensor:
    """No net, but not linear, and another function at every time."""
    return torch.tanh(0.7 * x.flip(-1) + 0.2 * x + torch.cos(time / 150.0).to(x.dtype).reshape(-1, 1, 1, 1))


def with_variance(x: Tensor, time: Tensor) -> Tensor:
    return torch.cat([model(x, time), torch.sin(3 * x)], 1)


def theirs(scheduler_class, steps: int, predicts: str = "noise", **options):
    """A scheduler of diffusers over our float64 alpha_bars instead of its float32 ones."""
    scheduler = scheduler_class(prediction_type=THEIR_NAMES[predicts], beta_schedule="linear", **options)
    scheduler.alphas_cumprod = SCHEDULE.alpha_bars
    scheduler.set_timesteps(steps)
    return scheduler


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def trajectory(sampler, model, x, **options) -> Tensor:
    """x after each step, (steps, *x.shape)."""
    states = []
    last = sample(sampler, model, x, callback=lambda i, x, image: states.append(x), **options)
    assert torch.equal(states[-1], last)
    return torch.stack(states)


def their_trajectory(scheduler, model, x, step=None) -> Tensor:
    states = []
    for i, time in enumerate(scheduler.timesteps):
        x = scheduler.step(model(x, time.expand(len(x))), time, x, **({} if step is None else step(i))).prev_sample
        states.append(x)
    return torch.stack(states)


@pytest.mark.parametrize(
    ("predicts", "variance", "clip", "spacing", "steps"),
    [
        ("noise", "small", True, "leading", 50),
        ("noise", "large", True, "leading", 1000),
        ("image", "large", False, "linspace", 30),
        ("velocity", "small", False, "trailing", 7),
        ("velocity", "learned", True, "linspace", 20),
        ("noise", "learned", False, "leading", 25),
    ],
)
def test_ddpm(predicts, variance, clip, spacing, steps):
    kind = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}[variance]
    scheduler = theirs(DDPMScheduler, steps, predicts, variance_type=kind, clip_sample=clip, timestep_spacing=spacing)
    net = with_variance if variance == "learned" else model
    # The scheduler draws from a generator, step after step: we draw the same before.
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(steps)]
    generator.manual_seed(3)
    sampler = ddpm(SCHEDULE, steps, predicts=predicts, variance=variance, clip=clip, spacing=spacing)
    expected = their_trajectory(scheduler, net, X, lambda i: {"generator": generator})
    assert_same(trajectory(sampler, net, X, noise=noise), expected, 1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("predicts", "clip", "spacing", "steps"),
    [("noise", True, "leading", 50), ("image", False, "trailing", 20), ("velocity", True, "leading", 7)],
)
def test_ddim(eta, predicts, clip, spacing, steps):
    scheduler = theirs(DDIMScheduler, steps, predicts, clip_sample=clip, timestep_spacing=spacing)
    noise = list(random.normal(random.key(1), (steps, *SHAPE), torch.float64))
    sampler = ddim(SCHEDULE, steps, eta=eta, predicts=predicts, clip=clip, spacing=spacing)
    expected = their_trajectory(
        scheduler, model, X, lambda i: {"eta": eta, "variance_noise": noise[i], "use_clipped_model_output": True}
    )
    assert_same(trajectory(sampler, model, X, noise=noise), expected)


def test_ddim_with_eta_1_is_ddpm():
    noise = list(random.normal(random.key(1), (1000, *SHAPE), torch.float64))
    assert_same(
        trajectory(ddim(SCHEDULE, eta=1.0), model, X, noise=noise),
        trajectory(ddpm(SCHEDULE), model, X, noise=noise),
        1e-8,
    )


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 40), ("trailing", 10)])
def test_inversion(spacing, steps):
    scheduler = theirs(DDIMInverseScheduler, steps, clip_sample=False, timestep_spacing=spacing)
    image = X.clamp(-1, 1)
    ours = trajectory(ddim_inversion(SCHEDULE, steps, spacing=spacing), model, image)
    assert_same(ours, their_trajectory(scheduler, model, image))


@numpy_copies
@pytest.mark.parametrize("predicts", THEIR_NAMES)
@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 20), ("leading", 10), ("trailing", 8)])
def test_dpm_solver(predicts, spacing, steps):
    """Their arithmetic is in float32: differences of log(alpha / sigma), of size 5, are off by 1e-6, and the errors of
    up to 20 steps add up."""
    scheduler = theirs(DPMSolverMultistepScheduler, steps, predicts, timestep_spacing=spacing)
    sampler = dpm_solver(SCHEDULE, steps, predicts=predicts, clip=False, spacing=spacing)
    ours = trajectory(sampler, model, X)
    assert_same(ours, their_trajectory(scheduler, model, X), 1e-4)


@numpy_copies
def test_heun():
    """Their x is ours over alpha, and they ask the model once a step: twice for each of ours but the last."""
    steps = 10  # their times are not rounded, and 999 / 9 needs none
    scheduler = theirs(HeunDiscreteScheduler, steps, beta_start=1e-4, beta_end=0.02)
    start = ((1 - SCHEDULE.alpha_bars[-1]) / SCHEDULE.alpha_bars[-1]).sqrt()
    x = X / SCHEDULE.alpha_bars[-1].sqrt()
    assert_same(scheduler.sigmas[0].double(), start, 1e-5)
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, time)
        x = scheduler.step(model(scaled, time.expand(len(x))), time, x).prev_sample
    assert_same(sample(heun(SCHEDULE, steps, clip=False), model, X), x, 1e-5)


# Data N(0, s^2): the best noise predictor is linear, and the effect of samplers is known exactly.
S = 0.6


def gaussian(schedule: Schedule):
    def model(x: Tensor, time: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bars[time].to(x.dtype).reshape(-1, 1)
        return (1 - alpha_bar).sqrt() * x / (alpha_bar * S**2 + 1 - alpha_bar)

    return model


def test_ddpm_of_gaussian_data_has_its_variance():
    """All steps are linear, so the variance of what comes out follows from each step's two coefficients.

    A reverse step's variance is that of y given x = sqrt(a) y + sqrt(1 - a) n, y of variance v:
    v (1 - a) / (a v + 1 - a), between the small one and the large one: a learned variance can be exact.
    """
    sampler, one, zero = ddpm(SCHEDULE, variance="learned", clip=False), torch.ones(1, 1).double(), torch.zeros(1, 1)
    alpha_bars = sampler.alpha_bars
    a, v = alpha_bars[:-1] / alpha_bars[1:], alpha_bars[1:] * S**2 + 1 - alpha_bars[1:]
    log_exact = (v * (1 - a) / (a * v + 1 - a)).log().flip(0)
    small, large = sampler.table[:, -3].flip(0), sampler.table[:, -2].flip(0)
    fraction = (log_exact - small) / (large - small)
    assert (fraction[1:] > 0).all() and (fraction[1:] < 1).all()
    fraction[0] = 0  # there is no noise in the last step

    def net(x, time):
        return torch.cat([gaussian(SCHEDULE)(x, time), 2 * fraction[time].reshape(-1, 1) - 1], 1)

    variance = 1.0
    for row in sampler.table:
        middle, of_x, of_noise = (
            sampler.step(net, row, *values)[0].item()
            for values in ((zero.double(),) * 3, (one, zero, zero), (zero.double(), zero, one))
        )
        assert middle == 0
        variance = of_x**2 * variance + of_noise**2
    # The last step takes the mean, without the little variance that is left.
    left = 1 / (1 / S**2 + SCHEDULE.alpha_bars[0] / (1 - SCHEDULE.alpha_bars[0]))
    assert variance == pytest.approx(S**2 - left.item(), rel=1e-6)
    # The noise that the loop draws is new at each step and of unit variance.
    schedule = linear(40)
    x = random.normal(random.key(0), (4000, 1), torch.float64)
    samples = sample(ddpm(schedule, variance="large", clip=False), gaussian(schedule), x, random.key(1))
    assert samples.mean().item() == pytest.approx(0, abs=4 * S / 4000**0.5)
    assert samples.std().item() == pytest.approx(S, rel=0.05)


def test_the_order_of_the_samplers():
    """The flow takes x_T to x_T s / sqrt(alpha_bar_T s^2 + 1 - alpha_bar_T): errors fall as steps go up."""
    schedule, x = linear(1000), torch.ones(1, 1).double()
    last = schedule.alpha_bars[-1]
    exact = S / (last * S**2 + 1 - last).sqrt()

    def error(name, steps):
        sampler = make(name, schedule, steps, clip=False, spacing="trailing")
        return (sample(sampler, gaussian(schedule), x) - exact).abs().item()

    errors = {name: [error(name, steps) for steps in (20, 40, 80)] for name in ("ddim", "dpm-solver++", "heun")}
    assert [errors["ddim"][i] / errors["ddim"][i + 1] for i in (0, 1)] == pytest.approx([2, 2], rel=0.05)
    assert [errors["heun"][i] / errors["heun"][i + 1] for i in (0, 1)] == pytest.approx([3.2, 3.2], rel=0.05)
    assert all(many < few / 4 for few, many in zip(errors["ddim"], errors["dpm-solver++"], strict=True))


def test_inversion_comes_back():
    image = random.normal(random.key(3), (5, 1), torch.float64)
    for predicts in PREDICTIONS:
        exact = gaussian(SCHEDULE)

        def net(x, time, predicts=predicts, exact=exact):
            return convert("noise", predicts, exact(x, time), x, *scales(SCHEDULE, time, x))

        errors = []
        for steps in (20, 100, 500):
            noise = sample(ddim_inversion(SCHEDULE, steps, predicts=predicts), net, image)
            back = sample(ddim(SCHEDULE, steps, predicts=predicts, clip=False), net, noise)
            errors.append((back - image).abs().max().item())
        assert errors[2] < errors[1] / 4 < errors[0] / 16 and errors[2] < 0.005


def test_slerp():
    a, b = X[:1], X[1:]
    assert_same(torch.cat([slerp(a, b, 0.0), slerp(a, b, 1.0)]), X)
    assert_same(slerp(X, X, torch.tensor([0.1, 0.7])), X)
    # Between two of one length, a third of the way is a third of the angle, and of that length.
    a, b = a / a.norm(), b / b.norm()
    third = slerp(a, b, 1 / 3)
    assert_same(third.norm(), torch.ones(()).double())
    assert_same((a * third).sum().acos(), (a * b).sum().acos() / 3)
    with pytest.raises(ValueError, match="one shape"):
        slerp(X, a, 0.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_compiled_graph_serves_all_steps(name):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    sampler = make(name, SCHEDULE, 5)
    x, key = X.float(), random.split(random.key(2), 2)
    step = torch.compile(sampler.step, fullgraph=True, dynamic=False, backend=counter)
    compiled = sample(sampler, model, x, key, step=step)
    assert_same(compiled, sample(sampler, model, x, key), 1e-5)
    assert counter.frame_count == 1
    # With a key an example, one alone is what it is among others.
    assert_same(sample(sampler, model, x[1:], key[1:]), compiled[1:], 1e-5)
    torch._dynamo.reset()


def test_guidance():
    def net(x, time, classes):
        return with_variance(x, time) * classes.reshape(-1, 1, 1, 1)

    classes, nothing, time = torch.tensor([2.0, 3.0]).double(), torch.ones(2).double(), torch.tensor([5, 900])
    separate = guided(lambda x, t: net(x, t, classes), lambda x, t: net(x, t, nothing), 2.5)
    both = separate(X, time)
    assert_same(guided_together(net, classes, nothing, 2.5)(X, time), both)
    conditional, unconditional = net(X, time, classes), net(X, time, nothing)
    # The paper's (1 + w) conditional - w unconditional; the variance is the conditional model's.
    assert_same(both[:, :3], 2.5 * conditional[:, :3] - 1.5 * unconditional[:, :3])
    assert_same(both[:, 3:], conditional[:, 3:])
    with pytest.raises(ValueError, match="must have one shape"):
        guided_together(net, classes, nothing[:1], 2.5)


def test_inpainting_of_gaussian_data():
    """Two pixels that are equal: where one is known, the other is filled in with it, the better with repeats."""
    schedule = linear(50)

    def net(x, time):
        # E[image | x] of one standard normal value observed twice.
        alpha_bar = schedule.alpha_bars[time].to(x.dtype).reshape(-1, 1, 1)
        return alpha_bar.sqrt() * x.sum(-1, keepdim=True).expand_as(x) / (1 + alpha_bar)

    value, x = random.normal(random.key(7), (500, 1, 1), torch.float64), random.normal(random.key(6), (500, 1, 2))
    image = torch.cat([value, torch.full_like(value, 7.0)], -1)
    sampler, mask = ddpm(schedule, predicts="image", variance="large", clip=False), torch.tensor([1, 0])
    errors = []
    for repeats in (1, 4):
        filled = inpaint(sampler, net, x.double(), image, mask, random.key(5), repeats=repeats)
        assert torch.equal(filled[..., 0], image[..., 0])
        errors.append((filled[..., 1] - image[..., 0]).square().mean().sqrt().item())
    assert errors[1] < 0.75 * errors[0] < 0.1


def test_errors():
    for arguments, message in (
        ({"name": "euler"}, "no sampler 'euler': choose one of ddpm, ddim, dpm-solver\\+\\+, heun"),
        ({"steps": 1001}, "a schedule of 1000 steps is sampled in 1 to 1000 steps, got 1001"),
        ({"steps": 0}, "got 0"),
        ({"name": "dpm-solver++", "steps": 1000}, "takes 1 to 999 of 1000 steps, got 1000"),
        ({"predicts": "score"}, "predicts must be one of noise, image, velocity, got 'score'"),
        ({"variance": "huge"}, "variance must be one of small, large, learned, got 'huge'"),
        ({"spacing": "even"}, "spacing must be one of leading, trailing, linspace, got 'even'"),
        ({"name": "ddim", "eta": 2.0}, "eta must be in \\[0, 1\\], got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**({"name": "ddpm", "schedule": SCHEDULE, "steps": 10} | arguments))
    sampler, key = ddpm(SCHEDULE, 5), random.key(0)
    with pytest.raises(ValueError, match="needs a key"):
        sample(sampler, model, X)
    with pytest.raises(ValueError, match="noise of 5 steps, got 4"):
        sample(sampler, model, X, noise=[X] * 4)
    with pytest.raises(ValueError, match="twice its channels: \\(2, 1, 4, 4\\)"):
        sample(sampler, lambda x, t: x[:, :1], X, key)
    with pytest.raises(ValueError, match="learned variance needs"):
        sample(ddpm(SCHEDULE, 5, variance="learned"), model, X, key)
    for shape in ((3, 3), (2, 4, 4), (3, 1, 4, 4), (4,)):
        with pytest.raises(ValueError, match="the mask has shape"):
            inpaint(sampler, model, X, X, torch.ones(shape), key)
    with pytest.raises(ValueError, match="the image has shape"):
        inpaint(sampler, model, X, X[:1], torch.ones(4, 4), key)
    with pytest.raises(ValueError, match="repeats"):
        inpaint(sampler, model, X, X, torch.ones(2, 1, 4, 4), key, repeats=0)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_times_are_the_schedule_s(spacing):
    for total, steps in ((1000, 1000), (1000, 7), (10, 9), (10, 1)):
        time = spaced(total, steps, spacing)
        assert len(time) == steps and 0 <= time[-1] and time[0] < total and (time.diff() < 0).all()
