"""T5 1.0 and 1.1 against transformers, on files: logits, gradients, texts; cached steps; damaged files."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad_and_value
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from core import random, tree
from nets.language import t5, t5_attention, t5_weights
from nets.language.beam_search import beam_search
from nets.language.decoding import greedy, sample
from nets.weights import WeightsError, fill
from tests.nets.language.t5_cases import VERSIONS, distance, exact, model_in, pairs, tiny, write


@pytest.fixture(scope="module", params=VERSIONS)
def published(request, tmp_path_factory):
    """(transformers' model of a folder in double precision, the folder)"""
    folder = write(tmp_path_factory.mktemp("t5"), request.param)
    return exact(model_in(folder)), folder


def loaded(folder):
    """(params, cfg) of a saved model, in double precision."""
    params, cfg = t5_weights.from_pretrained(str(folder))
    return tree.cast(params, torch.float64), cfg


@pytest.fixture
def folder(tmp_path):
    """A folder with a T5 1.1 that a test may damage."""
    return write(tmp_path, "1.1")


def outputs(model, source, target):
    mask = (source != 0).long()
    return model(source, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits


# The same numbers as transformers.


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 128), (16, 20)])
def test_buckets_equal_transformers(both, buckets, farthest):
    distances = torch.arange(-1000, 1000)
    expected = T5Attention._relative_position_bucket(distances, both, buckets, farthest)
    assert torch.equal(t5.bucket(distances, buckets, farthest, both), expected)
    assert expected.unique().tolist() == [i for i in range(buckets) if not (both and i == buckets // 2)]


def test_logits_equal_transformers(published):
    model, folder = published
    params, cfg = loaded(folder)
    with torch.no_grad():
        expected = outputs(model, *pairs())
    assert expected.std() > 0.2
    assert distance(t5.apply(params, pairs(), cfg), expected) < 1e-12
    fused = replace(cfg, attention="fused")
    assert distance(t5.apply(params, pairs(), fused), expected) < 1e-12


def test_logits_equal_transformers_in_single_precision(published):
    _, folder = published
    params, cfg = t5_weights.from_pretrained(str(folder))
    with torch.no_grad():
        expected = outputs(model_in(folder), *pairs())
    assert distance(t5.apply(params, pairs(), cfg), expected) < 1e-5


def test_attention_maps_equal_transformers(published):
    model, folder = published
    params, cfg = loaded(folder)
    source, target = pairs()
    mask = (source != 0).long()
    with torch.no_grad():
        out = model(source, attention_mask=mask, decoder_input_ids=target, use_cache=False, output_attentions=True)
    maps = t5_attention.attention_maps(params, (source, target), cfg)
    expected = {"encoder": out.encoder_attentions, "decoder": out.decoder_attentions, "cross": out.cross_attentions}
    assert maps.keys() == expected.keys()
    for name, layers in expected.items():
        rows = mask.bool()[:, None, :, None] if name == "encoder" else torch.tensor(True)  # not those of padding
        for i, weights in enumerate(layers):
            # transformers computes the softmax in single precision
            assert distance(torch.where(rows, maps[name][:, i], 0), torch.where(rows, weights, 0)) < 1e-6, (name, i)


def test_loss_and_its_gradient_equal_transformers(published):
    model, folder = published
    params, cfg = loaded(folder)
    source, target = pairs()

    def loss(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())

    model.zero_grad()
    expected = loss(outputs(model, source, target))
    expected.backward()
    # The gradients are renamed and joined as the weights are.
    wide = tree.map(lambda leaf: replace(leaf, dtype=torch.float64), t5.spec(cfg))
    state = {name: p.grad for name, p in model.named_parameters()}
    gradients = fill(wide, state, t5_weights.rename_table(cfg))
    actual, value = grad_and_value(lambda p: loss(t5.apply(p, (source, target), cfg)))(params)
    assert abs(value - expected) < 1e-12 * expected
    for (name, a), b in zip(tree.items(actual), tree.leaves(gradients), strict=True):
        assert distance(a, b) < 1e-10, name


def test_the_decoder_sees_no_later_token_and_the_encoder_no_padding():
    params, cfg = tiny()
    source, target = pairs()
    before = t5.apply(params, (source, target), cfg)
    changed = target.clone()
    changed[:, 20] = 31 - changed[:, 20]
    moved = (t5.apply(params, (source, changed), cfg) - before).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [t >= 20 for t in range(48)]
    longer = F.pad(source, (0, 7))
    torch.testing.assert_close(t5.apply(params, (longer, target), cfg), before)


# Texts.


def starts(params, source, cfg, positions):
    cache = t5.start(params, t5.encode(params, source, cfg), source != cfg.padding_id, cfg, positions)
    return cache["past"], torch.zeros(len(source), dtype=torch.int64), cache["shared"]


def theirs(model, source, steps, **options):
    mask = (source != 0).long()
    # Its cache expects as many layers of the decoder as of the encoder.
    options |= {"max_new_tokens": steps, "do_sample": False, "use_cache": False}
    return model.generate(source, attention_mask=mask, **options)[:, 1:]


def test_greedy_texts_equal_transformers(published):
    model, folder = published
    params, cfg = loaded(folder)
    source = pairs(5)[0]
    past, first, shared = starts(params, source, cfg, 8)
    options = {"end": 1, "max_length": 45, "shared": shared, "positions_axis": 2}
    actual = greedy(t5.stepper(params, cfg), past, first, **options)
    expected = theirs(model, source, 45, num_beams=1)
    assert actual.tokens.tolist() == expected.tolist() and len(expected.unique()) > 5


def test_beams_equal_transformers(published):
    model, folder = published
    params, cfg = loaded(folder)
    source = pairs(3)[0]
    past, first, shared = starts(params, source, cfg, 16)
    options = {"end": 1, "max_length": 20, "shared": shared, "positions_axis": 2, "beams": 4, "n_best": 2}
    actual = beam_search(t5.stepper(params, cfg), past, first, **options).tokens.flatten(0, 1)
    expected = theirs(model, source, 20, num_beams=4, num_return_sequences=2)
    assert actual.tolist() == expected[:, : actual.shape[1]].tolist() and not expected[:, actual.shape[1] :].any()


def test_a_text_is_the_same_in_any_batch_and_with_any_padding():
    params, cfg = tiny()
    source, keys = pairs(5)[0], random.split(random.key(5), 5)
    step, options = t5.stepper(params, cfg), {"end": 1, "max_length": 12, "positions_axis": 2}

    def text(rows, time, search, **more):
        past, first, shared = starts(params, source[rows, :time], cfg, 4)
        return search(step, past, first, shared=shared, **options, **more)

    for search, more in ((greedy, {}), (sample, {"key": keys}), (beam_search, {"beams": 3})):
        together = text(slice(None), 150, search, **more)
        for i, n in enumerate((source != 0).sum(1).tolist()):
            own = {"key": keys[i : i + 1]} if "key" in more else more
            alone = text(slice(i, i + 1), n, search, **own)
            width = alone.tokens.shape[-1]
            assert alone.tokens[0].tolist() == together.tokens[i, ..., :width].tolist(), (search, i)
            assert alone.lengths[0].tolist() == together.lengths[i].tolist()


@pytest.mark.parametrize("options", [{}, {"gated": True, "tied": False, "scale": False, "activation": "gelu_tanh"}])
def test_steps_equal_the_whole_pass(options):
    params, cfg = tiny(**options)
    source, target = pairs()
    expected = t5.apply(params, (source, target), cfg)
    memory = t5.encode(params, source, cfg)
    for changed, donate in ((cfg, False), (replace(cfg, attention="explicit"), True)):
        cache = t5.start(params, memory, source != 0, changed, 50)
        for t in range(48):
            before = tree.map(torch.clone, cache)
            scores, new = t5.step(params, cache, target[:, t], torch.tensor(t), changed, donate=donate)
            assert distance(scores, expected[:, t]) < 1e-5, t
            assert donate or all(map(torch.equal, tree.leaves(cache), tree.leaves(before)))
            cache = new


def test_compiled_step_is_one_graph_for_all_tokens():
    torch._dynamo.reset()
    params, cfg = tiny(decoder_layers=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(t5.step, backend=counter, fullgraph=True, dynamic=False)
    past, first, shared = starts(params, pairs()[0], cfg, 12)
    options = {"end": None, "max_length": 12, "shared": shared}
    eager = greedy(t5.stepper(params, cfg), past, first, **options)
    assert torch.equal(greedy(t5.stepper(params, cfg, compiled), past, first, **options).tokens, eager.tokens)
    assert counter.frame_count == 1


# Files of other versions, and damaged ones.

META = {
    "small": T5Config(),
    "base": T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "v1.1-small": T5Config(d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu"),
    "v1.1-base": T5Config(d_model=768, num_layers=12, num_heads=12, feed_forward_proj="gated-gelu"),
}


@pytest.mark.parametrize("preset", META)
def test_presets_are_the_published_models(preset):
    with torch.device("meta"):
        model = T5ForConditionalGeneration(META[preset])
    theirs = {name: tuple(p.shape) for name, p in model.named_parameters()}
    own_head = {"tie_word_embeddings": False} if preset.startswith("v1.1") else {}
    if own_head:  # transformers ties it in a model that is not read from a file
        theirs["lm_head.weight"] = theirs["shared.weight"]
    cfg, config = t5.PRESETS[preset], META[preset].to_dict()
    config = {name: x for name, x in config.items() if name != "scale_decoder_outputs"} | own_head
    assert t5_weights.published_config(config) == cfg
    table, ours = t5_weights.rename_table(cfg), dict(tree.items(t5.spec(cfg)))
    assert set(table) == set(ours)
    assert sorted(name for rename in table.values() for name in rename.names) == sorted(theirs)
    for name, rename in table.items():
        shapes = [theirs[part] for part in rename.names]
        assert (sum(shape[0] for shape in shapes), *shapes[0][1:]) == tuple(ours[name].shape), name


@pytest.mark.parametrize("own_head", [True, False])
def test_files_that_transformers_writes_of_version_1_1(folder, tmp_path_factory, own_head):
    """Their configuration says that the output layer is tied, whether it is or not."""
    if not own_head:
        state = load_file(folder / "model.safetensors")
        save_file(state | {"lm_head.weight": state["shared.weight"].clone()}, folder / "model.safetensors")
    model, again = model_in(folder), tmp_path_factory.mktemp("again")
    model.save_pretrained(again)
    assert json.loads((again / "config.json").read_text())["tie_word_embeddings"]
    params, cfg = t5_weights.from_pretrained(str(again))
    assert cfg == replace(t5_weights.from_pretrained(str(folder))[1], tied=not own_head)
    with torch.no_grad():
        expected = outputs(model, *pairs())
    assert distance(t5.apply(params, pairs(), cfg), expected) < 1e-5


def test_pickled_weights_with_copies_a_prefix_and_positions_that_nothing_uses(tmp_path):
    write(tmp_path, "1.0")
    expected, _ = t5_weights.from_pretrained(str(tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    state |= {name: state["shared.weight"] for name in copies}
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(32, 4)
    torch.save({f"module.{name}": x for name, x in state.items()}, tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(t5_weights.from_pretrained(str(tmp_path))[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lm_head.weight", None, r"'lm_head.weight' is missing; expected for 'output.weight' \(31, 16\)"),
        ("encoder.embed_tokens.weight", torch.ones(31, 16), "'encoder.embed_tokens.weight' differs from 'shared.w"),
        ("encoder.block.2.layer.0.layer_norm.weight", torch.ones(16), "no place for: 'encoder.block.2"),
        ("decoder.block.1.layer.2.DenseReluDense.wi_1.weight", None, "wi_1.weight' is missing; expected for 'decoder"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", torch.ones(16, 16), r"\(16, 16\), expected \(24, 16\) for"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, name, value, message):
    state = {n: x for n, x in load_file(folder / "model.safetensors").items() if n != name}
    save_file(state if value is None else {**state, name: value}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=message) as raised:
        t5_weights.from_pretrained(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mt5"}, "is of model_type 'mt5', expected 't5'"),
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj='gated-tanh'; expected one of gelu, gelu_new"),
        ({"feed_forward_proj": "relu"}, "DenseReluDense.wi.weight' is missing"),
        ({"tie_word_embeddings": True}, "'lm_head.weight' differs from 'shared.weight'"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder=False; only True"),
        ({"d_kv": None}, "d_kv=None; expected an integer"),
        ({"relative_attention_num_buckets": 5}, "an even number of buckets"),
        ({"num_decoder_layers": 4}, "'decoder.block.3.layer.0.SelfAttention.k.weight' is missing"),
        ({"pad_token_id": None}, "the configuration makes no model"),
    ],
)
def test_config_that_does_not_fit_is_named(folder, changes, message):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(WeightsError, match=message) as raised:
        t5_weights.from_pretrained(str(folder))
    assert "\n" not in str(raised.value)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_layers": 0}, "decoder_layers is 0; expected at least 1"),
        ({"buckets": 7}, "an even number of buckets"),
        ({"farthest": 16}, "farthest above its half, found 32 and 16"),
        ({"dropout": 1.0}, "dropout 1.0 is outside"),
        ({"padding_id": 31}, "padding_id 31 is not one of 31 tokens"),
        ({"activation": "none"}, "none"),
    ],
)
def test_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_inputs_are_checked():
    params, cfg = tiny()
    source, target = pairs()
    memory = t5.encode(params, source, cfg)
    with pytest.raises(ValueError, match=r"expected source tokens of shape \(batch, time\), found \(150,\)"):
        t5.encode(params, source[0], cfg)
    with pytest.raises(ValueError, match=r"a mask of shape \(3, 150\) of torch.bool, found \(3, 150\) of torch.int64"):
        t5.encode(params, source, cfg, mask=source)
    with pytest.raises(ValueError, match=r"expected a memory of shape \(2, source time, 16\), found \(3, 150, 16\)"):
        t5.decode(params, target[:2], memory, cfg, source_mask=None)
    with pytest.raises(ValueError, match=r"a mask of shape \(3, 150\)"):
        t5.start(params, memory, source[:2] != 0, cfg, 4)
    with pytest.raises(ValueError, match=r"expected tokens of shape \(batch,\), found \(3, 1\)"):
        t5.step(params, t5.start(params, memory, None, cfg, 4), target[:, :1], torch.tensor(0), cfg)
