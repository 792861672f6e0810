"""Sequence to sequence against modules of torch.nn with packed sequences; decoding; scheduled sampling."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import grad
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from core import random, spec, tree
from core.random import key
from nets.language import scheduled_sampling, seq2seq
from nets.language.beam_search import beam_search
from nets.language.decoding import greedy
from nets.language.seq2seq import Config

F64 = torch.float64
SIZES = {"source_vocabulary": 13, "target_vocabulary": 11, "embedding": 5, "width": 8, "encoder_width": 4}
CONFIGS = {
    "bahdanau, gru": Config(**SIZES),
    "bahdanau, lstm, linear": Config(**SIZES, kind="lstm", layers=2, readout="linear"),
    "general, gru": Config(**SIZES, layers=2, attention="general"),
    "dot, lstm, fed": Config(**SIZES, kind="lstm", layers=2, attention="dot", input_feeding=True),
    "general, gru, fed": Config(**SIZES, attention="general", input_feeding=True),
    "none, lstm": Config(
        **(SIZES | {"encoder_width": 8}), kind="lstm", layers=2, bidirectional=False, attention="none"
    ),
    "none, gru, linear": Config(**SIZES, attention="none", readout="linear"),
}
every_config = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)


def sentences(cfg):
    """Sources of 7, 3, 1 and 5 tokens, targets of 6."""
    source = random.randint(key(1), (4, 7), 1, cfg.source_vocabulary).long()
    source = torch.where(torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None], source, 0)
    return source, random.randint(key(2), (4, 6), 1, cfg.target_vocabulary).long()


def params_of(cfg, seed=0):
    return spec.init(key(seed), seq2seq.spec(cfg), F64)


# The same numbers as torch.nn.


class Reference(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, recurrent, n = cfg, nn.GRU if cfg.kind == "gru" else nn.LSTM, cfg.annotation_width
        self.source = nn.Embedding(cfg.source_vocabulary, cfg.embedding)
        self.target = nn.Embedding(cfg.target_vocabulary, cfg.embedding)
        options = {"batch_first": True, "num_layers": cfg.layers}
        self.encoder = recurrent(cfg.embedding, cfg.encoder_width, bidirectional=cfg.bidirectional, **options)
        fed = {"bahdanau": n}.get(cfg.attention, cfg.width if cfg.input_feeding else 0)
        self.decoder = recurrent(cfg.embedding + fed, cfg.width, **options)
        self.query = nn.Linear(cfg.width, cfg.width, bias=False)
        self.keys = nn.Linear(n, cfg.width, bias=cfg.attention == "bahdanau")
        self.score = nn.Linear(cfg.width, 1, bias=False)
        self.bridge = nn.ModuleDict(
            {part: nn.ModuleList(nn.Linear(n, cfg.width) for _ in range(cfg.layers)) for part in ("h", "c")}
        )
        seen = cfg.width + (0 if cfg.attention == "none" else n)
        self.readout = nn.Linear(seen, cfg.width, bias=False)
        self.output = nn.Linear(seen + cfg.embedding if cfg.readout == "linear" else cfg.width, cfg.target_vocabulary)

    def context(self, s, annotations, mask):
        """s (batch, width) -> (batch, annotation width)."""
        if self.cfg.attention == "bahdanau":
            scores = self.score(torch.tanh(self.query(s)[:, None] + self.keys(annotations)))[..., 0]
        elif self.cfg.attention == "general":
            scores = (self.keys(annotations) * s[:, None]).sum(-1)
        else:
            scores = (annotations * s[:, None]).sum(-1)
        weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)  # (batch, time)
        return (weights[..., None] * annotations).sum(1)

    def forward(self, source, target):
        cfg, lengths = self.cfg, (source != 0).sum(1)
        packed = pack_padded_sequence(self.source(source), lengths, batch_first=True, enforce_sorted=False)
        packed, ends = self.encoder(packed)
        annotations, _ = pad_packed_sequence(packed, batch_first=True, total_length=source.shape[1])
        states = {}
        for part, end in zip(("h", "c"), (ends,) if cfg.kind == "gru" else ends, strict=False):
            if cfg.bidirectional:
                end = torch.cat([end[0::2], end[1::2]], -1)  # (layers, batch, 2 encoder width)
            if cfg.bidirectional or cfg.encoder_width != cfg.width:
                end = torch.stack([layer(x) for layer, x in zip(self.bridge[part], end, strict=True)])
                end = torch.tanh(end) if part == "h" else end
            states[part] = end
        mask, logits, fed = source != 0, [], target.new_zeros(len(target), cfg.width, dtype=F64)
        for y in self.target(target).unbind(1):
            inputs, h = [y], states["h"][-1]
            if cfg.attention == "bahdanau":
                context = self.context(h, annotations, mask)
                inputs.append(context)
            if cfg.input_feeding:
                inputs.append(fed)
            before = states["h"] if cfg.kind == "gru" else (states["h"], states["c"])
            _, after = self.decoder(torch.cat(inputs, -1)[:, None], before)
            states = dict(zip(("h", "c"), (after,) if cfg.kind == "gru" else after, strict=False))
            h = states["h"][-1]
            if cfg.attention in ("dot", "general"):
                context = self.context(h, annotations, mask)
            x = h if cfg.attention == "none" else torch.cat([h, context], -1)
            if cfg.readout == "linear":
                x = torch.cat([x, y], -1)
            elif cfg.attention != "none":
                x = fed = torch.tanh(self.readout(x))
            logits.append(self.output(x))
        return torch.stack(logits, 1)


def ours(named, cfg):
    """Weights or gradients of the module under our names."""

    def leaves(name):
        return {leaf: named[f"{name}.{leaf}"] for leaf in ("bias", "weight") if f"{name}.{leaf}" in named}

    def layer(side, i, suffix="", columns=slice(None)):
        at = f"l{i}{suffix}"
        parts = {p: {q: named[f"{side}.{q}_{p}_{at}"] for q in ("bias", "weight")} for p in ("hh", "ih")}
        parts["ih"]["weight"] = parts["ih"]["weight"][:, columns]
        return parts

    first = slice(0, cfg.embedding)
    layers = [layer("decoder", i, columns=slice(None) if i else first) for i in range(cfg.layers)]
    decoder = {"layers": layers, "output": leaves("output"), "tokens": leaves("target")}
    fed = {"weight": named["decoder.weight_ih_l0"][:, cfg.embedding :]}
    if cfg.attention == "bahdanau":
        decoder |= {"attention": {part: leaves(part) for part in ("keys", "query", "score")}, "context": fed}
    if cfg.attention == "general":
        decoder["attention"] = {"keys": leaves("keys")}
    if cfg.input_feeding:
        decoder["feed"] = fed
    if cfg.readout == "tanh" and cfg.attention != "none":
        decoder["readout"] = leaves("readout")
    each = [layer("encoder", i) for i in range(cfg.layers)]
    if cfg.bidirectional:
        each = [{"backward": layer("encoder", i, "_reverse"), "forward": each[i]} for i in range(cfg.layers)]
    parts = {"decoder": decoder, "encoder": {"layers": each, "tokens": leaves("source")}}
    if cfg.bidirectional or cfg.encoder_width != cfg.width:
        names = ("h",) if cfg.kind == "gru" else ("c", "h")
        parts["bridge"] = [{part: leaves(f"bridge.{part}.{i}") for part in names} for i in range(cfg.layers)]
    return tree.map(lambda leaf, _: leaf.detach(), parts, seq2seq.spec(cfg))


def sorted_tree(node):
    if isinstance(node, dict):
        return {name: sorted_tree(node[name]) for name in sorted(node)}
    return [sorted_tree(one) for one in node] if isinstance(node, list) else node


@every_config
def test_logits_and_gradients_are_those_of_a_module(cfg):
    torch.manual_seed(0)
    module, (source, target) = Reference(cfg).to(F64), sentences(cfg)
    params = sorted_tree(ours(dict(module.named_parameters()), cfg))
    spec.check(seq2seq.spec(cfg), params)
    expected = module(source, target)
    torch.testing.assert_close(seq2seq.apply(params, (source, target), cfg), expected, rtol=1e-12, atol=1e-12)
    F.cross_entropy(expected.flatten(0, 1), target.roll(-1, 1).flatten()).backward()

    def loss(params):
        logits = seq2seq.apply(params, (source, target), cfg)
        return F.cross_entropy(logits.flatten(0, 1), target.roll(-1, 1).flatten())

    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    actual, reference = grad(loss)(params), sorted_tree(ours(gradients, cfg))
    for (name, g), other in zip(tree.items(actual), tree.leaves(reference), strict=True):
        torch.testing.assert_close(g, other, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


# Masks and ragged sources.


@every_config
def test_source_of_padding_is_known_by_nothing(cfg):
    """Neither its length in padding nor its embedded padding matters, and all gradients are finite."""
    params, (source, target) = params_of(cfg), sentences(cfg)
    source[0] = 0
    logits = seq2seq.apply(params, (source, target), cfg)
    longer = seq2seq.apply(params, (F.pad(source, (0, 3)), target), cfg)
    torch.testing.assert_close(longer, logits, rtol=1e-12, atol=1e-12)
    gradients = grad(lambda p: seq2seq.apply(p, (source, target), cfg).sin().sum())(params)
    assert all(g.isfinite().all() for g in tree.leaves(gradients))
    assert (gradients["encoder"]["tokens"]["weight"][0] == 0).all()


# Decoding.


@every_config
def test_steps_have_the_logits_of_the_whole(cfg):
    params, (source, target) = params_of(cfg), sentences(cfg)
    cache, steps = seq2seq.start(params, seq2seq.encode(params, source, cfg), cfg), []
    for t in range(target.shape[1]):
        logits, cache = seq2seq.step(params, cache, target[:, t], torch.tensor(t), cfg)
        steps.append(logits)
    whole = seq2seq.apply(params, (source, target), cfg)
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["bahdanau, gru", "dot, lstm, fed", "none, lstm"])
def test_beams_find_the_best_of_all_texts(name):
    """As many beams as there are texts of three tokens out of four, of which one ends a text."""
    cfg = dataclasses.replace(CONFIGS[name], target_vocabulary=4)
    params, (source, _) = tree.map(lambda leaf: 3 * leaf, params_of(cfg)), sentences(cfg)
    cache = seq2seq.start(params, seq2seq.encode(params, source, cfg), cfg)
    step, first = seq2seq.stepper(params, cfg), torch.ones(4, dtype=torch.int64)
    options = {"end": 2, "max_length": 3, "shared": cache["shared"], "length_penalty": 0.0, "early_stopping": "never"}
    out = beam_search(step, cache["past"], first, beams=36, **options)
    texts = [(a, b, c) for a in (0, 1, 3) for b in (0, 1, 3) for c in range(4)]
    texts += [(a, 2) for a in (0, 1, 3)] + [(2,)]
    for i in range(4):
        scores = []
        for text in texts:
            inputs = torch.tensor([[1, *text[:-1]]])
            logits = seq2seq.apply(params, (source[i : i + 1], inputs), cfg)
            log_p = torch.log_softmax(logits[0], -1)
            scores.append(float(log_p[torch.arange(len(text)), list(text)].sum()))
        best = max(range(len(texts)), key=scores.__getitem__)
        assert out.tokens[i, 0, : out.lengths[i, 0]].tolist() == list(texts[best])
        assert float(out.scores[i, 0]) == pytest.approx(scores[best], abs=1e-12)


def test_greedy_is_as_the_whole_net_would_write():
    cfg = CONFIGS["general, gru, fed"]
    params, (source, _) = params_of(cfg), sentences(cfg)
    cache = seq2seq.start(params, seq2seq.encode(params, source, cfg), cfg)
    options = {"end": None, "max_length": 5, "shared": cache["shared"]}
    out = greedy(seq2seq.stepper(params, cfg), cache["past"], torch.ones(4, dtype=torch.int64), **options)
    tokens = torch.ones(4, 1, dtype=torch.int64)
    for _ in range(5):
        best = seq2seq.apply(params, (source, tokens), cfg)[:, -1].argmax(-1)
        tokens = torch.cat([tokens, best[:, None]], 1)
    assert torch.equal(out.tokens, tokens[:, 1:])


@every_config
def test_attention_maps_are_means_over_the_source(cfg):
    source, target = sentences(cfg)
    maps = seq2seq.attention_maps(params_of(cfg), (source, target), cfg)
    if cfg.attention == "none":
        assert maps == {}
        return
    weights = maps["cross"]  # (4, 1, 1, 6, 7)
    assert weights.shape == (4, 1, 1, 6, 7) and torch.allclose(weights.sum(-1), torch.ones(4, 1, 1, 6, dtype=F64))
    assert ((weights > 0) == (source != 0)[:, None, None, None]).all()


# Scheduled sampling.


@pytest.mark.parametrize("name", ["bahdanau, gru", "general, gru", "dot, lstm, fed"])
def test_scheduled_sampling_reads_own_tokens_where_nothing_is_forced(name):
    cfg = CONFIGS[name]
    params, (source, target) = params_of(cfg), sentences(cfg)
    forced = torch.tensor([[0, 1, 0, 0, 1, 0]] * 4, dtype=torch.bool)
    logits, read = seq2seq.apply(params, (source, target), cfg, forced=forced), target[:, :1]
    for t in range(6):
        now = seq2seq.apply(params, (source, read), cfg)[:, -1]
        torch.testing.assert_close(logits[:, t], now, rtol=1e-12, atol=1e-12)
        if t < 5:
            following = torch.where(forced[:, t + 1], target[:, t + 1], now.argmax(-1))
            read = torch.cat([read, following[:, None]], 1)
    assert not torch.equal(read, target)
    everything = seq2seq.apply(params, (source, target), cfg, forced=torch.ones_like(forced))
    assert torch.equal(everything, seq2seq.apply(params, (source, target), cfg))


def test_scheduled_sampling_has_the_gradient_of_the_tokens_that_were_read():
    """Under grad and vmap(grad) alike: no derivative passes through the choice."""
    cfg = CONFIGS["bahdanau, gru"]
    params, (source, target) = params_of(cfg), sentences(cfg)
    forced = scheduled_sampling.teacher_forcing(key(3), 4, 6, torch.tensor(0.5))
    cache = seq2seq.start(params, seq2seq.encode(params, source, cfg), cfg)
    step = seq2seq.stepper(params, cfg)
    read = scheduled_sampling.mixed_target(step, cache["past"], target, forced, cache["shared"])
    assert not torch.equal(read, target)

    def loss(params, source, target, forced=None):
        return seq2seq.apply(params, (source, target), cfg, forced=forced).sin().sum()

    def alone(params, source, target, forced):
        return loss(params, source[None], target[None], forced[None])

    expected = grad(loss)(params, source, read)
    each = torch.func.vmap(grad(alone), (None, 0, 0, 0))(params, source, target, forced)
    for actual in (grad(loss)(params, source, target, forced), tree.map(lambda g: g.sum(0), each)):
        for g, other in zip(tree.leaves(actual), tree.leaves(expected), strict=True):
            torch.testing.assert_close(g, other, rtol=1e-12, atol=1e-12)


def test_teacher_forcing_has_the_rate():
    draw = partial(scheduled_sampling.teacher_forcing, key(0))
    assert draw(500, 40, torch.tensor(0.3)).float().mean() == pytest.approx(0.3, abs=0.015)
    assert draw(3, 4, 1.0).all() and not draw(3, 4, 0.0).any()
    rates = draw(2, 4000, torch.tensor([0.2, 0.9])).float().mean(1)
    assert rates.tolist() == pytest.approx([0.2, 0.9], abs=0.03)
    keys = random.split(key(5), 3)
    together = scheduled_sampling.teacher_forcing(keys, 3, 4, 0.5)
    assert torch.equal(scheduled_sampling.teacher_forcing(keys[1:2], 1, 4, 0.5), together[1:2])


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rnn"}, "kind 'rnn' is none of gru, lstm"),
        ({"attention": "luong"}, "attention 'luong' is none of none, bahdanau, dot, general"),
        ({"attention": "dot", "width": 9}, "the decoder's width 9 and the annotations' 8"),
        ({"input_feeding": True}, "input_feeding needs attention dot or general and readout tanh"),
        ({"layers": 0}, "layers is 0; expected at least 1"),
        ({"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
    ],
)
def test_configurations_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**SIZES | options)


def test_inputs_that_are_refused():
    cfg = Config(**SIZES, context=6)
    params, (source, target) = params_of(cfg), sentences(cfg)
    with pytest.raises(ValueError, match=r"source tokens .* of time 1 to 6, the context, found \(4, 7\)"):
        seq2seq.encode(params, source, cfg)
    memory = seq2seq.encode(params, source[:, :5], cfg)
    with pytest.raises(ValueError, match="expected a memory of 3 rows, found 4"):
        seq2seq.decode(params, target[:3], memory, cfg)
    with pytest.raises(ValueError, match=r"expected forced of shape \(4, 6\) of torch.bool, found \(4, 5\)"):
        seq2seq.apply(params, (source[:, :5], target), cfg, forced=torch.ones(4, 5, dtype=torch.bool))
