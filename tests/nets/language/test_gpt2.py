"""GPT and GPT-2 against transformers, on weights that transformers wrote: logits, gradients and greedy texts."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad_and_value
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from core import random, spec, tree
from nets.language import gpt2
from nets.weights import WeightsError

FAMILIES = {"gpt2": (GPT2Config, GPT2LMHeadModel), "openai-gpt": (OpenAIGPTConfig, OpenAIGPTLMHeadModel)}
SMALL = {"vocab_size": 31, "n_positions": 24, "n_layer": 2, "n_head": 2, "n_embd": 16}
SMALL |= {"bos_token_id": None, "eos_token_id": None}


def model_of(family, **options):
    """transformers' model with weights far from their start; large positions keep its texts from repeating a token."""
    config, model = FAMILIES[family]
    with torch.random.fork_rng():
        made = model(config(**SMALL | options)).eval()
    keys = random.split(random.key(7), 100).unbind(0)
    with torch.no_grad():
        for key, (name, p) in zip(keys, made.named_parameters(), strict=False):
            scale = 3.0 if name.endswith(("wpe.weight", "positions_embed.weight")) else 0.3 if p.ndim > 1 else 0.1
            p += scale * random.normal(key, p.shape)
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, tmp_path_factory):
    """(transformers' model, the folder it is saved in)"""
    folder, model = tmp_path_factory.mktemp(request.param), model_of(request.param)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def folder(tmp_path):
    """A folder with a GPT-2 that a test may damage."""
    model_of("gpt2").save_pretrained(tmp_path)
    return tmp_path


def ids(batch=3, time=24, seed=1, vocabulary=31):
    return random.randint(random.key(seed), (batch, time), 0, vocabulary).long()


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def tiny(**options):
    """(params, cfg) of a net with random weights."""
    sizes = {"vocabulary": 31, "context": 16, "layers": 2, "heads": 2, "width": 16}
    cfg = gpt2.Config(**sizes | options)
    return tree.map(lambda p: 8 * p, spec.init(random.key(0), gpt2.spec(cfg))), cfg


# The same numbers as transformers.


@pytest.mark.parametrize("time", [1, 7, 24])
def test_logits_equal_transformers(published, time):
    model, folder = published
    params, cfg = gpt2.from_pretrained(str(folder))
    with torch.no_grad():
        wanted = model(ids(time=time)).logits
    assert wanted.std() > 0.5
    assert distance(gpt2.apply(params, ids(time=time), cfg), wanted) < 1e-5


def test_loss_and_its_gradient_equal_transformers(published):
    model, folder = published
    params, cfg = gpt2.from_pretrained(str(folder))
    tokens = ids()
    model.zero_grad()
    wanted = model(tokens, labels=tokens).loss
    wanted.backward()
    # The gradients are renamed and transposed as the weights are.
    gradients = gpt2.from_published({name: p.grad for name, p in model.named_parameters()}, cfg)

    def loss(params):
        logits = gpt2.apply(params, tokens, cfg)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    found, value = grad_and_value(loss)(params)
    assert abs(value - wanted) < 1e-5 * wanted
    for (name, a), b in zip(tree.items(found), tree.leaves(gradients), strict=True):
        assert distance(a, b) < 1e-5, name


def test_fused_attention_gives_the_same():
    params, cfg = tiny()
    tokens = ids(time=16)
    fused = gpt2.apply(params, tokens, replace(cfg, attention="fused"))
    assert distance(fused, gpt2.apply(params, tokens, cfg)) < 1e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_text_equals_transformers(published, batch):
    model, folder = published
    params, cfg = gpt2.from_pretrained(str(folder))
    prompt, steps = ids(batch, 5), 19
    wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, do_sample=False)
    found = gpt2.generate(params, prompt, cfg, steps, temperature=0.0)
    assert found.tolist() == wanted[:, 5:].tolist()
    assert len(set(found.flatten().tolist())) > 3


