"""Beam search against every text there is, against transformers' `generate`, and against a plain one in Python."""

import itertools
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MarianConfig, MarianMTModel
from transformers.modeling_outputs import BaseModelOutput

from core import random, tree
from nets.language import gpt2
from nets.language.beam_search import _best, beam_search
from nets.language.decoding import greedy
from nets.language.sampling import penalise_repetition

END = 1
PADDING = 39  # transformers' beam search pads with the end where the padding is token 0
PENALTIES = [{"length_penalty": a, "normalization": n} for n in ("length", "gnmt") for a in (-0.5, 0.0, 0.6, 1.0, 2.0)]


def markov(vocabulary=4, batch=1, seed=0):
    """A step whose next token depends on the last two, on the position and on the example: (step, cache, logs).

    The position makes the scores of all texts different. Entry (i, t, a, b, c) of logs is log p(c | a b) at position t.
    """
    table = 1.5 * random.normal(random.key(seed), (batch, vocabulary, vocabulary, vocabulary), torch.float64)
    sharper = 1 + 0.05 * torch.arange(20)[:, None, None, None]

    def step(cache, tokens, position):
        logits = cache["table"][torch.arange(len(tokens)), cache["before"], tokens]
        return logits * (1 + 0.05 * position), {"before": tokens, "table": cache["table"]}

    cache = {"before": torch.zeros(batch, dtype=torch.int64), "table": table}
    return step, cache, torch.log_softmax(table[:, None] * sharper, -1)


def divisor(length, length_penalty=1.0, normalization="length"):
    return (length if normalization == "length" else (5 + length) / 6) ** length_penalty


def texts(logs, max_length, first=0, min_length=0, stop=()):
    """Log-probability of every text of one example, that ends or is of max_length."""
    vocabulary, logs, log_p = logs.shape[-1], logs.tolist(), {}
    for n in range(1, max_length + 1):
        for text in itertools.product(range(vocabulary), repeat=n):
            ends = [m for m in range(min_length + 1, n + 1) if any(text[:m][-len(s) :] == s for s in ((END,), *stop))]
            if END in text[:min_length] or min(ends, default=max_length) != n:
                continue
            path = (0, first, *text)
            log_p[text] = sum(logs[t][path[t]][path[t + 1]][c] for t, c in enumerate(text))
    return log_p


def listed(actual, i=0):
    """[(text, score)] of example i."""
    pairs = zip(actual.tokens[i].tolist(), actual.lengths[i].tolist(), actual.scores[i].tolist(), strict=True)
    return [(tuple(text[:n]), score) for text, n, score in pairs if n]


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


@pytest.mark.parametrize("stop", [((2,),), ((2, 3), (0, 0, 3)), ((0,), (1,), (2,), (3,))], ids=str)
@pytest.mark.parametrize("min_length", [0, 2])
def test_stop_sequences_end_a_text_as_the_end_does(stop, min_length):
    step, cache, logs = markov()
    options = {"end": END, "stop": stop, "max_length": 4, "min_length": min_length}
    # A stop sequence in which the prompt has a part does not count.
    actual = beam_search(step, cache, torch.tensor([2]), beams=4**4, n_best=4**4, **options)
    expected = {text: p / len(text) for text, p in texts(logs[0], 4, 2, min_length, stop).items()}
    assert dict(listed(actual)) == pytest.approx(expected, rel=1e-12) and len(listed(actual)) == len(expected)
    # Few beams: at each position enough continuations are left that do not end.
    step, cache, _ = markov(batch=7)
    options |= {"max_length": 9, "padding": 9}
    one, other = (
        search(step, cache, torch.arange(7) % 4, **options, **more)
        for search, more in ((beam_search, {"beams": 1, "length_penalty": 0.0, "early_stopping": True}), (greedy, {}))
    )
    assert torch.equal(one.tokens[:, 0], other.tokens) and torch.equal(one.lengths[:, 0], other.lengths)
    some = beam_search(step, cache, torch.arange(7) % 4, beams=3, n_best=3, **options)
    for i in range(7):
        for text, _ in listed(some, i):
            ends = [m for m in range(1, len(text) + 1) if any(text[:m][-len(s) :] == s for s in ((END,), *stop))]
            assert min((m for m in ends if m > min_length), default=9) == len(text)


