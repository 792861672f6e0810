"""Files of BERT and its relatives: which head they have, old names, ties, and what does not fit."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from core import random, spec
from nets.language import bert
from nets.weights import WeightsError
from tests.nets.language.bert_cases import FAMILIES, ids, model_of, outputs

CLS = "cls.predictions."
DECODER = {"bert": f"{CLS}decoder", "distilbert": "vocab_projector", "roberta": "lm_head.decoder"}


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """(family, head) -> (config.json, tensors) of a saved model."""
    saved = {}

    def get(name, head, **options):
        case = name, head, *options.items()
        if case not in saved:
            folder = tmp_path_factory.mktemp(name)
            model_of(name, head, **options).save_pretrained(folder)
            saved[case] = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        config, state = saved[case]
        return dict(config), {n: x.clone() for n, x in state.items()}

    return get


def write(folder, config, state):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return str(folder)


def output(name, folder, *args, **options):
    params, cfg = FAMILIES[name].module.from_pretrained(folder, *args, **options)
    return FAMILIES[name].module.apply(params, ids(name), cfg), cfg


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# Old names, and other forms of a file.


def old_names(state):
    """The first releases: gamma and beta, and the positions among the weights."""
    state = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): x for n, x in state.items()}
    state = {n.replace("LayerNorm.bias", "LayerNorm.beta"): x for n, x in state.items()}
    return state | {"bert.embeddings.position_ids": torch.arange(24)[None]}


FORMS = {
    "gamma, beta and position_ids": old_names,
    "wrapped": lambda state: {f"module.{n}": x for n, x in state.items()},
    "no prefix": lambda state: {n.removeprefix("bert."): x for n, x in state.items()},
    "a second bias": lambda state: state | {f"{CLS}decoder.bias": state[f"{CLS}bias"].clone()},
    "the other bias": lambda state: {n.replace(f"{CLS}bias", f"{CLS}decoder.bias"): x for n, x in state.items()},
    "a second embedding": lambda state: (
        state | {f"{CLS}decoder.weight": state["bert.embeddings.word_embeddings.weight"].clone()}
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_file(form, states, tmp_path, caplog):
    config, state = states("bert", "pretraining")
    expected, cfg = output("bert", write(tmp_path, config, state))
    assert cfg.head == "pretraining"
    actual, again = output("bert", write(tmp_path, config, FORMS[form](state)))
    assert again == cfg and not caplog.messages
    assert_same(actual, expected)


@pytest.mark.parametrize("name", ["distilbert", "roberta"])
def test_relatives_with_copies_and_a_pooler(name, states, tmp_path, caplog):
    """As the first files were: the output layer twice, positions; RoBERTa's also has a pooler that no head uses."""
    config, state = states(name, "masked_tokens")
    expected, cfg = output(name, write(tmp_path, config, state))
    more = {
        f"{DECODER[name]}.weight": state[f"{name}.embeddings.word_embeddings.weight"].clone(),
        f"{name}.embeddings.position_ids": torch.arange(24)[None],
    }
    if name == "roberta":
        more |= {"lm_head.decoder.bias": state["lm_head.bias"].clone()}
        more |= {"roberta.pooler.dense.weight": torch.ones(16, 16), "roberta.pooler.dense.bias": torch.ones(16)}
    actual, again = output(name, write(tmp_path, config, state | more))
    assert again == cfg and len(caplog.messages) == (name == "roberta")
    assert all("not used for the head 'masked_tokens': 'pooler.dense.bias'" in line for line in caplog.messages)
    assert_same(actual, expected)


