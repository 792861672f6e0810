"""linear against torch.nn.Linear, and under the transforms."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from core import random, spec, tree
from core.initializers import ones
from core.layers import linear, linear_spec
from core.spec import Param


def values(bias=True, n=None):
    keys = random.key(0) if n is None else random.split(random.key(0), n)
    layer = linear_spec(5, 3, bias=bias, bias_init=ones)
    init = lambda key: spec.init(key, layer, torch.float64)  # noqa: E731
    return init(keys) if n is None else vmap(init)(keys)


def loss(p, x):
    return linear(p, x).pow(3).sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 4, 5), (0, 5)])
def test_output_and_gradient_equal_torch(shape, bias):
    p, x = values(bias), random.normal(random.key(1), shape, torch.float64)
    module = torch.nn.Linear(5, 3, bias=bias, dtype=torch.float64)
    expected = lambda p, x: functional_call(module, p, (x,))  # noqa: E731
    torch.testing.assert_close(linear(p, x), expected(p, x), rtol=0, atol=0)
    actual, reference = (grad(f, argnums=(0, 1))(p, x) for f in (loss, lambda p, x: expected(p, x).pow(3).sum()))
    torch.testing.assert_close(actual, reference)


def test_spec_is_torch_layout_and_default_init_keeps_the_variance():
    layer = linear_spec(400, 300)
    assert list(layer) == ["bias", "weight"]
    assert layer["weight"].shape == (300, 400) and layer["weight"].axes == ("out", "in")
    assert layer["bias"].axes == ("out",)
    assert "bias" not in linear_spec(4, 3, bias=False)
    assert linear_spec(4, 3, init=ones)["weight"] == Param((3, 4), ones, ("out", "in"))
    x = random.normal(random.key(1), (200, 400))
    y = linear(spec.init(random.key(0), layer), x)
    assert 0.95 < y.std() < 1.05


def test_ensemble_equals_the_members():
    p, x = values(n=3), random.normal(random.key(1), (4, 5), torch.float64)
    stacked = vmap(grad(loss), in_dims=(0, None))(p, x)
    torch.testing.assert_close(stacked, tree.stack([grad(loss)(q, x) for q in tree.unstack(p)]))


def test_compiled_equals_eager():
    torch._dynamo.reset()
    p, x = values(n=3), random.normal(random.key(1), (4, 5), torch.float64)
    f = vmap(grad(loss), in_dims=(0, None))
    torch.testing.assert_close(torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")(p, x), f(p, x))


@pytest.mark.parametrize("shape", [(4, 6), ()])
def test_a_wrong_last_axis_is_an_error(shape):
    with pytest.raises(ValueError, match=r"linear: expected a last axis of 5, found x of shape \("):
        linear(values(), torch.zeros(shape, dtype=torch.float64))
