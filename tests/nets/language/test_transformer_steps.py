"""The transformer's cached steps against the whole pass, and its attention maps."""

import math
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import vmap

from core import tree
from nets.language import transformer
from nets.language.decoding import greedy
from tests.nets.language.transformer_cases import (
    F64,
    VARIANTS,
    distance,
    every_variant,
    pairs,
    paper_positions,
    sentences,
    tiny,
)


def stepped(params, x, cfg, positions, *, step=transformer.step, **options):
    source, target = x
    memory = transformer.encode(params, source, cfg)
    cache = transformer.start(params, memory, source != cfg.padding_id, cfg, positions)
    actual = []
    for t in range(target.shape[1]):
        scores, cache = step(params, cache, target[:, t], torch.tensor(t), cfg, **options)
        actual.append(scores)
    return torch.stack(actual, 1), cache


@every_variant
def test_steps_equal_the_whole_pass(options):
    params, cfg = tiny(**options)
    expected = transformer.apply(params, pairs(), cfg)
    assert expected.std() > 0.5
    for changed in (cfg, replace(cfg, attention="explicit")):
        actual, _ = stepped(params, pairs(), changed, 7)
        assert distance(actual, expected) < 1e-5
    donated, _ = stepped(params, pairs(), cfg, 12, donate=True)
    assert distance(donated, expected) < 1e-5


def test_steps_leave_their_cache_and_may_have_different_positions():
    params, cfg = tiny()
    source, target = pairs()
    expected = transformer.apply(params, (source, target), cfg)
    _, cache = stepped(params, (source, target[:, :3]), cfg, 7)
    before = tree.map(torch.clone, cache)
    rows, position = torch.arange(4), torch.tensor([3, 1, 2, 3])
    scores, _ = transformer.step(params, cache, target[rows, position], position, cfg)
    assert distance(scores, expected[rows, position]) < 1e-5
    for (name, a), b in zip(tree.items(cache), tree.leaves(before), strict=True):
        assert torch.equal(a, b), name


def test_rows_of_a_cache_can_be_selected_and_repeated():
    params, cfg = tiny()
    source, target = pairs()
    _, cache = stepped(params, (source, target[:, :3]), cfg, 7)
    assert all(len(leaf) == 4 for leaf in tree.leaves(cache))
    rows = torch.tensor([2, 2, 0, 1, 1])
    scores, _ = transformer.step(
        params, tree.map(lambda leaf: leaf[rows], cache), target[rows, 3], torch.tensor(3), cfg
    )
    assert distance(scores, transformer.apply(params, (source, target), cfg)[rows, 3]) < 1e-5


def test_beams_share_the_memory_of_their_sentence():
    params, cfg = tiny()
    source, target = pairs()
    cache = transformer.start(params, transformer.encode(params, source, cfg), source != 0, cfg, 2)
    beams = torch.stack([target[:, :2], target[:, 1:3], target[:, 2:4]], 1).flatten(0, 1)  # three of each sentence
    past, call = tree.map(lambda leaf: leaf.repeat_interleave(3, 0), cache["past"]), transformer.stepper(params, cfg)
    for t in range(2):
        scores, past = call(past, beams[:, t], torch.tensor(t), cache["shared"])
        expected = transformer.apply(params, (source.repeat_interleave(3, 0), beams), cfg)[:, t]
        assert distance(scores, expected) < 1e-5


def test_steps_of_an_ensemble():
    first, cfg = tiny(attention="explicit")
    params = [first, tree.map(lambda p: 0.9 * p, first)]
    source, target = pairs()

    def scores(p):
        return stepped(p, (source, target[:, :2]), cfg, 4)[0]

    together = vmap(scores)(tree.stack(params))
    torch.testing.assert_close(together, torch.stack([scores(p) for p in params]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [VARIANTS["post-norm"], VARIANTS["learned"]], ids=["post-norm", "learned"])
def test_compiled_step_is_one_graph_for_all_positions(options):
    torch._dynamo.reset()
    params, cfg = tiny(**options, layers=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(transformer.step, backend=counter, fullgraph=True, dynamic=False)
    actual, _ = stepped(params, pairs(), cfg, 7, step=compiled)
    assert distance(actual, transformer.apply(params, pairs(), cfg)) < 1e-5
    assert counter.frame_count == 1
    stepped(params, tuple(x.flip(0) for x in pairs()), cfg, 7, step=compiled)
    assert counter.frame_count == 1


# Attention maps.


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
    # The first layer of the encoder, written out.
    if options:
        return
    p = params["encoder"]["blocks"][0]["attn"]["qkv"]
    x = 4.0 * params["tokens"]["weight"][source[0]] + paper_positions(9, 16)
    q, k, _ = (x @ p["weight"].T + p["bias"]).split(16, -1)
    for head in range(2):
        columns = slice(8 * head, 8 * head + 8)
        expected = torch.softmax(q[:, columns] @ k[:, columns].T / math.sqrt(8), -1)
        torch.testing.assert_close(maps["encoder"][0, 0, head], expected)


def test_attention_maps_of_what_was_decoded():
    """Row t of the decoder's maps is of the pass that wrote token t; a text may fill the context."""
    params, cfg = tiny(F64)
    source, inputs = sentences(5, [5, 3], seed=4), []
    cache = transformer.start(params, transformer.encode(params, source, cfg), source != 0, cfg, 16)
    call = transformer.stepper(params, cfg)

    def step(past, tokens, position, shared):
        inputs.append(tokens)
        return call(past, tokens, position, shared)

    options = {"end": None, "max_length": 16, "shared": cache["shared"]}
    tokens = greedy(step, cache["past"], torch.tensor([7, 7]), **options).tokens
    assert len(tokens.unique()) > 3
    actual = transformer.decoded_attention(params, source, tokens, 7, cfg)
    expected = transformer.attention_maps(params, (source, torch.stack(inputs, 1)), cfg)
    assert actual["cross"].shape == (2, 2, 2, 16, 5) and actual["decoder"].shape == (2, 2, 2, 16, 16)
    for name, weights in expected.items():
        torch.testing.assert_close(actual[name], weights)
    with pytest.raises(ValueError, match="a decoded text of 17 tokens is longer than the context of 16"):
        transformer.decoded_attention(params, source, sentences(17, [17, 17]), 7, cfg)
