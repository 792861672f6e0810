"""From scores to tokens: the filters against transformers' logits processors, the draws against jax."""

import jax
import numpy as np
import pytest
import torch
from torch.func import vmap
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core import random, tree
from core.spec import init
from nets.language import gpt2
from nets.language.decoding import greedy, sample
from nets.language.sampling import choose, filter_logits, occurrences, penalise_repetition

FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.01},
    {"top_p": 0.6},
    {"top_p": 1.0},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.3, "top_k": 5, "top_p": 0.5},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 1.5, "top_k": 30, "top_p": 0.95, "min_p": 0.1},
]


def scores(batch=6, vocabulary=50, seed=0):
    return 2 * random.normal(random.key(seed), (batch, vocabulary))


def transformers_filter(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(None, logits)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filter_equals_transformers(options):
    logits = scores()
    actual = filter_logits(logits, **options)
    torch.testing.assert_close(actual, transformers_filter(logits, **options), rtol=0, atol=0)
    assert (actual.max(-1).values > -torch.inf).all()
    # Any leading axes, and vmapped.
    torch.testing.assert_close(filter_logits(logits.reshape(2, 3, -1), **options), actual.reshape(2, 3, -1))
    torch.testing.assert_close(vmap(lambda x: filter_logits(x, **options))(logits), actual)


def test_filter_keeps_ties_at_the_kth_place_and_the_best_token():
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [[True, True, False, True]]
    assert filter_logits(torch.tensor([[0.0, 9.0]]), top_p=1e-9).isfinite().tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0 is not above 0"),
        ({"temperature": -1.0}, "temperature -1.0 is not above 0"),
        ({"top_k": 0}, "top_k 0 is not at least 1"),
        ({"top_p": 0.0}, "top_p 0.0 is outside"),
        ({"top_p": 1.5}, "top_p 1.5 is outside"),
        ({"min_p": 0.0}, "min_p 0.0 is outside"),
        ({"min_p": float("nan")}, "min_p nan is outside"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        filter_logits(scores(), **options)
    if options.get("temperature") != 0.0:
        with pytest.raises(ValueError, match=message):
            choose(scores(), random.key(0), **options)


@pytest.mark.parametrize("penalty", [1.0, 1.2, 3.0, 0.5])
def test_repetition_penalty_equals_transformers(penalty):
    """Bits: one multiplication or division per logit on both sides."""
    logits = torch.where(scores() > 3.0, -torch.inf, scores())
    tokens = random.randint(random.key(1), (6, 30), 0, 50).long()
    present = occurrences(tokens, torch.full((6,), 30), 50)
    assert present.any(1).all() and not present.all(1).any()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits)
    assert torch.equal(penalise_repetition(logits, present, penalty), expected)


def test_occurrences_are_those_within_the_lengths():
    tokens, lengths = torch.tensor([[1, 1, 4], [2, 1, 0], [3, 3, 3]]), torch.tensor([2, 1, 3])
    assert [row.nonzero()[:, 0].tolist() for row in occurrences(tokens, lengths, 5)] == [[1], [2], [3]]


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("nan")])
def test_repetition_penalty_is_checked(penalty):
    with pytest.raises(ValueError, match=f"repetition_penalty {penalty} is not above 0"):
        penalise_repetition(scores(), scores() > 0, penalty)


def test_temperature_zero_takes_the_best_and_needs_no_key():
    assert torch.equal(choose(scores(), temperature=0.0), scores().argmax(-1))
    # It is the limit of small temperatures.
    for temperature in (1e-4, 1e-38, 1e-45):
        assert torch.equal(choose(scores(), random.key(0), temperature=temperature), scores().argmax(-1))


