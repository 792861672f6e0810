"""fastText against torch.nn.EmbeddingBag with n-grams hashed in plain Python; ends, hashes, dropout."""

import math

import pytest
import torch
from torch import nn
from torch.func import grad

from core import random, spec, tree
from nets.language import fasttext as net

F64 = torch.float64
LENGTHS = torch.tensor([5, 2, 7, 1])
LARGEST = torch.iinfo(torch.int64).max
SMALLEST = torch.iinfo(torch.int64).min


def setting(**options):
    """The initial vectors of n-grams are 0; here they are as random as the others."""
    cfg = net.Config(**{"vocabulary": 11, "d_in": 3, "buckets": 19, "outputs": 3, **options})
    params = spec.init(random.key(0), net.spec(cfg), F64)
    if cfg.ngrams > 1:
        params["ngrams"]["weight"] = random.normal(random.key(2), (cfg.buckets, cfg.d_in)).double()
    return cfg, params, random.randint(random.key(1), (4, 7), 0, 11).long()


def parts_of(tokens: list[int], cfg) -> list[int]:
    """Rows of a text in one table, the tokens' vectors above those of the n-grams: a text of whole numbers, hashed."""
    padded = [0, *[(t % net.PRIME + 1) % net.PRIME for t in tokens], 0]
    rows = list(tokens)
    for n in range(2, cfg.ngrams + 1):
        for first in range(len(padded) - n + 1):
            h = 0
            for digit in padded[first : first + n]:
                h = (h * net.MULTIPLIER + digit) % net.PRIME
            rows.append(cfg.vocabulary + h * net.MULTIPLIER % net.PRIME % cfg.buckets)
    return rows


@pytest.mark.parametrize("options", [{}, {"ngrams": 1}, {"ngrams": 5}, {"ngrams": 3, "hidden": 4}])
def test_equals_embedding_bag(options):
    cfg, params, tokens = setting(**options)
    texts = [parts_of(row[:n].tolist(), cfg) for row, n in zip(tokens, LENGTHS.tolist(), strict=True)]

    def theirs(params):
        table = torch.cat([params[part]["weight"] for part in ("tokens", "ngrams") if part in params])
        starts = torch.tensor([0, *[len(text) for text in texts[:-1]]]).cumsum(0)
        rows = torch.tensor([row for text in texts for row in text])
        bag = nn.EmbeddingBag(*table.shape, mode="mean", dtype=F64)
        x = torch.func.functional_call(bag, {"weight": table}, (rows, starts))
        if cfg.hidden:
            x = (x @ params["hidden"]["weight"].T + params["hidden"]["bias"]).relu()
        return x @ params["head"]["weight"].T + params["head"]["bias"]

    def ours(params):
        return net.apply(params, (tokens, LENGTHS), cfg)

    torch.testing.assert_close(ours(params), theirs(params), rtol=1e-12, atol=1e-12)
    mine = grad(lambda p: ours(p).square().sum())(params)
    leaves = tree.map(lambda leaf: leaf.clone().requires_grad_(), params)
    theirs(leaves).square().sum().backward()
    for (name, a), b in zip(tree.items(mine), tree.leaves(leaves), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("buckets", [1, 7, 2**17, net.PRIME])
def test_buckets_are_in_range_for_any_integers(buckets):
    tokens = torch.tensor([[0, -1, LARGEST, SMALLEST, net.PRIME, -net.PRIME, 2 * net.PRIME - 1]])
    ids, inside = net.hashed_ngrams(tokens, torch.tensor([7]), 4, buckets)
    assert ids.shape == inside.shape == (1, 3, 8) and ids.dtype == torch.int64
    assert int(ids.min()) >= 0 and int(ids.max()) < buckets
    assert inside.sum(2).tolist() == [[8, 7, 6]]  # 9 - n + 1, with both boundaries


def test_ngrams_spread_over_the_buckets():
    """65,536 pairs leave at most a share of 1 / e of as many buckets empty, what random ones would; order counts."""
    first, second = torch.cartesian_prod(torch.arange(256), torch.arange(256)).T
    pairs = torch.stack([first, second], 1)
    ids, _ = net.hashed_ngrams(pairs, torch.full((len(pairs),), 2), 2, 2**16)
    used = len(ids[:, 0, 1].unique()) / 2**16
    assert used > 1 - 1 / math.e
    exact, _ = net.hashed_ngrams(pairs, torch.full((len(pairs),), 2), 2, net.PRIME)
    assert len(exact[:, 0, 1].unique()) == 2**16


def test_what_follows_an_end_reaches_nothing():
    cfg, params, tokens = setting(ngrams=3)
    live = torch.arange(7) < LENGTHS[:, None]
    expected = net.apply(params, (tokens, LENGTHS), cfg)
    for filled in (-100, LARGEST, 10**6):
        garbage = torch.where(live, tokens, filled)
        assert torch.equal(net.apply(params, (garbage, LENGTHS), cfg), expected)
    cut = net.apply(params, (tokens[:1, :5], LENGTHS[:1]), cfg)  # no column too many
    torch.testing.assert_close(cut, expected[:1], rtol=1e-12, atol=1e-12)


def test_text_of_no_tokens_has_the_bias_as_its_logits():
    cfg, params, tokens = setting(ngrams=4)
    logits = net.apply(params, (tokens, torch.zeros(4, dtype=torch.int64)), cfg)
    assert torch.equal(logits, params["head"]["bias"].expand(4, -1))


def test_dropout_leaves_out_whole_tokens_and_ngrams():
    """With unit vectors the mean has a weight per token and n-gram: 0 or 1 / (count (1 - rate)), the latter as often as
    1 - rate."""
    time, rate = 6, 0.4
    cfg = net.Config(vocabulary=time, d_in=time + 50, buckets=50, dropout=rate)
    params = spec.init(random.key(0), net.spec(cfg), F64)
    eye = torch.eye(time + 50, dtype=F64)
    params["tokens"]["weight"], params["ngrams"]["weight"] = eye[:time], eye[time:]
    tokens, lengths = torch.arange(time).expand(500, -1), torch.full((500,), time)
    keys = random.split(random.key(3), 500)
    ids, _ = net.hashed_ngrams(tokens[:1], lengths[:1], 2, 50)
    assert len(ids.unique()) == time + 1  # else a weight would be the sum of two
    mean = net.features(params, (tokens, lengths), cfg, key=keys, train=True)
    weights = torch.cat([mean[:, :time], mean[:, time:][:, ids[0, 0]]], 1) * (2 * time + 1) * (1 - rate)
    survivors = weights > 0.5
    torch.testing.assert_close(weights, survivors.double(), rtol=1e-12, atol=1e-12)
    assert float((survivors.double().mean(0) - (1 - rate)).abs().max()) < 0.08  # four standard deviations of 500


@pytest.mark.slow
def test_compiled_hashes_are_the_same():
    tokens = torch.tensor([[3, -1, LARGEST, SMALLEST, 12345]])
    lengths = torch.tensor([5])
    compiled = torch.compile(net.hashed_ngrams, fullgraph=True, dynamic=False)
    for mine, theirs in zip(
        compiled(tokens, lengths, 4, 2**17), net.hashed_ngrams(tokens, lengths, 4, 2**17), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ngrams": 0}, "ngrams is 0; expected at least 1"),
        ({"hidden": -1}, "hidden is -1; expected at least 0"),
        ({"buckets": 2**31}, "buckets is 2147483648; expected up to 2147483647, the values of the hash"),
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
