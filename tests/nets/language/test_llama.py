"""Llama, Mistral and Qwen2 against transformers, on weights that transformers wrote: logits, gradients, files."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.func import grad_and_value
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from core import random, tree
from nets.language import llama
from nets.weights import WeightsError
from tests.nets.language.llama_cases import FAMILIES, STRETCH, distance, exact, ids, model_of, tiny


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, tmp_path_factory):
    """(transformers' model, the folder it is saved in), the model then in double precision."""
    folder, model = tmp_path_factory.mktemp(request.param.split(",")[0]), model_of(request.param)
    model.save_pretrained(folder)
    with torch.no_grad():
        single = model(ids()).logits
    return exact(model), folder, single


def loaded(folder):
    """(params, cfg) of a saved model, in double precision."""
    params, cfg = llama.from_pretrained(str(folder))
    return tree.cast(params, torch.float64), cfg


@pytest.fixture
def folder(tmp_path):
    """A folder with a Llama that a test may damage."""
    model_of("llama").save_pretrained(tmp_path)
    return tmp_path


# The same numbers as transformers.


@pytest.mark.parametrize("time", [1, 7, 24])
def test_logits_equal_transformers(published, time):
    model, folder, _ = published
    params, cfg = loaded(folder)
    with torch.no_grad():
        expected = model(ids(time=time)).logits
    assert expected.std() > 0.5
    assert distance(llama.apply(params, ids(time=time), cfg), expected) < 1e-12


def test_logits_equal_transformers_in_single_precision(published):
    """As it is, with norms and rotations of its own."""
    _, folder, expected = published
    params, cfg = llama.from_pretrained(str(folder))
    assert distance(llama.apply(params, ids(), cfg), expected) < 1e-5


def test_loss_and_its_gradient_equal_transformers(published):
    model, folder, _ = published
    params, cfg = loaded(folder)
    tokens = ids()

    def loss(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    model.zero_grad()
    expected = loss(model(tokens).logits)
    expected.backward()
    # The gradients are renamed and joined as the weights are.
    wide = tree.map(lambda leaf: replace(leaf, dtype=torch.float64), llama.spec(cfg))
    state = {name: p.grad for name, p in model.named_parameters()}
    gradients = llama.fill(wide, state, llama.rename_table(cfg))
    actual, value = grad_and_value(lambda params: loss(llama.apply(params, tokens, cfg)))(params)
    assert abs(value - expected) < 1e-12 * expected
    for (name, a), b in zip(tree.items(actual), tree.leaves(gradients), strict=True):
        assert distance(a, b) < 1e-10, name


def test_fused_attention_gives_the_same():
    for window in (None, 5):
        params, cfg = tiny(window=window)
        fused = llama.apply(params, ids(time=16), replace(cfg, attention="fused"))
        assert distance(fused, llama.apply(params, ids(time=16), cfg)) < 1e-5


def test_a_window_hides_tokens_farther_back():
    params, cfg = tiny(window=5, layers=1)
    tokens = ids(1, 16)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 31
    moved = (llama.apply(params, changed, cfg) - llama.apply(params, tokens, cfg)).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7]


def test_norms_of_half_precision_are_computed_in_single():
    """As LlamaRMSNorm: rounded before the weight, not after."""
    params, cfg = tiny(layers=1)
    x = 300 * random.normal(random.key(2), (2, 3, 16)).bfloat16()
    weight = random.normal(random.key(3), (16,)).bfloat16()
    model = model_of("llama").bfloat16()
    norm = model.model.norm
    norm.weight.data = weight
    assert torch.equal(llama._norm({"weight": weight}, x, replace(cfg, eps=norm.variance_epsilon)), norm(x))


META = {
    "llama-2-7b": (
        LlamaForCausalLM,
        LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5, rope_parameters={"rope_theta": 1e4}),
    ),
    "llama-3.2-1b": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            rope_parameters={
                **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            },
        ),
    ),
    "mistral-7b": (
        MistralForCausalLM,
        MistralConfig(max_position_embeddings=32768, rms_norm_eps=1e-5, rope_parameters={"rope_theta": 1e4}),
    ),
    "qwen2-0.5b": (
        Qwen2ForCausalLM,
        Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_position_embeddings=131072,
            tie_word_embeddings=True,
            rope_parameters={"rope_theta": 1e6},
        ),
    ),
    "smollm2-135m": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            rope_parameters={"rope_theta": 1e5},
        ),
    ),
    "tinyllama-1.1b": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_key_value_heads=4,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 1e4},
        ),
    ),
}


@pytest.mark.parametrize("preset", META)
def test_presets_are_the_published_models(preset):
    kind, config = META[preset]
    with torch.device("meta"):
        model = kind(config)
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    cfg = llama.PRESETS[preset]
    assert llama.published_config(config.to_dict()) == cfg
    assert tree.count(llama.spec(cfg)) == sum(p.numel() for p in model.parameters())
    table, ours = llama.rename_table(cfg), dict(tree.items(llama.spec(cfg)))
    assert set(table) == set(ours)
    assert sorted(name for rename in table.values() for name in rename.names) == sorted(theirs)
    for name, rename in table.items():
        shapes = [theirs[part] for part in rename.names]
        assert (sum(shape[0] for shape in shapes), *shapes[0][1:]) == tuple(ours[name].shape), name


# Files of other versions, and damaged ones.


def loads_the_same(folder, state):
    params, cfg = llama.from_pretrained(str(folder))
    torch.testing.assert_close(params, llama.from_published(state, cfg), rtol=0, atol=0)


