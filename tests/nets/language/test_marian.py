"""Marian against transformers, on weights that transformers wrote: logits, gradients, attention and greedy texts."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.func import grad_and_value
from transformers import MarianConfig, MarianMTModel

from core import random, tree
from nets.language import marian, transformer
from nets.weights import WeightsError

PADDING, END = 30, 0
SMALL = {"vocab_size": 31, "d_model": 16, "max_position_embeddings": 24, "scale_embedding": True}
SMALL |= {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 24))}
SMALL |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "activation_function": "swish"}
SMALL |= {"pad_token_id": PADDING, "eos_token_id": END, "decoder_start_token_id": PADDING, "forced_eos_token_id": None}
VARIANTS = {
    "swish": {},
    "relu": {"activation_function": "relu", "scale_embedding": False},
    "two vocabularies": {
        "share_encoder_decoder_embeddings": False,
        "decoder_vocab_size": 35,
        "activation_function": "gelu",
    },
}


def model_of(**options):
    """transformers' model with weights far from their start; norms of both signs keep texts from repeating a token."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MarianMTModel(MarianConfig(**SMALL | options)).eval()
    model.set_attn_implementation("eager")  # which shows its weights
    keys = random.split(random.key(7), 200).unbind(0)
    with torch.no_grad():
        for key, (name, p) in zip(keys, model.named_parameters(), strict=False):
            scale = 1.5 if name.endswith("final_layer_norm.weight") else 0.3 if p.ndim > 1 else 0.1
            p += scale * random.normal(key, p.shape) * p.requires_grad
        model.final_logits_bias += 0.3 * random.normal(random.key(8), model.final_logits_bias.shape)
    # The first target token is padding, whose row torch's embedding would leave without this part of its gradient.
    for side in (model.model.encoder, model.model.decoder):
        side.embed_tokens.padding_idx = None
    return model


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def published(request, tmp_path_factory):
    """(transformers' model, the folder it is saved in), the model then in double precision, its positions too."""
    folder, model = tmp_path_factory.mktemp("marian"), model_of(**request.param)
    model.save_pretrained(folder)
    positions = transformer.sinusoids(torch.arange(24), 16, halves=True)
    for side in (model.double().model.encoder, model.model.decoder):
        torch.testing.assert_close(side.embed_positions.weight.data, positions, rtol=0, atol=1e-7)
        side.embed_positions.weight.data = positions
    return model, folder


def loaded(folder):
    """(params, cfg) of a saved model, in double precision, where both sides' rounding is far below any tolerance."""
    params, cfg = marian.from_pretrained(str(folder))
    return tree.cast(params, torch.float64), cfg


@pytest.fixture
def folder(tmp_path):
    """A folder with a Marian that a test may damage."""
    model_of().save_pretrained(tmp_path)
    return tmp_path


def pairs():
    source, target = (random.randint(random.key(seed), (8, 9), 1, 30).long() for seed in (1, 2))
    source = torch.where(torch.arange(9) < torch.tensor([9, 4, 6, 1, 2, 8, 7, 3])[:, None], source, PADDING)
    return source, F.pad(target[:, :6], (1, 0), value=PADDING)


def distance(actual, expected):
    return float((actual - expected).norm() / expected.norm())


def outputs(model, **options):
    source, target = pairs()
    mask = (source != PADDING).long()
    return model(source, attention_mask=mask, decoder_input_ids=target, use_cache=False, **options)


def test_logits_and_attention_equal_transformers(published):
    model, folder = published
    params, cfg = loaded(folder)
    with torch.no_grad():
        expected = outputs(model, output_attentions=True)
    assert expected.logits.std() > 0.5
    assert distance(transformer.apply(params, pairs(), cfg), expected.logits) < 1e-12
    maps = transformer.attention_maps(params, pairs(), cfg)
    theirs = {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}
    for name, field in theirs.items():
        torch.testing.assert_close(maps[name], torch.stack(getattr(expected, field), 1), rtol=0, atol=1e-12)


def test_loss_and_its_gradient_equal_transformers(published):
    model, folder = published
    params, cfg = loaded(folder)
    _, target = pairs()

    def loss(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())

    model.zero_grad()
    expected = loss(outputs(model).logits)
    expected.backward()
    state = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    state["final_logits_bias"] = torch.zeros_like(model.final_logits_bias)  # a buffer there
    untied = {}
    if not cfg.shared:  # one table there: ours has its gradient in two
        name = "model.decoder.embed_tokens.weight"
        untied = {"decoder.tokens.weight": state[name]}
    gradients = marian.from_published(state, cfg)  # rounded to single precision

    actual, value = grad_and_value(lambda p: loss(transformer.apply(p, pairs(), cfg)))(params)
    assert abs(value - expected) < 1e-12 * expected
    for (name, a), b in zip(tree.items(actual), tree.leaves(gradients), strict=True):
        if name in untied:
            assert distance(a + actual["output"]["weight"], untied[name]) < 1e-7, name
        elif not name.startswith("output"):
            assert distance(a, b) < 1e-7, name


