"""Attention against torch's kernel, torch.nn.MultiheadAttention and jax; the cache against the whole sequence."""

import math

import jax
import jax.numpy as jnp
import numpy
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.nn import functional as F

from core import random, spec, transforms, tree
from core.attention import (
    Cache,
    attention,
    cached_self_attention,
    causal_mask,
    cross_attention,
    cross_attention_spec,
    cross_keys_values,
    empty_cache,
    merge_heads,
    padding_mask,
    self_attention,
    self_attention_spec,
    split_heads,
)
from core.layers import dropout

F64 = torch.float64
KEY = random.key(11)


def draw(site, *shape, dtype=F64):
    return random.normal(random.fold_in(KEY, site), shape, dtype)


def inputs(queries=5, keys=5, heads=4, kv_heads=4, batch=3, depth=6):
    memory = batch, kv_heads, keys, depth
    return draw(0, batch, heads, queries, depth), draw(1, *memory), draw(2, *memory)


LENGTHS = torch.tensor([5, 2, 3])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masking", ["none", "causal", "padding", "both"])
@pytest.mark.parametrize("queries", [5, 3])
@pytest.mark.parametrize("method", ["explicit", "fused"])
def test_equals_torch(kv_heads, masking, queries, method):
    q, k, v = inputs(queries, 5, kv_heads=kv_heads)
    causal = masking in ("causal", "both")
    mask = padding_mask(LENGTHS, 5) if masking in ("padding", "both") else None
    # torch aligns is_causal at the start, we at the end: as with a cache, the queries are the last ones.
    whole = torch.ones(queries, 5, dtype=torch.bool).tril(5 - queries) if causal else torch.ones(queries, 5).bool()
    whole = whole if mask is None else whole & mask

    def ours(q, k, v):
        return attention(q, k, v, mask=mask, causal=causal, method=method)

    def theirs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=whole, enable_gqa=True)

    torch.testing.assert_close(ours(q, k, v), theirs(q, k, v))
    weights = torch.cos(torch.arange(q.numel(), dtype=F64)).reshape(q.shape)
    gradients = [grad(lambda *qkv, f=f: (f(*qkv) * weights).sum(), argnums=(0, 1, 2))(q, k, v) for f in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_scale_depth_of_values_and_auto():
    q, k, v = inputs()
    v = v[..., :2]
    out = attention(q, k, v, scale=0.3)
    assert out.shape == (3, 4, 5, 2)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.3))
    torch.testing.assert_close(attention(q, k, v, method="explicit"), attention(q, k, v), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["explicit", "fused"])
