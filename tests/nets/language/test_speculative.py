"""Speculative decoding: greedy texts equal the target's own, samples have its distribution."""

import functools
import itertools

import pytest
import torch
from scipy.stats import chi2
from torch._dynamo.testing import CompileCounterWithBackend

from core import random, spec, tree
from nets.language import gpt2, llama, speculative
from nets.language.sampling import Options, filter_logits, penalise_repetition
from nets.language.speculative import Decoder

TARGETS = {
    gpt2: {"context": 40, "layers": 2, "heads": 2, "width": 16, "dropout": 0.0},
    llama: {"context": 40, "layers": 2, "heads": 4, "kv_heads": 2, "width": 16, "hidden": 24, "window": 9},
}


@functools.cache
def nets(net=gpt2, vocabulary=29, scale=8.0, **options):
    """(target, draft): the draft is a GPT-2 of one layer whose weights are near the target's, where these are GPTs."""
    cfg = net.Config(vocabulary=vocabulary, **TARGETS[net] | options)
    params = tree.map(lambda p: scale * p, spec.init(random.key(0), net.spec(cfg)))
    small = gpt2.Config(vocabulary=vocabulary, **TARGETS[gpt2] | {"layers": 1})
    of_draft = tree.map(lambda p: scale * p, spec.init(random.key(0), gpt2.spec(small)))
    return Decoder(net.decode, net.empty_caches, params, cfg), Decoder(gpt2.decode, gpt2.empty_caches, of_draft, small)


def prompts(batch=4, time=6, vocabulary=29):
    return random.randint(random.key(1), (batch, time), 0, vocabulary).long()


@pytest.mark.parametrize("ahead", [1, 3, 6])
@pytest.mark.parametrize("net", TARGETS, ids=lambda net: net.__name__.rpartition(".")[2])
def test_greedy_text_is_that_of_the_target_alone(net, ahead):
    target, draft = nets(net)
    lengths, steps = torch.tensor([6, 1, 4, 2]), 17
    plain = net.generate(target.params, prompts(), target.cfg, steps, lengths=lengths, temperature=0.0)
    end, stop = int(plain[0, 9]), (tuple(plain[1, 4:7].tolist()),)
    for options in ({}, {"repetition_penalty": 1.3}, {"end": end, "stop": stop, "padding": 28}):
        options = Options(temperature=0.0, **options)
        expected = net.generate(target.params, prompts(), target.cfg, steps, lengths=lengths, options=options)
        actual = speculative.generate(target, draft, prompts(), steps, ahead=ahead, lengths=lengths, options=options)
        assert actual.tokens.tolist() == expected.tolist()
        assert (actual.lengths < steps).any() == (options.end is not None)
        # The rounds of the longest text and the draft's hits fit each other.
        assert 0.0 <= actual.acceptance <= 1.0 and steps / (ahead + 1) <= actual.rounds <= steps
        assert actual.rounds < steps or actual.acceptance < 0.3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_is_the_target_is_always_right(temperature):
    target, _ = nets()
    actual = speculative.generate(target, target, prompts(), 20, ahead=3, key=random.key(0), temperature=temperature)
    assert actual.acceptance > 0.999 and actual.rounds == 5 and actual.lengths.tolist() == [20] * 4


@pytest.mark.parametrize("vocabulary", [20, 31])
def test_a_draft_with_a_table_of_another_size_changes_no_text(vocabulary):
    """Also where the prompt or the target has tokens that the draft does not know."""
    (target, _), (_, draft) = nets(), nets(vocabulary=vocabulary)
    assert int(prompts().max()) >= 20
    for options in ({"temperature": 0.0}, {"temperature": 0.0, "repetition_penalty": 1.3}):
        expected = gpt2.generate(target.params, prompts(), target.cfg, 17, **options)
        assert torch.equal(speculative.generate(target, draft, prompts(), 17, **options).tokens, expected)
        assert int(expected.max()) >= 20
    sampled = speculative.generate(target, draft, prompts(), 17, key=random.key(1), top_k=9)
    assert 0.0 < sampled.acceptance < 1.0 and int(sampled.tokens.max()) < 29


OPTIONS = [
    {},
    {"temperature": 1.6, "top_p": 0.9},
    {"top_k": 2},
    {"temperature": 3.0, "min_p": 0.2, "repetition_penalty": 1.5},
    {"end": 2, "padding": 0},
]


