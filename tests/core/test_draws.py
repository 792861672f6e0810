"""Lifted modules that draw: dropout and noise from a key, an example's own in any batch; attention written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core import per_example, random, tree
from core.attention_module import Attention
from core.draws import Draws
from core.lift import lift
from core.recurrent_modules import replaced
from tests.core.per_example.models import Draw

F64 = torch.float64
DRAW = Draw("draws")
X = DRAW(5, 4, 8)
KEYS = random.split(random.key(1), 5)


class Noisy(nn.Module):
    """Draws as other libraries make them in training: noise, stochastic depth in three spellings, dropped channels."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.4)

    def forward(self, x):
        h = self.linear(x)
        if self.training:
            h = h + 0.1 * torch.randn(h.shape, dtype=h.dtype) + torch.rand(len(h), 4, 8, dtype=h.dtype)
            h = h * h.new_empty(len(h), 1, 1).bernoulli_(0.7) / 0.7
            h = h * (0.5 + torch.rand((h.shape[0], 1, 1), dtype=h.dtype)).floor_()
            h = h * torch.bernoulli(torch.full_like(h, 0.5))
        h = F.alpha_dropout(F.dropout1d(h, 0.3, self.training), 0.2, self.training)
        return self.drop(F.scaled_dot_product_attention(h, h, h, dropout_p=0.3 if self.training else 0.0))


