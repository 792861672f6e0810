"""Dropout of values, channels and examples: its rate, its scale, and the masks of each key."""

import math

import pytest
import torch
from torch.func import grad, vmap

from core import random
from core.layers import dropout, dropout_channels, dropout_sites, stochastic_depth

KEY = random.key(3)
LAYERS = [dropout, dropout_channels, stochastic_depth]
X = 1 + random.uniform(random.key(1), (8, 6, 5, 3), torch.float64)

# (layer, shape of an input of ones, number of independent masks)
MANY = [
    (dropout, (200, 500), 100_000),
    (dropout_channels, (200, 500, 2), 100_000),
    (stochastic_depth, (100_000, 2), 100_000),
]


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("keys", ["one key", "one key per example"])
@pytest.mark.parametrize(("layer", "shape", "count"), MANY)
def test_the_share_dropped_is_the_rate_and_the_rest_is_scaled(layer, shape, count, keys, rate):
    key = KEY if keys == "one key" else random.fold_in(KEY, torch.arange(shape[0]))
    y = layer(torch.ones(shape, dtype=torch.float64), rate, key)
    mask = y != 0
    torch.testing.assert_close(y[mask], torch.full_like(y[mask], 1 / (1 - rate)))
    assert abs(mask.double().mean().item() - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / count)


def test_whole_channels_and_whole_examples_are_dropped():
    channels = (dropout_channels(X, 0.5, KEY) != 0).flatten(2)
    assert (channels.all(-1) == channels.any(-1)).all() and 0 < channels[:, :, 0].sum() < 48
    examples = (stochastic_depth(X, 0.5, KEY) != 0).flatten(1)
    assert (examples.all(-1) == examples.any(-1)).all() and 0 < examples[:, 0].sum() < 8


@pytest.mark.parametrize("lag", [1, 2, 3, 25_000, 50_000, 75_000])
def test_masks_are_independent(lag):
    # Four masks share the words of one draw: the lags cover neighbours in the draw and in the word.
    mask = (dropout(torch.ones(100_000), 0.5, KEY) != 0).double() * 2 - 1
    assert abs((mask[:-lag] * mask[lag:]).mean()) < 4 / math.sqrt(100_000 - lag)


@pytest.mark.parametrize("layer", LAYERS)
def test_equal_keys_equal_masks_and_other_keys_other_masks(layer):
    keys = random.split(KEY, 16)
    masks = [(layer(X, 0.5, key) != 0) for key in keys]
    assert (masks[0] == (layer(2 * X, 0.5, keys[0]) != 0)).all()
    assert any((masks[0] != other).any() for other in masks[1:])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_one_key_per_example_gives_the_masks_of_the_examples_alone(layer, compiled):
    keys = random.split(KEY, 8)

    def whole(x, keys):
        return layer(x, 0.6, keys)

    def alone(x, key):
        return layer(x[None], 0.6, key[None])[0]

    if compiled:
        torch._dynamo.reset()
        whole = torch.compile(whole, fullgraph=True, dynamic=False, backend="aot_eager")
    y = whole(X, keys)
    torch.testing.assert_close(y, layer(X, 0.6, keys), rtol=0, atol=0)
    torch.testing.assert_close(y, vmap(alone)(X, keys), rtol=0, atol=0)
    torch.testing.assert_close(y[2:5], layer(X[2:5], 0.6, keys[2:5]), rtol=0, atol=0)
    assert (y != 0).any() and (y == 0).any()


@pytest.mark.parametrize("layer", LAYERS)
def test_gradient_is_the_scaled_mask(layer):
    keys = random.split(KEY, 8)
    gradient = vmap(grad(lambda x, key: layer(x[None], 0.3, key[None]).sum()))(X, keys)
    torch.testing.assert_close(gradient, layer(torch.ones_like(X), 0.3, keys), rtol=0, atol=0)


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_to_draw_is_the_input_itself_and_needs_no_key(layer):
    assert layer(X, 0.0, None) is X
    assert layer(X, 0.5, None, train=False) is X
    assert layer(X, 0.5, KEY, False) is X


@pytest.mark.parametrize("layer", LAYERS)
def test_half_precision_stays(layer):
    assert layer(X.bfloat16(), 0.5, KEY).dtype == torch.bfloat16


@pytest.mark.parametrize("layer", LAYERS)
def test_errors(layer):
    name = layer.__name__
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"{name}: rate must be in \[0, 1\), found {rate}"):
            layer(X, rate, KEY, train=False)
    with pytest.raises(ValueError, match=f"{name}: training with rate 0.5 needs a key"):
        layer(X, 0.5, None)
    with pytest.raises(ValueError, match=rf"{name}: expected a key \(2,\) or \(8, 2\), found \(5, 2\)"):
        layer(X, 0.5, random.split(KEY, 5))


@pytest.mark.parametrize("examples", [None, 5])
def test_each_site_has_the_mask_of_its_own_key(examples):
    key = random.key(7) if examples is None else random.split(random.key(7), examples)
    x = torch.arange(1.0, 61.0).reshape(5, 4, 3)
    sites = dropout_sites(key, 3, tuple(x.shape), 0.4)
    for i, drop in enumerate(sites):
        torch.testing.assert_close(drop(x), dropout(x, 0.4, random.fold_in(key, i)), rtol=0, atol=0)
    assert not torch.equal(sites[0](x), sites[1](x))


def test_sites_refuse_wrong_keys_and_rates():
    with pytest.raises(ValueError, match=r"expected a key \(2,\) or \(5, 2\), found \(4, 2\)"):
        dropout_sites(random.split(random.key(0), 4), 2, (5, 3), 0.5)
    with pytest.raises(ValueError, match="rate must be in"):
        dropout_sites(random.key(0), 2, (5, 3), 0.0)