@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_samples_have_the_distribution_of_the_target(options, ahead):
    """Chi-square of all texts of three tokens of a vocabulary of three, beyond its 99.9 % quantile."""
    n, vocabulary, time, options = 12_000, 3, 3, Options(**options)
    target, draft = nets(gpt2, vocabulary, 5.0)
    prompt = torch.tensor([[1, 2]])
    actual = speculative.generate(
        target, draft, prompt.expand(n, -1), time, ahead=ahead, key=random.key(3), options=options
    )
    texts = torch.tensor(list(itertools.product(range(vocabulary), repeat=time)))  # (27, time)
    whole = torch.cat([prompt.expand(len(texts), -1), texts], 1)
    logits, p = gpt2.apply(target.params, whole, target.cfg), torch.ones(len(texts))
    ended = torch.zeros(len(texts), dtype=torch.bool)
    for t in range(time):
        scores, rows = logits[:, 1 + t], torch.arange(len(texts))
        present = (whole[:, : 2 + t, None] == torch.arange(vocabulary)).any(1)
        scores = penalise_repetition(scores, present, options.repetition_penalty)
        filters = (options.temperature, options.top_k, options.top_p, options.min_p)
        step = torch.softmax(filter_logits(scores, *filters), -1)[rows, texts[:, t]]
        p = p * torch.where(ended, (texts[:, t] == options.padding).float(), step)
        ended = ended | (texts[:, t] == options.end)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-5)
    written = torch.nn.functional.pad(actual.tokens, (0, time - actual.tokens.shape[1]), value=options.padding)
    counts = (written * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27)
    assert not counts[p == 0].any()
    # The rare texts are one cell: with few expected, a cell's error is not that of a chi-square.
    rare = n * p < 10
    p, counts = (torch.cat([x[~rare], x[rare].sum(0, keepdim=True)]) for x in (p, counts.float()))
    p, counts = p[p > 0], counts[p > 0]
    error = ((counts - n * p) ** 2 / (n * p)).sum()
    assert len(p) > 3 and float(error) < chi2.ppf(0.999, len(p) - 1)
    assert 0.1 < actual.acceptance < 0.99, "the draft neither always nor never hits, or nothing is tested"


def test_text_depends_neither_on_batch_nor_on_padding():
    target, draft = nets()
    lengths, keys = torch.tensor([6, 1, 4, 2]), random.split(random.key(2), 4)
    options = Options(0.9, top_k=20, repetition_penalty=1.1, end=7, stop=((3, 4),), padding=1)
    together = speculative.generate(target, draft, prompts(), 15, lengths=lengths, key=keys, options=options)
    assert len({tuple(row) for row in together.tokens.tolist()}) == 4
    for i, n in enumerate(lengths.tolist()):
        row = slice(i, i + 1)
        alone = speculative.generate(target, draft, prompts()[row, :n], 15, key=keys[row], options=options)
        assert alone.lengths == together.lengths[i]
        assert alone.tokens.tolist() == together.tokens[row, : alone.tokens.shape[1]].tolist()
    first = speculative.generate(target, draft, prompts()[:2], 15, key=random.key(5))
    assert torch.equal(first.tokens, speculative.generate(target, draft, prompts(), 15, key=random.key(5)).tokens[:2])


def test_compiled_passes_are_five_graphs():
    torch._dynamo.reset()
    pair, counters = nets(layers=1), [CompileCounterWithBackend("aot_eager") for _ in range(2)]
    compiled = [
        net._replace(decode=torch.compile(net.decode, backend=counter, fullgraph=True, dynamic=False))
        for net, counter in zip(pair, counters, strict=True)
    ]
    options = {"temperature": 0.0, "ahead": 3}
    actual, expected = (speculative.generate(*both, prompts(), 12, **options) for both in (compiled, pair))
    assert torch.equal(actual.tokens, expected.tokens) and actual.rounds > 2
    assert [counter.frame_count for counter in counters] == [2, 3], "each net's prompt, and one or two passes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 31}, "41 tokens exceed the context of 40"),
        ({"steps": 0}, "steps is 0 and ahead 4; expected at least 1"),
        ({"ahead": 0}, "steps is 3 and ahead 0; expected at least 1"),
        ({"key": None}, "needs key="),
        ({"stop": ((),)}, "a stop sequence is"),
        ({"nan": True}, "logits with NaN"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_are_one_line(change, message):
    target, draft = nets()
    if change.pop("nan", False):
        target = target._replace(params=tree.map(lambda p: torch.full_like(p, torch.nan), target.params))
    arguments = {"target": target, "draft": draft, "prompt": prompts(), "steps": 3, "key": random.key(0)}
    with pytest.raises(ValueError, match=message) as error:
        speculative.generate(**arguments | change)
    assert "\n" not in str(error.value)