@pytest.mark.parametrize("key", [None, random.split(random.key(0), 3), random.split(random.key(0), 6)[None]])
def test_key_is_checked(key):
    with pytest.raises(ValueError, match="key"):
        choose(scores(6), key)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_equal_jax(options):
    logits, key = scores(200), random.key(3)
    words = random.fold_in(key, torch.arange(200)).numpy().view(np.uint32)
    keys = jax.random.wrap_key_data(jax.numpy.asarray(words), impl="threefry2x32")
    filtered = jax.numpy.asarray(transformers_filter(logits, **options).numpy())
    samples = jax.vmap(jax.random.categorical)(keys, filtered)
    assert choose(logits, key, **options).tolist() == samples.tolist()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.8, "temperature": 0.9}], ids=str
)
def test_tokens_come_as_often_as_they_should(options):
    n = 20_000
    logits = scores(1, 6)
    samples = choose(logits.expand(n, -1), random.key(1), **options)
    p = torch.softmax(transformers_filter(logits, **options)[0], -1)
    error = samples.bincount(minlength=6) / n - p
    assert (error.abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


def test_example_gets_the_same_token_in_any_batch():
    logits, key = scores(8), random.key(5)
    together = choose(logits, key)
    assert len(set(together.tolist())) > 4
    for n in range(1, 8):
        assert torch.equal(choose(logits[:n], key), together[:n])
    # With one key per example, in any order too.
    keys = random.fold_in(key, torch.arange(8))
    assert torch.equal(choose(logits, keys), together)
    assert torch.equal(choose(logits[[5, 2]], keys[[5, 2]]), together[[5, 2]])


# Whole texts.

END = 1


def toy(batch=1, vocabulary=5, seed=0):
    """(step, cache, table): the next token depends on the last one and, by a table of its own, on the example."""
    table = 1.5 * random.normal(random.key(seed), (batch, vocabulary, vocabulary), torch.float64)
    return lambda table, tokens, position: (table[torch.arange(len(tokens)), tokens], table), table, table


def probability(table, text, first):
    logs = torch.log_softmax(table, -1)
    return float(logs[[first, *text[:-1]], list(text)].sum())


@pytest.mark.parametrize("method", ["greedy", "sample"])
def test_texts_scores_and_padding(method):
    step, cache, table = toy(7)
    first, options = torch.arange(7) % 5, {"end": END, "max_length": 9, "padding": 4}
    if method == "greedy":
        actual = greedy(step, cache, first, **options)
    else:
        actual = sample(step, cache, first, random.key(0), temperature=0.8, top_k=3, **options)
    assert actual.tokens.shape == (7, int(actual.lengths.max())) and len(set(actual.lengths.tolist())) > 2
    for i, (tokens, n) in enumerate(zip(actual.tokens.tolist(), actual.lengths.tolist(), strict=True)):
        text = tokens[:n]
        assert END not in text[:-1] and (text[-1] == END or n == 9) and set(tokens[n:]) <= {4}
        # The score is the net's log-probability, before the filters.
        assert float(actual.scores[i]) == pytest.approx(probability(table[i], text, int(first[i])), rel=1e-12)
        if method == "greedy":
            path = [int(first[i]), *text]
            assert all(int(table[i, a].argmax()) == b for a, b in zip(path, path[1:], strict=False))


def test_sampled_texts_come_as_often_as_they_should():
    n = 20_000
    step, _, table = toy(vocabulary=3)
    first = torch.zeros(n, dtype=torch.int64)
    actual = sample(step, table.expand(n, -1, -1), first, random.key(2), end=END, max_length=3)
    texts, counts = actual.tokens.unique(dim=0, return_counts=True)
    total = 0.0
    for text, count in zip(texts.tolist(), counts.tolist(), strict=True):
        text = text[: text.index(END) + 1] if END in text else text
        p = float(np.exp(probability(table[0], text, 0)))
        assert abs(count / n - p) <= 4 * (p * (1 - p) / n) ** 0.5
        total += p
    assert total == pytest.approx(1.0) and len(texts) == 1 + 2 + 4 * 3


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"min_length": 4}, {"batch_sizes": (3, 5)}], ids=str)
def test_text_is_the_same_in_any_batch(options):
    step, cache, _ = toy(8)
    first, key = torch.arange(8) % 5, random.key(1)
    options = {"end": END, "max_length": 12} | options
    together = sample(step, cache, first, key, **options)
    assert int(together.lengths.min()) > options.get("min_length", 0)
    for n in range(1, 8):
        actual = sample(step, cache[:n], first[:n], key, **options)
        assert torch.equal(actual.tokens, together.tokens[:n, : actual.tokens.shape[1]])
        torch.testing.assert_close(actual.scores, together.scores[:n])
    # With one key per example, in any order too.
    keys = random.split(key, 8)
    together = sample(step, cache, first, keys, **options)
    actual = sample(step, cache[[6, 2]], first[[6, 2]], keys[[6, 2]], **options)
    torch.testing.assert_close(actual.scores, together.scores[[6, 2]])


