"""Adapters against the library peft, in its files: forward, merge, gradients, both ways; and what does not fit."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import grad
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

from core import lora, random, spec, tree
from nets.adapters import overlay, read_peft, write_peft
from nets.classifiers import vit
from nets.language import bert, gpt2
from nets.weights import Rename, WeightsError, fill
from tests.nets.language.gpt2_cases import SMALL, distance, ids, model_of

peft = pytest.importorskip("peft")
# peft asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIG = gpt2.published_config(SMALL | {"model_type": "gpt2"})
MODEL, TABLE = gpt2.spec(CONFIG), gpt2.rename_table(CONFIG)
LINEAR = ["c_attn", "c_proj", "c_fc"]


def adapt(model, **options):
    """peft's model, every adapter random: B of 0 would hide most mistakes."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | options)).eval()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if ".lora_" in name:
                p += 0.2 * torch.randn(p.shape)
    return adapted


def gpt(**options):
    """(peft's model, our parameters of its base)."""
    model = model_of("gpt2").transformer
    params = gpt2.from_published(dict(model.state_dict()), CONFIG)
    return adapt(model, fan_in_fan_out="wte" not in options.get("target_modules", ()), **options), params


CASES = {
    "linear": {"target_modules": LINEAR},
    "stabilised": {"target_modules": ["c_attn"], "use_rslora": True},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "embedding": {"target_modules": ["wte"]},
    "ranks": {"target_modules": LINEAR, "rank_pattern": {"c_fc": 2}, "alpha_pattern": {"h.1.attn.c_attn": 3}},
    "some layers": {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(peft's model, folder that it wrote, our base, what we read from the folder)."""
    model, params = gpt(**CASES[request.param])
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return model, folder, params, read_peft(str(folder), MODEL, TABLE)


def hidden(params):
    return gpt2.features(params, ids(), CONFIG)


def test_forward_and_merge_equal_pefts(case):
    model, _, params, (adapters, scale, _) = case
    with torch.no_grad():
        expected = model(ids()).last_hidden_state
        assert distance(hidden(params), expected) > 0.01
        # peft adapts the look-up of a table alone, which is all that hidden states see.
        assert distance(hidden(lora.adapted(params, adapters, scale)), expected) < 1e-6
        merged = model.merge_and_unload()
    ours = lora.merge(params, adapters, scale)
    theirs = gpt2.from_published(dict(merged.state_dict()), CONFIG)
    for (name, actual), value in zip(tree.items(ours), tree.leaves(theirs), strict=True):
        assert distance(actual, value) < 1e-6, name


def test_gradients_by_adapters_equal_pefts():
    for options in (CASES["linear"], CASES["dora"]):
        model, params = gpt(**options)

        def loss(adapters, params=params):
            return hidden(lora.adapted(params, adapters, 2.0)).sin().sum()

        model(ids()).last_hidden_state.sin().sum().backward()
        gradients = tree.flatten(grad(loss)(of_state(model, lambda name, p: p)))
        expected = tree.flatten(of_state(model, lambda name, p: p.grad))
        assert gradients.keys() == expected.keys()
        for name, g in gradients.items():
            assert distance(g, expected[name]) < 1e-5, name


def of_state(model, f):
    """f(name, parameter) of each of peft's adapters, as a tree of ours."""
    ours = {rename.theirs.removesuffix(".weight"): name for name, rename in TABLE.items() if name.endswith("weight")}
    values = {}
    for name, p in model.named_parameters():
        if ".lora_" in name:
            path, _, entry = name.removeprefix("base_model.model.").partition(".lora_")
            key = {"A": "a", "B": "b", "m": "magnitude"}[entry[0]]
            values[f"{ours[path]}.{key}"] = f(name, p).detach()
    return tree.sort(tree.nest(values))


def test_files_of_ours_are_read_by_peft(case, tmp_path):
    _, folder, params, (adapters, scale, modules) = case
    write_peft(str(tmp_path), adapters, scale, MODEL, TABLE, modules=modules)
    theirs = peft.PeftModel.from_pretrained(model_of("gpt2").transformer, str(tmp_path)).eval()
    with torch.no_grad():
        assert distance(theirs(ids()).last_hidden_state, hidden(lora.adapted(params, adapters, scale))) < 1e-6
    again = read_peft(str(tmp_path), MODEL, TABLE)
    assert abs(again.scale - scale) < 1e-12
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), again.adapters, adapters)
    names = [load_file(path / "adapter_model.safetensors").keys() for path in (folder, tmp_path)]
    assert names[0] == names[1]


def test_an_adapter_of_a_model_with_a_head_keeps_the_prefix(tmp_path):
    model = adapt(model_of("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True)
    model.save_pretrained(tmp_path / "theirs")
    params = gpt2.from_published(dict(model_of("gpt2").state_dict()), CONFIG)
    adapters, scale, _ = read_peft(str(tmp_path / "theirs"), MODEL, TABLE)
    expected = gpt2.apply(lora.adapted(params, adapters, scale), ids(), CONFIG)
    with torch.no_grad():
        assert distance(model(ids()).logits, expected) < 1e-6
        write_peft(str(tmp_path / "ours"), adapters, scale, MODEL, TABLE, prefix="transformer.", stabilised=True)
        again = peft.PeftModel.from_pretrained(model_of("gpt2"), str(tmp_path / "ours")).eval()
        assert distance(again(ids()).logits, expected) < 1e-6


# Queries and values of a fused matrix, convolutions, a head that is saved whole: a vision transformer.

VIT = vit.Config(image=8, patch=4, layers=2, heads=2, width=16, hidden=32, classes=3)
# transformers writes the names of `rename_table` and has others in memory, which peft sees.
IN_MEMORY = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def in_memory(rename):
    """The names in ViTForImageClassification, whose classifier alone is not under `vit.`."""
    names = []
    for name in rename.names:
        for old, new in IN_MEMORY.items():
            name = name.replace(old, new)
        names.append(name if name.startswith("classifier") else f"vit.{name}")
    return Rename(tuple(names) if len(names) > 1 else names[0])


VIT_TABLE = {ours: in_memory(rename) for ours, rename in vit.rename_table(VIT, "transformers").items()}


def vision():
    sizes = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    torch.manual_seed(1)
    model = ViTForImageClassification(
        ViTConfig(**sizes, intermediate_size=32, num_labels=3, layer_norm_eps=1e-6)
    ).eval()
    params = fill(vit.spec(VIT), dict(model.state_dict()), VIT_TABLE)
    return model, params


@pytest.mark.parametrize("dora", [False, True])
def test_row_blocks_convolutions_and_heads_of_a_vision_transformer(dora, tmp_path):
    model, params = vision()
    targets = ["q_proj", "v_proj", "projection"]
    theirs = adapt(model, target_modules=targets, modules_to_save=["classifier"], use_dora=dora)
    with torch.no_grad():
        theirs.base_model.model.classifier.modules_to_save.default.weight.mul_(2.0)
    theirs.save_pretrained(tmp_path / "theirs")
    model = vit.spec(VIT)
    read = read_peft(str(tmp_path / "theirs"), model, VIT_TABLE)
    assert set(read.adapters["blocks"][0]["attn"]["qkv"]["weight"]) == {"from_0", "from_32"}
    assert tree.names(read.modules) == ["head.bias", "head.weight"]
    x = random.normal(random.key(1), (3, 3, 8, 8))
    ours = lora.adapted(overlay(params, read.modules), read.adapters, read.scale)
    with torch.no_grad():
        expected = theirs(x).logits
        assert distance(vit.apply(ours, x, VIT), expected) < 1e-6
        assert distance(vit.apply(lora.adapted(params, read.adapters, read.scale), x, VIT), expected) > 1e-3
        write_peft(str(tmp_path / "ours"), read.adapters, read.scale, model, VIT_TABLE, modules=read.modules)
        again = peft.PeftModel.from_pretrained(vision()[0], str(tmp_path / "ours")).eval()
        assert distance(again(x).logits, expected) < 1e-6


@pytest.mark.parametrize("targets", [["query", "value"], ["key", "dense", "word_embeddings"]])
def test_berts_adapters(targets, tmp_path):
    sizes = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 12}
    torch.manual_seed(2)
    model = BertModel(BertConfig(**sizes)).eval()
    cfg = bert.published_config(model.config.to_dict() | {"architectures": ["BertModel"]})
    params = bert.from_published(dict(model.state_dict()), cfg)
    theirs = adapt(model, target_modules=targets)
    theirs.save_pretrained(tmp_path)
    adapters, scale, _ = read_peft(str(tmp_path), bert.spec(cfg), bert.rename_table(cfg))
    x = ids(time=12)
    with torch.no_grad():
        expected = theirs(x, attention_mask=(x != 0).long())
        out = bert.apply(lora.adapted(params, adapters, scale), x, cfg)
    assert distance(out["features"], expected.last_hidden_state) < 1e-6
    assert distance(out["pooled"], expected.pooler_output) < 1e-6
    assert distance(bert.features(params, x, cfg), expected.last_hidden_state) > 0.01


def test_an_adapter_over_joined_modules_is_cut_between_them(tmp_path):
    model, params = vision()
    adapters = lora.init(random.key(3), lora.spec(vit.spec(VIT), ["qkv.weight"], 2), params)
    adapters = tree.map(lambda x: x + 0.1, adapters)
    write_peft(str(tmp_path), adapters, 2.0, vit.spec(VIT), VIT_TABLE)
    x = random.normal(random.key(1), (3, 3, 8, 8))
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(model, str(tmp_path)).eval()
        assert distance(theirs(x).logits, vit.apply(lora.adapted(params, adapters, 2.0), x, VIT)) < 1e-6


def test_grouped_queries_have_blocks_of_different_sizes(tmp_path):
    """8 rows of queries, 2 of keys and 2 of values: told by the file's shapes, or stated."""
    model = {"qkv": {"weight": spec.Param((12, 6))}}
    table = {"qkv.weight": Rename(("q.weight", "k.weight", "v.weight"))}
    targets = {"qkv.weight": ((0, 8), (10, 12))}
    adapters = spec.init(random.key(1), lora.spec(model, targets, 2))
    write_peft(str(tmp_path), adapters, 2.0, model, table)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert names == {f"base_model.model.{m}.lora_{x}.weight" for m in "qv" for x in "AB"}
    tree.map(torch.testing.assert_close, read_peft(str(tmp_path), model, table).adapters, adapters)
    whole = spec.init(random.key(1), lora.spec(model, ["qkv.weight"], 2))
    write_peft(str(tmp_path), whole, 2.0, model, table, sizes={"qkv.weight": (8, 2, 2)})
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.q.lora_B.weight"].shape == (8, 2)
    with pytest.raises(WeightsError, match="7 rows in module 1 of 3 do not fit the 12 rows of 'qkv.weight'"):
        wrong = spec.init(random.key(1), lora.spec(model, {"qkv.weight": ((0, 7),)}, 2))
        write_peft(str(tmp_path), wrong, 2.0, model, table, sizes={"qkv.weight": (6, 3, 3)})


# What does not fit

NAME = "base_model.model.h.0.attn.c_attn"


@pytest.fixture
def folder(tmp_path):
    adapters = spec.init(random.key(1), lora.spec(MODEL, ["qkv.weight"], 4))
    write_peft(str(tmp_path), adapters, 2.0, MODEL, TABLE)
    return tmp_path


def renamed(state, old, new):
    state[new] = state.pop(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: renamed(s, f"{NAME}.lora_A.weight", "base_model.model.h.7.attn.c_attn.lora_A.weight"),
            "'h.7.attn.c_attn",
        ),
        (
            lambda s: s.pop(f"{NAME}.lora_B.weight"),
            "of 'h.0.attn.c_attn.weight' the file has 'lora_A', but use_dora is False",
        ),
        (
            lambda s: s.update({f"{NAME}.lora_B.weight": torch.ones(40, 4)}),
            r"b \(40, 4\) do not fit the shape \(48, 16\)",
        ),
        (
            lambda s: renamed(s, f"{NAME}.lora_A.weight", f"{NAME}.lora_E"),
            "'base_model.model.h.0.attn.c_attn.lora_E' is unknown",
        ),
        (lambda s: s.clear(), "holds no lora_A and lora_B"),
        (
            lambda s: s.update({f"{NAME}.lora_A.weight": torch.ones(4, 16).long()}),
            "holds torch.int64, expected floating",
        ),
        (
            lambda s: s.update({f"{NAME}.lora_B.weight": torch.ones(48, 2)}),
            "has rank 2, but adapter_config.json says 4",
        ),
        (
            lambda s: s.update({f"{NAME}.lora_magnitude_vector": torch.ones(48)}),
            "magnitude_vector', but use_dora is False",
        ),
    ],
)
def test_adapters_for_another_model_are_refused_in_one_line(change, message, folder):
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match=message) as error:
        read_peft(str(folder), MODEL, TABLE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("r", 0),
        ("lora_alpha", "x"),
        ("lora_alpha", float("inf")),
        ("rank_pattern", [1]),
        ("use_rslora", "yes"),
        ("use_dora", "no"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(entry, value, folder):
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {entry: value}), encoding="utf-8")
    with pytest.raises(WeightsError, match=re.escape(f"{entry} is {value!r}")):
        read_peft(str(folder), MODEL, TABLE)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"r": 8}, "lora_B.weight' has rank 4, but adapter_config.json says 8"),
        ({"rank_pattern": {"c_attn": 2}}, "lora_B.weight' has rank 4, but adapter_config.json says 2"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has a name that is no regular expression"),
        ({"use_dora": True}, "the file has 'lora_A', 'lora_B', but use_dora is True in adapter_config.json"),
    ],
)
def test_a_configuration_that_is_not_the_files_is_named(entries, message, folder):
    """It would scale the adapter by another factor, or leave out its magnitudes, without a word."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")
    with pytest.raises(WeightsError, match=message):
        read_peft(str(folder), MODEL, TABLE)


def test_a_file_in_half_precision_is_computed_with_in_single_as_by_peft(folder):
    path = folder / "adapter_model.safetensors"
    save_file({n: (x + 0.1).bfloat16() for n, x in load_file(path).items()}, path)
    adapters, scale, _ = read_peft(str(folder), MODEL, TABLE)
    params = gpt2.from_published(dict(model_of("gpt2").state_dict()), CONFIG)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(model_of("gpt2").transformer, str(folder)).eval()(ids())
    assert distance(hidden(lora.adapted(params, adapters, scale)), expected.last_hidden_state) < 1e-6


def test_an_adapter_of_a_tied_table_is_that_of_pefts_merged_model(tmp_path):
    model = adapt(model_of("gpt2"), target_modules=["wte"])
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload()
    params = gpt2.from_published(dict(model_of("gpt2").state_dict()), CONFIG)
    adapters, scale, modules = read_peft(str(tmp_path), MODEL, TABLE)
    with torch.no_grad():
        ours = gpt2.apply(lora.adapted(overlay(params, modules), adapters, scale), ids(), CONFIG)
        assert distance(ours, merged(ids()).logits) < 1e-6


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(WeightsError, match="none of the files adapter_config.json"):
        read_peft(str(tmp_path), MODEL, TABLE)


def test_writing_what_the_table_does_not_name(tmp_path):
    adapters = spec.init(random.key(1), lora.spec(MODEL, ["qkv.weight"], 4))
    with pytest.raises(WeightsError, match="'blocks.0.attn.qkv.weight' has no name"):
        write_peft(str(tmp_path), adapters, 2.0, MODEL, {})
