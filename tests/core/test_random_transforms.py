"""Draws under batched keys, vmap, grad and torch.compile, on the meta device, and beside torch's own generator."""

import math
import warnings

import jax
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from core import random, threefry
from tests.core.test_random import in_jax, keys, on_cpu  # noqa: F401 - a fixture

DRAWS = {
    "split": lambda key: random.split(key, 3),
    "fold_in": lambda key: random.fold_in(key, 5),
    "bits": lambda key: random.bits(key, (2, 3), 64),
    "uniform": lambda key: random.uniform(key, (3,), torch.bfloat16, -1, 2),
    "normal": lambda key: random.normal(key, (2, 3)),
    "truncated_normal": lambda key: random.truncated_normal(key, -1, 2, (3,)),
    "gumbel": lambda key: random.gumbel(key, (3,)),
    "bernoulli": lambda key: random.bernoulli(key, 0.4, (9,)),
    "randint": lambda key: random.randint(key, (3,), 0, 1000),
}
ONE_KEY_DRAWS = {
    "categorical": lambda key: random.categorical(key, torch.arange(6.0).reshape(2, 3)),
    "permutation": lambda key: random.permutation(key, 9),
    "permutation of a tensor": lambda key: random.permutation(key, torch.eye(4)),
}


def assert_same_draw(name, actual, expected):
    """Bits, but for draws through a logarithm: its kernels (for vector registers, for the rest of an array) differ by a
    few eps of 1.2e-7."""
    if name in ("normal", "truncated_normal", "gumbel"):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)
    else:
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("name", DRAWS)
def test_batched_keys_draw_slice_by_slice(name):
    rows = random.split(keys(), 6).reshape(2, 3, 2)
    together = DRAWS[name](rows)
    assert_same_draw(name, together[1, 2], DRAWS[name](rows[1, 2]))
    assert_same_draw(name, together[0, 1], DRAWS[name](rows[0, 1]))


@pytest.mark.parametrize("name", DRAWS | ONE_KEY_DRAWS)
def test_vmap_over_keys(name):
    f, rows = (DRAWS | ONE_KEY_DRAWS)[name], random.split(keys(), 3)
    assert_same_draw(name, torch.vmap(f)(rows), torch.stack([f(row) for row in rows]))


COMPILED = ("bits", "normal", "permutation")  # the others are slow


@pytest.mark.parametrize(
    "name",
    [name if name in COMPILED else pytest.param(name, marks=pytest.mark.slow) for name in DRAWS | ONE_KEY_DRAWS],
)
def test_compile(name):
    f = (DRAWS | ONE_KEY_DRAWS)[name]
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same_draw(name, compiled(keys()), f(keys()))


@pytest.mark.slow
def test_inductor_draws_the_same_bits():
    """Integers and one exact difference, so bits whatever the kernel; a size that leaves a remainder in vectors."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda key: random.uniform(key, (67,)), fullgraph=True, dynamic=False)
    assert torch.equal(compiled(keys()), random.uniform(keys(), (67,)))


@pytest.mark.parametrize("name", DRAWS)
def test_shapes_on_the_meta_device(name):
    actual, expected = DRAWS[name](keys().to("meta")), DRAWS[name](keys())
    assert actual.is_meta and actual.shape == expected.shape and actual.dtype == expected.dtype


@pytest.mark.parametrize("name", DRAWS | ONE_KEY_DRAWS)
def test_global_generator_and_key_stay_as_they_are(name):
    key, state = keys(), torch.get_rng_state()
    (DRAWS | ONE_KEY_DRAWS)[name](key)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(key, keys())


def test_gradient_of_uniform_in_its_range():
    unit = random.uniform(keys(), (100,), torch.float64)

    def total(low, high):
        return random.uniform(keys(), (100,), torch.float64, low, high).sum()

    ends = torch.tensor(-2.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    low, high = torch.func.grad(total, argnums=(0, 1))(*ends)
    torch.testing.assert_close(low, (1 - unit).sum())
    torch.testing.assert_close(high, unit.sum())


def test_gradient_of_truncated_normal_is_that_of_jax():
    """Up to the error of the polynomial's derivative."""
    ours = torch.func.grad(lambda a, b: random.truncated_normal(keys(), a, b, (100,)).sum(), argnums=(0, 1))
    theirs = jax.grad(lambda a, b: jax.random.truncated_normal(in_jax(keys()), a, b, (100,)).sum(), argnums=(0, 1))
    for a, b in zip(ours(torch.tensor(-1.0), torch.tensor(2.0)), theirs(-1.0, 2.0), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_gradient_of_truncated_normal_is_finite_at_0():
    """bfloat16 draws take 128 values, and the middle one is 0, where sqrt(w) has no derivative."""
    bounds = torch.tensor([-1.0, 1.0], dtype=torch.bfloat16)
    assert (random.truncated_normal(keys(), *bounds, (1000,), torch.bfloat16) == 0).any()
    f = torch.func.grad(lambda b: random.truncated_normal(keys(), b[0], b[1], (1000,), torch.bfloat16).sum())
    assert f(bounds).isfinite().all()


def test_draws_move_with_the_key_not_with_defaults():
    torch.set_default_dtype(torch.float64)
    try:
        assert random.normal(keys(), (2,)).dtype == torch.float32
        assert random.bernoulli(keys(), 0.5, (50,)).equal(random.uniform(keys(), (50,)) < 0.5)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (5, 7)])
def test_numpy_and_torch_hash_alike(batch, shape, monkeypatch):
    """Small eager draws are numpy's, larger ones torch's."""
    keys = random.split(random.key(-1), math.prod(batch)).reshape(*batch, 2)
    before = keys.clone()
    by_numpy = random.bits(keys, shape), random.fold_in(keys, torch.full(batch, -7)), random.split(keys, 4)
    monkeypatch.setattr(threefry, "_SMALL", -1)
    by_torch = random.bits(keys, shape), random.fold_in(keys, torch.full(batch, -7)), random.split(keys, 4)
    for a, b in zip(by_numpy, by_torch, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert torch.equal(keys, before)


class Counting(TorchFunctionMode):
    """The calls of torch that it sees."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_what_watches_torch_sees_every_draw():
    """A draw that numpy makes would be a constant to it."""
    graph = make_fx(lambda key: random.bits(key, (3,)))(random.key(0))
    assert torch.equal(graph(random.key(1)), random.bits(random.key(1), (3,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, but train/ship offers it, and warns of every branch
        traced = torch.jit.trace(lambda key: random.bits(key, (3,)), (random.key(0),), check_trace=False)
    assert torch.equal(traced(random.key(1)), random.bits(random.key(1), (3,)))
    with Counting() as mode:
        random.bits(random.key(0), (3,))
    assert mode.calls > 100
    with FakeTensorMode() as fake:
        assert isinstance(random.bits(fake.from_tensor(random.key(0)), (3,)), FakeTensor)
