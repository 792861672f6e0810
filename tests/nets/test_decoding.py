"""From scores to tokens: the filters against transformers' logits processors, the draws against jax."""

import jax
import numpy as np
import pytest
import torch
from torch.func import vmap
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from core import random
from nets.decoding import choose, filter_logits

FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.01},
    {"top_p": 0.6},
    {"top_p": 1.0},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.3, "top_k": 5, "top_p": 0.5},
]


def scores(batch=6, vocabulary=50, seed=0):
    return 2 * random.normal(random.key(seed), (batch, vocabulary))


def expected(logits, temperature=1.0, top_k=None, top_p=None):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers(None, logits)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filter_equals_transformers(options):
    logits = scores()
    found = filter_logits(logits, **options)
    torch.testing.assert_close(found, expected(logits, **options), rtol=0, atol=0)
    assert (found.max(-1).values > -torch.inf).all()
    # Any leading axes, and vmapped.
    torch.testing.assert_close(filter_logits(logits.reshape(2, 3, -1), **options), found.reshape(2, 3, -1))
    torch.testing.assert_close(vmap(lambda x: filter_logits(x, **options))(logits), found)


def test_filter_keeps_ties_at_the_kth_place_and_the_best_token():
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, True, False, True]]
    assert filter_logits(torch.tensor([[0.0, 9.0]]), top_p=1e-9).isfinite().tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0 is not above 0"),
        ({"temperature": -1.0}, "temperature -1.0 is not above 0"),
        ({"top_k": 0}, "top_k 0 is not at least 1"),
        ({"top_p": 0.0}, "top_p 0.0 is outside"),
        ({"top_p": 1.5}, "top_p 1.5 is outside"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        filter_logits(scores(), **options)
    if options.get("temperature") != 0.0:
        with pytest.raises(ValueError, match=message):
            choose(scores(), random.key(0), **options)


def test_temperature_zero_takes_the_best_and_needs_no_key():
    assert torch.equal(choose(scores(), temperature=0.0), scores().argmax(-1))
    # It is the limit of small temperatures.
    assert torch.equal(choose(scores(), random.key(0), temperature=1e-4), scores().argmax(-1))


@pytest.mark.parametrize("key", [None, random.split(random.key(0), 3), random.split(random.key(0), 6)[None]])
def test_key_is_checked(key):
    with pytest.raises(ValueError, match="key"):
        choose(scores(6), key)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_equal_jax(options):
    logits, key = scores(200), random.key(3)
    words = random.fold_in(key, torch.arange(200)).numpy().view(np.uint32)
    keys = jax.random.wrap_key_data(jax.numpy.asarray(words), impl="threefry2x32")
    filtered = jax.numpy.asarray(expected(logits, **options).numpy())
    drawn = jax.vmap(jax.random.categorical)(keys, filtered)
    assert choose(logits, key, **options).tolist() == drawn.tolist()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.8, "temperature": 0.9}], ids=str
)
def test_tokens_come_as_often_as_they_should(options):
    n = 20_000
    logits = scores(1, 6)
    drawn = choose(logits.expand(n, -1), random.key(1), **options)
    p = torch.softmax(expected(logits, **options)[0], -1)
    error = drawn.bincount(minlength=6) / n - p
    assert (error.abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


def test_example_gets_the_same_token_in_any_batch():
    logits, key = scores(8), random.key(5)
    together = choose(logits, key)
    assert len(set(together.tolist())) > 4
    for n in range(1, 8):
        assert torch.equal(choose(logits[:n], key), together[:n])
    # With a key an example, in any order too.
    keys = random.fold_in(key, torch.arange(8))
    assert torch.equal(choose(logits, keys), together)
    assert torch.equal(choose(logits[[5, 2]], keys[[5, 2]]), together[[5, 2]])
