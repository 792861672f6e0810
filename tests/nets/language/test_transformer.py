"""The transformer against torch.nn.Transformer, its initial values, padding."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import grad_and_value
from torch.nn import functional as F

from core import random, spec, tree
from nets.language import transformer
from tests.nets.language.transformer_cases import (
    F64,
    SIZES,
    distance,
    every_variant,
    pairs,
    paper_positions,
    sentences,
    tiny,
)

# The same numbers as torch.nn.Transformer.


def module_of(norm_first, final_norms, dropout=0.0):
    torch.manual_seed(0)
    sizes = {"dim_feedforward": 24, "dropout": dropout, "batch_first": True, "norm_first": norm_first, "dtype": F64}
    module = nn.Transformer(16, 2, 2, 2, **sizes)
    if not final_norms:
        module.encoder.norm = module.decoder.norm = None
    for p in module.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, 0.5, 0.3)
    return module


def ours(named, tokens):
    """Weights or gradients of torch's module under our names."""
    params = {"decoder": {"blocks": [{}, {}]}, "encoder": {"blocks": [{}, {}]}, "tokens": {"weight": tokens}}
    for side, parts in params.items():
        for i, block in enumerate(parts.get("blocks", [])):
            at = f"{side}.layers.{i}"

            def leaves(name, rows=slice(None), join=".", at=at):
                return {leaf: named[f"{at}.{name}{join}{leaf}"][rows] for leaf in ("bias", "weight")}

            block["attn"] = {"proj": leaves("self_attn.out_proj"), "qkv": leaves("self_attn.in_proj", join="_")}
            block["mlp"] = {"down": leaves("linear2"), "up": leaves("linear1")}
            block["norm1"], block["norm2"] = leaves("norm1"), leaves("norm2" if side == "encoder" else "norm3")
            if side == "decoder":
                block["norm_cross"] = leaves("norm2")
                block["cross"] = {
                    "kv": leaves("multihead_attn.in_proj", slice(16, None), "_"),
                    "proj": leaves("multihead_attn.out_proj"),
                    "q": leaves("multihead_attn.in_proj", slice(16), "_"),
                }
        if f"{side}.norm.weight" in named:
            parts["norm"] = {leaf: named[f"{side}.norm.{leaf}"] for leaf in ("bias", "weight")}
    return tree.sort(params)


def torch_logits(module, tokens, source, target, drop=lambda x: x):
    def embed(ids):
        return drop(4.0 * tokens[ids] + paper_positions(ids.shape[1], 16))  # sqrt(16)

    out = module(
        embed(source),
        embed(target),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=F64).isinf(),
        src_key_padding_mask=source == 0,
        tgt_key_padding_mask=target == 0,
        memory_key_padding_mask=source == 0,
    )
    return out @ tokens.T


def loss(logits, target):
    """Mean over all tokens but padding, each predicted at the position before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("final_norms", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_equals_torch(norm_first, final_norms):
    module, (source, target) = module_of(norm_first, final_norms), pairs()
    tokens = random.normal(random.key(3), (31, 16), F64).requires_grad_()
    expected = torch_logits(module, tokens, source, target)
    loss(expected, target).backward()
    cfg = transformer.Config(**SIZES, norm_first=norm_first, final_norms=final_norms)
    params = ours(tree.map(torch.detach, dict(module.named_parameters())), tokens.detach())
    spec.check(transformer.spec(cfg), params)

    actual = transformer.apply(params, (source, target), cfg)
    assert expected.std() > 0.5
    # torch's queries at padding attend to fewer keys; they have no meaning.
    assert distance(actual[target != 0], expected.detach()[target != 0]) < 1e-12
    gradients, value = grad_and_value(lambda p: loss(transformer.apply(p, (source, target), cfg), target))(params)
    assert abs(value - loss(expected, target)) < 1e-12
    expected = ours({name: p.grad for name, p in module.named_parameters()}, tokens.grad)
    scale = max(float(leaf.abs().max()) for leaf in tree.leaves(expected))
    for (name, a), b in zip(tree.items(gradients), tree.leaves(expected), strict=True):
        assert (a - b).abs().max() < 1e-12 * scale, name


class Scale(nn.Module):
    def forward(self, x):
        return 0.7 * x


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_is_where_the_paper_has_it(norm_first, monkeypatch):
    """Each dropout is replaced by a factor, here and in torch's module."""
    module, (source, target) = module_of(norm_first, True).train(), pairs()
    for layer in (*module.encoder.layers, *module.decoder.layers):
        for name in ("dropout1", "dropout2", "dropout3"):
            if hasattr(layer, name):
                setattr(layer, name, Scale())
    monkeypatch.setattr(transformer, "dropout_sites", lambda key, n, shape, rate: [Scale()] * n)
    tokens = random.normal(random.key(3), (31, 16), F64)
    params = ours(tree.map(torch.detach, dict(module.named_parameters())), tokens)
    cfg = transformer.Config(**SIZES | {"dropout": 0.3}, norm_first=norm_first, final_norms=True)
    actual = transformer.apply(params, (source, target), cfg, key=random.key(0), train=True)
    expected = torch_logits(module, tokens, source, target, Scale()).detach()
    assert distance(actual[target != 0], expected[target != 0]) < 1e-12
    # A factor of the attention weights is one of the matrix after them.
    less = tree.map_with_names(
        lambda n, p: 0.7 * p if n.endswith(("attn.proj.weight", "cross.proj.weight")) else p, params
    )
    expected = transformer.apply(less, (source, target), cfg, key=random.key(0), train=True)
    cfg = replace(cfg, attention_dropout=0.1)
    both = transformer.apply(params, (source, target), cfg, key=random.key(0), train=True)
    assert distance(both, expected) < 1e-12 and distance(both, actual) > 1e-3


