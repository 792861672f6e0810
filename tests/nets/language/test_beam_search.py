"""Beam search against every text there is, against transformers' `generate`, and against a plain one in Python."""

import itertools
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from core import random, tree
from nets.language import gpt2
from nets.language.beam_search import _best, beam_search
from nets.language.decoding import greedy
from tests.nets.language.beam_cases import (
    END,
    PADDING,
    assert_same,
    divisor,
    generated,
    listed,
    marian,
    marian_step,
    markov,
    texts,
)

PENALTIES = [{"length_penalty": a, "normalization": n} for n in ("length", "gnmt") for a in (-0.5, 0.0, 0.6, 1.0, 2.0)]


@pytest.mark.parametrize("min_length", [0, 2])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_with_beams_for_all_texts_it_is_exhaustive(penalty, early_stopping, min_length):
    step, cache, logs = markov()
    options = {"end": END, "max_length": 4, "min_length": min_length, "early_stopping": early_stopping, **penalty}
    actual = beam_search(step, cache, torch.tensor([3]), beams=4**4, n_best=4**4, **options)
    expected = {text: p / divisor(len(text), **penalty) for text, p in texts(logs[0], 4, 3, min_length).items()}
    assert dict(listed(actual)) == pytest.approx(expected, rel=1e-12)
    ordered = actual.scores[0]
    assert len(listed(actual)) == len(expected) and (ordered[:-1] >= ordered[1:]).all()
    assert (actual.tokens[0][actual.lengths[0] == 0] == 0).all() and ordered[len(expected) :].isneginf().all()


def plain(logs, beams, max_length, penalty, first=0):
    """Beam search over lists that goes on to the last position."""
    live, finished = [((0, first), 0.0)], []
    for n in range(1, max_length + 1):
        going = [(text + (c,), p + q) for text, p in live for c, q in enumerate(logs[n - 1][text[-2]][text[-1]])]
        going = sorted(going, key=lambda pair: -pair[1])[: 2 * beams]
        ended = [n == max_length or text[-1] == END for text, _ in going]
        finished += [
            (text[2:], p / divisor(n, **penalty)) for (text, p), ends in zip(going[:beams], ended, strict=False) if ends
        ]
        live = [pair for pair, ends in zip(going, ended, strict=True) if not ends][:beams]
    return sorted(finished, key=lambda pair: -pair[1])


@pytest.mark.parametrize("n_best", [1, 3])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_stopping_is_exact(penalty, n_best):
    step, cache, logs = markov(6, batch=8)
    calls = []

    def counting(*args):
        calls.append(len(args[1]))
        return step(*args)

    options = {"end": END, "max_length": 16, "n_best": n_best, "early_stopping": "never", **penalty}
    actual = beam_search(counting, cache, torch.zeros(8, dtype=torch.int64), beams=3, **options)
    for i in range(8):
        expected = plain(logs[i].tolist(), 3, 16, penalty)[:n_best]
        assert [text for text, _ in listed(actual, i)] == [text for text, _ in expected]
        assert [p for _, p in listed(actual, i)] == pytest.approx([p for _, p in expected], rel=1e-12)
    # Sentences leave as they are done; where longer texts gain much, late.
    assert calls[0] == 8 and calls[1:] == sorted(calls[1:], reverse=True)
    if penalty["length_penalty"] <= 0.6:
        assert sum(calls) < 8 + 15 * 24


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_example_gets_the_same_in_any_batch(early_stopping):
    step, cache, _ = markov(9, batch=7)
    options = {"beams": 4, "n_best": 2, "end": END, "max_length": 12, "early_stopping": early_stopping}
    first = torch.arange(7)
    together = beam_search(step, cache, first, **options)
    for some in ([3], [0, 6], [5, 4, 1], [6, 5, 4, 3, 2, 1, 0]):
        actual = beam_search(step, tree.map(lambda x, some=some: x[some], cache), first[some], **options)
        time = actual.tokens.shape[2]
        assert torch.equal(actual.tokens, together.tokens[some, :, :time])
        # In double precision: the sums of 12 logarithms, from kernels for batches of another size.
        torch.testing.assert_close(actual.scores, together.scores[some], rtol=1e-12, atol=0)
        assert torch.equal(actual.lengths, together.lengths[some]) and int(actual.lengths.max()) == time
    # If the batch only shrinks to some sizes, too.
    sizes = []

    def counting(*args):
        sizes.append(len(args[1]))
        return step(*args)

    actual = beam_search(counting, cache, first, batch_sizes=(2, 7), **options)
    assert torch.equal(actual.tokens, together.tokens) and torch.equal(actual.lengths, together.lengths)
    torch.testing.assert_close(actual.scores, together.scores, rtol=1e-12, atol=0)
    assert sizes[0] == 7 and set(sizes[1:]) <= {2 * 4, 7 * 4}
    # Nothing that came in was changed.
    assert torch.equal(cache["table"], markov(9, batch=7)[1]["table"])


