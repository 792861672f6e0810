"""Recurrent language models against torch.nn's layers; texts against passes over all that came before."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad
from transformers import RepetitionPenaltyLogitsProcessor

from core import random, spec, tree
from core.layers import dropout_sites
from nets.language import decoding, rnn
from nets.language.beam_search import beam_search
from nets.weights import WeightsError
from tests.benchmarks.module_rnn import LAYERS, module_of
from tests.nets import parity

SIZES = {"vocabulary": 11, "embedding": 12, "width": 12, "layers": 2}


def tiny(dtype=torch.float64, lively=False, **options):
    """(params, config), with a bias of the logits that is not zero.

    lively: weights so large that greedy texts vary (and rounding errors grow).
    """
    cfg = rnn.Config(**SIZES | {"dropout": 0.0} | options)
    params = spec.init(random.key(5), rnn.spec(cfg), dtype)
    if lively:
        params = tree.map_with_names(lambda name, x: (10 if name.startswith("layers") else 60) * x, params)
    return params | {"head": params["head"] | {"bias": random.normal(random.key(1), (11,), dtype)}}, cfg


def ids(batch, time, seed=2):
    return random.randint(random.key(seed), (batch, time), 0, 11).long()


def states(cfg, batch):
    """A state that is not zero."""
    return tree.map(lambda x: 0.5 + x.double(), rnn.empty_state(cfg, batch))


def as_theirs(state):
    """(layers, batch, width) of the hidden states, and of the cells."""
    parts = [torch.stack([layer[part] for layer in state]) for part in ("h", "c") if part in state[0]]
    return tuple(parts) if len(parts) > 1 else parts[0]


# --- torch.nn


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_equal_torch(kind, tied):
    params, cfg = tiny(kind=kind, tied=tied, embedding=12 if tied else 5)
    module, tokens, state = module_of(cfg, params), ids(3, 7), states(tiny(kind=kind)[1], 3)
    logits, after = rnn.apply(params, tokens, cfg, state=state)
    expected, theirs = module(tokens.T, as_theirs(state))
    torch.testing.assert_close(logits, expected.transpose(0, 1), rtol=1e-12, atol=1e-12)
    for ours, other in zip(tree.leaves(as_theirs(after)), tree.leaves(theirs), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)

    expected.sin().sum().backward()
    gradient = grad(lambda p: rnn.apply(p, tokens, cfg, state=state)[0].sin().sum())(params)
    assert tree.count(params) == sum(p.numel() for p in module.parameters())
    named = dict(module.named_parameters())
    for name, g in tree.items(gradient):
        torch.testing.assert_close(g, named[rnn.rename_table(cfg)[name].theirs].grad, rtol=1e-10, atol=1e-10)


def test_initial_values_are_of_the_published_kind():
    params = spec.init(random.key(0), rnn.spec(rnn.Config(**SIZES | {"width": 64})))
    assert not params["head"]["bias"].any()
    for leaf in (params["head"]["weight"], params["tokens"]["weight"]):
        assert 0.09 < leaf.abs().max() <= 0.1 and leaf.std() == pytest.approx(0.1 / 3**0.5, rel=0.15)
    assert 0.12 < params["layers"][1]["hh"]["weight"].abs().max() <= 0.125  # 1 / sqrt(64), as torch.nn


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_state_dict_is_read(kind, tied):
    params, cfg = tiny(torch.float32, kind=kind, tied=tied)
    state = module_of(cfg, params).state_dict()
    if not tied:
        parity.check_names(rnn, cfg, module_of(cfg, params))
    assert rnn.published_config(state, dropout=0.0) == cfg
    read = rnn.from_published(state, cfg)
    assert tree.names(read) == tree.names(params)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(read), tree.leaves(params), strict=True))


def test_state_dict_that_does_not_fit_is_named():
    params, cfg = tiny(torch.float32, tied=True)
    state = module_of(cfg, params).state_dict()
    with pytest.raises(WeightsError, match="'decoder.weight' differs from 'encoder.weight'"):
        rnn.from_published(state | {"decoder.weight": state["decoder.weight"] + 1}, cfg)
    without = {name: x for name, x in state.items() if name != "rnn.bias_hh_l1"}
    with pytest.raises(WeightsError, match=r"'rnn.bias_hh_l1' is missing"):
        rnn.from_published(without, cfg)
    with pytest.raises(WeightsError, match="'encoder.weight' is missing"):
        rnn.published_config({"decoder.weight": state["decoder.weight"]})
    with pytest.raises(WeightsError, match="has shape .*expected 1, 3 or 4 gates"):
        rnn.published_config(state | {"rnn.weight_hh_l0": torch.zeros(24, 12)})
    with pytest.raises(WeightsError, match="no layer_norm_lstm; expected rnn, gru or lstm"):
        rnn.rename_table(rnn.Config(kind="layer_norm_lstm"))


@pytest.mark.parametrize("variational", [False, True])
def test_dropout_is_at_the_places_of_torch(variational):
    params, cfg = tiny(dropout=0.4, variational=variational, width=5, tied=False)
    tokens, key, layers = ids(3, 7), random.key(4), []
    steps = 1 if variational else 7
    of_tokens, of_layers = random.sites(key, 2).unbind(0)
    masks = [f(torch.ones(3, 7, 12).double()) for f in dropout_sites(of_tokens, 1, (3, steps, 12), 0.4)]
    masks += [f(torch.ones(3, 7, 5).double()) for f in dropout_sites(of_layers, 2, (3, steps, 5), 0.4)]
    assert all(0.2 < float((mask == 0).double().mean()) < 0.6 for mask in masks)
    assert all(bool((mask == mask[:, :1]).all()) == variational for mask in masks)
    for i, p in enumerate(params["layers"]):
        layer = torch.nn.LSTM(p["ih"]["weight"].shape[1], 5, batch_first=True, dtype=torch.float64)
        layer.load_state_dict({f"{leaf}_{part}_l0": p[part][leaf] for part in p for leaf in p[part]})
        layers.append(layer.requires_grad_(False))
        assert i < 2
    h = F.embedding(tokens, params["tokens"]["weight"]) * masks[0]
    h = layers[1](layers[0](h)[0] * masks[1])[0] * masks[2]
    actual, _ = rnn.apply(params, tokens, cfg, key=key, train=True)
    torch.testing.assert_close(actual, rnn.logits(params, h), rtol=1e-12, atol=1e-12)


def test_one_hot_is_a_table_without_a_matrix():
    params, cfg = tiny(embedding=None)
    assert "tokens" not in params and params["layers"][0]["ih"]["weight"].shape == (48, 11)
    embedded = {**params, "tokens": {"weight": torch.eye(11, dtype=torch.float64)}}
    other = rnn.Config(**SIZES | {"embedding": 11}, dropout=0.0)
    tokens = ids(2, 5)
    expected = rnn.apply(embedded, tokens, other)
    for a, b in zip(tree.leaves(rnn.apply(params, tokens, cfg)), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cutoffs", [(), (4, 8)])
def test_cross_entropy_is_that_of_the_logits(cutoffs):
    cfg = rnn.Config(**SIZES | {"width": 16}, dropout=0.0, cutoffs=cutoffs)
    params = spec.init(random.key(5), rnn.spec(cfg), torch.float64)
    tokens, targets = ids(3, 7), ids(3, 7, seed=3)
    h, _ = rnn.features(params, tokens, cfg)
    logits, _ = rnn.apply(params, tokens, cfg)
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(rnn.cross_entropy(params, h, targets), expected, rtol=1e-12, atol=1e-12)
    # Log-probabilities of all tokens serve as logits.
    assert rnn.generate(params, tokens, cfg, 5, key=random.key(4), top_k=5).shape == (3, 5)


# --- states and lengths


@pytest.mark.parametrize("kind", rnn.SPECS)
def test_a_text_in_pieces_equals_the_whole(kind):
    params, cfg = tiny(kind=kind)
    tokens, state, pieces = ids(3, 9), rnn.empty_state(cfg, 3, torch.float64), []
    whole, end = rnn.apply(params, tokens, cfg)
    for piece in tokens.split([4, 1, 4], 1):
        logits, state = rnn.apply(params, piece, cfg, state=state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    for a, b in zip(tree.leaves(state), tree.leaves(end), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_lengths_end_a_row():
    params, cfg = tiny()
    tokens, lengths = ids(3, 6), torch.tensor([6, 1, 4])
    logits, state = rnn.apply(params, tokens, cfg, lengths=lengths)
    for i, n in enumerate(lengths):
        alone, after = rnn.apply(params, tokens[i : i + 1, :n], cfg)
        torch.testing.assert_close(logits[i : i + 1, :n], alone, rtol=1e-12, atol=1e-12)
        for a, b in zip(tree.leaves(state), tree.leaves(after), strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-12, atol=1e-12)


def test_every_step_ends_with_the_state():
    params, cfg = tiny()
    h, every = rnn.features(params, ids(2, 5), cfg, every_step=True)
    _, last = rnn.features(params, ids(2, 5), cfg)
    assert torch.equal(h, every[-1]["h"]) and every[0]["c"].shape == (2, 5, 12)
    assert all(torch.equal(a[:, -1], b) for a, b in zip(tree.leaves(every), tree.leaves(last), strict=True))


def test_state_keeps_its_precision():
    params, cfg = tiny(torch.float32)
    state = rnn.empty_state(cfg, 2)
    logits, after = rnn.apply(tree.cast(params, torch.bfloat16), ids(2, 5), cfg, state=state)
    assert logits.dtype == torch.bfloat16 and {x.dtype for x in tree.leaves(after)} == {torch.float32}
    exact, _ = rnn.apply(params, ids(2, 5), cfg, state=state)
    torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.05)


# --- texts


def continued(params, cfg, prompt, steps, penalty=1.0):
    """Greedy, each token from a pass over the whole text."""
    text, penalise = prompt, RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(steps):
        scores = penalise(text, rnn.apply(params, text, cfg)[0][:, -1])
        text = torch.cat([text, scores.argmax(-1)[:, None]], 1)
    return text[:, prompt.shape[1] :]


@pytest.mark.parametrize("kind", rnn.SPECS)
def test_stream_equals_passes_over_the_whole_text(kind):
    params, cfg = tiny(lively=True, kind=kind)
    prompts, lengths = ids(3, 5), torch.tensor([5, 2, 3])
    actual = rnn.generate(params, prompts, cfg, 30, lengths=lengths, temperature=0.0)
    for i, n in enumerate(lengths):
        assert torch.equal(actual[i : i + 1], continued(params, cfg, prompts[i : i + 1, :n], 30))
    assert len(actual.unique()) > 2
    halves = rnn.apply(params, prompts[:, :2], cfg)[1]
    whole = rnn.generate(params, prompts, cfg, 5, temperature=0.0)
    assert torch.equal(rnn.generate(params, prompts[:, 2:], cfg, 5, state=halves, temperature=0.0), whole)


def test_stream_equals_the_engine():
    params, cfg = tiny(lively=True)
    prompts = ids(4, 5)
    _, cache = rnn.apply(params, prompts[:, :-1], cfg)

    def step(cache, tokens, position):
        return rnn.step(params, cache, tokens, position, cfg)

    options = {"end": 3, "max_length": 12}
    greedy = decoding.greedy(step, cache, prompts[:, -1], **options)
    beams = beam_search(step, cache, prompts[:, -1], beams=1, n_best=1, length_penalty=0.0, **options)
    streamed = rnn.generate(params, prompts, cfg, 12, temperature=0.0, end=3)
    assert torch.equal(streamed, greedy.tokens) and torch.equal(beams.tokens[:, 0], greedy.tokens)
    sampled = decoding.sample(step, cache, prompts[:, -1], random.key(5), temperature=0.9, top_k=5, **options)
    streamed = rnn.generate(params, prompts, cfg, 12, key=random.key(5), temperature=0.9, top_k=5, end=3)
    assert torch.equal(streamed, sampled.tokens) and len(streamed.unique()) > 3
    best = beam_search(step, cache, prompts[:, -1], beams=4, n_best=1, length_penalty=0.0, **options)
    assert (best.scores[:, 0] >= greedy.scores - 1e-9).all() and (best.scores[:, 0] > greedy.scores + 1e-9).any()


def test_one_prompt_is_sampled_once_per_key():
    params, cfg = tiny(lively=True)
    prompt, keys = ids(1, 6), random.split(random.key(3), 5)
    samples = rnn.generate(params, prompt, cfg, 20, key=keys)
    assert samples.shape == (5, 20) and len(samples.unique(dim=0)) == 5
    for i in range(5):
        assert torch.equal(rnn.generate(params, prompt, cfg, 20, key=keys[i : i + 1]), samples[i : i + 1])
    shorter = rnn.generate(params, prompt, cfg, 20, key=keys, lengths=torch.tensor([4]))
    assert torch.equal(shorter, rnn.generate(params, prompt[:, :4], cfg, 20, key=keys))
    _, state = rnn.apply(params, prompt[:, :4], cfg)
    assert torch.equal(rnn.generate(params, prompt[:, 4:], cfg, 20, key=keys, state=state), samples)


def test_repetition_is_penalised():
    params, cfg = tiny(lively=True)
    plain, other = (
        rnn.generate(params, ids(2, 4), cfg, 12, temperature=0.0, repetition_penalty=penalty) for penalty in (1.0, 1.5)
    )
    assert torch.equal(other, continued(params, cfg, ids(2, 4), 12, 1.5)) and not torch.equal(plain, other)


# --- errors


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"kind": "lstmm"}, "kind 'lstmm' is unknown; expected one of gru, layer_norm_lstm, lstm, rnn"),
        ({"tied": True, "width": 7}, "tied needs embedding = width, found 12 and 7"),
        ({"tied": True, "embedding": None}, "tied needs embedding = width, found None and 12"),
        ({"tied": True, "cutoffs": (3,)}, "tied and cutoffs exclude each other"),
        ({"layers": 0}, "layers is 0; expected at least 1"),
        ({"embedding": 0}, "embedding is 0; expected at least 1"),
        ({"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
    ],
)
def test_configurations_that_are_none(options, error):
    with pytest.raises(ValueError, match=error):
        rnn.Config(**SIZES | options)


def test_arguments_that_do_not_fit():
    params, cfg = tiny()
    for call, error in (
        (lambda: rnn.apply(params, ids(1, 3)[0], cfg), r"expected tokens of shape \(batch, time\), found \(3,\)"),
        (lambda: rnn.apply(params, ids(2, 3), cfg, state=states(cfg, 3)), r"of shape \(2, 12\), found \(3, 12\)"),
        (lambda: rnn.apply(params, ids(2, 3), cfg, state=states(cfg, 2)[:1]), "each of 2 layers, found 1"),
        (lambda: rnn.apply(params, ids(2, 3), cfg, lengths=torch.tensor([4, 1])), "lengths are from 1 to 4"),
        (lambda: rnn.generate(params, ids(2, 3)[:, :0], cfg, 1), "at least one token"),
        (lambda: rnn.generate(params, ids(2, 3), cfg, 1, lengths=torch.tensor([0, 1])), "at least one token"),
        (lambda: rnn.generate(params, ids(2, 3), cfg, 0), "steps is 0; expected at least 1"),
        (lambda: rnn.generate(params, ids(2, 3), cfg, 1, end=11), "the end token is 11; expected an id below 11"),
        (lambda: rnn.generate(params, ids(2, 3), cfg, 1), "needs key="),
    ):
        with pytest.raises(ValueError, match=error):
            call()
