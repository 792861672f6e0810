"""Texts of GPT and GPT-2 against transformers' `generate` and against a loop without a cache."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import RepetitionPenaltyLogitsProcessor

from core import random
from nets.language import gpt2
from tests.nets.language.gpt2_cases import FAMILIES, ids, model_of, tiny


@pytest.fixture(scope="module", params=FAMILIES)
def both(request):
    """(transformers' model, our parameters, our configuration)"""
    model = model_of(request.param)
    cfg = gpt2.published_config(model.config.to_dict())
    return model, gpt2.from_published(model.state_dict(), cfg), cfg


def generated(model, prompt, steps, **options):
    """New tokens of transformers' greedy search; without an end, `steps` of them."""
    options |= {"attention_mask": torch.ones_like(prompt), "max_new_tokens": steps, "do_sample": False}
    return model.generate(prompt, **options)[:, prompt.shape[1] :]


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_text_equals_transformers(both, batch, penalty):
    model, params, cfg = both
    prompt = ids(batch, 5)
    expected = generated(model, prompt, 19, repetition_penalty=penalty)
    actual = gpt2.generate(params, prompt, cfg, 19, temperature=0.0, repetition_penalty=penalty)
    assert actual.tolist() == expected.tolist()
    plain = gpt2.generate(params, prompt, cfg, 19, temperature=0.0)
    assert len(plain.unique()) > 3 and torch.equal(actual, plain) == (penalty == 1.0)


def test_texts_end_as_those_of_transformers(both):
    model, params, cfg = both
    prompt = ids(6, 5)
    plain = gpt2.generate(params, prompt, cfg, 19, temperature=0.0)
    # An end that some texts have early, others late or never.
    first = {end: ((plain == end).cumsum(1) == 0).sum(1) for end in range(31)}
    end = max(first, key=lambda end: len(first[end].unique()))
    assert len(first[end].unique()) > 1
    expected = generated(model, prompt, 19, eos_token_id=end, pad_token_id=30)
    calls = []

    def counting(*args, **options):
        calls.append(args)
        return gpt2.decode(*args, **options)

    for rows in (slice(None), first[end] < first[end].max()):  # the second stops before 19 tokens
        calls.clear()
        options = {"temperature": 0.0, "end": end, "padding": 30, "decode": counting}
        actual = gpt2.generate(params, prompt[rows], cfg, 19, **options)
        steps = min(19, int(first[end][rows].max()) + 1)
        assert actual.tolist() == expected[rows, :steps].tolist() and len(calls) == steps


def test_one_prompt_is_sampled_once_per_key():
    params, cfg = tiny()
    prompt, keys = ids(1, 6), random.split(random.key(3), 5)
    samples = gpt2.generate(params, prompt, cfg, 20, key=keys)
    assert samples.shape == (5, 20) and len(samples.unique(dim=0)) == 5
    for i in range(5):
        assert torch.equal(gpt2.generate(params, prompt, cfg, 20, key=keys[i : i + 1]), samples[i : i + 1])
    shorter = gpt2.generate(params, prompt, cfg, 20, key=keys, lengths=torch.tensor([4]))
    assert torch.equal(shorter, gpt2.generate(params, prompt[:, :4], cfg, 20, key=keys))


def uncached(params, prompt, cfg, steps, penalty=1.0):
    """Greedy, each token from a whole pass over its past; past the context, over the last part of it."""
    room = min(cfg.context, prompt.shape[1] + steps - 1)
    room -= min(steps - 1, room // 2)
    window, text = prompt if prompt.shape[1] <= cfg.context else prompt[:, -room:], prompt
    penalise = RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(steps):
        if window.shape[1] > cfg.context:
            window = window[:, -room:]
        token = penalise(text, gpt2.apply(params, window, cfg)[:, -1]).argmax(-1)
        window, text = (torch.cat([x, token[:, None]], 1) for x in (window, text))
    return text[:, prompt.shape[1] :]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    ("time", "steps"), [(1, 16), (5, 1), (5, 12), (5, 13), (5, 40), (15, 3), (16, 1), (16, 20), (17, 1), (30, 20)]
)
def test_stream_equals_a_loop_without_a_cache(time, steps, norm_first):
    """With a penalty of all tokens of the text, also of those that no longer fit the context."""
    params, cfg = tiny(norm_first=norm_first)
    prompt = ids(2, time)
    for penalty in (1.0, 1.2):
        actual = gpt2.generate(params, prompt, cfg, steps, temperature=0.0, repetition_penalty=penalty)
        expected = uncached(params, prompt, cfg, steps, penalty)
        assert actual.shape == (2, steps) and actual.tolist() == expected.tolist()


def test_context_of_one_token():
    params, cfg = tiny(context=1)
    actual = gpt2.generate(params, ids(2, 3), cfg, 4, temperature=0.0)
    assert actual.tolist() == uncached(params, ids(2, 3), cfg, 4).tolist()


def test_ragged_prompts_go_on_past_the_context():
    params, cfg = tiny()
    prompts, lengths = ids(3, 20), torch.tensor([20, 2, 9], dtype=torch.int32)
    before = prompts.clone()
    actual = gpt2.generate(params, prompts, cfg, 30, lengths=lengths, key=random.key(0))
    assert actual.shape == (3, 30) and actual.min() >= 0 and actual.max() < 31
    assert torch.equal(prompts, before) and lengths.tolist() == [20, 2, 9]
    # What follows a row's prompt is ignored.
    noise = torch.where(torch.arange(20) < lengths[:, None], prompts, 30 - prompts)
    assert torch.equal(gpt2.generate(params, noise, cfg, 30, lengths=lengths, key=random.key(0)), actual)


def test_example_gets_the_same_text_in_any_batch():
    params, cfg = tiny()
    prompts, lengths, key = ids(4, 6), torch.tensor([6, 3, 5, 1]), random.key(3)
    together = gpt2.generate(params, prompts, cfg, 10, lengths=lengths, key=key)
    first = gpt2.generate(params, prompts[:2], cfg, 10, lengths=lengths[:2], key=key)
    assert torch.equal(first, together[:2])


def test_texts_come_as_often_as_they_should():
    params, cfg = tiny(vocabulary=3, context=4)
    n, start = 6000, torch.tensor([[1]])
    samples = gpt2.generate(params, start.expand(n, 1), cfg, 2, key=random.key(0), temperature=8.0)
    first = torch.softmax(gpt2.apply(params, start, cfg)[0, -1] / 8, -1)
    pairs = torch.cartesian_prod(torch.tensor([1]), torch.arange(3))
    second = torch.softmax(gpt2.apply(params, pairs, cfg)[:, -1] / 8, -1)
    p = (first[:, None] * second).flatten()
    error = (3 * samples[:, 0] + samples[:, 1]).bincount(minlength=9) / n - p
    assert (error.abs() <= 4 * (p * (1 - p) / n).sqrt()).all() and p.min() > 0.005


def test_short_prompts_of_int32():
    params, cfg = tiny()
    prompt = ids(2, 5)
    actual = gpt2.generate(params, prompt.int(), cfg, 30, temperature=0.0)
    assert actual.dtype == torch.int64 and torch.equal(actual, gpt2.generate(params, prompt, cfg, 30, temperature=0.0))


@pytest.mark.parametrize("norm_first", [True, False])
def test_compiled_decode_is_one_graph_for_all_tokens(norm_first):
    torch._dynamo.reset()
    params, cfg = tiny(norm_first=norm_first, layers=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gpt2.decode, backend=counter, fullgraph=True, dynamic=False)
    prompt, options = ids(3, 5), {"key": random.key(1), "top_k": 20}
    eager = gpt2.generate(params, prompt, cfg, 12, **options)
    assert torch.equal(gpt2.generate(params, prompt, cfg, 12, decode=compiled, **options), eager)
    assert counter.frame_count == 2, "one graph for the prompt, one for every token after it"
    # Another prompt of this shape compiles nothing.
    gpt2.generate(params, ids(3, 5, seed=2), cfg, 12, decode=compiled, **options)
    assert counter.frame_count == 2


# Errors.


@pytest.mark.parametrize(
    ("prompt", "steps", "options", "message"),
    [
        ((1, 0), 3, {}, "a prompt of at least one token"),
        ((2, 4), 3, {"lengths": torch.tensor([4, 0])}, "a prompt of at least one token"),
        ((2, 4), 3, {"lengths": torch.tensor([4, 5])}, r"expected 2 lengths up to 4, found \[4, 5\]"),
        ((2, 4), 3, {"lengths": torch.tensor([4])}, r"expected 2 lengths up to 4, found \[4\]"),
        ((4,), 3, {}, r"expected tokens of shape \(batch, time\), found \(4,\)"),
        ((2, 4), 0, {}, "steps is 0; expected at least 1"),
        ((2, 4), 3, {}, "needs key="),
        ((2, 4), 3, {"temperature": -1.0}, "temperature -1.0"),
        ((2, 4), 3, {"repetition_penalty": 0.0}, "repetition_penalty 0.0 is not above 0"),
        ((2, 4), 3, {"end": 31}, "the end token is 31; expected an id below 31, or None"),
    ],
)
def test_generation_is_checked(prompt, steps, options, message):
    params, cfg = tiny()
    key = None if message == "needs key=" else random.key(0)
    with pytest.raises(ValueError, match=message):
        gpt2.generate(params, torch.ones(prompt, dtype=torch.int64), cfg, steps, key=key, **options)