def test_rotations_among_the_weights_and_prefixes_of_wrapped_modules(folder):
    state = load_file(folder / "model.safetensors")
    rates = torch.tensor(llama.published_config(model_of("llama").config.to_dict()).rates)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": rates.bfloat16() for i in range(2)}
    save_file({f"_orig_mod.{name}": x for name, x in (state | buffers).items()}, folder / "model.safetensors")
    loads_the_same(folder, state)
    buffers["model.layers.1.self_attn.rotary_emb.inv_freq"] = rates**1.1
    save_file(state | buffers, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"'model.layers.1.self_attn.rotary_emb.inv_freq' .* not the rotations"):
        llama.from_pretrained(str(folder))


def test_tied_weights_with_and_without_a_head(tmp_path):
    model_of("qwen2").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in state
    head = state["model.embed_tokens.weight"]
    save_file(state | {"lm_head.weight": head.clone()}, tmp_path / "model.safetensors")
    loads_the_same(tmp_path, state)
    save_file(state | {"lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="'lm_head.weight' differs from the token embedding"):
        llama.from_pretrained(str(tmp_path))


OLD = {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {k: STRETCH[k] for k in list(STRETCH)[2:]}}


@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_rotations_of_old_configurations(name):
    new = model_of("llama", rope_parameters=STRETCH).config.to_dict()
    old = new | OLD | {"rope_scaling": {**OLD["rope_scaling"], name: "llama3"}}
    assert llama.published_config(old) == llama.published_config(new)
    assert llama.published_config(old).theta == 500.0 and llama.published_config(old).rope_factor == 4.0
    plain = {k: v for k, v in new.items() if k != "rope_parameters"} | {"rope_scaling": None}
    assert llama.published_config(plain).theta == 10000.0
    assert llama.published_config(plain | {"rope_theta": 77}).theta == 77


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.norm.weight", None, r"'model.norm.weight' is missing; expected for 'norm.weight' \(16,\)"),
        ("lm_head.weight", None, r"'lm_head.weight' is missing; expected for 'output.weight' \(31, 16\)"),
        (
            "model.layers.0.self_attn.q_proj.bias",
            torch.ones(16),
            "no place for: 'model.layers.0.self_attn.q_proj.bias'",
        ),
        (
            "model.layers.1.self_attn.k_proj.weight",
            torch.ones(4, 16),
            r"\(4, 16\) .* expected \(32, 16\) for 'blocks.1",
        ),
        ("model.layers.1.mlp.up_proj.weight", torch.ones(24, 15), r"\(24, 15\), expected \(48, 16\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, name, value, message):
    state = {n: x for n, x in load_file(folder / "model.safetensors").items() if n != name}
    save_file(state if value is None else {**state, name: value}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=message) as raised:
        llama.from_pretrained(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "is of model_type 'gemma', expected one of llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu' is supported"),
        ({"attention_bias": True}, "attention_bias=True; only False"),
        ({"mlp_bias": True}, "mlp_bias=True; only False"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1; only 0.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}; only None"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'; expected 'default' or"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor=None; expected a number"),
        ({"model_type": "mistral", "rope_parameters": None}, "rope_theta=None; expected a number"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=True; only False"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
            "layers of sliding_attention; only full_attention",
        ),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2'; expected an integer"),
        ({"rope_parameters": None, "rope_scaling": 1}, "rope_scaling=1; expected an object"),
        ({"rope_parameters": ["default"]}, r"rope_parameters=\['default'\]; expected an object"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
            "full_attention=.* of rotary positions",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 of rotary"),
        ({"rms_norm_eps": "1e-5"}, "makes no model: eps is '1e-5'; expected float"),
        ({"rms_norm_eps": None}, "makes no model: eps is None; expected float"),
        ({"rms_norm_eps": float("nan")}, "makes no model: eps is nan; expected float"),
        ({"tie_word_embeddings": "no"}, "makes no model: tied is 'no'; expected bool"),
        ({"num_key_value_heads": "2"}, "makes no model: kv_heads is '2'; expected int"),
        ({"head_dim": 5.5}, r"makes no model: depth is 5.5; expected int \| None"),
        ({"num_key_value_heads": 3}, "4 heads do not divide into 3"),
        ({"num_hidden_layers": 3}, "'model.layers.2.self_attn.o_proj.weight' is missing"),
        ({"head_dim": 6}, r"self_attn.o_proj.weight' has shape \(16, 16\), expected \(16, 24\)"),
    ],
)
def test_config_that_does_not_fit_is_named(folder, changes, message):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(WeightsError, match=message) as raised:
        llama.from_pretrained(str(folder))
    assert "\n" not in str(raised.value)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers is 0; expected at least 1"),
        ({"width": 30}, "width 30 is not divisible by 4 heads"),
        ({"kv_heads": 3}, "4 heads do not divide into 3"),
        ({"width": 12}, "a head of 3 dimensions does not divide into pairs"),
        ({"window": 0}, "window is 0"),
        ({"rope_factor": 0.5}, "rope_factor >= 1"),
        ({"dropout": 1.0}, "dropout 1.0 is outside"),
    ],
)
def test_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_tokens_are_checked():
    params, cfg = tiny()
    with pytest.raises(ValueError, match="17 tokens exceed the context of 16"):
        llama.apply(params, ids(1, 17), cfg)
    with pytest.raises(ValueError, match=r"expected tokens of shape \(batch, time\), found \(16,\)"):
        llama.apply(params, ids(1, 16)[0], cfg)
    with pytest.raises(TypeError, match="llama: tokens is list; expected a tensor"):
        llama.apply(params, [[0, 1]], cfg)
    with pytest.raises(ValueError, match="17 tokens exceed the context of 16"):
        llama.empty_caches(params, cfg, 1, 17)
