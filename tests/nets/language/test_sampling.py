"""Options that every net's texts share: where a text ends, what its batch may change (nothing), and errors."""

import functools

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from core import random, spec, tree
from nets.language import gpt2, llama, rnn, seq2seq, t5, transformer
from nets.language.decoding import sample
from nets.language.sampling import Options, begin, next_token, noises

VOCABULARY, STEPS = 29, 12
DECODERS = {
    gpt2: gpt2.Config(VOCABULARY, context=24, layers=2, heads=2, width=16, dropout=0.0),
    llama: llama.Config(VOCABULARY, 24, layers=2, heads=4, kv_heads=2, width=16, hidden=24),
    rnn: rnn.Config(VOCABULARY, 16, 16, dropout=0.0),
}
SIZES = {"heads": 2, "width": 16, "hidden": 24, "dropout": 0.0}
TRANSLATORS = {
    seq2seq: seq2seq.Config(VOCABULARY, VOCABULARY, embedding=16, width=16, encoder_width=16, context=24, dropout=0.0),
    t5: t5.Config(VOCABULARY, 2, 2, depth=8, **SIZES),
    transformer: transformer.Config(VOCABULARY, VOCABULARY, layers=2, context=24, **SIZES),
}
NETS = DECODERS | TRANSLATORS
every_net = pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__.rpartition(".")[2])


@functools.cache
def params_of(net):
    """Random weights, large enough that a text does not repeat a token."""
    return tree.map(lambda p: 4 * p, spec.init(random.key(3), net.spec(NETS[net])))


def texts(net, lengths=(6, 3, 5), rows=slice(None), params=None, **options):
    """Texts after the first tokens of three prompts or sources, (rows, tokens), the padding being 1."""
    params, cfg, lengths = params or params_of(net), NETS[net], torch.tensor(lengths)[rows]
    tokens = random.randint(random.key(1), (3, 6), 2, VOCABULARY).long()[rows, : int(lengths.max())]
    options = {"key": random.split(random.key(2), 3)[rows], "padding": 1} | options
    if net in DECODERS:
        return net.generate(params, tokens, cfg, STEPS, lengths=lengths, **options)
    source = torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], tokens, cfg.padding_id)
    memory, positions = net.encode(params, source, cfg), {}
    if net is seq2seq:
        cache = net.start(params, memory, cfg)
    else:
        cache, positions = net.start(params, memory, source != cfg.padding_id, cfg, 4), {"positions_axis": 2}
    options |= {"shared": cache["shared"], "max_length": STEPS} | positions
    return sample(net.stepper(params, cfg), cache["past"], torch.ones_like(lengths), **options).tokens


def cut(row, sequences):
    """The text up to and with the first stop sequence."""
    for n in range(1, len(row) + 1):
        if any(tuple(row[max(0, n - len(s)) : n]) == s for s in sequences):
            return row[:n]
    return row


@every_net
def test_text_depends_neither_on_batch_nor_on_padding(net):
    options = Options(0.9, top_k=25, top_p=0.99, min_p=0.001, repetition_penalty=1.1, end=7, stop=((5,), (3, 4)))
    together = texts(net, options=options)
    assert len({tuple(row) for row in together.tolist()}) == 3
    for i in range(3):
        alone = texts(net, rows=slice(i, i + 1), options=options)
        width = alone.shape[1]
        assert alone.tolist() == together[i : i + 1, :width].tolist()
        assert set(together[i, width:].tolist()) <= {1}


@every_net
def test_a_text_ends_after_its_first_stop_sequence(net):
    plain = texts(net).tolist()
    # The first text stops at two tokens from its middle, the second at one of its own; the last may go on.
    stop = (tuple(plain[0][4:6]), (plain[1][7],), (27, 28, 27, 28))
    expected = [cut(row, stop) for row in plain]
    assert len(expected[0]) < STEPS and len(expected[1]) < STEPS
    steps = max(map(len, expected))
    padded = [row + [1] * (steps - len(row)) for row in expected]
    assert texts(net, stop=stop).tolist() == padded
    assert texts(net, options=Options(stop=stop)).tolist() == padded


