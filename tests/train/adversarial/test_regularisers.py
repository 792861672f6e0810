"""Penalties on a critic's gradient against torch.autograd.grad, example by example, in float64."""

import pytest
import torch
from torch.func import grad, vmap

from core import random, spec, stats, transforms, tree
from core.layers.normalization import batch_norm, batch_norm_spec
from train.adversarial import regularisers
from train.adversarial.regularisers import REGULARISERS, clip, input_gradient, interpolate

GENERATOR = torch.Generator().manual_seed(0)
REAL = torch.randn(5, 2, 4, 4, generator=GENERATOR, dtype=torch.float64)
FAKE = torch.randn(5, 2, 4, 4, generator=GENERATOR, dtype=torch.float64)
KEY = random.key(3)
PARAMS = {
    "bias": torch.randn(3, generator=GENERATOR, dtype=torch.float64),
    "out": torch.randn(48, generator=GENERATOR, dtype=torch.float64) / 7,
    "weight": torch.randn(3, 2, 3, 3, generator=GENERATOR, dtype=torch.float64) / 4,
}


def critic(params, x):
    hidden = torch.nn.functional.conv2d(x, params["weight"], params["bias"], padding=1)
    return torch.nn.functional.softplus(hidden).flatten(1) @ params["out"]


def patches(params, x):
    return torch.nn.functional.conv2d(x, params["weight"][:1], params["bias"][:1]).tanh()


def points(name):
    """Where each penalty looks."""
    if name == "r1":
        return REAL
    if name == "r2":
        return FAKE
    if name == "dragan":
        noise_key, mix_key = random.fold_in(KEY, 0), random.fold_in(KEY, 1)
        u = random.uniform(mix_key, (5, 1, 1, 1), dtype=torch.float64)
        return REAL + u * 0.5 * REAL.std() * random.uniform(noise_key, REAL.shape, dtype=torch.float64)
    u = random.uniform(KEY, (5, 1, 1, 1), dtype=torch.float64)
    return u * REAL + (1 - u) * FAKE


VALUES = {
    "gradient-penalty": lambda norm: 10 * (norm - 1) ** 2,
    "dragan": lambda norm: 10 * (norm - 1) ** 2,
    "r1": lambda norm: 5 * norm**2,
    "r2": lambda norm: 5 * norm**2,
    "wgan-div": lambda norm: 2 * norm**6,
}


def looped(name, params, f=critic):
    """(batch,) penalties by plain autograd, one example after the other, ready for another backward pass."""
    values = []
    for example in points(name).split(1):
        x = example.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(f(params, x).mean(), x, create_graph=True)
        values.append(VALUES[name](gradient.square().sum().sqrt()))
    return torch.stack(values)


def penalty(name, params, reduction="mean", f=critic):
    return REGULARISERS[name](lambda x: f(params, x), REAL, FAKE, KEY, reduction=reduction)


def test_every_regulariser_has_a_case():
    assert list(VALUES) == list(REGULARISERS)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("f", [critic, patches])
def test_values_are_those_of_autograd(name, f):
    expected = looped(name, PARAMS, f)
    torch.testing.assert_close(penalty(name, PARAMS, "none", f), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(penalty(name, PARAMS, "mean", f), expected.mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", VALUES)
def test_gradient_inside_a_gradient_is_autograds(name):
    params = {key: value.clone().requires_grad_() for key, value in PARAMS.items()}
    expected = torch.autograd.grad(looped(name, params).mean(), list(params.values()), allow_unused=True)
    actual = grad(lambda p: penalty(name, p))(PARAMS)
    for (path, gradient), reference in zip(actual.items(), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-11, atol=1e-11, msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.parametrize(
    "name", [name if name == "gradient-penalty" else pytest.param(name, marks=pytest.mark.slow) for name in VALUES]
)
def test_compiled_step_is_the_eager_one(name):
    torch._dynamo.reset()

    def step(params, real, fake, key):
        def loss(p):
            return REGULARISERS[name](lambda x: critic(p, x), real, fake, key)

        value, gradients = transforms.value_and_grad(loss)(params)
        return value, {path: params[path] - 0.1 * gradients[path] for path in params}

    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(PARAMS, REAL, FAKE, KEY), step(PARAMS, REAL, FAKE, KEY))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", VALUES)
def test_an_ensemble_under_vmap(name):
    several = {path: torch.stack([value, 0.5 * value, -value]) for path, value in PARAMS.items()}
    keys = random.split(KEY, 3)

    def one(params, key):
        return grad(lambda p: REGULARISERS[name](lambda x: critic(p, x), REAL, FAKE, key))(params)

    actual = vmap(one)(several, keys)
    for i in range(3):
        alone = one({path: value[i] for path, value in several.items()}, keys[i])
        torch.testing.assert_close({path: value[i] for path, value in actual.items()}, alone)


@pytest.mark.parametrize("name", VALUES)
def test_a_dead_critic_gives_finite_gradients(name):
    dead = {path: torch.zeros_like(value) for path, value in PARAMS.items()}
    value, gradients = transforms.value_and_grad(lambda p: penalty(name, p))(dead)
    assert torch.isfinite(value) and all(torch.isfinite(x).all() for x in gradients.values())


@pytest.mark.parametrize("name", VALUES)
def test_inputs_and_global_generator_are_left_alone(name):
    state, before = torch.get_rng_state(), [x.clone() for x in (REAL, FAKE, KEY)]
    first, second = penalty(name, PARAMS), penalty(name, PARAMS)
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, (REAL, FAKE, KEY), strict=True))


