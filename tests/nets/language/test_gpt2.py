"""GPT and GPT-2 against transformers, on weights that transformers wrote: logits, gradients, files."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.func import grad_and_value
from transformers import GPT2Config, OpenAIGPTConfig

from core import tree
from nets.language import gpt2
from nets.weights import WeightsError
from tests.nets.language.gpt2_cases import FAMILIES, SMALL, distance, ids, model_of, tiny


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, tmp_path_factory):
    """(transformers' model, the folder it is saved in), the model then in double precision."""
    folder, model = tmp_path_factory.mktemp(request.param), model_of(request.param)
    model.save_pretrained(folder)
    return model.double(), folder


def loaded(folder):
    """(params, cfg) of a saved model, in double precision, where both sides' rounding is far below any tolerance."""
    params, cfg = gpt2.from_pretrained(str(folder))
    return tree.cast(params, torch.float64), cfg


@pytest.fixture
def folder(tmp_path):
    """A folder with a GPT-2 that a test may damage."""
    model_of("gpt2").save_pretrained(tmp_path)
    return tmp_path


# The same numbers as transformers.


@pytest.mark.parametrize("time", [1, 7, 24])
def test_logits_equal_transformers(published, time):
    model, folder = published
    params, cfg = loaded(folder)
    with torch.no_grad():
        expected = model(ids(time=time)).logits
    assert expected.std() > 0.5
    assert distance(gpt2.apply(params, ids(time=time), cfg), expected) < 1e-12


def test_loss_and_its_gradient_equal_transformers(published):
    model, folder = published
    params, cfg = loaded(folder)
    tokens = ids()

    def loss(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    model.zero_grad()
    expected = loss(model(tokens).logits)
    expected.backward()
    # The gradients are renamed and transposed as the weights are, and rounded to single precision.
    gradients = gpt2.from_published({name: p.grad for name, p in model.named_parameters()}, cfg)
    actual, value = grad_and_value(lambda params: loss(gpt2.apply(params, tokens, cfg)))(params)
    assert abs(value - expected) < 1e-12 * expected
    for (name, a), b in zip(tree.items(actual), tree.leaves(gradients), strict=True):
        assert distance(a, b) < 1e-7, name


def test_fused_attention_gives_the_same():
    params, cfg = tiny()
    tokens = ids(time=16)
    fused = gpt2.apply(params, tokens, replace(cfg, attention="fused"))
    assert distance(fused, gpt2.apply(params, tokens, cfg)) < 1e-5


META = {
    "gpt": OpenAIGPTConfig(),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPT2Config(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPT2Config(n_layer=48, n_head=25, n_embd=1600),
}


@pytest.mark.parametrize("preset", META)
def test_presets_are_the_published_models(preset):
    with torch.device("meta"):
        model = FAMILIES[META[preset].model_type][1](META[preset])
    theirs = {name.removeprefix("transformer."): tuple(p.shape) for name, p in model.named_parameters()}
    cfg = gpt2.PRESETS[preset]
    assert gpt2.published_config(META[preset].to_dict()) == cfg
    assert tree.count(gpt2.spec(cfg)) == sum(p.numel() for p in model.parameters())
    table, ours = gpt2.rename_table(cfg), dict(tree.items(gpt2.spec(cfg)))
    assert set(table) == set(ours) and sorted(rename.theirs for rename in table.values()) == sorted(theirs)
    for name, rename in table.items():
        assert theirs[rename.theirs] == (ours[name].shape[::-1] if rename.transposed else ours[name].shape), name


# Files of other versions, and damaged ones.


def loads_the_same(folder, state):
    params, cfg = gpt2.from_pretrained(str(folder))
    torch.testing.assert_close(params, gpt2.from_published(state, cfg), rtol=0, atol=0)


def with_masks(state):
    """The first releases: no prefix, and each layer's causal mask among the weights."""
    state = {name.removeprefix("transformer."): x for name, x in state.items()}
    for i in range(SMALL["n_layer"]):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=torch.uint8).tril()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def test_old_names_and_mask_buffers(folder):
    state = load_file(folder / "model.safetensors")
    save_file(with_masks(state), folder / "model.safetensors")
    loads_the_same(folder, state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_modules(folder, prefix):
    state = load_file(folder / "model.safetensors")
    save_file({prefix + name: x for name, x in state.items()}, folder / "model.safetensors")
    loads_the_same(folder, state)


def test_pickled_weights_with_the_tied_head(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    both = {**state, "lm_head.weight": state["transformer.wte.weight"]}
    torch.save(both, folder / "pytorch_model.bin")
    loads_the_same(folder, state)


def test_half_precision_weights_become_single(folder):
    state = {name: x.bfloat16() for name, x in load_file(folder / "model.safetensors").items()}
    save_file({**state, "lm_head.weight": state["transformer.wte.weight"].clone()}, folder / "model.safetensors")
    loads_the_same(folder, {name: x.float() for name, x in state.items()})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("transformer.h.1.ln_2.bias", None, r"'h.1.ln_2.bias' is missing; expected for 'blocks.1.norm2.bias' \(16,\)"),
        ("transformer.h.2.ln_1.bias", torch.ones(16), "has 1 tensors .* no place for: 'h.2.ln_1.bias'"),
        ("transformer.wpe.weight", torch.ones(23, 16), r"'wpe.weight' has shape \(23, 16\), expected \(24, 16\)"),
        (
            "transformer.h.0.mlp.c_fc.weight",
            torch.ones(64, 16),
            r"\(64, 16\), expected \(16, 64\) for 'blocks.0.mlp.up",
        ),
        ("lm_head.weight", torch.ones(31, 16), "'lm_head.weight' differs from the token embedding"),
        ("lm_head.weight", torch.ones(30, 16), "'lm_head.weight' differs from the token embedding"),
        ("h.0.attn.bias", torch.ones(1, 1, 24, 24), r"'h.0.attn.bias' of shape \(1, 1, 24, 24\) is not a causal mask"),
        ("h.0.attn.bias", torch.ones(48), r"'h.0.attn.bias' of shape \(48,\) is not a causal mask"),
        ("h.0.attn.masked_bias", torch.tensor(0.0), "'h.0.attn.masked_bias' .* is not the -1e4"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, name, value, message):
    state = {n: x for n, x in load_file(folder / "model.safetensors").items() if n != name}
    save_file(state if value is None else {**state, name: value}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=message) as raised:
        gpt2.from_pretrained(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "is of model_type 'bert', expected 'gpt2' or 'openai-gpt'"),
        ({"model_type": None}, "is of model_type 'None'"),
        ({"activation_function": "relu"}, "activation_function='relu'; only 'gelu_new' is supported"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06; only 1e-05"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False; only True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False; only True"),
        ({"attn_pdrop": 0.0}, "attn_pdrop=0.0, embd_pdrop=0.1, resid_pdrop=0.1; only one dropout rate"),
        ({"resid_pdrop": 0.2}, "attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.2; only one dropout rate"),
        ({"n_inner": 17}, "n_inner=17; expected 4"),
        ({"n_layer": "2"}, "n_layer='2'; expected a number"),
        ({"n_head": 3}, "width 16 is not divisible by 3 heads"),
        ({"n_layer": 3}, "'h.2.attn.c_proj.bias' is missing"),
        ({"model_type": "openai-gpt"}, "'positions_embed.weight' is missing"),
    ],
)
def test_config_that_does_not_fit_is_named(folder, changes, message):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(WeightsError, match=message) as raised:
        gpt2.from_pretrained(str(folder))
    assert "\n" not in str(raised.value)


def test_folder_without_config_or_weights(folder, tmp_path_factory):
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match="has none of the files config.json"):
        gpt2.from_pretrained(str(folder))
    with pytest.raises(WeightsError, match="has none of the files"):
        gpt2.from_pretrained(str(tmp_path_factory.mktemp("empty")))


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers is 0; expected at least 1"),
        ({"width": 30, "heads": 4}, "width 30 is not divisible by 4 heads"),
        ({"dropout": 1.0}, "dropout 1.0 is outside"),
    ],
)
def test_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        gpt2.Config(**options)


def test_tokens_are_checked():
    params, cfg = tiny()
    with pytest.raises(ValueError, match="17 tokens exceed the context of 16"):
        gpt2.apply(params, ids(1, 17), cfg)
    with pytest.raises(ValueError, match=r"expected tokens of shape \(batch, time\), found \(16,\)"):
        gpt2.apply(params, ids(1, 16)[0], cfg)
    with pytest.raises(TypeError, match="gpt2: tokens is list; expected a tensor"):
        gpt2.apply(params, [[0, 1]], cfg)
    with pytest.raises(ValueError, match="17 tokens exceed the context of 16"):
        gpt2.empty_caches(params, cfg, 1, 17)