def test_pickled_and_sharded_files(states, tmp_path):
    config, state = states("bert", "masked_tokens")
    expected, _ = output("bert", write(tmp_path, config, state))
    (tmp_path / "model.safetensors").unlink()
    torch.save(old_names(state), tmp_path / "pytorch_model.bin")
    assert_same(output("bert", str(tmp_path))[0], expected)
    (tmp_path / "pytorch_model.bin").unlink()
    model_of("bert", "masked_tokens").save_pretrained(tmp_path, max_shard_size="4kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(output("bert", str(tmp_path))[0], expected)


def test_half_precision_becomes_single(states, tmp_path):
    config, state = states("bert", "pooler")
    half = {n: x.bfloat16() for n, x in state.items()}
    expected, _ = output("bert", write(tmp_path, config, {n: x.float() for n, x in half.items()}))
    assert_same(output("bert", write(tmp_path, config, half))[0], expected)


def test_chinese_roberta_is_a_bert(states, tmp_path):
    """RoBERTa-wwm and RBT3 call themselves so only in their names: they have BERT's tensors and configuration."""
    config, state = states("bert", "pretraining")
    config |= {"architectures": ["BertForMaskedLM"], "directionality": "bidi", "pooler_type": "first_token_transform"}
    _, cfg = output("bert", write(tmp_path, config, old_names(state)))
    assert cfg.head == "masked_tokens"


# Heads.


@pytest.mark.parametrize(
    ("name", "head", "architecture", "expected"),
    [
        ("bert", "pretraining", None, "pretraining"),
        ("bert", "pretraining", "BertForMaskedLM", "masked_tokens"),
        ("bert", "pretraining", "BertForNextSentencePrediction", "next_sentence"),
        ("bert", "masked_tokens", None, "masked_tokens"),
        ("bert", "masked_tokens", "BertModel", "masked_tokens"),
        ("bert", "tokens", None, "tokens"),
        ("bert", "tokens", "BertModel", "tokens"),
        ("bert", "sequence", None, "sequence"),
        ("bert", "spans", None, "spans"),
        ("bert", "pooler", None, "pooler"),
        ("distilbert", "features", None, "features"),
        ("distilbert", "sequence", None, "sequence"),
        ("roberta", "sequence", None, "sequence"),
        ("roberta", "tokens", None, "tokens"),
        ("roberta", "masked_tokens", None, "masked_tokens"),
    ],
)
def test_head_of_a_file(name, head, architecture, expected, states, tmp_path):
    config, state = states(name, head)
    config["architectures"] = [architecture] if architecture else None
    assert output(name, write(tmp_path, config, state))[1].head == expected


def test_encoder_without_a_pooler(states, tmp_path):
    config, state = states("bert", "pooler")
    state = {n: x for n, x in state.items() if not n.startswith("pooler")}
    assert output("bert", write(tmp_path, config, state))[1].head == "features"


def test_head_that_is_left_out_is_named(states, tmp_path, caplog):
    config, state = states("bert", "pretraining")
    folder = write(tmp_path, config, state)
    everything, _ = output("bert", folder)
    assert not caplog.messages
    masked, cfg = output("bert", folder, "masked_tokens")
    assert_same(masked, everything["masked_tokens"])
    (message,) = caplog.messages
    assert "not used for the head 'masked_tokens': 'cls.seq_relationship.bias'" in message and "1 more" in message
    caplog.clear()
    assert "pooler" not in bert.from_pretrained(folder, "features")[0]
    assert "not used for the head 'features': 'cls.predictions.bias'" in caplog.messages[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_head_that_is_missing_is_drawn_by_a_key(name, states, tmp_path, caplog):
    module = FAMILIES[name].module
    folder = write(tmp_path, *states(name, "masked_tokens"))
    with pytest.raises(WeightsError, match=r"no classifier .*for head 'tokens' \('classifier.bias' is missing\)"):
        module.from_pretrained(folder, "tokens")
    caplog.clear()
    params, cfg = module.from_pretrained(folder, "sequence", classes=5, key=random.key(3))
    assert cfg.head == "sequence" and cfg.classes == 5
    first, second = caplog.messages
    assert "the file has no classifier and pooler for the head 'sequence'; drawn anew" in first
    assert "not used for the head 'sequence'" in second
    fresh, before = spec.init(random.key(3), module.spec(cfg)), module.from_pretrained(folder)[0]
    assert_same({n: params[n] for n in ("classifier", "pooler")}, {n: fresh[n] for n in ("classifier", "pooler")})
    assert_same(params["blocks"], before["blocks"])


def test_pooler_is_kept_where_only_the_classes_are_missing(states, tmp_path):
    folder = write(tmp_path, *states("bert", "pretraining"))
    pooler = bert.from_pretrained(folder)[0]["pooler"]
    assert_same(bert.from_pretrained(folder, "sequence", key=random.key(0))[0]["pooler"], pooler)


def test_classifier_of_another_head_is_not_taken(states, tmp_path, caplog):
    folder = write(tmp_path, *states("bert", "sequence"))
    before = bert.from_pretrained(folder)[0]["classifier"]
    with pytest.raises(WeightsError, match="no classifier for head 'tokens'"):
        bert.from_pretrained(folder, "tokens")
    params, _ = bert.from_pretrained(folder, "tokens", key=random.key(0))
    assert not torch.equal(params["classifier"]["weight"], before["weight"])
    assert "drawn anew" in caplog.messages[0] and "'classifier.bias', 'classifier.weight'" in caplog.messages[1]


def test_unknown_heads_and_architectures(states, tmp_path):
    config, state = states("bert", "sequence")
    folder = write(tmp_path, config | {"architectures": ["BertForMultipleChoice"]}, state)
    with pytest.raises(WeightsError, match="architecture 'BertForMultipleChoice' has no known head; pass head=, one"):
        bert.from_pretrained(folder)
    assert bert.from_pretrained(folder, "sequence")[1].head == "sequence"
    config, state = states("roberta", "masked_tokens")
    folder = write(tmp_path, config | {"hidden_act": "relu"}, state)  # masked_tokens alone refuses it
    assert FAMILIES["roberta"].module.from_pretrained(folder, "features")[1].activation == "relu"
    with pytest.raises(WeightsError, match="no head 'mlm'; there are pooler, features, masked_tokens"):
        bert.from_pretrained(folder, "mlm")


# The output layer of masked tokens: tied, not tied, tied again.


@pytest.mark.parametrize("name", FAMILIES)
def test_output_layer_of_its_own(name, states, tmp_path, caplog):
    module, decoder = FAMILIES[name].module, f"{DECODER[name]}.weight"
    config, state = states(name, "masked_tokens", tie_word_embeddings=False)
    assert decoder in state
    params, cfg = module.from_pretrained(write(tmp_path, config, state))
    assert not cfg.tied
    assert_same(params["masked_tokens"]["weight"], state[decoder])
    # The bias that transformers uses is the one beside it.
    unused = [] if name == "distilbert" else [f"'{DECODER[name]}.bias' differs from"]
    assert all(part in message for part, message in zip(unused, caplog.messages, strict=True))
    model = model_of(name, "masked_tokens", tie_word_embeddings=False)
    with torch.no_grad():
        expected = outputs(name, model, ids(name))[1]
    torch.testing.assert_close(module.apply(params, ids(name), cfg), expected)
    caplog.clear()
    # The configuration says tied, the file has two.
    params, again = module.from_pretrained(write(tmp_path, config | {"tie_word_embeddings": True}, state))
    assert again == cfg and f"'{decoder}' differs from the token embedding" in caplog.messages[0]
    assert_same(params["masked_tokens"]["weight"], state[decoder])
    with pytest.raises(WeightsError, match="differs from the token embedding; the two are one with tied=True"):
        module.from_published(state, replace(cfg, tied=True))
    # It says that there are two, the file has one, or two that were tied when it was saved.
    tied = {n: x for n, x in state.items() if n != decoder}
    with pytest.raises(WeightsError, match=f"'{decoder}' is missing; expected for 'masked_tokens.weight'"):
        module.from_pretrained(write(tmp_path, config, tied))
    caplog.clear()
    tied[decoder] = state[f"{name}.embeddings.word_embeddings.weight"].clone()
    assert not module.from_pretrained(write(tmp_path, config, tied))[1].tied
    assert "equals the token embedding, which the configuration does not tie" in caplog.messages[0]


# What does not fit.


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bert.encoder.layer.1.output.dense.bias", None, "'encoder.layer.1.output.dense.bias' is missing; expected"),
        ("bert.encoder.layer.2.output.dense.bias", torch.ones(16), "no place for: 'encoder.layer.2.output.dense.bias'"),
        ("cls.predictions.transform.dense.bias", None, "'cls.predictions.transform.dense.bias' is missing"),
        ("cls.other.weight", torch.ones(2), "has 1 tensors .* no place for: 'cls.other.weight'"),
        (
            "bert.embeddings.word_embeddings.weight",
            torch.ones(30, 16),
            r"word_embeddings.weight' has shape \(30, 16\), expected \(31, 16\) for 'tokens.weight'",
        ),
        ("cls.predictions.decoder.bias", torch.ones(31), "decoder.bias' differs from 'cls.predictions.bias'; the two"),
        ("bert.embeddings.position_ids", torch.zeros(1, 24), "'embeddings.position_ids' are not 0, 1, 2"),
    ],
)
def test_weights_that_do_not_fit_are_named(name, value, message, states, tmp_path):
    config, state = states("bert", "pretraining")
    state.pop(name, None)
    folder = write(tmp_path, config, state if value is None else {**state, name: value})
    with pytest.raises(WeightsError, match=message) as raised:
        bert.from_pretrained(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", {"model_type": "roberta"}, "is of model_type 'roberta', expected 'bert'"),
        ("distilbert", {"model_type": "bert"}, "is of model_type 'bert', expected 'distilbert'"),
        ("roberta", {"model_type": "bert"}, "is of model_type 'bert', expected 'roberta'"),
        ("bert", {"is_decoder": True}, "is_decoder=True; only False"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention=True; only False"),
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type='relative_key'; only 'absolute'",
        ),
        ("distilbert", {"pruned_heads": {"0": [1]}}, "pruned_heads="),
        ("bert", {"hidden_act": "tanh"}, "hidden_act='tanh'; expected one of gelu, gelu_new"),
        ("distilbert", {"activation": "mish"}, "activation='mish'; expected one of gelu"),
        ("roberta", {"hidden_act": "relu"}, "hidden_act='relu'; only 'gelu' is supported with masked_tokens"),
        ("bert", {"hidden_size": "16"}, "hidden_size='16'; expected an integer"),
        ("bert", {"pad_token_id": None}, "pad_token_id=None; expected an integer"),
        ("bert", {"layer_norm_eps": None}, "layer_norm_eps=None; expected a number"),
        ("bert", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no'; expected true or false"),
        ("bert", {"id2label": None, "num_labels": "2"}, "num_labels='2'; expected an integer"),
        ("bert", {"num_attention_heads": 3}, "makes no model: .*width 16 is not divisible by 3 heads"),
        ("bert", {"num_hidden_layers": 3}, "'encoder.layer.2.attention.output.dense.bias' is missing"),
        (
            "roberta",
            {"max_position_embeddings": 20},
            r"position_embeddings.weight' has shape \(24, 16\), expected \(20",
        ),
    ],
)
def test_config_that_does_not_fit_is_named(name, changes, message, states, tmp_path):
    config, state = states(name, "masked_tokens")
    with pytest.raises(WeightsError, match=message) as raised:
        FAMILIES[name].module.from_pretrained(write(tmp_path, config | changes, state))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "head", "changes", "rates"),
    [
        ("bert", "sequence", {"hidden_dropout_prob": 0.2}, (0.2, 0.1, None, 0.0)),
        ("bert", "tokens", {"classifier_dropout": 0.3}, (0.1, 0.1, 0.3, 0.0)),
        ("bert", "spans", {"classifier_dropout": 0.3, "attention_probs_dropout_prob": 0.4}, (0.1, 0.4, None, 0.0)),
        ("distilbert", "sequence", {}, (0.1, 0.1, 0.2, 0.0)),
        ("distilbert", "spans", {"qa_dropout": 0.4}, (0.1, 0.1, 0.4, 0.0)),
        ("distilbert", "tokens", {"dropout": 0.3}, (0.3, 0.1, None, 0.0)),
        ("roberta", "sequence", {"classifier_dropout": 0.3}, (0.1, 0.1, 0.3, 0.3)),
        ("roberta", "sequence", {"hidden_dropout_prob": 0.2}, (0.2, 0.1, None, 0.2)),
    ],
)
def test_dropout_rates_are_those_of_the_head(name, head, changes, rates, states):
    config = states(name, head)[0] | changes
    cfg = FAMILIES[name].module.published_config(config)
    assert (cfg.dropout, cfg.attention_dropout, cfg.head_dropout, cfg.pooler_dropout) == rates


def test_fields_that_a_file_leaves_out_are_those_of_transformers():
    roberta = FAMILIES["roberta"].module.published_config({"model_type": "roberta"})
    assert (roberta.vocabulary, roberta.context, roberta.types, roberta.eps) == (50265, 510, 2, 1e-12)
    assert bert.published_config({"model_type": "bert"}) == bert.PRESETS["base"]
    distilbert = FAMILIES["distilbert"].module
    assert distilbert.published_config({"model_type": "distilbert"}) == distilbert.PRESETS["distilbert"]