def test_finished_examples_leave_the_batch():
    step, cache, _ = toy(8)
    rows = []

    def counting(*args):
        rows.append(len(args[1]))
        return step(*args)

    lengths = greedy(counting, cache, torch.arange(8) % 5, end=END, max_length=12).lengths
    assert rows == [int((lengths > t).sum()) for t in range(len(rows))]
    full = list(rows)
    rows.clear()
    greedy(counting, cache, torch.arange(8) % 5, end=END, max_length=12, batch_sizes=(4, 8))
    assert rows == [4 if n <= 4 else 8 for n in full]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 9}], ids=str)
@pytest.mark.parametrize("positions", [4, 16])
def test_gpt_writes_what_its_generate_does(positions, options):
    cfg = gpt2.Config(vocabulary=30, context=32, layers=2, heads=2, width=16, dropout=0.0)
    params = tree.map(lambda p: 4 * p, init(random.key(0), gpt2.spec(cfg)))
    prompt, lengths = random.randint(random.key(1), (3, 5), 0, 30).long(), torch.tensor([5, 3, 4])
    # Prompts of any lengths: what follows them is overwritten before any query attends to it.
    caches = gpt2.empty_caches(params, cfg, 3, max(positions, 4))
    caches = gpt2.decode(params, prompt[:, :4], caches, torch.zeros(3, dtype=torch.int64), cfg)[1]

    def step(caches, tokens, position):
        logits, caches = gpt2.decode(params, tokens[:, None], caches, position, cfg)
        return logits[:, 0], caches

    first = prompt[torch.arange(3), lengths - 1]
    actual = sample(
        step, caches, first, random.key(2), end=None, max_length=8, position=lengths - 1, positions_axis=2, **options
    )
    expected = gpt2.generate(params, prompt, cfg, 8, lengths=lengths, key=random.key(2), **options)
    assert torch.equal(actual.tokens, expected)


def test_recurrent_net_whose_cache_is_its_state():
    width, keys = 8, random.split(random.key(0), 4)
    inner, outer, table = (random.normal(k, (width, width), torch.float64) for k in keys[:3])
    state = random.normal(keys[3], (5, width), torch.float64)

    def step(state, tokens, position, shared):
        state = torch.tanh(state @ inner + table[tokens] + shared)
        return 2 * state @ outer, state

    shared = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None].expand(5, width)
    actual = greedy(step, state, torch.zeros(5, dtype=torch.int64), end=END, max_length=20, shared=shared)
    for i in range(5):
        h, token, text = state[i : i + 1], 0, []
        while len(text) < 20 and token != END:
            logits, h = step(h, torch.tensor([token]), None, shared[i : i + 1])
            token = int(logits.argmax())
            text.append(token)
        assert actual.tokens[i, : actual.lengths[i]].tolist() == text
    assert len(set(actual.lengths.tolist())) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": None}, "drawing a token at a temperature above 0 needs key="),
        ({"key": random.split(random.key(0), 3)}, r"expected a key \(2,\) or \(2, 2\), found \(3, 2\)"),
        ({"top_p": 2.0}, "top_p 2.0 is outside"),
        ({"max_length": 0}, "min_length < max_length, found 0 and 0"),
        ({"cache": torch.zeros(3, 5, 5)}, r"of cache is \(3, 5, 5\); expected 2 rows"),
        ({"cache": torch.full((2, 5, 5), torch.nan)}, "logits with NaN"),
        ({"positions_axis": 3}, "axis 3 is not the positions of every leaf"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors_of_whole_texts(options, message):
    step, cache, _ = toy(2)
    arguments = {"step": step, "cache": cache, "first": torch.zeros(2, dtype=torch.int64), "key": random.key(0)}
    with pytest.raises(ValueError, match=message) as error:
        sample(**(arguments | {"end": END, "max_length": 8} | options))
    assert "\n" not in str(error.value)