def test_repetition_penalty_is_that_of_sampling():
    step, cache, _ = markov()
    logits = cache["table"][0] * (1 + 0.05 * torch.arange(4)[:, None, None, None])

    def score(text, first, start):
        total, path = 0.0, (0, first, *text)
        for t, token in enumerate(text):
            present = torch.tensor([c in {*start, *path[2 : t + 2]} for c in range(4)])
            penalised = penalise_repetition(logits[t, path[t], path[t + 1]], present, 1.7)
            total += float(torch.log_softmax(penalised, -1)[token])
        return total

    options = {"end": END, "max_length": 4, "repetition_penalty": 1.7}
    for start, present in (([3], None), ([0, 2], torch.tensor([[True, False, True, False]]))):
        actual = beam_search(step, cache, torch.tensor([3]), beams=4**4, n_best=4**4, present=present, **options)
        expected = {text: score(text, 3, start) / len(text) for text in texts(logits, 4)}
        assert dict(listed(actual)) == pytest.approx(expected, rel=1e-12)
    step, cache, _ = markov(9, batch=7)
    one = beam_search(step, cache, torch.arange(7), beams=1, length_penalty=0.0, early_stopping=True, **options)
    other = greedy(step, cache, torch.arange(7), **options)
    assert torch.equal(one.tokens[:, 0], other.tokens)
    assert not torch.equal(other.tokens, greedy(step, cache, torch.arange(7), end=END, max_length=4).tokens)


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


def marian(seed=0, vocabulary=40):
    torch.manual_seed(seed)
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    config = MarianConfig(
        vocab_size=vocabulary,
        **sizes,
        pad_token_id=PADDING,
        eos_token_id=END,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        dropout=0.0,
        init_std=0.6,
    )
    model = MarianMTModel(config).eval().requires_grad_(False)
    # Another output layer than the embedding, which would repeat the last token, and texts that end at all lengths.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(vocabulary, 16), requires_grad=False)
    model.final_logits_bias[0, END] = 4.0
    source = random.randint(random.key(seed), (6, 7), 3, PADDING).long()
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 1, 7, 4])[:, None]
    return model, torch.where(mask, source, PADDING), mask.long()


def marian_step(model, source, mask, positions):
    """Without a cache of theirs: all tokens are read again at each position."""
    memory = model.model.encoder(source, attention_mask=mask).last_hidden_state

    def step(cache, tokens, position, shared):
        texts = cache.index_copy(1, position[None], tokens[:, None])
        beams = len(tokens) // len(shared["memory"])
        memory, mask = (shared[name].repeat_interleave(beams, 0) for name in ("memory", "mask"))
        output = model(
            encoder_outputs=BaseModelOutput(memory),
            attention_mask=mask,
            decoder_input_ids=texts[:, : position + 1],
            use_cache=False,
        )
        return output.logits[:, -1], texts

    return step, torch.zeros(len(source), positions, dtype=torch.int64), {"memory": memory, "mask": mask}


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


def generated(model, inputs, **options):
    options = {"do_sample": False, "return_dict_in_generate": True, "output_scores": True} | options
    return model.generate(inputs, **options)


def assert_same(actual, tokens, scores):
    time = actual.tokens.shape[2]
    assert torch.equal(actual.tokens, tokens[:, :, :time]) and (tokens[:, :, time:] == PADDING).all()
    torch.testing.assert_close(actual.scores, scores, rtol=1e-5, atol=1e-5)


def test_several_end_tokens_equal_transformers_marian():
    model, source, mask = marian()
    step, cache, shared = marian_step(model, source, mask, 16)
    ends = [END, 7, 19, 23]
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 16, "eos_token_id": ends}
    theirs = generated(model, source, attention_mask=mask, **options)
    options = {"beams": 3, "n_best": 3, "max_length": 16, "padding": PADDING, "shared": shared}
    options["stop"] = tuple((end,) for end in ends)
    actual = beam_search(step, cache, torch.full((6,), 2), **options)
    assert_same(actual, theirs.sequences[:, 1:].unflatten(0, (6, 3)), theirs.sequences_scores.reshape(6, 3))
    last = actual.tokens.gather(2, actual.lengths[:, :, None] - 1)
    assert len(last.unique()) > 2


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
