"""The transformer against torch.nn.Transformer, cached steps against the whole pass, and what padding must not do."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

from core import random, spec, tree
from nets.language import transformer

F64 = torch.float64
SIZES = {"source_vocabulary": 31, "target_vocabulary": 31, "layers": 2, "heads": 2, "width": 16, "hidden": 24}
SIZES |= {"context": 16, "dropout": 0.0}
VARIANTS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True},
    "separate": {"shared": False, "target_vocabulary": 29, "output_bias": True},
    "learned": {"positions": "learned", "final_norms": True},
    "halves": {"positions": "halves", "scale": False, "activation": "gelu"},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def tiny(dtype=torch.float32, **options):
    """(params, cfg) of a net far from its start, whose logits are not small."""
    cfg = transformer.Config(**SIZES | options)
    params = spec.init(random.key(0), transformer.spec(cfg), dtype)
    keys = random.split(random.key(5), len(tree.leaves(params))).unbind(0)
    noise = tree.unflatten(params, list(keys))
    return tree.map(lambda p, key: 1.5 * p + 0.1 * random.normal(key, p.shape, dtype), params, noise), cfg


def sentences(time, lengths, seed=1, vocabulary=29):
    """(batch, time) tokens from 1 up, 0 behind the lengths."""
    drawn = random.randint(random.key(seed), (len(lengths), time), 1, vocabulary).long()
    return torch.where(torch.arange(time) < torch.tensor(lengths)[:, None], drawn, 0)


def pairs(source_time=9, target_time=7):
    return sentences(source_time, [9, 3, 6, 1]), sentences(target_time, [4, 7, 1, 5], 2)


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


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


def paper_positions(time, width):
    """Section 3.5, place by place."""
    table = torch.zeros(time, width, dtype=F64)
    for place in range(time):
        for i in range(width // 2):
            angle = place / 10000 ** (2 * i / width)
            table[place, 2 * i], table[place, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


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
    """The mean over the tokens that are there, each from the place in front of it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("final_norms", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_equals_torch(norm_first, final_norms):
    module, (source, target) = module_of(norm_first, final_norms), pairs()
    tokens = random.normal(random.key(3), (31, 16), F64).requires_grad_()
    wanted = torch_logits(module, tokens, source, target)
    loss(wanted, target).backward()
    cfg = transformer.Config(**SIZES, norm_first=norm_first, final_norms=final_norms)
    params = ours(tree.map(torch.detach, dict(module.named_parameters())), tokens.detach())
    spec.check(transformer.spec(cfg), params)

    found = transformer.apply(params, (source, target), cfg)
    assert wanted.std() > 0.5
    # torch's queries at padding see less; nothing is made of them.
    assert distance(found[target != 0], wanted.detach()[target != 0]) < 1e-12
    gradients, value = grad_and_value(lambda p: loss(transformer.apply(p, (source, target), cfg), target))(params)
    assert abs(value - loss(wanted, target)) < 1e-12
    wanted = ours({name: p.grad for name, p in module.named_parameters()}, tokens.grad)
    scale = max(float(leaf.abs().max()) for leaf in tree.leaves(wanted))
    for (name, a), b in zip(tree.items(gradients), tree.leaves(wanted), strict=True):
        assert (a - b).abs().max() < 1e-12 * scale, name


class Scale(nn.Module):
    def forward(self, x):
        return 0.7 * x


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_is_where_the_paper_has_it(norm_first, monkeypatch):
    """With a factor in place of each dropout, torch's module with the same factors gives the same."""
    module, (source, target) = module_of(norm_first, True).train(), pairs()
    for layer in (*module.encoder.layers, *module.decoder.layers):
        for name in ("dropout1", "dropout2", "dropout3"):
            if hasattr(layer, name):
                setattr(layer, name, Scale())
    monkeypatch.setattr(transformer, "dropout_sites", lambda key, n, shape, rate: [Scale()] * n)
    tokens = random.normal(random.key(3), (31, 16), F64)
    params = ours(tree.map(torch.detach, dict(module.named_parameters())), tokens)
    cfg = transformer.Config(**SIZES | {"dropout": 0.3}, norm_first=norm_first, final_norms=True)
    found = transformer.apply(params, (source, target), cfg, key=random.key(0), train=True)
    wanted = torch_logits(module, tokens, source, target, Scale()).detach()
    assert distance(found[target != 0], wanted[target != 0]) < 1e-12
    # A factor of the attention weights is one of the matrix behind them.
    less = tree.map_with_names(
        lambda n, p: 0.7 * p if n.endswith(("attn.proj.weight", "cross.proj.weight")) else p, params
    )
    wanted = transformer.apply(less, (source, target), cfg, key=random.key(0), train=True)
    cfg = replace(cfg, attention_dropout=0.1)
    both = transformer.apply(params, (source, target), cfg, key=random.key(0), train=True)
    assert distance(both, wanted) < 1e-12 and distance(both, found) > 1e-3


def test_masks_of_dropout_differ_from_site_to_site(monkeypatch):
    drawn, sites = [], transformer.dropout_sites

    def record(key, n, shape, rate):
        drawn.extend(site(torch.ones(shape)) != 0 for site in sites(key, n, shape, rate))
        return sites(key, n, shape, rate)

    monkeypatch.setattr(transformer, "dropout_sites", record)
    params, cfg = tiny(dropout=0.4, attention_dropout=0.4)
    same = sentences(7, [7, 7]), sentences(7, [7, 7])
    transformer.apply(params, same, cfg, key=random.key(0), train=True)
    assert len(drawn) == 2 + 5 + 2 + 2 + 7
    flat = [mask.flatten()[:196] for mask in drawn]
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
        found = tree.get(block, name)["weight"]
        assert abs(found.abs().max() / like.abs().max() - 1) < 0.01, name
        assert abs(found.std() / like.std() - 1) < 0.05, name
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
    places = torch.arange(50)
    found = transformer.sinusoids(places, 16)
    torch.testing.assert_close(found, paper_positions(50, 16))
    halves = transformer.sinusoids(places.reshape(5, 10), 16, halves=True).reshape(50, 16)
    torch.testing.assert_close(halves, torch.cat([found[:, 0::2], found[:, 1::2]], 1))


# Padding.


@every_variant
def test_padding_changes_nothing(options):
    params, cfg = tiny(F64, **options)
    source, target = pairs()
    wide = F.pad(source, (0, 4)), F.pad(target, (0, 6))
    wanted = transformer.apply(params, (source, target), cfg)
    found = transformer.apply(params, wide, cfg)
    assert distance(found[:, :7], wanted) < 1e-12
    # One at a time, without any.
    for i, (n, m) in enumerate([(9, 4), (3, 7), (6, 1), (1, 5)]):
        alone = transformer.apply(params, (source[i : i + 1, :n], target[i : i + 1, :m]), cfg)
        assert distance(alone[0], wanted[i, :m]) < 1e-12

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
    wanted = transformer.apply(params, (source, target), cfg)
    # The table's first row put last, and every other a row up.
    moved = {**params, "tokens": {"weight": params["tokens"]["weight"].roll(-1, 0)}}
    other = [torch.where(x == 0, 30, x - 1) for x in (source, target)]
    found = transformer.apply(moved, tuple(other), replace(cfg, padding_id=30))
    torch.testing.assert_close(found, wanted.roll(-1, -1))
    mask = source != 0
    assert torch.equal(transformer.encode(params, source, cfg, mask=mask), transformer.encode(params, source, cfg))
    whole = torch.ones_like(mask)
    memory = transformer.encode(params, source, cfg, mask=whole)
    a, b = (transformer.decode(params, target, memory, cfg, source_mask=m) for m in (whole, None))
    torch.testing.assert_close(a, b)
    assert distance(a, wanted) > 0.01


# Step by step.


def stepped(params, x, cfg, places, *, step=transformer.step, **options):
    source, target = x
    memory = transformer.encode(params, source, cfg)
    cache = transformer.start(params, memory, source != cfg.padding_id, cfg, places)
    found = []
    for t in range(target.shape[1]):
        scores, cache = step(params, cache, target[:, t], torch.tensor(t), cfg, **options)
        found.append(scores)
    return torch.stack(found, 1), cache


@every_variant
def test_steps_equal_the_whole_pass(options):
    params, cfg = tiny(**options)
    wanted = transformer.apply(params, pairs(), cfg)
    assert wanted.std() > 0.5
    for changed in (cfg, replace(cfg, attention="explicit")):
        found, _ = stepped(params, pairs(), changed, 7)
        assert distance(found, wanted) < 1e-5
    donated, _ = stepped(params, pairs(), cfg, 12, donate=True)
    assert distance(donated, wanted) < 1e-5


def test_steps_keep_their_cache_and_may_stand_at_different_places():
    params, cfg = tiny()
    source, target = pairs()
    wanted = transformer.apply(params, (source, target), cfg)
    _, cache = stepped(params, (source, target[:, :3]), cfg, 7)
    before = tree.map(torch.clone, cache)
    rows, position = torch.arange(4), torch.tensor([3, 1, 2, 3])
    scores, _ = transformer.step(params, cache, target[rows, position], position, cfg)
    assert distance(scores, wanted[rows, position]) < 1e-5
    for (name, a), b in zip(tree.items(cache), tree.leaves(before), strict=True):
        assert torch.equal(a, b), name


def test_rows_of_a_cache_can_be_chosen_and_repeated():
    params, cfg = tiny()
    source, target = pairs()
    _, cache = stepped(params, (source, target[:, :3]), cfg, 7)
    assert all(len(leaf) == 4 for leaf in tree.leaves(cache))
    rows = torch.tensor([2, 2, 0, 1, 1])
    scores, _ = transformer.step(
        params, tree.map(lambda leaf: leaf[rows], cache), target[rows, 3], torch.tensor(3), cfg
    )
    assert distance(scores, transformer.apply(params, (source, target), cfg)[rows, 3]) < 1e-5


def test_beams_share_what_is_known_of_their_sentence():
    params, cfg = tiny()
    source, target = pairs()
    cache = transformer.start(params, transformer.encode(params, source, cfg), source != 0, cfg, 2)
    beams = torch.stack([target[:, :2], target[:, 1:3], target[:, 2:4]], 1).flatten(0, 1)  # three of each sentence
    past, call = tree.map(lambda leaf: leaf.repeat_interleave(3, 0), cache["past"]), transformer.stepper(params, cfg)
    for t in range(2):
        scores, past = call(past, beams[:, t], torch.tensor(t), cache["shared"])
        wanted = transformer.apply(params, (source.repeat_interleave(3, 0), beams), cfg)[:, t]
        assert distance(scores, wanted) < 1e-5


def test_steps_of_an_ensemble():
    members = [tiny(attention="explicit", positions=positions) for positions in ("sinusoidal", "sinusoidal")]
    cfg = members[0][1]
    params = [members[0][0], tree.map(lambda p: 0.9 * p, members[1][0])]
    source, target = pairs()

    def scores(p):
        return stepped(p, (source, target[:, :2]), cfg, 4)[0]

    together = vmap(scores)(tree.stack(params))
    torch.testing.assert_close(together, torch.stack([scores(p) for p in params]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [VARIANTS["post-norm"], VARIANTS["learned"]], ids=["post-norm", "learned"])
def test_compiled_step_is_one_graph_for_all_positions(options):
    torch._dynamo.reset()
    params, cfg = tiny(**options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(transformer.step, backend=counter, fullgraph=True, dynamic=False)
    found, _ = stepped(params, pairs(), cfg, 7, step=compiled)
    assert distance(found, transformer.apply(params, pairs(), cfg)) < 1e-5
    assert counter.frame_count == 1
    stepped(params, tuple(x.flip(0) for x in pairs()), cfg, 7, step=compiled)
    assert counter.frame_count == 1


# What the heads look at.


@every_variant
def test_attention_maps(options):
    params, cfg = tiny(F64, **options)
    source, target = pairs()
    maps = transformer.attention_maps(params, (source, target), cfg)
    sizes = {"cross": (7, 9), "decoder": (7, 7), "encoder": (9, 9)}
    assert sorted(maps) == sorted(sizes)
    padding = (source == 0)[:, None, None, None]
    hidden = {"cross": padding, "decoder": torch.ones(7, 7).triu(1).bool(), "encoder": padding}
    for name, weights in maps.items():
        assert weights.shape == (4, 2, 2, *sizes[name]), name
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert ((weights == 0) == hidden[name]).all(), name
    # They are what apply uses: the first layer of the encoder, by hand.
    if options:
        return
    p = params["encoder"]["blocks"][0]["attn"]["qkv"]
    x = 4.0 * params["tokens"]["weight"][source[0]] + paper_positions(9, 16)
    q, k, _ = (x @ p["weight"].T + p["bias"]).split(16, -1)
    for head in range(2):
        columns = slice(8 * head, 8 * head + 8)
        wanted = torch.softmax(q[:, columns] @ k[:, columns].T / math.sqrt(8), -1)
        torch.testing.assert_close(maps["encoder"][0, 0, head], wanted)


# What is refused.


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
    with pytest.raises(ValueError, match="17 places are more than the context of 16"):
        transformer.start(params, memory, source != 0, cfg, 17)
    cache = transformer.start(params, memory, None, cfg, 7)
    with pytest.raises(ValueError, match=r"expected tokens of shape \(batch,\), found \(4, 7\)"):
        transformer.step(params, cache, target, torch.tensor(0), cfg)
