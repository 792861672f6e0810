"""Initialisers against torch.nn.init and jax.nn.initializers, and under the transforms."""

import math

import jax
import numpy as np
import pytest
import torch

from core import initializers, random

SHAPES = [(30, 50), (20, 10, 3), (16, 8, 3, 3)]
SCALED = {
    "xavier_uniform": (initializers.xavier_uniform(1.7), lambda w: torch.nn.init.xavier_uniform_(w, 1.7)),
    "xavier_normal": (initializers.xavier_normal(1.7), lambda w: torch.nn.init.xavier_normal_(w, 1.7)),
    "kaiming_uniform": (initializers.kaiming_uniform(), torch.nn.init.kaiming_uniform_),
    "kaiming_uniform a": (
        initializers.kaiming_uniform(a=math.sqrt(5)),
        lambda w: torch.nn.init.kaiming_uniform_(w, math.sqrt(5)),
    ),
    "kaiming_normal out": (
        initializers.kaiming_normal(mode="fan_out", nonlinearity="relu"),
        lambda w: torch.nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    ),
    "kaiming_normal tanh": (
        initializers.kaiming_normal(nonlinearity="tanh"),
        lambda w: torch.nn.init.kaiming_normal_(w, nonlinearity="tanh"),
    ),
}
OTHERS = {
    "constant": initializers.constant(3.5),
    "uniform": initializers.uniform(-1, 2),
    "normal": initializers.normal(0.02, 1.0),
    "truncated_normal": initializers.truncated_normal(0.02),
    "lecun_uniform": initializers.lecun_uniform(),
    "lecun_normal": initializers.lecun_normal(),
    "orthogonal": initializers.orthogonal(1.5),
    "zeros": initializers.zeros,
    "ones": initializers.ones,
}
ALL = {name: ours for name, (ours, _) in SCALED.items()} | OTHERS


@pytest.fixture
def our_draws(monkeypatch):
    """torch.nn.init's draws, replaced by ours: what is left of its initialisers is the scale they ask for."""
    key = random.key(3)

    def uniform_(self, low, high):
        return self.copy_(random.uniform(key, self.shape, self.dtype, low, high))

    def normal_(self, mean, std):
        return self.copy_(random.normal(key, self.shape, self.dtype) * std + mean)

    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high, generator=None: uniform_(self, low, high))
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, mean, std, generator=None: normal_(self, mean, std))
    return key


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("shape", SHAPES)
def test_scale_is_that_of_torch(our_draws, name, shape):
    ours, theirs = SCALED[name]
    torch.testing.assert_close(ours(our_draws, shape, torch.float32), theirs(torch.empty(shape)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 3, 5), (4, 6, 3, 3), (6, 4, 3, 1), (2, 2, 4, 3, 3)])
def test_dirac_is_that_of_torch(shape):
    actual = initializers.dirac(random.key(0), shape)
    assert torch.equal(actual, torch.nn.init.dirac_(torch.empty(shape)))


@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4), (6, 2, 3, 3), (40, 2, 3)])
def test_orthogonal_is_that_of_torch(monkeypatch, shape):
    key, rows = random.key(3), shape[0]
    columns = math.prod(shape[1:])

    def normal_(self, mean, std, generator=None):
        # torch draws (rows, columns) and transposes a wide matrix, we draw the tall one.
        tall = random.normal(key, (max(rows, columns), min(rows, columns)))
        return self.copy_((tall if rows >= columns else tall.T).reshape(self.shape))

    monkeypatch.setattr(torch.Tensor, "normal_", normal_)
    actual = initializers.orthogonal(1.5)(key, shape, torch.float32)
    torch.testing.assert_close(actual, torch.nn.init.orthogonal_(torch.empty(shape), 1.5), rtol=1e-4, atol=1e-5)
    matrix = actual.reshape(rows, columns) / 1.5
    small = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    torch.testing.assert_close(small, torch.eye(min(rows, columns)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (initializers.truncated_normal(0.3), jax.nn.initializers.truncated_normal(0.3)),
        (
            initializers.truncated_normal(2.0, -1.0, 3.0),
            jax.nn.initializers.truncated_normal(2.0, lower=-1.0, upper=3.0),
        ),
        (initializers.normal(0.3), jax.nn.initializers.normal(0.3)),
        (initializers.lecun_uniform(), jax.nn.initializers.lecun_uniform(in_axis=1, out_axis=0)),
        (
            initializers.lecun_normal(),
            jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0),
        ),
    ],
)
def test_values_are_those_of_jax(ours, theirs):
    with jax.default_device(jax.devices("cpu")[0]):
        expected = np.asarray(theirs(jax.random.key(3), (30, 50)))
    np.testing.assert_allclose(ours(random.key(3), (30, 50), torch.float32), expected, rtol=1e-4, atol=1e-6)