class Outputs(nn.Module):
    """The outputs of a recurrence, without its state."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


MODULES = {
    "noise": Noisy,
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True),
    "dropout": lambda: nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.Linear(6, 3)),
    "recurrence": lambda: Outputs(nn.LSTM(8, 3, 2, dropout=0.5, bidirectional=True, batch_first=True)),
}


def lifted(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params, _, apply = lift(MODULES[name]().double())
    return params, apply


@pytest.mark.parametrize("name", MODULES)
def test_what_is_drawn_is_that_of_the_key_and_of_the_example(name):
    params, apply = lifted(name)
    state = torch.get_rng_state()
    y = apply(params, X, train=True, key=KEYS)
    torch.testing.assert_close(apply(params, X, train=True, key=KEYS), y, rtol=0, atol=0)
    torch.testing.assert_close(apply(params, X[3:], train=True, key=KEYS[3:]), y[3:], rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(apply(params, X, train=True, key=random.split(random.key(2), 5)), y)
    one = apply(params, X, train=True, key=random.key(1))  # a key for all
    assert not torch.allclose(one[:1], apply(params, X[:1], train=True, key=KEYS[:1]))
    torch.testing.assert_close(apply(params, X, key=KEYS), apply(params, X))  # nothing is drawn


@pytest.mark.parametrize("name", MODULES)
def test_each_example_has_its_gradient(name):
    params, apply = lifted(name)

    def loss(p, batch):
        return apply(p, batch[0], train=True, key=batch[1]).square().mean((1, 2))

    out = per_example.reports(loss, params, (X, KEYS))
    assert per_example.verify(loss, params, (X, KEYS)) < 1e-12
    for norm, g in zip(tree.leaves(out.norm), tree.leaves(per_example.each(loss, params, (X, KEYS))), strict=True):
        torch.testing.assert_close(norm, g.flatten(1).norm(dim=1))


@pytest.mark.parametrize("name", ["transformer", pytest.param("noise", marks=pytest.mark.slow)])
def test_compiled(name):
    params, apply = lifted(name)
    torch._dynamo.reset()
    f = torch.compile(lambda p, x, k: apply(p, x, train=True, key=k), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(f(params, X, KEYS), apply(params, X, train=True, key=KEYS))


SHARES = {
    "dropout": lambda x: F.dropout(x, 0.3, True) != 0,
    "dropout1d": lambda x: F.dropout1d(x[None], 0.3, True) != 0,
    "dropout2d": lambda x: F.dropout2d(x[:, :, None, None], 0.3, True) != 0,
    "rand_like": lambda x: torch.rand_like(x) < 0.7,
    "randn_like": lambda x: torch.randn_like(x) < 0.5244,
    "bernoulli": lambda x: torch.bernoulli(0.7 * x) == 1,
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.7) == 1,
    "uniform_": lambda x: torch.empty_like(x).uniform_(0.3, 1.3) < 1,
    "rand": lambda x: torch.rand(*x.shape) < 0.7,
    "rand of a size": lambda x: torch.rand(size=tuple(x.shape)) < 0.7,
    "normal_": lambda x: torch.empty_like(x).normal_(1.0, 2.0) < 1.0 + 2.0 * 0.5244,
    "randn": lambda x: torch.randn(x.shape, dtype=F64) < 0.5244,
    "nothing dropped": lambda x: F.dropout(x, 0.3, False) == 1,
}


@pytest.mark.parametrize("name", SHARES)
def test_shares_of_what_is_drawn(name):
    with Draws(random.key(0)):
        values = SHARES[name](torch.ones(200, 200))
    share = 1.0 if name == "nothing dropped" else 0.7
    n = 200 if name == "dropout1d" else 40000  # dropped as a whole
    assert abs(values.double().mean() - share) < 5 * (0.21 / n) ** 0.5


def test_dropout_between_layers_is_at_the_outputs_of_all_but_the_last():
    """With a rate near 1 the second layer of a stack sees zeros, and gives what it gives for zeros."""
    torch.manual_seed(0)
    module = nn.GRU(8, 3, 2, dropout=1 - 1e-9).double()
    params, _, apply = lift(module)
    second = nn.GRU(3, 3).double()
    second.load_state_dict({k.replace("l1", "l0"): v for k, v in module.state_dict().items() if "l1" in k})
    out, state = apply(params, X, train=True, key=random.key(0))
    alone, last = second(torch.zeros(5, 4, 3, dtype=F64))
    torch.testing.assert_close(out, alone)
    torch.testing.assert_close(state[1], last[0])
    torch.testing.assert_close(state[0], module.eval()(X)[1][0])


def test_alpha_dropout_keeps_mean_and_variance():
    with Draws(random.key(0)):
        y = F.alpha_dropout(random.normal(random.key(1), (100000,)), 0.3, True)
    assert abs(float(y.mean())) < 0.02 and abs(float(y.var()) - 1) < 0.03


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False}, {"kdim": 6}])
def test_attention_is_torchs(options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for first in (False, True):
            module = nn.MultiheadAttention(8, 2, batch_first=first, **options).double()
            for p in module.parameters():
                nn.init.normal_(p)
            ours = replaced(module, {nn.MultiheadAttention: Attention})
            q, k, v = (
                torch.randn((3, t, d) if first else (t, 3, d), dtype=F64)
                for t, d in ((4, 8), (5, options.get("kdim", 8)), (5, 8))
            )
            hidden = torch.zeros(3, 5, dtype=torch.bool)
            hidden[1, 3:] = True
            masks = [None, torch.ones(4, 5, dtype=torch.bool).triu(1), torch.randn(6, 4, 5, dtype=F64)]
            for mask in masks:
                numbers = mask is not None and mask.dtype != torch.bool
                padding = torch.zeros(3, 5, dtype=F64).masked_fill(hidden, -torch.inf) if numbers else hidden
                arguments = {"key_padding_mask": padding, "attn_mask": mask, "average_attn_weights": first}
                torch.testing.assert_close(ours(q, k, v, **arguments), module(q, k, v, **arguments))


def test_attention_without_a_batch_or_weights():
    module = nn.MultiheadAttention(8, 2).double()
    ours = replaced(module, {nn.MultiheadAttention: Attention})
    torch.testing.assert_close(ours(X[0], X[0], X[0]), module(X[0], X[0], X[0]))
    torch.testing.assert_close(ours(X, X, X, need_weights=False)[0], module(X, X, X, need_weights=False)[0])
    assert ours(X, X, X, need_weights=False)[1] is None


def test_what_cannot_draw_is_named():
    with pytest.raises(ValueError, match="layer '1' draws random numbers in training mode; pass a key, set its rate"):
        lift(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))).apply({}, X, train=True)
    params, _, apply = lift(nn.Sequential(nn.Linear(8, 8), nn.RReLU()).double())
    with pytest.raises(ValueError, match="rrelu draws random numbers, and takes no key here"):
        apply(params, X, train=True, key=KEYS)
    params, _, apply = lift(nn.LSTM(8, 3, 2, dropout=0.1).double())
    with pytest.raises(ValueError, match="'LSTM' draws random numbers in training mode; pass a key"):
        apply(params, X, train=True)
    params, apply = lifted("dropout")
    with pytest.raises(ValueError, match="dropout: expected a key"):
        apply(params, X, train=True, key=KEYS[:3])

    class Like(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    _, _, apply = lift(Like())
    torch._dynamo.reset()
    with pytest.raises(Exception, match="torch.rand_like and the like draw past the key while compiling"):
        torch.compile(lambda k: apply({}, X, train=True, key=k), backend="aot_eager", fullgraph=True)(KEYS)
    with pytest.raises(ValueError, match="keys of 5 examples, but values of shape"), Draws(KEYS):
        torch.rand(4, 5)
