"""Keys and draws against jax.random, bit for bit where arithmetic does not round; vmap, compile and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from core import random

SHAPES = [(), (7,), (3, 5), (2, 3, 4), (0, 3)]
SEEDS = [0, 7, -1, 2**32 - 1]
HALF = {torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def in_jax(key):
    """The same key as a jax key array."""
    return jax.random.wrap_key_data(jnp.asarray(key.numpy().view(np.uint32)))


def words(jax_key):
    return torch.from_numpy(np.array(jax.random.key_data(jax_key)).view(np.int32))


def equal(ours, theirs):
    """Equal bit for bit, with jax's unsigned integers read as signed ones."""
    ours, theirs = ours.numpy(), np.asarray(theirs)
    if theirs.dtype.kind == "u" and ours.dtype.kind == "i":
        theirs = theirs.view(ours.dtype)
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours, theirs)


def ulps(ours, theirs):
    """The largest distance in units in the last place."""
    a, b = (np.asarray(x).view(np.int32).astype(np.int64) for x in (ours, theirs))
    a, b = (np.where(x < 0, -(2**31) - x, x) for x in (a, b))
    return np.abs(a - b).max(initial=0)


def keys(seed=11):
    """A key whose two words are both in use."""
    return random.split(random.key(seed))[1]


@pytest.mark.parametrize("seed", [0, 1, -1, 42, 2**31, 2**32 - 1, 2**32 + 5, -(2**31) - 1, 2**63 - 1, -(2**63), True])
def test_key_is_that_of_jax(seed):
    key = random.key(seed)
    assert key.dtype == torch.int32
    assert torch.equal(key, words(jax.random.key(seed)))


def test_key_takes_numpy_integers():
    assert torch.equal(random.key(np.int64(9)), random.key(9))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_split(seed, n):
    key = keys(seed)
    assert torch.equal(random.split(key, n), words(jax.random.split(in_jax(key), n)))


