"""Layers called in the wrong way: with an array of another library, a list, or the parameters second."""

import numpy as np
import pytest
import torch

from core import layers, random, spec
from core.attention import (
    attention,
    cross_attention,
    cross_attention_spec,
    self_attention,
    self_attention_spec,
)

IMAGES, TOKENS = np.ones((2, 4, 6, 6), np.float32), np.ones((2, 3, 4), np.float32)
KEY = random.key(0)

# (layer of p and x, its spec, an input)
LAYERS = {
    "linear": (layers.linear, layers.linear_spec(4, 3), TOKENS),
    "conv": (layers.conv, layers.conv_spec(4, 2, 3), IMAGES),
    "conv_transpose": (layers.conv_transpose, layers.conv_spec(4, 2, 3, transposed=True), IMAGES),
    "embedding": (layers.embedding, layers.embedding_spec(4, 3), np.array([0, 2])),
    "layer_norm": (layers.layer_norm, layers.layer_norm_spec(4), TOKENS),
    "rms_norm": (layers.rms_norm, layers.rms_norm_spec(4), TOKENS),
    "group_norm": (lambda p, x: layers.group_norm(p, x, 2), layers.group_norm_spec(4), IMAGES),
    "instance_norm": (layers.instance_norm, layers.instance_norm_spec(4), IMAGES),
    "batch_norm": (lambda p, x: layers.batch_norm(p, x, train=True), layers.batch_norm_spec(4), IMAGES),
    "prelu": (layers.prelu, layers.prelu_spec(4), IMAGES),
    "self_attention": (lambda p, x: self_attention(p, x, 2), self_attention_spec(4, 2), TOKENS),
    "cross_attention": (
        lambda p, x: cross_attention(p, x, torch.as_tensor(TOKENS), 2),
        cross_attention_spec(4, 2),
        TOKENS,
    ),
}

# (function of x, an input)
FUNCTIONS = {
    "max_pool": (lambda x: layers.max_pool(x, 2), IMAGES),
    "average_pool": (lambda x: layers.average_pool(x, 2), IMAGES),
    "adaptive_max_pool": (lambda x: layers.adaptive_max_pool(x, 2), IMAGES),
    "adaptive_average_pool": (lambda x: layers.adaptive_average_pool(x, 2), IMAGES),
    "global_average_pool": (layers.global_average_pool, IMAGES),
    "dropout": (lambda x: layers.dropout(x, 0.1, KEY), TOKENS),
    "dropout_channels": (lambda x: layers.dropout_channels(x, 0.1, KEY), IMAGES),
    "stochastic_depth": (lambda x: layers.stochastic_depth(x, 0.1, KEY), IMAGES),
}


@pytest.mark.parametrize("name", LAYERS)
def test_an_array_is_named_and_the_same_tensor_is_taken(name):
    layer, model, x = LAYERS[name]
    params = spec.init(KEY, model)
    with pytest.raises(TypeError, match=f"^{name}: (x|ids) is ndarray; expected a tensor, such as torch.as_tensor"):
        layer(params, x)
    with pytest.raises(TypeError, match=f"^{name}: (x|ids) is list; expected a tensor"):
        layer(params, x.tolist())
    assert layer(params, torch.as_tensor(x)).isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_come_first(name):
    layer, model, x = LAYERS[name]
    with pytest.raises(TypeError, match=rf"^{name}: the parameters are Tensor; expected a dict, as in {name}\(p, "):
        layer(torch.as_tensor(x), spec.init(KEY, model))


@pytest.mark.parametrize("name", LAYERS)
def test_a_spec_is_not_its_values(name):
    layer, model, x = LAYERS[name]
    with pytest.raises(TypeError, match=r"the parameters are a spec; expected its values, spec.init\(key, ...\)"):
        layer(model, torch.as_tensor(x))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "embedding"])
def test_bytes_and_other_integers_are_named(name):
    layer, model, x = LAYERS[name]
    for dtype in (torch.uint8, torch.int64):
        with pytest.raises(TypeError, match=f"^{name}: x is {dtype}; expected floating point, such as x / 255"):
            layer(spec.init(KEY, model), torch.as_tensor(x).to(dtype))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_tensor(name):
    f, x = FUNCTIONS[name]
    with pytest.raises(TypeError, match=f"^{name}: x is ndarray; expected a tensor, such as torch.as_tensor"):
        f(x)
    assert f(torch.as_tensor(x)).isfinite().all()


@pytest.mark.parametrize("at", range(3))
def test_attention_names_the_argument(at):
    inputs = [torch.ones(1, 2, 3, 4)] * 3
    inputs[at] = inputs[at].numpy()
    with pytest.raises(TypeError, match=f"^attention: {'qkv'[at]} is ndarray; expected a tensor"):
        attention(*inputs)


@pytest.mark.parametrize("layer", [layers.dropout, layers.dropout_channels, layers.stochastic_depth])
def test_a_seed_is_not_a_key(layer):
    with pytest.raises(TypeError, match=r"^a key must be a tensor, as core.random.key\(7\) is, got int"):
        layer(torch.ones(2, 3), 0.5, 7)
    with pytest.raises(TypeError, match="^a key must be a tensor"):
        layers.dropout_sites(7, 2, (2, 3), 0.5)