def test_input_gradient_gives_the_scores_too():
    scores, gradients = input_gradient(lambda x: critic(PARAMS, x), REAL)
    torch.testing.assert_close(scores, critic(PARAMS, REAL))
    assert gradients.shape == REAL.shape


def test_a_1_lipschitz_plane_costs_nothing():
    direction = torch.randn(32, generator=GENERATOR, dtype=torch.float64)
    plane = direction / direction.norm()
    values = regularisers.gradient_penalty(lambda x: x.flatten(1) @ plane, REAL, FAKE, KEY, reduction="none")
    torch.testing.assert_close(values, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-28)


def test_interpolation_lies_between_and_differs_from_example_to_example():
    between = interpolate(KEY, torch.ones(64, 3), torch.zeros(64, 3))
    assert (between >= 0).all() and (between < 1).all()
    assert (between == between[:, :1]).all() and len(between[:, 0].unique()) == 64


@pytest.mark.parametrize("name", ["r1", "r2"])
def test_gradient_of_each_example_is_the_looped_one(name):
    def of_one(params, real, fake):
        return REGULARISERS[name](lambda x: critic(params, x), real.unsqueeze(0), fake.unsqueeze(0), KEY)

    actual = vmap(grad(of_one), (None, 0, 0))(PARAMS, REAL, FAKE)
    params = {path: value.clone().requires_grad_() for path, value in PARAMS.items()}
    for i, value in enumerate(looped(name, params)):
        expected = torch.autograd.grad(value, list(params.values()), retain_graph=True)
        for path, gradient in zip(params, expected, strict=True):
            torch.testing.assert_close(actual[path][i], gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "x"), [("r1", REAL), ("r2", FAKE)])
def test_batch_norm_in_the_critic(name, x):
    """The penalty is that of torch's batch norm, mixed examples and all, and its pass is one update of the Stats."""
    layer = batch_norm_spec(32)
    params, running = spec.split(layer, tree.cast(spec.init(KEY, layer), torch.float64))
    out = torch.linspace(-1, 1, 32, dtype=torch.float64)

    def penalise(params, running):
        def normed(x):
            return batch_norm(tree.merge(params, running), x.flatten(1), train=True).tanh() @ out

        return REGULARISERS[name](normed, REAL, FAKE, KEY)

    gradients, increments = transforms.grad(penalise, argnums=(0, 1))(params, running)
    place, theirs = x.clone().requires_grad_(), [params[k].clone().requires_grad_() for k in ("weight", "bias")]
    hidden = torch.nn.functional.batch_norm(place.flatten(1), None, None, *theirs, training=True)
    (inner,) = torch.autograd.grad((hidden.tanh() @ out).sum(), place, create_graph=True)
    expected = torch.autograd.grad(5 * inner.square().sum((1, 2, 3)).mean(), theirs)
    torch.testing.assert_close([gradients["weight"], gradients["bias"]], list(expected), rtol=1e-9, atol=1e-9)
    updated = stats.update(running, increments)
    torch.testing.assert_close(updated["mean"], 0.1 * x.flatten(1).mean(0))
    assert updated["count"] == 1


def test_half_precision_penalises_in_single():
    half = {path: x.bfloat16() for path, x in PARAMS.items()}
    gradients = input_gradient(lambda x: critic(half, x), REAL.bfloat16())[1]
    value = regularisers.r1(lambda x: critic(half, x), REAL.bfloat16(), FAKE.bfloat16(), KEY, reduction="none")
    torch.testing.assert_close(value, 5 * gradients.float().square().sum((1, 2, 3)), rtol=1e-6, atol=0)
    assert value.dtype == torch.float32


def test_clipping():
    before = {path: value.clone() for path, value in PARAMS.items()}
    clipped = clip(PARAMS, 0.05)
    for path, value in clipped.items():
        torch.testing.assert_close(value, PARAMS[path].clip(-0.05, 0.05))
        assert torch.equal(PARAMS[path], before[path]) and value.abs().max() == 0.05


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: interpolate(KEY, REAL, FAKE[:3]), r"\(5, 2, 4, 4\) and \(3, 2, 4, 4\)"),
        (lambda: input_gradient(lambda x: x.sum(), REAL), r"scores of 5 examples have shape \(\)"),
        (lambda: regularisers.r1(lambda x: critic(PARAMS, x), REAL, FAKE, KEY, reduction="sum"), "reduction must be"),
        (lambda: clip(PARAMS, 0.0), "limit must be positive"),
    ],
)
def test_errors_name_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()
