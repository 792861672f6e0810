"""The sequence classifier against torch.nn with packed sequences, its poolings, what comes after an end."""

import pytest
import torch
from torch import nn
from torch.func import grad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from core import random, spec, tree
from nets.language import sequence_classifier as net

F64 = torch.float64
LENGTHS = torch.tensor([5, 2, 7, 1])
SUFFIXES = {"forward": "", "backward": "_reverse"}


def setting(**options):
    cfg = net.Config(vocabulary=11, d_in=3, width=4, layers=2, outputs=3, **options)
    tokens = random.randint(random.key(1), (4, 7), 0, 11).long()
    return cfg, spec.init(random.key(0), net.spec(cfg), F64), tokens


def torch_logits(cfg, params, tokens):
    """The same by torch's module over packed sequences, pooled by hand."""
    kinds = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
    sizes = {"num_layers": cfg.layers, "bidirectional": cfg.bidirectional, "batch_first": True, "dtype": F64}
    module = kinds[cfg.kind](cfg.d_in, cfg.width, **sizes)
    weights = {}
    for i, layer in enumerate(params["layers"]):
        for direction, p in (layer if cfg.bidirectional else {"forward": layer}).items():
            for part in ("ih", "hh"):
                for leaf, value in p[part].items():
                    weights[f"{leaf}_{part}_l{i}{SUFFIXES[direction]}"] = value
    module.load_state_dict(weights)
    x = params["tokens"]["weight"][tokens]
    packed, ends = module(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False))
    h, _ = pad_packed_sequence(packed, batch_first=True)
    ends = ends[0] if cfg.kind == "lstm" else ends
    each = [h[i, :n] for i, n in enumerate(LENGTHS.tolist())]
    pooled = {
        "last": lambda: torch.cat(list(ends[-2:] if cfg.bidirectional else ends[-1:]), -1),
        "mean": lambda: torch.stack([x.mean(0) for x in each]),
        "max": lambda: torch.stack([x.amax(0) for x in each]),
    }[cfg.pooling]()
    return pooled @ params["head"]["weight"].T + params["head"]["bias"]


@pytest.mark.parametrize(
    ("kind", "bidirectional", "pooling"),
    [("lstm", True, "last"), ("gru", False, "last"), ("rnn", True, "mean"), ("lstm", False, "max")],
)
def test_equals_torch_with_packed_sequences(kind, bidirectional, pooling):
    cfg, params, tokens = setting(kind=kind, bidirectional=bidirectional, pooling=pooling)
    torch.testing.assert_close(
        net.apply(params, (tokens, LENGTHS), cfg), torch_logits(cfg, params, tokens), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("pooling", net.POOLINGS)
def test_nan_after_an_end_reaches_nothing(pooling):
    cfg = net.Config(d_in=2, width=3, bidirectional=True, pooling=pooling)
    params, x = spec.init(random.key(0), net.spec(cfg), F64), random.normal(random.key(1), (4, 7, 2)).double()
    garbage = torch.where(torch.arange(7)[:, None] < LENGTHS[:, None, None], x, torch.nan)

    def loss(params, x):
        return net.apply(params, (x, LENGTHS), cfg).square().sum()

    assert torch.equal(loss(params, garbage), loss(params, x))
    for (name, actual), expected in zip(
        tree.items(grad(loss)(params, garbage)), tree.leaves(grad(loss)(params, x)), strict=True
    ):
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize("pooling", net.POOLINGS)
def test_sequence_of_no_steps_has_the_bias_as_its_outputs(pooling):
    cfg, params, tokens = setting(pooling=pooling)
    logits = net.apply(params, (tokens, torch.zeros(4, dtype=torch.int64)), cfg)
    assert torch.equal(logits, params["head"]["bias"].expand(4, -1))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"kind": "cnn"}, "kind 'cnn' is unknown; expected gru, layer_norm_lstm, lstm, rnn"),
        ({"pooling": "first"}, "pooling 'first' is unknown; expected last, max, mean"),
        ({"width": 0}, "width is 0; expected at least 1"),
        ({"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
    ],
)
def test_refused_configurations(options, error):
    with pytest.raises(ValueError, match=error):
        net.Config(**options)


def test_refused_arguments():
    cfg, params, tokens = setting()
    with pytest.raises(TypeError, match=r"x is Tensor; expected a tuple, \(tokens, lengths\)"):
        net.apply(params, tokens, cfg)
    with pytest.raises(ValueError, match=r"expected tokens of shape \(batch, time\), found \(4, 7, 1\)"):
        net.apply(params, (tokens[..., None], LENGTHS), cfg)
    with pytest.raises(ValueError, match="lengths are from 2 to 8; expected from 0 to the time of 7"):
        net.apply(params, (tokens, LENGTHS + 1), cfg)
    values = net.Config(d_in=2)
    with pytest.raises(ValueError, match=r"expected values of shape \(batch, time, 2\), found \(4, 7\)"):
        net.apply(params, (tokens, LENGTHS), values)
