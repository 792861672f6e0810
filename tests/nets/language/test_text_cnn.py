"""TextCNN against torch.nn.Conv1d over each text by itself; short texts, empty ones, what follows an end."""

import pytest
import torch
from torch import nn
from torch.func import grad

from core import random, spec, tree
from nets.language import text_cnn as net

F64 = torch.float64
LENGTHS = torch.tensor([5, 2, 7, 1])


def setting(**options):
    cfg = net.Config(**{"vocabulary": 11, "d_in": 3, "width": 4, "windows": (2, 3, 9), "outputs": 3, **options})
    tokens = random.randint(random.key(1), (4, 7), 0, 11).long()
    return cfg, spec.init(random.key(0), net.spec(cfg), F64), tokens


def theirs(params, tokens, lengths, cfg):
    """One text after another, none of them padded but by the convolutions, at both ends."""
    out = []
    for row, n in zip(tokens, lengths.tolist(), strict=True):
        x = nn.functional.embedding(row[:n], params["tokens"]["weight"]).T[None]  # (1, d_in, n)
        pooled = []
        for k, p in zip(cfg.windows, params["convs"], strict=True):
            module = nn.Conv1d(cfg.d_in, cfg.width, k, padding=k - 1, dtype=F64)
            h = torch.func.functional_call(module, p, (x,)).relu()
            pooled.append(nn.functional.adaptive_max_pool1d(h, 1)[0, :, 0])
        out.append(torch.cat(pooled) @ params["head"]["weight"].T + params["head"]["bias"])
    return torch.stack(out)


def test_equals_conv1d_of_each_text():
    cfg, params, tokens = setting()
    mine = net.apply(params, (tokens, LENGTHS), cfg)
    torch.testing.assert_close(mine, theirs(params, tokens, LENGTHS, cfg), rtol=1e-12, atol=1e-12)
    actual = grad(lambda p: net.apply(p, (tokens, LENGTHS), cfg).square().sum())(params)
    expected = grad(lambda p: theirs(p, tokens, LENGTHS, cfg).square().sum())(params)
    for (name, a), b in zip(tree.items(actual), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_what_follows_an_end_reaches_nothing():
    cfg, params, tokens = setting()
    live = torch.arange(7) < LENGTHS[:, None]
    expected = net.apply(params, (tokens, LENGTHS), cfg)
    for filled in (-100, 10**6):
        assert torch.equal(net.apply(params, (torch.where(live, tokens, filled), LENGTHS), cfg), expected)
    cut = net.apply(params, (tokens[:1, :5], LENGTHS[:1]), cfg)  # no column too many
    torch.testing.assert_close(cut, expected[:1], rtol=1e-12, atol=1e-12)


def test_text_of_no_tokens_has_the_bias_as_its_logits():
    cfg, params, tokens = setting()
    params["convs"] = tree.map(lambda leaf: leaf + 1.0, params["convs"])  # a bias that relu lets through
    logits = net.apply(params, (tokens, torch.zeros(4, dtype=torch.int64)), cfg)
    assert torch.equal(logits, params["head"]["bias"].expand(4, -1))


def test_dropout_is_of_the_pooled_filters():
    cfg, params, tokens = setting(dropout=0.4)
    plain = net.features(params, (tokens, LENGTHS), cfg)
    dropped = net.features(params, (tokens, LENGTHS), cfg, key=random.key(4), train=True)
    alive = plain > 0
    ratio = (dropped / plain)[alive]
    assert alive.sum() > 20 and 0 < (ratio == 0).sum() < len(ratio)
    torch.testing.assert_close(ratio[ratio != 0], torch.full_like(ratio[ratio != 0], 1 / 0.6), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"windows": ()}, r"windows are \(\); expected different widths of at least 1"),
        ({"windows": (2, 2)}, r"windows are \(2, 2\); expected different widths of at least 1"),
        ({"windows": (0, 2)}, r"windows are \(0, 2\); expected different widths of at least 1"),
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