@pytest.mark.parametrize("net", DECODERS, ids=lambda net: net.__name__.rpartition(".")[2])
def test_a_stop_sequence_that_began_in_the_prompt_does_not_count(net):
    cfg, params, prompt = DECODERS[net], params_of(net), torch.tensor([[4, 9]])
    plain = net.generate(params, prompt, cfg, STEPS, key=random.key(0))
    spanning = (9, int(plain[0, 0]))
    assert spanning not in zip(plain[0, :-1].tolist(), plain[0, 1:].tolist(), strict=True)
    assert torch.equal(net.generate(params, prompt, cfg, STEPS, key=random.key(0), stop=(spanning,)), plain)


def test_the_penalty_of_a_translator_counts_its_own_tokens():
    """transformers' form: those after the start token, and it."""
    plain, actual = (texts(t5, temperature=0.0, repetition_penalty=penalty) for penalty in (1.0, 1.5))
    params, cfg, penalise = params_of(t5), NETS[t5], RepetitionPenaltyLogitsProcessor(1.5)
    source = random.randint(random.key(1), (3, 6), 2, VOCABULARY).long()[:1]
    target = torch.ones(1, 1, dtype=torch.int64)
    for _ in range(STEPS):
        scores = penalise(target, t5.apply(params, (source, target), cfg)[:, -1])
        target = torch.cat([target, scores.argmax(-1)[:, None]], 1)
    assert actual[:1].tolist() == target[:, 1:].tolist() and not torch.equal(actual, plain)


@every_net
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": ((3,), ())}, r"a stop sequence is \[\]; expected at least one token id"),
        ({"stop": ((3, -1),)}, r"a stop sequence is \[3, -1\]"),
        ({"stop": ((3, VOCABULARY),)}, f"expected ids below {VOCABULARY}"),
        ({"end": VOCABULARY}, f"expected an id below {VOCABULARY}"),
        ({"min_p": 1.5}, "min_p 1.5 is outside"),
        ({"temperature": float("nan")}, "temperature nan is not above 0"),
        ({"key": None}, "needs key="),
        ({"key": random.split(random.key(0), 2)}, r"expected a key \(2,\) or \(3, 2\), found \(2, 2\)"),
        ({"params": "NaN"}, "logits with NaN"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_are_one_line(net, options, message):
    if "params" in options:
        options = {"params": tree.map(lambda p: torch.full_like(p, torch.nan), params_of(net))}
    with pytest.raises(ValueError, match=message) as error:
        texts(net, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 5e-324])
def test_logits_do_not_overflow_by_the_temperature(temperature):
    """Nor does the temperature become 0 in single precision."""
    assert texts(rnn, temperature=temperature).tolist() == texts(rnn, temperature=0.0).tolist()


def test_nan_of_one_row_is_an_error_with_every_filter():
    scores = torch.zeros(2, 5)
    scores[1, 3] = torch.nan
    progress = begin(Options(), 2, scores.device)
    for options in (Options(), Options(temperature=0.0), Options(top_k=2), Options(top_p=0.5), Options(min_p=0.5)):
        with pytest.raises(ValueError, match="logits with NaN"):
            next_token(scores, progress, options, next(noises(random.key(0), options, 2, 5)))


@pytest.mark.parametrize("vocabulary", [9, 2**17 + 3])
def test_noise_is_that_of_each_token_alone(vocabulary):
    """However many tokens' noise is drawn in one go."""
    for key in (random.key(4), random.split(random.key(4), 3)):
        for t, noise in zip(range(3 if vocabulary > 9 else 20), noises(key, Options(), 3, vocabulary), strict=False):
            keys = random.fold_in(key, t)
            keys = random.fold_in(keys, torch.arange(3)) if key.ndim == 1 else keys
            assert torch.equal(noise, random.gumbel(keys, (vocabulary,)))


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="temprature"):
        texts(gpt2, temprature=1.0)
