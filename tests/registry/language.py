"""Nets that read and write tokens."""

from dataclasses import replace

from torch import Tensor

from core import random
from core.tree import Tree
from nets.language import (
    bert,
    distilbert,
    fasttext,
    gpt2,
    llama,
    rnn,
    roberta,
    seq2seq,
    sequence_classifier,
    t5,
    text_cnn,
    transformer,
)
from tests.registry.face import Net, both, labels, net, published, register, sequences, tokens

GPT = {"vocabulary": 31, "context": 10, "layers": 2, "heads": 2, "width": 8}
net("gpt2", gpt2, gpt2.Config(**GPT, dropout=0.2), tokens(31, 10), draws=True)
net("gpt2, no bias", gpt2, gpt2.Config(**GPT, dropout=0.0, bias=False), tokens(31, 10))
net("gpt2, norm last", gpt2, gpt2.Config(**GPT, dropout=0.1, norm_first=False), tokens(31, 10), draws=True)
published(
    gpt2,
    {
        # Radford et al. 2018 and 2019, as in the published weights (tests/nets/language/test_gpt2.py).
        "gpt": 116_534_784,
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        # nanoGPT prints 0.80M and 10.65M, in which the positions are not counted.
        "nanogpt-cpu": 804_096,
        "nanogpt-gpu": 10_745_088,
    },
)

LLAMA = {"vocabulary": 31, "context": 10, "layers": 2, "heads": 4, "kv_heads": 2, "width": 8, "hidden": 12}
net("llama", llama, llama.Config(**LLAMA), tokens(31, 10))
OPTIONS = {"depth": 4, "qkv_bias": True, "tied": True, "window": 4, "rope_factor": 4.0, "dropout": 0.2}
net("llama, all options", llama, llama.Config(**LLAMA, **OPTIONS), tokens(31, 10), draws=True)
published(
    llama,
    {
        # As in the published weights (tests/nets/language/test_llama.py).
        "llama-2-7b": 6_738_415_616,
        "llama-3.2-1b": 1_235_814_400,
        "mistral-7b": 7_241_732_096,
        "qwen2-0.5b": 494_032_768,
        "smollm2-135m": 134_515_008,
        "tinyllama-1.1b": 1_100_048_384,
    },
)

RNN = {"vocabulary": 13, "embedding": 6, "width": 5, "layers": 2}
IDS = tokens(13, 7)
net("rnn", rnn, rnn.Config(**RNN, dropout=0.2), IDS, draws=True)
net("rnn, tanh", rnn, rnn.Config(**RNN, dropout=0.0, kind="rnn"), IDS)
net("rnn, gru", rnn, rnn.Config(**RNN, dropout=0.3, variational=True, kind="gru"), IDS, draws=True)
net("rnn, layer norm", rnn, rnn.Config(**RNN, dropout=0.0, kind="layer_norm_lstm"), IDS)
net("rnn, one-hot", rnn, rnn.Config(**RNN | {"embedding": None}, dropout=0.2), IDS, draws=True)
net("rnn, adaptive", rnn, rnn.Config(**RNN | {"width": 16}, dropout=0.0, cutoffs=(4, 8)), IDS)


def carried(cfg: rnn.Config) -> Net:
    """Goes on from a state, over rows of different lengths."""

    def batch(key: Tensor, n: int) -> dict:
        keys = random.split(key, 3).unbind(0)
        state = [{part: 0.5 * random.normal(k, (n, cfg.width)) for part in ("c", "h")} for k in keys[: cfg.layers]]
        return {"lengths": random.randint(keys[2], (n,), 1, 8), "state": state, "tokens": IDS(key, n)}

    def apply(params: Tree, x: dict, key: Tensor | None, train: bool) -> Tree:
        return rnn.apply(params, x["tokens"], cfg, state=x["state"], lengths=x["lengths"], key=key, train=train)

    return Net("rnn, carried and ragged", rnn.spec(cfg), apply, batch)


register(carried(rnn.Config(**RNN | {"embedding": 5}, dropout=0.0, tied=True)))
# Two layers of 128 over 65 characters, by hand: 4 * 128 * (65 + 128 + 2) + 4 * 128 * 258 + 65 * 129.
published(rnn, {"char-rnn": 240_321})

# Token 0 is padding, here also between others.
SENTENCES = {"source_vocabulary": 13, "target_vocabulary": 13, "heads": 2, "width": 8, "hidden": 12, "context": 9}
PAIRS = both(tokens(13, 7), tokens(13, 5))
PRENORM = transformer.Config(**SENTENCES, layers=2, dropout=0.2, norm_first=True, positions="halves", scale=False)
net("transformer, norm first", transformer, PRENORM, PAIRS, draws=True)
SENTENCES |= {"layers": 1}
net("transformer", transformer, transformer.Config(**SENTENCES, dropout=0.0), PAIRS)
net("transformer, dropout", transformer, transformer.Config(**SENTENCES, attention_dropout=0.2), PAIRS, draws=True)
SENTENCES |= {"target_vocabulary": 11, "shared": False, "output_bias": True, "positions": "learned"}
SEPARATE = transformer.Config(**SENTENCES, dropout=0.0, activation="silu", final_norms=True)
net("transformer, separate embeddings", transformer, SEPARATE, both(tokens(13, 7), tokens(11, 5)))
# The paper's table 3 has 65 and 213 million for a shared vocabulary of "about 37,000" tokens, which are counted here.
published(transformer, {"base": 63_082_496, "big": 214_245_376})

