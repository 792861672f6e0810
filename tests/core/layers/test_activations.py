"""The table of activations against torch.nn's modules, and prelu."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from core import random, spec, tree
from core.initializers import uniform
from core.layers import ACTIVATIONS, activation, prelu, prelu_spec
from core.layers.activations import geglu, swiglu

X = 4 * random.normal(random.key(0), (5, 4, 6), torch.float64)

MODULES = {
    "elu": nn.ELU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "glu": nn.GLU(),
    "hard_sigmoid": nn.Hardsigmoid(),
    "hard_swish": nn.Hardswish(),
    "hard_tanh": nn.Hardtanh(),
    "identity": nn.Identity(),
    "leaky_relu": nn.LeakyReLU(),
    "log_sigmoid": nn.LogSigmoid(),
    "log_softmax": nn.LogSoftmax(-1),
    "mish": nn.Mish(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "selu": nn.SELU(),
    "sigmoid": nn.Sigmoid(),
    "silu": nn.SiLU(),
    "softmax": nn.Softmax(-1),
    "softplus": nn.Softplus(),
    "softsign": nn.Softsign(),
    "tanh": nn.Tanh(),
}


def test_every_activation_is_held_against_something():
    assert set(ACTIVATIONS) == {*MODULES, "quick_gelu", "swiglu", "geglu"}


@pytest.mark.parametrize("name", MODULES)
def test_equals_torch(name):
    torch.testing.assert_close(activation(name)(X), MODULES[name](X), rtol=0, atol=0)


@pytest.mark.parametrize(("f", "gate"), [(swiglu, nn.SiLU()), (geglu, nn.GELU())])
def test_gated_units_multiply_the_halves(f, gate):
    torch.testing.assert_close(f(X), gate(X[..., :3]) * X[..., 3:])


def test_quick_gelu():
    torch.testing.assert_close(activation("quick_gelu")(X), X / (1 + torch.exp(-1.702 * X)))


def test_every_activation_works_under_vmap_and_compile():
    torch._dynamo.reset()
    f = vmap(grad(lambda x: sum(torch.sin(g(x)).sum() for g in ACTIVATIONS.values())))
    each = torch.stack([grad(lambda x: sum(torch.sin(g(x)).sum() for g in ACTIVATIONS.values()))(x) for x in X])
    torch.testing.assert_close(f(X), each)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")(X), each)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="no activation 'swish'; there are elu, .*tanh"):
        activation("swish")


def slopes(channels, key):
    return spec.init(key, prelu_spec(channels, init=uniform(0.1, 0.9)), torch.float64)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 6), (5, 4, 3, 2)])
@pytest.mark.parametrize("channels", [1, 4])
def test_prelu_equals_torch(channels, shape):
    p, module = slopes(channels, random.key(1)), nn.PReLU(channels, dtype=torch.float64)
    # A zero in x: the slope on the left of it is torch's choice of gradient there.
    x = torch.cat([torch.zeros(1, *shape[1:], dtype=torch.float64), random.normal(random.key(2), shape, torch.float64)])

    def expected(p, x):
        return functional_call(module, p, (x,))

    torch.testing.assert_close(prelu(p, x), expected(p, x), rtol=0, atol=0)
    actual, reference = (grad(lambda p, x, f=f: f(p, x).exp().sum(), argnums=(0, 1))(p, x) for f in (prelu, expected))
    torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize("compiled", [False, True])
def test_prelu_ensemble_equals_the_members(compiled):
    p = vmap(lambda key: slopes(4, key))(random.split(random.key(1), 3))
    gradient = grad(lambda p, x: torch.sin(prelu(p, x)).sum())
    f = vmap(gradient, in_dims=(0, None))
    if compiled:
        torch._dynamo.reset()
        f = torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(f(p, X), tree.stack([gradient(q, X) for q in tree.unstack(p)]))


def test_prelu_defaults_and_errors():
    assert spec.init(random.key(0), prelu_spec())["weight"].tolist() == [0.25]
    with pytest.raises(ValueError, match=r"prelu: expected x of shape \(batch, 4, ...\), found \(5, 3\)"):
        prelu(slopes(4, random.key(1)), torch.zeros(5, 3))
