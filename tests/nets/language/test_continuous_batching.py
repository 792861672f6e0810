"""Continuous batching against texts that are written alone."""

import dataclasses

import pytest
import torch

from core import random, spec, tree
from nets.language import gpt2, llama
from nets.language.continuous_batching import Batch, NotFinite, Text, choose
from nets.language.sampling import Options, begin, next_token

GPT = dataclasses.replace(gpt2.PRESETS["tiny"], vocabulary=40, context=24, layers=2, heads=2, width=32)
LLAMA = llama.Config(40, 24, 2, 4, 2, 32, 48, tied=True, window=10)
OPTIONS = [
    Options(temperature=0.8),
    Options(temperature=0.0),
    Options(top_k=5),
    Options(top_p=0.7, temperature=1.3),
    Options(min_p=0.2, top_k=20),
    Options(top_k=3, top_p=0.5, min_p=0.1),
    Options(stop=((7,), (3, 4)), temperature=1.5),
    Options(end=11),
]


def net_of(cfg, dtype=torch.float64):
    """(module, params): logits that differ enough for tokens to differ.

    In double precision, where batches of other sizes differ by 1e-15: so no two tokens are equally likely up to that.
    """
    net = gpt2 if cfg is GPT else llama
    params = tree.cast(spec.init(random.key(1), net.spec(cfg)), dtype)
    return net, params | {"tokens": {"weight": 8.0 * params["tokens"]["weight"]}}


def texts_of(cfg, count):
    """Prompts of 1 to 22 tokens and texts of 1 to 60: within the context and far beyond it."""
    keys = random.split(random.key(2), count)
    prompts = [tuple((5 * i + j) % cfg.vocabulary for j in range(1 + 7 * i % 22)) for i in range(count)]
    return [Text(p, 1 + 23 * i % 60, keys[i], OPTIONS[i % len(OPTIONS)]) for i, p in enumerate(prompts)]


def alone(net, params, cfg, text):
    """The tokens of `generation.stream`."""
    stream = net.stream(params, torch.tensor([text.prompt]), cfg, text.steps, key=text.key[None], options=text.options)
    with torch.inference_mode():
        return [int(token) for token in stream]


def written(batch, texts):
    """{number: tokens} of texts that join whenever a row is free."""
    waiting, out = list(enumerate(texts)), {i: [] for i in range(len(texts))}
    while waiting or batch.count:
        while waiting and batch.free:
            batch.add(*waiting.pop(0))
        for i, token, ended in batch.step():
            out[i].append(token)
            assert ended == (len(out[i]) == texts[i].steps) or texts[i].options.stop or texts[i].options.end
    return out