T5 = {"vocabulary": 13, "layers": 2, "decoder_layers": 1, "heads": 2, "depth": 3, "width": 8, "hidden": 12}
FEW = {"buckets": 4, "farthest": 5}  # so that each bucket is used
net("t5", t5, t5.Config(**T5, **FEW, dropout=0.0), PAIRS)
V1_1 = t5.Config(**T5, **FEW, activation="gelu_tanh", gated=True, tied=False, scale=False, dropout=0.2)
net("t5, version 1.1", t5, V1_1, PAIRS, draws=True)
# As in the published weights (tests/nets/language/test_t5.py).
published(t5, {"base": 222_903_552, "small": 60_506_624, "v1.1-base": 247_577_856, "v1.1-small": 76_961_152})

# Token 0 (of RoBERTa: 1) is padding, here also between others.
TEXT = {"vocabulary": 13, "context": 8, "layers": 1, "heads": 2, "width": 8, "hidden": 12}
PLAIN = bert.Config(**TEXT, head="pretraining", dropout=0.0, attention_dropout=0.0)
TYPED = both(tokens(13, 7), tokens(2, 7))
net("bert", bert, PLAIN, TYPED)
net("bert, dropout", bert, bert.Config(**TEXT, head="pretraining"), TYPED, draws=True)
net("bert, pooler", bert, replace(PLAIN, head="pooler", activation="relu"), tokens(13, 7))
net("bert, tokens", bert, replace(PLAIN, head="tokens", classes=3, head_dropout=0.2), TYPED, draws=True)
net("bert, spans", bert, replace(PLAIN, head="spans"), TYPED)
net("bert, own output layer", bert, replace(PLAIN, head="masked_tokens", tied=False), TYPED)
PUBLISHED_BERTS = {"tiny": 4_385_920, "mini": 11_170_560, "small": 28_763_648, "medium": 41_373_184}
PUBLISHED_BERTS |= {"base": 109_482_240, "large": 335_141_888, "chinese-base": 102_267_648, "rbt3": 38_476_800}
published(bert, PUBLISHED_BERTS)

DISTIL = replace(PLAIN, types=0, head="features", pooler_activation="relu")
net("distilbert", distilbert, DISTIL, tokens(13, 7))
net("distilbert, sequence", distilbert, replace(DISTIL, head="sequence", head_dropout=0.2), tokens(13, 7), draws=True)
published(distilbert, {"distilbert": 66_362_880})

ROBERTA = replace(PLAIN, types=1, head="masked_tokens", padding_id=1, positions="tokens")
net("roberta", roberta, ROBERTA, tokens(13, 7))
SEQUENCE = replace(ROBERTA, head="sequence", pooler_dropout=0.2, head_dropout=0.2)
net("roberta, sequence", roberta, SEQUENCE, tokens(13, 7), draws=True)
published(roberta, {"roberta-base": 124_645_632})
# A source ends with its last token that is not 0.
SENTENCES = {"source_vocabulary": 13, "target_vocabulary": 11, "embedding": 5, "width": 8, "encoder_width": 4}
PAIRS = both(tokens(13, 6), tokens(11, 4))
net("seq2seq", seq2seq, seq2seq.Config(**SENTENCES, dropout=0.2), PAIRS, draws=True)
LAYERS = {"layers": 2, "kind": "lstm", "dropout": 0.2}
GENERAL = seq2seq.Config(**SENTENCES, **LAYERS, attention="general", readout="linear")
net("seq2seq, general", seq2seq, GENERAL, PAIRS, draws=True)
FEEDING = seq2seq.Config(**SENTENCES, **LAYERS, attention="dot", input_feeding=True)
net("seq2seq, input feeding", seq2seq, FEEDING, PAIRS, draws=True)
SENTENCES |= {"encoder_width": 8, "bidirectional": False}
net("seq2seq, no attention", seq2seq, seq2seq.Config(**SENTENCES, attention="none"), PAIRS)
# Counted by layers, for the vocabularies that a version of the data has.
published(seq2seq, {"multi30k": 20_518_917})

# Sequences of 0 to 6 steps.
CLASSES = {"vocabulary": 13, "d_in": 5, "width": 4, "outputs": 3}
RAGGED = both(tokens(13, 6), labels(7))
LSTM = sequence_classifier.Config(**CLASSES)
net("sequence classifier", sequence_classifier, LSTM, RAGGED)
DEEP = sequence_classifier.Config(**CLASSES, layers=2, bidirectional=True, pooling="mean", dropout=0.2)
net("sequence classifier, bidirectional", sequence_classifier, DEEP, RAGGED, draws=True)
VALUES = {"d_in": 2, "width": 4}
GRU = sequence_classifier.Config(**VALUES, kind="gru", bidirectional=True, pooling="max")
net("sequence classifier, gru of values", sequence_classifier, GRU, both(sequences(6, 2), labels(7)))
ELMAN = sequence_classifier.Config(**VALUES, kind="rnn", layers=2, outputs=4, dropout=0.3)
net("sequence classifier, rnn of values", sequence_classifier, ELMAN, both(sequences(6, 2), labels(7)), draws=True)

# Texts of 0 to 6 tokens, whose n-grams share few buckets.
CLASSES = {"vocabulary": 13, "d_in": 5, "outputs": 3}
net("fasttext", fasttext, fasttext.Config(**CLASSES, buckets=16, dropout=0.3), RAGGED, draws=True)
net("fasttext, hidden layer", fasttext, fasttext.Config(**CLASSES, buckets=16, ngrams=4, hidden=4), RAGGED)
net("fasttext, tokens alone", fasttext, fasttext.Config(**CLASSES, ngrams=1), RAGGED)
net("text cnn", text_cnn, text_cnn.Config(**CLASSES, width=4, windows=(2, 3), dropout=0.2), RAGGED, draws=True)
net("text cnn, a wide window", text_cnn, text_cnn.Config(**CLASSES, width=4, windows=(8,), dropout=0.0), RAGGED)