@pytest.mark.parametrize("data", [0, 1, 2**31, 2**32 - 1, np.int64(3)])
def test_fold_in_of_a_number(data):
    key = keys()
    assert torch.equal(random.fold_in(key, data), words(jax.random.fold_in(in_jax(key), data)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_fold_in_broadcasts(dtype):
    rows, data = random.split(keys(), 3), torch.tensor([[0], [1], [200], [7]], dtype=dtype)
    folded = random.fold_in(rows, data)
    assert folded.shape == (4, 3, 2)
    for i in range(4):
        for j in range(3):
            assert torch.equal(folded[i, j], words(jax.random.fold_in(in_jax(rows[j]), int(data[i]))))


def test_fold_in_takes_the_low_32_bits_of_a_tensor():
    key = keys()
    data = torch.tensor([2**32 + 3, 2**32 - 1, -1])
    expected = torch.stack([random.fold_in(key, i) for i in (3, 2**32 - 1, 2**32 - 1)])
    assert torch.equal(random.fold_in(key, data), expected)


@pytest.mark.parametrize("batch", [(), (4,)])
def test_sites(batch):
    key = keys() if batch == () else random.split(keys(), 4)
    actual = random.sites(key, 3)
    assert actual.shape == (3, *batch, 2)
    for i in range(3):
        assert torch.equal(actual[i], random.fold_in(key, i))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_bits(seed, shape, width):
    key = keys(seed)
    with jax.enable_x64():
        equal(random.bits(key, shape, width), jax.random.bits(in_jax(key), shape, f"uint{width}"))


def test_bits_of_a_draw_done_in_pieces():
    n = 2**19 + 3
    equal(random.bits(keys(), (n,)), jax.random.bits(in_jax(keys()), (n,)))
    rows = random.split(keys(), 2)
    assert torch.equal(random.bits(rows, (n,))[1], random.bits(rows[1], (n,)))


def test_counters_past_32_bits():
    high, low = random.threefry._counters(2**33 + 2**31, 2**33 + 2**31 + 2, torch.device("cpu"))
    assert high.tolist() == [2, 2] and low.tolist() == [-(2**31), -(2**31) + 1]


@pytest.mark.parametrize("shape", [(), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_unit_uniform(shape, dtype):
    with jax.enable_x64():
        theirs = jax.random.uniform(in_jax(keys()), shape, str(dtype).removeprefix("torch."))
    ours = random.uniform(keys(), shape, dtype)
    assert ours.dtype == dtype
    equal(ours.double(), np.asarray(theirs).astype(np.float64))


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.1, 0.7), (-3.0, 10.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_uniform_in_a_range(low, high, dtype):
    ours = random.uniform(keys(), (10_000,), dtype, low, high).double().numpy()
    theirs = jax.random.uniform(in_jax(keys()), (10_000,), str(dtype).removeprefix("torch."), low, high)
    # XLA fuses the multiplication and the addition where the processor can, and so spares the rounding of the product:
    # half an eps of the range. The sum may then be rounded to the other neighbour: an eps of the result.
    bound = torch.finfo(dtype).eps * ((high - low) / 2 + max(abs(low), abs(high)))
    assert np.abs(ours - np.asarray(theirs).astype(np.float64)).max() <= bound


def test_uniform_broadcasts_tensors():
    low, high = torch.tensor([[0.0], [5.0]]), torch.tensor([1.0, 2.0, 8.0]) + 5
    theirs = jax.random.uniform(in_jax(keys()), (2, 3), minval=low.numpy(), maxval=high.numpy())
    np.testing.assert_allclose(random.uniform(keys(), (2, 3), minval=low, maxval=high), theirs, rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_normal_is_within_3_ulp(seed):
    key = keys(seed)
    assert ulps(random.normal(key, (100, 1000)).numpy(), jax.random.normal(in_jax(key), (100, 1000))) <= 3


@pytest.mark.parametrize("dtype", HALF)
def test_normal_in_half_precision(dtype):
    ours = random.normal(keys(), (10_000,), dtype)
    theirs = np.asarray(jax.random.normal(in_jax(keys()), (10_000,), HALF[dtype])).astype(np.float32)
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours.float(), theirs, rtol=2 * torch.finfo(dtype).eps)


def test_normal_in_double_precision():
    with jax.enable_x64():
        theirs = jax.random.normal(in_jax(keys()), (10_000,), jnp.float64)
    np.testing.assert_allclose(random.normal(keys(), (10_000,), torch.float64), theirs, rtol=1e-10)


@pytest.mark.parametrize("lower, upper", [(-2.0, 2.0), (-1.0, 3.0), (0.5, float("inf"))])
def test_truncated_normal(lower, upper):
    ours = random.truncated_normal(keys(), lower, upper, (1000,))
    theirs = jax.random.truncated_normal(in_jax(keys()), lower, upper, (1000,))
    assert (ours > lower).all() and (ours < upper).all()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_truncated_normal_far_in_the_tail_is_finite():
    samples = random.truncated_normal(keys(), 4.0, float("inf"), (100_000,))
    assert samples.max() < 6 and samples.min() > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gumbel(dtype):
    ours = random.gumbel(keys(), (10_000,), dtype)
    theirs = jax.random.gumbel(in_jax(keys()), (10_000,), str(dtype).removeprefix("torch."))
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(ours.float(), np.asarray(theirs).astype(np.float32), rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("shape", [(), (3, 5)])
def test_bernoulli(shape):
    equal(random.bernoulli(keys(), 0.3, shape), jax.random.bernoulli(in_jax(keys()), 0.3, shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bernoulli_draws_in_the_dtype_of_p(dtype):
    p = torch.linspace(0, 1, 500).to(dtype)
    theirs = jax.random.bernoulli(in_jax(keys()), jnp.asarray(p.float().numpy()).astype(str(dtype)[6:]))
    equal(random.bernoulli(keys(), p), theirs)


@pytest.mark.parametrize("axis", [1, -1, -3])
@pytest.mark.parametrize("prefix", [(), (3, 2)])
def test_categorical(axis, prefix):
    logits = torch.linspace(-3, 3, 4 * 5 * 6).sin().reshape(4, 5, 6)
    shape = prefix + tuple(np.delete(logits.shape, axis))
    theirs = jax.random.categorical(in_jax(keys()), jnp.asarray(logits.numpy()), axis, shape)
    equal(random.categorical(keys(), logits, axis, shape), theirs)
    if not prefix:
        equal(random.categorical(keys(), logits, axis), theirs)


@pytest.mark.parametrize("shape", [(3, 5)])
@pytest.mark.parametrize(
    "dtype, low, high",
    [
        (torch.int32, 0, 10),
        (torch.int32, -5, 1000),
        (torch.int32, -(2**31), 2**31),
        (torch.int32, 0, 2**31 - 1),
        (torch.uint8, 0, 256),
        (torch.int8, -7, 100),
        (torch.int16, -300, 2**15),
        (torch.int64, 0, 10),
        (torch.int64, -(2**62), 2**62),
        (torch.int64, -(2**63), 2**63 - 1),
        (torch.int64, 0, 3 * 2**61),
    ],
)
def test_randint(shape, dtype, low, high):
    with jax.enable_x64():
        theirs = jax.random.randint(in_jax(keys()), shape, low, high, str(dtype).removeprefix("torch."))
    ours = random.randint(keys(), shape, low, high, dtype)
    assert ours.dtype == dtype
    equal(ours, theirs)


def test_randint_of_all_64_bits():
    """jax cannot be given 2**63: here the remainder takes nothing away."""
    samples = random.randint(keys(), (50,), -(2**63), 2**63, torch.int64)
    low_bits = random.bits(random.split(keys())[1], (50,), 64)
    assert torch.equal(samples, low_bits + -(2**63))


def test_randint_with_tensors():
    low, high = torch.tensor([[0], [50], [5]]), torch.tensor([1, 9, 300, 2**40])
    with jax.enable_x64():
        for dtype in (torch.int32, torch.int64):
            theirs = jax.random.randint(in_jax(keys()), (3, 4), low.numpy(), high.numpy(), str(dtype)[6:])
            equal(random.randint(keys(), (3, 4), low, high, dtype), theirs)


@pytest.mark.parametrize("n", [0, 1, 10, 1625, 1626])
def test_permutation(n):
    order = random.permutation(keys(), n)
    equal(order, jax.random.permutation(in_jax(keys()), n))
    assert torch.equal(order.sort().values, torch.arange(n))


@pytest.mark.parametrize("shape", [(9,), (4, 3), (5, 2, 2)])
def test_permutation_of_a_tensor(shape):
    x = torch.arange(float(np.prod(shape))).reshape(shape)
    equal(random.permutation(keys(), x), jax.random.permutation(in_jax(keys()), x.numpy()))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: random.key(1.5), TypeError, "seed must be an integer, got float"),
        (lambda: random.key(2**63), ValueError, "64 bits"),
        (lambda: random.bits(torch.zeros(3, dtype=torch.int32), (2,)), ValueError, r"shape \(3,\)"),
        (lambda: random.bits(torch.zeros(2), (2,)), ValueError, "float32 of shape"),
        (lambda: random.normal(np.zeros(2, np.int32), (2,)), TypeError, "ndarray"),
        (lambda: random.normal(3, (2,)), TypeError, r"as core.random.key\(3\) is, got int"),
        (lambda: random.fold_in(3, 1), TypeError, r"core.random.key\(3\)"),
        (lambda: random.permutation(None, 4), TypeError, r"core.random.key\(seed\) is, got NoneType"),
        (lambda: random.split(torch.tensor(1, dtype=torch.int32)), ValueError, r"shape \(\)"),
        (lambda: random.bits(keys(), (2,), 24), ValueError, "got 24"),
        (lambda: random.fold_in(keys(), -1), ValueError, "got -1"),
        (lambda: random.fold_in(keys(), 2**32), ValueError, "got 4294967296"),
        (lambda: random.fold_in(keys(), 0.5), TypeError, "got float"),
        (lambda: random.fold_in(keys(), torch.tensor(0.5)), TypeError, "float32"),
        (lambda: random.uniform(keys(), (2,), torch.int32), ValueError, "int32"),
        (lambda: random.uniform(keys(), (2,), maxval=torch.ones(3)), ValueError, r"\(3,\) .* \(2,\)"),
        (lambda: random.truncated_normal(keys(), torch.zeros(4), 1, (2,)), ValueError, r"\(4,\) .* \(2,\)"),
        (lambda: random.bernoulli(keys(), torch.ones(3), (2, 1)), ValueError, r"\(3,\) .* \(2, 1\)"),
        (lambda: random.bernoulli(keys(), torch.ones(3, dtype=torch.int64)), ValueError, "int64"),
        (lambda: random.categorical(keys()[None], torch.ones(3)), ValueError, "torch.vmap"),
        (lambda: random.categorical(keys(), torch.ones(3), 1), ValueError, "no axis 1"),
        (lambda: random.categorical(keys(), np.ones(3)), TypeError, "logits are ndarray; expected a tensor"),
        (lambda: random.categorical(keys(), torch.ones(3, 4), shape=(2,)), ValueError, r"\(3,\) .* \(2,\)"),
        (lambda: random.randint(keys(), (2,), 5, 5), ValueError, r"\[5, 5\)"),
        (lambda: random.randint(keys(), (2,), 0, 300, torch.uint8), ValueError, "maxval 300 does not fit torch.uint8"),
        (lambda: random.randint(keys(), (2,), 0, 3, torch.float32), ValueError, "float32"),
        (lambda: random.permutation(keys(), -1), ValueError, "got -1"),
        (lambda: random.permutation(keys(), torch.tensor(3)), ValueError, "0-D"),
        (lambda: random.permutation(random.split(keys()), 3), ValueError, "torch.vmap"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