def test_constants():
    key = random.key(0)
    assert torch.equal(initializers.zeros(key, (2, 3)), torch.zeros(2, 3))
    assert torch.equal(initializers.ones(key, (2,), torch.float64), torch.ones(2, dtype=torch.float64))
    assert torch.equal(initializers.constant(0.25)(key, (2,), torch.bfloat16), torch.full((2,), 0.25).bfloat16())


@pytest.mark.parametrize("name", ["linear", "sigmoid", "tanh", "relu", "selu"])
def test_gain_is_that_of_torch(name):
    assert initializers.gain(name) == pytest.approx(torch.nn.init.calculate_gain(name))
    assert initializers.gain("leaky_relu", 0.3) == pytest.approx(torch.nn.init.calculate_gain("leaky_relu", 0.3))


@pytest.mark.parametrize("shape", SHAPES)
def test_fans_are_those_of_torch(shape):
    assert initializers.fans(shape) == torch.nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))


@pytest.mark.parametrize("name", ALL)
def test_vmap_over_keys_makes_an_ensemble(name):
    keys = random.split(random.key(5), 3)
    ensemble = torch.vmap(lambda key: ALL[name](key, (6, 4, 2), torch.float32))(keys)
    alone = torch.stack([ALL[name](key, (6, 4, 2), torch.float32) for key in keys])
    torch.testing.assert_close(ensemble, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_half_precision_rounds_the_single_precision_values(name):
    key = random.key(5)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(ALL[name](key, (8, 4), dtype), ALL[name](key, (8, 4), torch.float32).to(dtype))
    assert ALL[name](key, (8, 4), torch.float64).dtype == torch.float64


@pytest.mark.parametrize("name", ALL)
def test_on_the_meta_device(name):
    actual = ALL[name](random.key(0, device="meta"), (8, 4), torch.float32)
    assert actual.is_meta and actual.shape == (8, 4)


def test_compile():
    torch._dynamo.reset()

    def init(key):
        names = ("xavier_uniform", "truncated_normal", "orthogonal")
        return [ALL[name](key, (6, 4), torch.float32) for name in names]

    compiled = torch.compile(init, fullgraph=True, dynamic=False, backend="aot_eager")
    for actual, expected in zip(compiled(random.key(5)), init(random.key(5)), strict=True):
        torch.testing.assert_close(actual, expected)


def test_equal_arguments_make_equal_initialisers():
    assert initializers.normal(0.02) == initializers.normal(0.02) != initializers.normal(0.03)
    assert hash(initializers.xavier_uniform()) == hash(initializers.xavier_uniform(1.0))
    assert initializers.xavier_uniform() != initializers.xavier_normal()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: initializers.kaiming_normal(nonlinearity="gelu"), "unknown nonlinearity 'gelu'"),
        (lambda: initializers.kaiming_normal(mode="fan"), "unknown mode 'fan'"),
        (lambda: initializers.VarianceScaling(1.0, "fan_in", "cauchy"), "unknown distribution 'cauchy'"),
        (
            lambda: initializers.xavier_uniform()(random.key(0), (3,), torch.float32),
            r"\(out, in, \*kernel\), got \(3,\)",
        ),
        (lambda: initializers.orthogonal()(random.key(0), (3,), torch.float32), r"at least 2 dimensions, got \(3,\)"),
        (lambda: initializers.dirac(random.key(0), (3, 3)), r"dirac needs .* \(out, in, \*kernel\), got \(3, 3\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