def test_one_beam_is_greedy():
    step, cache, _ = markov(9, batch=7)
    options = {"end": END, "max_length": 12}
    one = beam_search(step, cache, torch.arange(7), beams=1, length_penalty=0.0, early_stopping=True, **options)
    other = greedy(step, cache, torch.arange(7), **options)
    assert torch.equal(one.tokens[:, 0], other.tokens) and torch.equal(one.lengths[:, 0], other.lengths)
    torch.testing.assert_close(one.scores[:, 0], other.scores, rtol=1e-12, atol=0)
    assert len(set(other.lengths.tolist())) > 2


# transformers


def test_tokens_and_scores_equal_transformers_marian():
    model, source, mask = marian()
    step, cache, shared = marian_step(model, source, mask, 16)
    first, lengths = torch.full((6,), 2), set()
    combinations = [(2, 0.0), (2, 0.6), (2, 2.0), (3, 1.0), (4, 1.0), (5, 0.0), (5, 1.0)]
    for (beams, alpha), stop in itertools.product(combinations, (False, True, "never")):
        options = {"length_penalty": alpha, "early_stopping": stop}
        theirs = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": 16, "attention_mask": mask}
        theirs = generated(model, source, **theirs, **options)
        tokens, scores = theirs.sequences[:, 1:].unflatten(0, (6, beams)), theirs.sequences_scores.reshape(6, beams)
        options |= {"beams": beams, "max_length": 16, "end": END, "padding": PADDING, "shared": shared}
        for n_best in (1, beams):
            actual = beam_search(step, cache, first, n_best=n_best, **options)
            assert_same(actual, tokens[:, :n_best], scores[:, :n_best])
            lengths |= set(actual.lengths.flatten().tolist())
    assert len(lengths) > 6


@pytest.mark.parametrize("min_length", [0, 5])
def test_one_beam_and_shortest_lengths_equal_transformers_marian(min_length):
    model, source, mask = marian(1)
    step, cache, shared = marian_step(model, source, mask, 20)
    first, ours = torch.full((6,), 2), {"end": END, "max_length": 20, "min_length": min_length, "padding": PADDING}
    ours["shared"] = shared
    options = {"min_new_tokens": min_length or None, "max_new_tokens": 20, "attention_mask": mask}
    tokens = generated(model, source, num_beams=1, **options).sequences[:, 1:]
    one = beam_search(step, cache, first, beams=1, early_stopping=True, **ours).tokens[:, 0]
    for actual in (one, greedy(step, cache, first, **ours).tokens):
        assert torch.equal(actual, tokens[:, : actual.shape[1]]) and (tokens[:, actual.shape[1] :] == PADDING).all()
    theirs = generated(model, source, num_beams=4, num_return_sequences=4, **options)
    actual = beam_search(step, cache, first, beams=4, n_best=4, **ours)
    assert_same(actual, theirs.sequences[:, 1:].unflatten(0, (6, 4)), theirs.sequences_scores.reshape(6, 4))
    assert int(actual.lengths.min()) > min_length


def gpt(vocabulary=1000):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": vocabulary, "n_positions": 32}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": PADDING}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **rates, **ids, initializer_range=0.5)).eval().requires_grad_(False)
    cfg = gpt2.published_config(model.config.to_dict())
    return model, gpt2.from_published(model.state_dict(), cfg), cfg


def gpt_start(params, cfg, prompt, positions):
    """Caches that have read all of the prompt but its last token."""
    caches = gpt2.empty_caches(params, cfg, len(prompt), positions)
    zeros = torch.zeros(len(prompt), dtype=torch.int64)
    return gpt2.decode(params, prompt[:, :-1], caches, zeros, cfg)[1]


def gpt_step(params, cfg, decode=gpt2.decode):
    def step(caches, tokens, position):
        logits, caches = decode(params, tokens[:, None], caches, position, cfg)
        return logits[:, 0], caches

    return step


@pytest.mark.parametrize("compiled", [False, True])
def test_cached_gpt_equals_transformers(compiled):
    model, params, cfg = gpt()
    prompt = random.randint(random.key(4), (3, 5), 2, cfg.vocabulary).long()
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12, "eos_token_id": END}
    theirs = generated(model, prompt, attention_mask=torch.ones_like(prompt), length_penalty=0.8, **options)
    expected = theirs.sequences[:, 5:].unflatten(0, (3, 2)), theirs.sequences_scores.reshape(3, 2)
    ours = {"end": END, "max_length": 12, "beams": 3, "n_best": 2, "length_penalty": 0.8, "padding": PADDING}
    ours |= {"position": torch.full((3,), 4)}
    if compiled:
        torch._dynamo.reset()
        decode = torch.compile(gpt2.decode, fullgraph=True, dynamic=False, backend="aot_eager")
        step, ours["batch_sizes"] = gpt_step(params, cfg, decode), (3,)
        assert_same(beam_search(step, gpt_start(params, cfg, prompt, 16), prompt[:, -1], **ours), *expected)
        return
    for options in ({"positions_axis": None}, {"positions_axis": 2}):  # a cache that grows as the texts do
        cache = gpt_start(params, cfg, prompt, 16 if options["positions_axis"] is None else 4)
        assert_same(beam_search(gpt_step(params, cfg), cache, prompt[:, -1], **options, **ours), *expected)


