"""The MLP against torch.nn, and its dropout."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from core import random, spec, tree
from nets.classifiers import mlp

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def module(cfg):
    """The same net in torch.nn; the names of its layers are 0, 2, 4 ..."""
    layers = []
    for d_in, d_out in zip(cfg.widths[:-1], cfg.widths[1:], strict=True):
        layers += [nn.Linear(d_in, d_out, dtype=torch.float64), ACTIVATIONS[cfg.activation]()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [(12, 3), (12, 7, 5, 3)])
def test_equals_torch(widths, activation):
    cfg = mlp.Config(widths, activation)
    params = spec.init(random.key(0), mlp.spec(cfg), torch.float64)
    params = tree.map(lambda p: p + 0.1, params)
    x = random.normal(random.key(1), (5, 3, 4), torch.float64)

    def expected(params):
        flat = {f"{2 * i}.{name}": leaf for i, layer in enumerate(params["layers"]) for name, leaf in layer.items()}
        return functional_call(module(cfg), flat, (x.flatten(1),))

    torch.testing.assert_close(mlp.apply(params, x, cfg), expected(params))
    ours, theirs = (grad(lambda p, f=f: f(p).sin().sum())(params) for f in (lambda p: mlp.apply(p, x, cfg), expected))
    torch.testing.assert_close(ours, theirs)


def test_dropout_is_on_every_hidden_layer_and_not_on_the_last():
    # Weights 1 and no bias: each layer counts the units before it that are kept, times 1 / (1 - rate).
    cfg = mlp.Config((1, 50, 50, 40), "identity", dropout=0.5)
    params = tree.map(lambda p: torch.zeros(p.shape) if len(p.shape) == 1 else torch.ones(p.shape), mlp.spec(cfg))
    out = mlp.apply(params, torch.ones(200, 1), cfg, key=random.key(0), train=True)
    paths = out[:, 0] / 4
    assert (out == out[:, :1]).all() and (paths == paths.round()).all()
    # The product of two binomials with n = 50, p = 1/2: mean 625, variance (12.5 + 625)^2 - 625^2 = 125.6^2.
    assert abs(paths.mean() - 625) < 25 and 110 < paths.std() < 140
    assert (mlp.apply(params, torch.ones(3, 1), cfg) == 2500).all()


@pytest.mark.parametrize(
    ("activation", "width", "message"),
    [
        ("swish-like", 4, "no activation 'swish-like'; there are "),
        ("relu", 5, r"expected a last axis of 4, found x of shape \(2, 5\)"),
    ],
)
def test_errors_name_what_is_wrong(activation, width, message):
    cfg = mlp.Config((4, 3, 2), activation)
    params = spec.init(random.key(0), mlp.spec(cfg))
    with pytest.raises(ValueError, match=message):
        mlp.apply(params, torch.zeros(2, width), cfg)