@pytest.mark.parametrize("cfg", [GPT, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("exact", [False, True])
def test_texts_are_those_written_alone(cfg, exact):
    """Any prompt, length and options, beyond the context too, whoever is in the other rows."""
    net, params = net_of(cfg)
    texts = texts_of(cfg, 20)
    out = written(Batch(net, params, cfg, 5, exact=exact), texts)
    assert out == {i: alone(net, params, cfg, text) for i, text in enumerate(texts)}
    assert len({tuple(tokens) for tokens in out.values()}) > 15  # they do differ


def test_exact_text_has_the_same_bits_alone_and_among_15_others():
    """One program makes both: a step of 16 rows, whatever is in them."""
    net, params = net_of(GPT, torch.float32)
    seen = {}

    def decode(*args, **options):
        logits, caches = gpt2.decode(*args, **options)
        seen.setdefault(case, []).append(logits[0].clone())
        return logits, caches

    text, *others = [one._replace(steps=30) for one in texts_of(GPT, 17)]
    tokens = {}
    for case, neighbours in (("alone", []), ("among others", others[:15])):
        batch, tokens[case] = Batch(net, params, GPT, 16, exact=True, decode=decode), []
        for name, one in enumerate([text, *neighbours]):
            batch.add(name, one)
        while any(row is not None and row.name == 0 for row in batch.rows):
            tokens[case] += [token for name, token, _ in batch.step() if name == 0]
    assert len(tokens["alone"]) == 30 and tokens["alone"] == tokens["among others"]
    assert torch.equal(*(torch.stack(seen[case]) for case in ("alone", "among others")))


def test_text_that_is_removed_frees_its_row_and_changes_no_other():
    net, params = net_of(GPT)
    texts = texts_of(GPT, 6)
    batch, out = Batch(net, params, GPT, 4), {}
    for i in range(4):
        batch.add(i, texts[i]._replace(steps=40, options=OPTIONS[i]))
    for at in range(40):
        if at == 3:
            batch.remove(1)
            batch.remove("nobody")
            batch.add(9, texts[5]._replace(steps=40, options=OPTIONS[0]))
        for name, token, _ in batch.step():
            out.setdefault(name, []).append(token)
    expected = {i: alone(net, params, GPT, texts[i]._replace(steps=40, options=OPTIONS[i])) for i in (0, 2, 3)}
    assert {i: out[i] for i in expected} == expected and len(out[1]) == 3
    assert out[9] == alone(net, params, GPT, texts[5]._replace(steps=40, options=OPTIONS[0]))[:37]


def test_each_row_is_chosen_by_its_own_options():
    """As `sampling.next_token` chooses, over many logits, ties and -inf among them."""
    rows = 64
    logits = 3 * random.normal(random.key(3), (rows, 40))
    logits[::4] = logits[::4].round()  # ties
    logits[5, ::2] = -torch.inf
    noise = random.gumbel(random.key(4), (rows, 40), torch.float32)
    options = [OPTIONS[i % len(OPTIONS)] for i in range(rows)]
    tokens = choose(logits, noise, options)
    for i, one in enumerate(options):
        own = None if one.temperature == 0 else noise[i : i + 1]
        expected, _ = next_token(logits[i : i + 1], begin(one, 1, logits.device), one, own)
        assert int(tokens[i]) == int(expected), one


def test_logits_that_are_not_finite_end_one_text_alone():
    net, params = net_of(GPT)
    params = tree.map(torch.clone, params)
    texts = [Text((1, 2), 8, random.key(0)), Text((39, 2), 8, random.key(1)), Text((3,), 8, random.key(2))]
    expected = [alone(net, params, GPT, texts[i]) for i in (0, 2)]
    batch = Batch(net, params, GPT, 3)
    for i, text in enumerate(texts):
        batch.add(i, text)
    row = next(i for i, one in enumerate(batch.rows) if one.name == 1)
    batch.caches[0].values[row] = torch.nan
    out = {0: [], 1: [], 2: []}
    while batch.count:
        for name, token, _ in batch.step():
            out[name].append(token)
    assert len(out[1]) == 1 and isinstance(out[1][0], NotFinite)
    assert [out[0], out[2]] == expected


def test_a_compiled_step_that_copies_the_caches_is_kept():
    """A compiled `decode` may give new caches in place of those that it got."""
    net, params = net_of(GPT)

    def copying(params, tokens, caches, position, cfg, *, donate):
        return gpt2.decode(params, tokens, caches, position, cfg, donate=False)

    texts = texts_of(GPT, 6)
    out = written(Batch(net, params, GPT, 4, decode=copying), texts)
    assert out == {i: alone(net, params, GPT, text) for i, text in enumerate(texts)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (Text((), 3, random.key(0)), "the prompt has 0 tokens; expected 1 to 24"),
        (Text((1,) * 25, 3, random.key(0)), "the prompt has 25 tokens; expected 1 to 24"),
        (Text((1, 40), 3, random.key(0)), "outside the vocabulary of 40"),
        (Text((-1,), 3, random.key(0)), "outside the vocabulary of 40"),
        (Text((1,), 0, random.key(0)), "steps is 0; expected at least 1"),
        (Text((1,), 3), "needs key="),
        (Text((1,), 3, random.key(0), Options(repetition_penalty=1.2)), "no repetition penalty"),
        (Text((1,), 3, random.key(0), Options(end=40)), "the end token is 40"),
    ],
)
def test_refuses_texts_that_cannot_be_written(text, message):
    net, params = net_of(GPT)
    batch = Batch(net, params, GPT, 1)
    with pytest.raises(ValueError, match=message):
        batch.add(0, text)
    batch.add(0, Text((1,), 3, random.key(0)))
    with pytest.raises(ValueError, match="all 1 rows are taken"):
        batch.add(1, Text((1,), 3, random.key(0)))


@pytest.mark.parametrize(("rows", "context"), [(0, None), (2, 0), (2, 25)])
def test_refuses_sizes_that_the_net_has_not(rows, context):
    net, params = net_of(GPT)
    with pytest.raises(ValueError, match="expected at least 1, of 1 to 24"):
        Batch(net, params, GPT, rows, context=context)