def test_masks_of_dropout_differ_from_site_to_site(monkeypatch):
    masks, sites = [], transformer.dropout_sites

    def record(key, n, shape, rate):
        masks.extend(site(torch.ones(shape)) != 0 for site in sites(key, n, shape, rate))
        return sites(key, n, shape, rate)

    monkeypatch.setattr(transformer, "dropout_sites", record)
    params, cfg = tiny(dropout=0.4, attention_dropout=0.4)
    same = sentences(7, [7, 7]), sentences(7, [7, 7])
    transformer.apply(params, same, cfg, key=random.key(0), train=True)
    assert len(masks) == 2 + 5 + 2 + 2 + 7
    flat = [mask.flatten()[:196] for mask in masks]
    assert not any(torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])


def test_starts_as_torch_does():
    """torch.nn.Transformer draws Xavier's uniform for its packed matrices; so do we, matrix by matrix."""
    cfg = transformer.Config(500, 500, layers=1, heads=2, width=64, hidden=96)
    params = spec.init(random.key(0), transformer.spec(cfg))
    module = nn.Transformer(64, 2, 1, 1, dim_feedforward=96, batch_first=True)
    named = {name: p.detach() for name, p in module.named_parameters()}
    bounds = {"attn.qkv": named["encoder.layers.0.self_attn.in_proj_weight"], "mlp.up": None, "mlp.down": None}
    bounds |= {"cross.q": bounds["attn.qkv"], "cross.kv": bounds["attn.qkv"]}
    bounds |= {"mlp.up": named["encoder.layers.0.linear1.weight"], "mlp.down": named["encoder.layers.0.linear2.weight"]}
    block = params["decoder"]["blocks"][0]
    for name, like in bounds.items():
        actual = tree.get(block, name)["weight"]
        assert abs(actual.abs().max() / like.abs().max() - 1) < 0.01, name
        assert abs(actual.std() / like.std() - 1) < 0.05, name
    # Embedded tokens and first logits are of unit variance.
    assert abs(8 * params["tokens"]["weight"].std() - 1) < 0.05
    source = target = sentences(20, [20] * 8, vocabulary=500)
    first = transformer.apply(params, (source, target), cfg)
    assert 0.8 < first.std() < 1.2


@pytest.mark.parametrize(("preset", "published"), [("base", 65e6), ("big", 213e6)])
def test_presets_have_the_size_in_the_paper(preset, published):
    """Table 3 rounds, and says "about 37000 tokens"."""
    assert abs(tree.count(transformer.spec(transformer.PRESETS[preset])) / published - 1) < 0.03


def test_sinusoids():
    positions = torch.arange(50)
    actual = transformer.sinusoids(positions, 16)
    torch.testing.assert_close(actual, paper_positions(50, 16))
    halves = transformer.sinusoids(positions.reshape(5, 10), 16, halves=True).reshape(50, 16)
    torch.testing.assert_close(halves, torch.cat([actual[:, 0::2], actual[:, 1::2]], 1))


# Padding.


@every_variant
def test_padding_changes_nothing(options):
    params, cfg = tiny(F64, **options)
    source, target = pairs()
    wide = F.pad(source, (0, 4)), F.pad(target, (0, 6))
    expected = transformer.apply(params, (source, target), cfg)
    actual = transformer.apply(params, wide, cfg)
    assert distance(actual[:, :7], expected) < 1e-12
    # One at a time, without any.
    for i, (n, m) in enumerate([(9, 4), (3, 7), (6, 1), (1, 5)]):
        alone = transformer.apply(params, (source[i : i + 1, :n], target[i : i + 1, :m]), cfg)
        assert distance(alone[0], expected[i, :m]) < 1e-12

    def gradient(x):
        return grad_and_value(lambda p: loss(transformer.apply(p, x, cfg), x[1]))(params)[0]

    for a, b in zip(tree.leaves(gradient(wide)), tree.leaves(gradient((source, target))), strict=True):
        torch.testing.assert_close(a, b)