def test_greedy_text_of_ragged_prompts_equals_transformers(published):
    model, folder = published
    params, cfg = gpt2.from_pretrained(str(folder))
    prompts, lengths, steps = ids(4, 9), torch.tensor([9, 1, 4, 7]), 15
    found = gpt2.generate(params, prompts, cfg, steps, lengths=lengths, temperature=0.0)
    for i, n in enumerate(lengths):
        prompt = prompts[i : i + 1, :n]
        wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=steps, do_sample=False)
        assert found[i].tolist() == wanted[0, n:].tolist(), i


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


# Weights as they are found in the wild, and damaged.


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


def test_pickled_weights_with_the_tied_head(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    both = {**state, "lm_head.weight": state["transformer.wte.weight"]}
    torch.save(both, folder / "pytorch_model.bin")
    loads_the_same(folder, state)


def test_sharded_weights(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    model_of("gpt2").save_pretrained(folder, max_shard_size="10kB")
    assert (folder / "model.safetensors.index.json").is_file() and len(list(folder.glob("*.safetensors"))) > 1
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


# Generation.


def uncached(params, prompt, cfg, steps):
    """Greedy, each token from a whole pass over its past; past the context, over the last part of it."""
    room = min(cfg.context, prompt.shape[1] + steps - 1)
    room -= min(steps - 1, room // 2)
    window, new = prompt if prompt.shape[1] <= cfg.context else prompt[:, -room:], []
    for _ in range(steps):
        if window.shape[1] > cfg.context:
            window = window[:, -room:]
        new.append(gpt2.apply(params, window, cfg)[:, -1].argmax(-1))
        window = torch.cat([window, new[-1][:, None]], 1)
    return torch.stack(new, 1)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    ("time", "steps"), [(1, 16), (5, 1), (5, 12), (5, 13), (5, 40), (15, 3), (16, 1), (16, 20), (17, 1), (30, 20)]
)
def test_stream_equals_a_loop_without_a_cache(time, steps, norm_first):
    params, cfg = tiny(norm_first=norm_first)
    prompt = ids(2, time)
    found = gpt2.generate(params, prompt, cfg, steps, temperature=0.0)
    assert found.shape == (2, steps) and found.tolist() == uncached(params, prompt, cfg, steps).tolist()


def test_context_of_one_token():
    params, cfg = tiny(context=1)
    found = gpt2.generate(params, ids(2, 3), cfg, 4, temperature=0.0)
    assert found.tolist() == uncached(params, ids(2, 3), cfg, 4).tolist()


def test_ragged_prompts_go_on_past_the_context():
    params, cfg = tiny()
    prompts, lengths = ids(3, 20), torch.tensor([20, 2, 9], dtype=torch.int32)
    before = prompts.clone()
    found = gpt2.generate(params, prompts, cfg, 30, lengths=lengths, key=random.key(0))
    assert found.shape == (3, 30) and found.min() >= 0 and found.max() < 31
    assert torch.equal(prompts, before) and lengths.tolist() == [20, 2, 9]
    # What lies behind a row's prompt is not looked at.
    noise = torch.where(torch.arange(20) < lengths[:, None], prompts, 30 - prompts)
    assert torch.equal(gpt2.generate(params, noise, cfg, 30, lengths=lengths, key=random.key(0)), found)


def test_example_gets_the_same_text_in_any_batch():
    params, cfg = tiny()
    prompts, lengths, key = ids(4, 6), torch.tensor([6, 3, 5, 1]), random.key(3)
    together = gpt2.generate(params, prompts, cfg, 10, lengths=lengths, key=key)
    first = gpt2.generate(params, prompts[:2], cfg, 10, lengths=lengths[:2], key=key)
    assert torch.equal(first, together[:2])
    # With a key an example, alone and anywhere.
    keys = random.split(key, 4)
    together = gpt2.generate(params, prompts, cfg, 10, lengths=lengths, key=keys)
    for i, n in enumerate(lengths):
        alone = gpt2.generate(params, prompts[i : i + 1, :n], cfg, 10, key=keys[i : i + 1])
        assert torch.equal(alone, together[i : i + 1]), i
    assert len({tuple(row) for row in together.tolist()}) == 4


def test_texts_come_as_often_as_they_should():
    params, cfg = tiny(vocabulary=3, context=4)
    n, start = 6000, torch.tensor([[1]])
    drawn = gpt2.generate(params, start.expand(n, 1), cfg, 2, key=random.key(0), temperature=8.0)
    first = torch.softmax(gpt2.apply(params, start, cfg)[0, -1] / 8, -1)
    pairs = torch.cartesian_prod(torch.tensor([1]), torch.arange(3))
    second = torch.softmax(gpt2.apply(params, pairs, cfg)[:, -1] / 8, -1)
    p = (first[:, None] * second).flatten()
    error = (3 * drawn[:, 0] + drawn[:, 1]).bincount(minlength=9) / n - p
    assert (error.abs() <= 4 * (p * (1 - p) / n).sqrt()).all() and p.min() > 0.005


def test_short_prompts_of_int32():
    params, cfg = tiny()
    prompt = ids(2, 5)
    found = gpt2.generate(params, prompt.int(), cfg, 30, temperature=0.0)
    assert found.dtype == torch.int64 and torch.equal(found, gpt2.generate(params, prompt, cfg, 30, temperature=0.0))


@pytest.mark.parametrize("norm_first", [True, False])
def test_compiled_decode_is_one_graph_for_all_tokens(norm_first):
    torch._dynamo.reset()
    params, cfg = tiny(norm_first=norm_first)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gpt2.decode, backend=counter, fullgraph=True, dynamic=False)
    prompt, options = ids(3, 5), {"key": random.key(1), "top_k": 20}
    eager = gpt2.generate(params, prompt, cfg, 12, **options)
    assert torch.equal(gpt2.generate(params, prompt, cfg, 12, decode=compiled, **options), eager)
    assert counter.frame_count == 2, "one graph for the prompt, one for every token after it"
    # Another prompt of this shape compiles nothing.
    gpt2.generate(params, ids(3, 5, seed=2), cfg, 12, decode=compiled, **options)
    assert counter.frame_count == 2


# What is refused.


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
    with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
        gpt2.apply(params, ids(1, 17), cfg)
    with pytest.raises(ValueError, match=r"expected tokens of shape \(batch, time\), found \(16,\)"):
        gpt2.apply(params, ids(1, 16)[0], cfg)
    with pytest.raises(ValueError, match="17 tokens are more than the context of 16"):
        gpt2.empty_caches(params, cfg, 1, 17)


@pytest.mark.parametrize(
    ("prompt", "steps", "options", "message"),
    [
        ((1, 0), 3, {}, "a prompt of at least one token"),
        ((2, 4), 3, {"lengths": torch.tensor([4, 0])}, "a prompt of at least one token"),
        ((2, 4), 3, {"lengths": torch.tensor([4, 5])}, r"expected 2 lengths of at most 4, found \[4, 5\]"),
        ((2, 4), 3, {"lengths": torch.tensor([4])}, r"expected 2 lengths of at most 4, found \[4\]"),
        ((4,), 3, {}, r"expected tokens of shape \(batch, time\), found \(4,\)"),
        ((2, 4), 0, {}, "steps is 0; expected at least 1"),
        ((2, 4), 3, {}, "needs key="),
        ((2, 4), 3, {"temperature": -1.0}, "temperature -1.0"),
    ],
)
def test_generation_is_checked(prompt, steps, options, message):
    params, cfg = tiny()
    key = None if message == "needs key=" else random.key(0)
    with pytest.raises(ValueError, match=message):
        gpt2.generate(params, torch.ones(prompt, dtype=torch.int64), cfg, steps, key=key, **options)