def test_greedy_texts_equal_transformers(published):
    model, folder = published
    params, cfg = loaded(folder)
    source, steps = pairs()[0], 14
    mask = (source != PADDING).long()
    expected = model.generate(source, attention_mask=mask, max_new_tokens=steps, num_beams=1, do_sample=False)
    cache = transformer.start(params, transformer.encode(params, source, cfg), source != PADDING, cfg, steps)
    token, texts = torch.full((len(source),), PADDING), []
    for t in range(expected.shape[1] - 1):
        scores, cache = transformer.step(params, cache, token, torch.tensor(t), cfg)
        token = scores.argmax(-1)
        texts.append(token)
    for actual, text in zip(torch.stack(texts, 1).tolist(), expected[:, 1:].tolist(), strict=True):
        n = text.index(END) + 1 if END in text else len(text)
        assert actual[:n] == text[:n]
    assert expected.unique().numel() > 3


def test_published_configuration():
    """That of Helsinki-NLP/opus-mt-de-en, which is the paper's base."""
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 6), ("ffn_dim", 2048))}
    sizes |= {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "d_model": 512}
    theirs = MarianConfig(**sizes, max_position_embeddings=512, scale_embedding=True, activation_function="swish")
    with torch.device("meta"):
        state = MarianMTModel(theirs).state_dict()
    state = {name: x for name, x in state.items() if "embed_" not in name and name != "lm_head.weight"}
    cfg = marian.published_config(theirs.to_dict())
    table, ours = marian.rename_table(cfg), transformer.spec(cfg)
    assert set(table) == set(tree.names(ours))
    names = [(r.theirs,) if isinstance(r.theirs, str) else r.theirs for r in table.values()]
    assert sorted(sum(names, ())) == sorted(state)
    assert sum(x.numel() for x in state.values()) == tree.count(ours)
    base = replace(transformer.PRESETS["base"], positions="halves", activation="silu", output_bias=True, context=512)
    assert cfg == replace(base, source_vocabulary=58101, target_vocabulary=58101, padding_id=58100)


# Files of other versions, and damaged ones.


def test_pickled_weights_with_tied_tables_positions_and_a_prefix(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    table = state.get("model.shared.weight", next(iter(state.values())))
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_tokens.weight"] = state["model.shared.weight"]
        state[f"model.{side}.embed_positions.weight"] = transformer.sinusoids(torch.arange(24), 16, halves=True).float()
    state = {f"module.{name}": x for name, x in {**state, "lm_head.weight": table}.items()}
    torch.save(state, folder / "pytorch_model.bin")
    params, cfg = marian.from_pretrained(str(folder))
    with torch.no_grad():
        expected = outputs(model_of()).logits
    assert distance(transformer.apply(params, pairs(), cfg), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.encoder.layers.1.fc1.bias", None, r"fc1.bias' is missing; expected for 'encoder.blocks.1.mlp.up.bias'"),
        ("model.encoder.layers.2.fc1.bias", torch.ones(24), "has 1 tensors .* no place for: 'model.encoder.layers.2"),
        ("model.shared.weight", torch.ones(30, 16), r"has shape \(30, 16\), expected \(31, 16\) for 'tokens.weight'"),
        ("lm_head.weight", torch.ones(31, 16), "'lm_head.weight' differs from 'model.shared.weight'"),
        ("model.decoder.embed_positions.weight", torch.ones(24, 16), "decoder.embed_positions.* are not the sines"),
        ("model.encoder.embed_positions.weight", torch.ones(20, 16), r"of shape \(20, 16\) are not the sines"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, name, value, message):
    state = {n: x for n, x in load_file(folder / "model.safetensors").items() if n != name}
    save_file(state if value is None else {**state, name: value}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=message) as raised:
        marian.from_pretrained(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bart"}, "is of model_type 'bart', expected 'marian'"),
        ({"decoder_layers": 3}, "decoder_layers=3; only 2 is supported"),
        ({"normalize_before": True}, "normalize_before=True; only False"),
        ({"activation_dropout": 0.1}, "activation_dropout=0.1; only 0.0"),
        ({"activation_function": "tanh"}, "activation_function='tanh'; expected one of gelu, relu, silu, swish"),
        ({"d_model": "16"}, "d_model='16'; expected an integer"),
        ({"pad_token_id": None}, "pad_token_id=None; expected an integer"),
        ({"decoder_vocab_size": 35}, "vocabularies of 31 and 35 tokens cannot share"),
        ({"encoder_attention_heads": 3, "decoder_attention_heads": 3}, "width 16 is not divisible by 3 heads"),
        ({"dropout": "0.1"}, "the configuration makes no model"),
    ],
)
def test_config_that_does_not_fit_is_named(folder, changes, message):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(WeightsError, match=message) as raised:
        marian.from_pretrained(str(folder))
    assert "\n" not in str(raised.value)