def test_a_query_that_sees_nothing_gets_zeros_and_finite_gradients(method):
    q, k, v = inputs(queries=7, keys=5)
    mask = padding_mask(torch.tensor([5, 0, 3]), 5)
    blind = torch.zeros(3, 7, dtype=torch.bool)
    blind[1], blind[:, :2] = True, True  # two more queries than keys: the first two see none

    def f(q, k, v):
        return attention(q, k, v, mask=mask, causal=True, method=method)

    out = f(q, k, v).transpose(1, 2)
    assert (out[blind] == 0).all() and (out[~blind] != 0).all()
    gradients = grad(lambda *qkv: f(*qkv).square().sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(g.isfinite().all() for g in gradients) and (gradients[2][1] == 0).all()


def test_masks():
    assert torch.equal(causal_mask(3), torch.ones(3, 3).tril().bool())
    assert torch.equal(causal_mask(2, 4), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool())
    assert torch.equal(padding_mask(torch.tensor([1, 3]), 3)[:, 0, 0], torch.tensor([[1, 0, 0], [1, 1, 1]]).bool())
    x = draw(3, 2, 5, 12)
    assert torch.equal(merge_heads(split_heads(x, 4)), x) and split_heads(x, 4).shape == (2, 4, 5, 3)


def module_and_params(cross):
    """torch's layer, and its weights under our names."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(12, 4, batch_first=True, dtype=F64)
    nn.init.normal_(module.in_proj_bias), nn.init.normal_(module.out_proj.bias)

    def part(weight, bias, rows):
        return {"bias": bias.detach()[rows], "weight": weight.detach()[rows]}

    both = slice(None), slice(0, 12), slice(12, 36)
    names = {"q": both[1], "kv": both[2]} if cross else {"qkv": both[0]}
    params = {name: part(module.in_proj_weight, module.in_proj_bias, rows) for name, rows in names.items()}
    return module, tree.sort({**params, "proj": part(module.out_proj.weight, module.out_proj.bias, both[0])})


@pytest.mark.parametrize(
    ("cross", "masking"),
    [(False, "none"), (False, "causal"), (False, "padding"), (False, "both"), (True, "none"), (True, "padding")],
)
def test_equals_multihead_attention(cross, masking):
    module, params = module_and_params(cross)
    x, memory = draw(4, 3, 5, 12), draw(5, 3, 7, 12)
    lengths, keys = (LENGTHS + 2, 7) if cross else (LENGTHS, 5)
    causal, padded = masking in ("causal", "both"), masking in ("padding", "both")
    mask = padding_mask(lengths, keys) if padded else None

    def ours(p, x):
        if cross:
            return cross_attention(p, x, memory, 4, mask=mask)
        return self_attention(p, x, 4, mask=mask, causal=causal)

    def theirs(x):
        source = memory if cross else x
        return module(
            x,
            source,
            source,
            key_padding_mask=torch.arange(keys) >= lengths[:, None] if padded else None,
            attn_mask=~causal_mask(5) if causal else None,
            need_weights=False,
        )[0]

    spec.check(cross_attention_spec(12, 4) if cross else self_attention_spec(12, 4), params)
    torch.testing.assert_close(ours(params, x), theirs(x))
    gradient, x_gradient = grad(lambda p, x: ours(p, x).square().sum(), argnums=(0, 1))(params, x)
    x = x.clone().requires_grad_()
    theirs(x).square().sum().backward()
    names = ("q", "kv") if cross else ("qkv",)
    for leaf, reference in (("weight", module.in_proj_weight.grad), ("bias", module.in_proj_bias.grad)):
        torch.testing.assert_close(torch.cat([gradient[name][leaf] for name in names]), reference)
        torch.testing.assert_close(gradient["proj"][leaf], getattr(module.out_proj, leaf).grad)
    torch.testing.assert_close(x_gradient, x.grad)


def test_keys_and_values_of_a_memory_are_enough():
    params = spec.init(KEY, cross_attention_spec(12, 4), F64)
    x, memory, mask = draw(4, 3, 5, 12), draw(5, 3, 7, 12), padding_mask(LENGTHS, 7)
    pair = cross_keys_values(params, memory, 4)
    assert pair.keys.shape == pair.values.shape == (3, 4, 7, 3)
    actual, expected = (cross_attention(params, x, m, 4, mask=mask) for m in (pair, memory))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_rows_may_share_a_memory():
    params = spec.init(KEY, cross_attention_spec(12, 4), F64)
    x, memory, mask = draw(4, 6, 5, 12), draw(5, 3, 7, 12), padding_mask(LENGTHS, 7)
    expected = cross_attention(params, x, memory.repeat_interleave(2, 0), 4, mask=mask.repeat_interleave(2, 0))
    torch.testing.assert_close(cross_attention(params, x, memory, 4, mask=mask), expected)
    with pytest.raises(ValueError, match="attention: 5 rows do not divide by the 3 of memory"):
        cross_attention(params, x[:5], memory, 4)


def test_cross_attention_starts_as_one_matrix_does():
    params = spec.init(KEY, cross_attention_spec(64, 4))
    bounds = {"kv": math.sqrt(6 / 256), "proj": math.sqrt(6 / 128), "q": math.sqrt(6 / 256)}
    for name, bound in bounds.items():
        assert 0.99 * bound < params[name]["weight"].abs().max() <= bound, name


def jax_attention(q, k, v):
    # jax.nn.dot_product_attention takes its softmax in single precision, whatever the inputs are.
    k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(2, 3) / jnp.sqrt(q.shape[-1])
    return jax.nn.softmax(jnp.where(jnp.tri(q.shape[2], dtype=bool), scores, -jnp.inf)) @ v


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_forward_mode_and_second_derivatives_equal_jax(kv_heads):
    primals, tangents = inputs(kv_heads=kv_heads), tuple(x.cos() for x in inputs(kv_heads=kv_heads))

    def ours(qkv):
        return attention(*qkv, causal=True, method="explicit").square().sum()

    def theirs(qkv):
        return jnp.square(jax_attention(*qkv)).sum()

    gradient, product = transforms.hvp(ours, primals, tangents)
    with jax.enable_x64(True):
        arrays, directions = (tuple(jnp.asarray(x.numpy()) for x in xs) for xs in (primals, tangents))
        reference = jax.jvp(jax.grad(theirs), (arrays,), (directions,))
        for a, b in zip((*gradient, *product), (*reference[0], *reference[1]), strict=True):
            numpy.testing.assert_allclose(a.numpy(), numpy.asarray(b), rtol=1e-9, atol=1e-12)


BEYOND = {
    "jvp": lambda f: lambda q: torch.func.jvp(f, (q,), (q.cos(),)),
    "hvp": lambda f: lambda q: torch.func.jvp(grad(f), (q,), (q.cos(),)),
    "dual": lambda f: lambda q: dual(f, q),
    "grad of grad": lambda f: grad(lambda q: grad(f)(q).square().sum()),
    "linearize": lambda f: lambda q: transforms.linearize(f, q)[1](q.cos()),
}


def dual(f, q):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(q, q.cos()))))


@pytest.mark.parametrize(
    ("name", "compiled"),
    # Dynamo does not trace dual numbers.
    [(name, compiled) for name in BEYOND for compiled in (False, True) if not (compiled and name == "dual")],
)
def test_fused_gives_way_where_it_has_no_derivative(name, compiled):
    q, k, v = inputs()

    def loss(method):
        return lambda q: attention(q, k, v, causal=True, method=method).square().sum()

    f = BEYOND[name](loss("fused"))
    torch._dynamo.reset()
    f = torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else f
    torch.testing.assert_close(f(q), BEYOND[name](loss("explicit"))(q))


def test_fused_is_used_for_values_and_gradients(monkeypatch):
    q, k, v = inputs()
    calls = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kw: calls.append(1) or kernel(*args, **kw))
    attention(q, k, v, method="fused")
    grad(lambda q: attention(q, k, v, method="fused").sum())(q)
    assert len(calls) == 2


def dropping(key):
    return lambda weights: dropout(weights, 0.5, key)


def test_dropout_masks_belong_to_their_examples():
    q, k, v = inputs()
    keys = random.split(KEY, 3)
    out = attention(q, k, v, drop=dropping(keys), causal=True)
    singly = [[x[i : i + 1] for x in (q, k, v, keys)] for i in range(3)]
    alone = [attention(a, b, c, drop=dropping(key), causal=True) for a, b, c, key in singly]
    torch.testing.assert_close(out, torch.cat(alone))
    mapped = vmap(lambda q, k, v, key: attention(q[None], k[None], v[None], drop=dropping(key[None]), causal=True)[0])
    torch.testing.assert_close(out, mapped(q, k, v, keys))
    assert not torch.allclose(out, attention(q, k, v, causal=True))
    # The mean over many masks is the value without dropout.
    many = random.split(KEY, 4096)
    one = [x[:1].expand(4096, *x.shape[1:]) for x in (q, k, v)]
    mean = attention(*one, drop=dropping(many)).mean(0)
    torch.testing.assert_close(mean, attention(q, k, v)[0], rtol=0, atol=0.1)


def test_bfloat16_softmax_is_taken_in_float32():
    # 512 keys of equal score: a bfloat16 sum of exponentials would stop at 256.
    q = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, 512, 8, dtype=torch.bfloat16)
    v = draw(6, 1, 1, 512, 8).bfloat16()
    out = attention(q, k, v, method="explicit")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.to(F64), v.to(F64).mean(2, keepdim=True), rtol=0, atol=2e-3)
    q, k, v = (x.bfloat16() for x in inputs())
    wide = F.scaled_dot_product_attention(q.to(F64), k.to(F64), v.to(F64))
    torch.testing.assert_close(attention(q, k, v).to(F64), wide, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("method", ["explicit", "auto"])
def test_vmap_over_params_and_compile(method):
    layer = self_attention_spec(12, 4, kv_heads=2)
    ensemble = vmap(lambda key: spec.init(key, layer, F64))(random.split(KEY, 3))
    x = draw(4, 2, 5, 12)

    def apply(p):
        return self_attention(p, x, 4, kv_heads=2, causal=True, method=method)

    one_by_one = torch.stack([apply(p) for p in tree.unstack(ensemble)])
    torch.testing.assert_close(vmap(apply)(ensemble), one_by_one)
    torch._dynamo.reset()
    compiled = torch.compile(vmap(grad(lambda p: apply(p).sum())), fullgraph=True, dynamic=False, backend="aot_eager")
    reference = tree.stack([grad(lambda p: apply(p).sum())(p) for p in tree.unstack(ensemble)])
    torch.testing.assert_close(compiled(ensemble), reference)


def decoder(kv_heads):
    params = spec.init(KEY, self_attention_spec(12, 4, kv_heads=kv_heads), F64)
    return params, draw(4, 3, 9, 12), empty_cache(3, kv_heads or 4, 9, 3, F64)


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("chunks", [[1] * 9, [9], [4, 1, 1, 3], [2, 7]], ids=str)
def test_cached_equals_uncached(kv_heads, chunks):
    params, x, cache = decoder(kv_heads)
    expected = self_attention(params, x, 4, kv_heads=kv_heads, causal=True)
    outputs, start, before = [], 0, cache
    for size in chunks:
        position = torch.full((3,), start)
        y, cache = cached_self_attention(params, x[:, start : start + size], cache, position, 4, kv_heads=kv_heads)
        outputs.append(y)
        start += size
    torch.testing.assert_close(torch.cat(outputs, 1), expected)
    assert all((z == 0).all() for z in before) and isinstance(cache, Cache)


def test_examples_may_be_at_different_positions():
    """Prompts of 2, 5 and 3 tokens in one padded batch; then four more tokens each."""
    params, x, cache = decoder(None)
    expected = self_attention(params, x, 4, causal=True)
    lengths = torch.tensor([2, 5, 3])
    prompt = torch.where(torch.arange(5)[:, None] < lengths[:, None, None], x[:, :5], 1e3)
    y, cache = cached_self_attention(params, prompt, cache, torch.zeros(3, dtype=torch.int64), 4)
    rows = torch.arange(3)
    torch.testing.assert_close(y[rows, lengths - 1], expected[rows, lengths - 1])
    for t in range(4):
        token = x[rows, lengths + t][:, None]
        y, cache = cached_self_attention(params, token, cache, lengths + t, 4)
        torch.testing.assert_close(y[:, 0], expected[rows, lengths + t])


def test_cached_decoding_compiles_once_and_vmaps():
    params, x, cache = decoder(None)
    expected = self_attention(params, x, 4, causal=True)
    torch._dynamo.reset()
    step = torch.compile(
        lambda x, cache, position: cached_self_attention(params, x, cache, position, 4),
        fullgraph=True,
        dynamic=False,
        backend="aot_eager",
    )
    step(x[:, :1], cache, START)
    torch._dynamo.utils.counters.clear()
    for t in range(9):
        y, cache = step(x[:, t : t + 1], cache, torch.full((3,), t))
        torch.testing.assert_close(y[:, 0], expected[:, t])
    assert not torch._dynamo.utils.counters["stats"]
    ensemble = tree.stack([params, tree.map(torch.neg, params)])
    caches = tree.map(lambda z: z.expand(2, *z.shape), empty_cache(3, 4, 9, 3, F64))
    y, _ = vmap(lambda p, c: cached_self_attention(p, x, c, torch.zeros(3, dtype=torch.int64), 4))(ensemble, caches)
    torch.testing.assert_close(y[0], expected)


Q, K, V = inputs()
PARAMS = spec.init(KEY, self_attention_spec(12, 4), F64)
X = draw(4, 3, 5, 12)
START = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(Q, K[:, :3], V[:, :3]), "4 query heads do not divide into 3 key-value heads"),
        (lambda: attention(Q, K, V, method="flash"), "method 'flash' is unknown; expected auto, explicit or fused"),
        (lambda: attention(Q[0], K, V), r"q, k and v must be \(batch, heads, time, depth\)"),
        (lambda: attention(Q, K, V[:, :, :2]), "do not fit each other"),
        (lambda: attention(Q[:2], K, V), "do not fit each other"),
        (lambda: attention(Q, K[..., :3], V), "do not fit each other"),
        (lambda: attention(Q, K, V, mask=torch.ones(5, 5)), "mask must be boolean, .* found torch.float32"),
        (
            lambda: attention(Q, K, V, mask=torch.ones(3, 5).bool()),
            r"mask of shape \(3, 5\) does not broadcast",
        ),
        (lambda: self_attention_spec(10, 4), "width 10 is not divisible by 4 heads"),
        (lambda: self_attention_spec(12, 4, kv_heads=3), "4 query heads do not divide into 3 key-value heads"),
        (lambda: cross_attention_spec(10, 4), "width 10 is not divisible by 4 heads"),
        (lambda: self_attention(PARAMS, X, 4, kv_heads=2), "do not fit a qkv matrix of 36 rows"),
        (lambda: self_attention(PARAMS, X[..., :10], 4), r"x of shape \(3, 5, 10\), 4 heads"),
        (
            lambda: cached_self_attention(PARAMS, X, empty_cache(3, 4, 4, 3, F64), START, 4),
            "does not take keys",
        ),
        (lambda: cached_self_attention(PARAMS, X, empty_cache(3, 2, 9, 3, F64), START, 4), r"shape \(3, 2, 9"),
        (
            lambda: cached_self_attention(PARAMS, X, empty_cache(3, 4, 9, 3), START, 4),
            "and torch.float32 does not take",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