@pytest.mark.parametrize("vocabulary", [2, 63, 640, 1000, 1024])
@pytest.mark.parametrize("forbidden", [None, 1])
def test_best_tokens_of_large_vocabularies(vocabulary, forbidden):
    logits = random.normal(random.key(0), (5, vocabulary))
    logits[2] = logits[2].sort().values  # the best all in one block
    logs = torch.log_softmax(logits, -1)
    if forbidden is not None:
        logs[:, forbidden] = -torch.inf
    for k in (1, 2, 5, 10):
        k = min(k, vocabulary)
        values, ids = _best(logits, k, forbidden)
        torch.testing.assert_close(values, logs.topk(k).values, rtol=0, atol=0)
        torch.testing.assert_close(logs.gather(1, ids), values, rtol=0, atol=0)


def test_texts_without_an_end_and_an_empty_batch():
    step, cache, _ = markov(5, batch=2)
    actual = beam_search(step, cache, torch.zeros(2, dtype=torch.int64), beams=2, end=None, max_length=6)
    assert (actual.lengths == 6).all() and actual.tokens.shape == (2, 1, 6)
    none = tree.map(lambda x: x[:0], cache)
    actual = beam_search(step, none, torch.zeros(0, dtype=torch.int64), beams=2, n_best=2, end=END, max_length=6)
    assert actual.tokens.shape == (0, 2, 0) and actual.scores.shape == actual.lengths.shape == (0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "n_best <= beams, found 1 and 0"),
        ({"n_best": 4}, "n_best <= beams, found 4 and 3"),
        ({"n_best": 0}, "n_best <= beams, found 0 and 3"),
        ({"normalization": "words"}, "normalization 'words' is unknown; expected length or gnmt"),
        ({"length_penalty": 1e30}, r"length_penalty is 1e\+30; expected -10 to 10"),
        ({"length_penalty": float("nan")}, "length_penalty is nan; expected -10 to 10"),
        ({"early_stopping": "later"}, "early_stopping is 'later'; expected True, False or 'never'"),
        ({"early_stopping": 1}, "early_stopping is 1; expected True, False or 'never'"),
        ({"max_length": 0}, "min_length < max_length, found 0 and 0"),
        ({"min_length": 8}, "min_length < max_length, found 8 and 8"),
        ({"end": -1}, "the end token is -1"),
        ({"end": 5}, "the end token is 5; expected an id below 5"),
        ({"stop": ((),)}, r"a stop sequence is \[\]; expected at least one token id"),
        ({"stop": ((1, 5),)}, r"a stop sequence is \[1, 5\]; expected ids below 5"),
        ({"temperature": 0.7}, "temperature is 0.7, which is for sampling; beams draw nothing"),
        ({"top_k": 3}, "top_k is 3, which is for sampling"),
        ({"top_p": 0.9}, "top_p is 0.9, which is for sampling"),
        ({"min_p": 0.1}, "min_p is 0.1, which is for sampling"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 is not above 0"),
        ({"first": torch.zeros(2, 1, dtype=torch.int64)}, r"first tokens \(batch,\) integers, found \(2, 1\)"),
        ({"first": torch.zeros(2)}, "integers, found .* torch.float32"),
        ({"first": torch.zeros(3, dtype=torch.int64)}, r"'before' of cache is \(2,\); expected 3 rows"),
        ({"shared": {"memory": torch.zeros(6, 4)}}, r"'memory' of shared is \(6, 4\); expected 2 rows"),
        ({"position": torch.zeros(3)}, r"expected a position, or 2, found \(3,\)"),
        ({"positions_axis": 2}, "axis 2 is not the positions of every leaf of the cache"),
        ({"step": lambda cache, tokens, position: (torch.zeros(3, 5), cache)}, r"expected logits \(2, vocabulary\)"),
        ({"step": lambda cache, tokens, position: (torch.full((len(tokens), 5), math.nan), cache)}, "logits with NaN"),
        (
            {"step": lambda cache, tokens, position: (torch.full((len(tokens), 5), -math.inf), cache)},
            "-inf for every token",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors(options, message):
    step, cache, _ = markov(5, batch=2)
    arguments = {"step": step, "cache": cache, "first": torch.zeros(2, dtype=torch.int64)}
    arguments |= {"beams": 3, "end": END, "max_length": 8}
    with pytest.raises(ValueError, match=message) as error:
        beam_search(**(arguments | options))
    assert "\n" not in str(error.value)
