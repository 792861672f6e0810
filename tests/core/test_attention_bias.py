"""A bias of the scores against torch's kernel, and heads of another size than width / heads."""

import pytest
import torch
from torch.func import grad
from torch.nn import functional as F

from core import random, spec, tree
from core.attention import (
    attention,
    cached_self_attention,
    cross_attention,
    empty_cache,
    merge_heads,
    padding_mask,
    queries_keys_values,
    self_attention,
    self_attention_spec,
)
from core.layers import linear

F64 = torch.float64


def draw(site, *shape):
    return random.normal(random.fold_in(random.key(5), site), shape, F64)


Q, K, V = draw(0, 3, 4, 5, 6), draw(1, 3, 2, 7, 6), draw(2, 3, 2, 7, 6)
MASK = padding_mask(torch.tensor([7, 4, 1]), 7)


@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (1, 4, 5, 7), (4, 1, 7), (5, 1)])
@pytest.mark.parametrize("masking", ["none", "causal", "padding", "both"])
@pytest.mark.parametrize("method", ["explicit", "fused"])
def test_bias_equals_torch(shape, masking, method):
    options = {"mask": MASK if masking in ("padding", "both") else None, "causal": masking in ("causal", "both")}
    visible = torch.ones(3, 1, 5, 7, dtype=torch.bool)
    visible = visible & MASK if options["mask"] is not None else visible
    visible = visible.tril(2) if options["causal"] else visible

    def ours(q, k, v, bias):
        return attention(q, k, v, bias=bias, scale=0.7, method=method, **options)

    def theirs(q, k, v, bias):
        bias = torch.where(visible, bias, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.7, enable_gqa=True)

    arguments = Q, K, V, draw(3, *shape)
    torch.testing.assert_close(ours(*arguments), theirs(*arguments))
    weights = torch.cos(torch.arange(Q.numel(), dtype=F64)).reshape(Q.shape)
    gradients = [grad(lambda *x, f=f: (f(*x) * weights).sum(), (0, 1, 2, 3))(*arguments) for f in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("method", ["explicit", "fused"])
def test_a_query_that_sees_nothing_gets_zeros_with_a_bias_too(method):
    mask = padding_mask(torch.tensor([7, 0, 3]), 7)
    out = attention(Q, K, V, mask=mask, bias=draw(3, 4, 5, 7), method=method)
    assert (out[1] == 0).all() and (out[[0, 2]] != 0).all()


def test_cross_attention_takes_a_bias_and_a_scale():
    x, memory, bias = draw(4, 3, 5, 8), draw(5, 3, 7, 10), draw(6, 2, 5, 7)
    p = {"kv": {"weight": draw(7, 24, 10)}, "proj": {"weight": draw(8, 8, 12)}, "q": {"weight": draw(9, 12, 8)}}
    k, v = (memory @ rows.T for rows in p["kv"]["weight"].chunk(2))
    q, k, v = (part.unflatten(-1, (2, 6)).transpose(1, 2) for part in (x @ p["q"]["weight"].T, k, v))
    expected = merge_heads(torch.softmax(q @ k.mT + bias, -1) @ v) @ p["proj"]["weight"].T
    torch.testing.assert_close(cross_attention(p, x, memory, 2, bias=bias, scale=1.0), expected)


def test_heads_of_any_size():
    shapes = self_attention_spec(12, 4, kv_heads=2, depth=5, bias=True, proj_bias=False)
    assert {name: tuple(leaf.shape) for name, leaf in tree.items(shapes)} == {
        "proj.weight": (12, 20),
        "qkv.bias": (40,),
        "qkv.weight": (40, 12),
    }
    params, x = spec.init(random.key(0), shapes, F64), draw(10, 3, 6, 12)
    q, k, v = queries_keys_values(params, x, 4, 2)
    assert q.shape == (3, 4, 6, 5) and k.shape == v.shape == (3, 2, 6, 5)
    expected = linear(params["proj"], merge_heads(attention(q, k, v, causal=True)))
    torch.testing.assert_close(self_attention(params, x, 4, kv_heads=2, causal=True), expected)
    start = torch.zeros(3, dtype=torch.int64)
    actual, _ = cached_self_attention(params, x, empty_cache(3, 2, 8, 5, F64), start, 4, kv_heads=2)
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="8 heads and 2 key-value heads do not fit a qkv matrix of 40 rows"):
        queries_keys_values(params, x, 8, 2)


def test_a_bias_that_does_not_broadcast_is_refused():
    with pytest.raises(ValueError, match=r"a bias of shape \(3, 7\) does not broadcast to \(3, 4, 5, 7\)"):
        attention(Q, K, V, bias=draw(3, 3, 7))