def test_an_empty_source_is_no_nan():
    params, cfg = tiny()
    source, target = pairs()
    source[2] = 0
    gradients, value = grad_and_value(lambda p: loss(transformer.apply(p, (source, target), cfg), target))(params)
    assert value.isfinite() and all(leaf.isfinite().all() for leaf in tree.leaves(gradients))


def test_padding_id_and_masks_by_hand():
    params, cfg = tiny()
    source, target = pairs()
    expected = transformer.apply(params, (source, target), cfg)
    # The table's first row put last, and every other a row up.
    moved = {**params, "tokens": {"weight": params["tokens"]["weight"].roll(-1, 0)}}
    other = [torch.where(x == 0, 30, x - 1) for x in (source, target)]
    actual = transformer.apply(moved, tuple(other), replace(cfg, padding_id=30))
    torch.testing.assert_close(actual, expected.roll(-1, -1))
    mask = source != 0
    assert torch.equal(transformer.encode(params, source, cfg, mask=mask), transformer.encode(params, source, cfg))
    whole = torch.ones_like(mask)
    memory = transformer.encode(params, source, cfg, mask=whole)
    a, b = (transformer.decode(params, target, memory, cfg, source_mask=m) for m in (whole, None))
    torch.testing.assert_close(a, b)
    assert distance(a, expected) > 0.01


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers is 0; expected at least 1"),
        ({"width": 30, "heads": 4}, "width 30 is not divisible by 4 heads"),
        ({"width": 15, "heads": 5}, "width 15 is odd"),
        ({"positions": "rotary"}, "positions 'rotary' is none of sinusoidal, halves, learned"),
        ({"dropout": 1.0}, "dropout 1.0 is outside"),
        ({"attention_dropout": -0.1}, "attention_dropout -0.1 is outside"),
        ({"target_vocabulary": 30}, "vocabularies of 31 and 30 tokens cannot share an embedding; use shared=False"),
        ({"padding_id": 31}, "padding_id 31 is not one of 31 tokens"),
        ({"activation": "relu7"}, "no activation 'relu7'"),
    ],
)
def test_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        transformer.Config(**SIZES | options)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_inputs_are_checked(positions):
    params, cfg = tiny(positions=positions)
    source, target = pairs()
    long, memory = sentences(17, [17] * 4), transformer.encode(params, source, cfg)
    with pytest.raises(ValueError, match="a source of 17 tokens is longer than the context of 16"):
        transformer.apply(params, (long, target), cfg)
    with pytest.raises(ValueError, match="a target of 17 tokens is longer than the context of 16"):
        transformer.apply(params, (source, long), cfg)
    with pytest.raises(ValueError, match="a source of 17 tokens is longer than the context of 16"):
        transformer.attention_maps(params, (long, target), cfg)
    with pytest.raises(ValueError, match=r"expected source tokens of shape \(batch, time\), found \(9,\)"):
        transformer.apply(params, (source[0], target), cfg)
    with pytest.raises(ValueError, match=r"expected target tokens of shape \(batch, time\), found \(7,\)"):
        transformer.apply(params, (source, target[0]), cfg)
    with pytest.raises(ValueError, match=r"expected a memory of shape \(3, source time, 16\), found \(4, 9, 16\)"):
        transformer.apply(params, (source, target[:3]), cfg)
    with pytest.raises(ValueError, match="integer ids, found torch.float32"):
        transformer.apply(params, (source, target.float()), cfg)
    with pytest.raises(ValueError, match=r"a mask of shape \(4, 9\) of torch.bool, found \(4, 8\) of torch.bool"):
        transformer.encode(params, source, cfg, mask=source[:, 1:] != 0)
    with pytest.raises(ValueError, match=r"a source_mask of shape \(4, 9\) of torch.bool, found .* torch.int64"):
        transformer.decode(params, target, memory, cfg, source_mask=source)
    with pytest.raises(ValueError, match="17 positions exceed the context of 16"):
        transformer.start(params, memory, source != 0, cfg, 17)
    cache = transformer.start(params, memory, None, cfg, 7)
    with pytest.raises(ValueError, match=r"expected tokens of shape \(batch,\), found \(4, 7\)"):
        transformer.step(params, cache, target, torch.tensor(0), cfg)
