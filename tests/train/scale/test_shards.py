"""Meshes from flags, and plans from specs: nothing here needs a process."""

import math

import pytest

from core import initializers, spec, tree
from core.spec import Param, Stat
from nets.classifiers import resnet
from nets.language import gpt2, llama
from train.scale import mesh, shards
from train.scale.shards import RULES, Shard, plan


def test_sizes_of_a_flag():
    assert mesh.sizes("data=4,model=2") == {"replica": 1, "data": 4, "model": 2}
    assert mesh.sizes(" model=3 ") == {"replica": 1, "data": 1, "model": 3}


@pytest.mark.parametrize("text", ["", "data", "data=0", "data=-1", "data=x", "foo=2", "data=2;model=2", "data=2,,"])
def test_other_forms_are_refused(text):
    with pytest.raises(ValueError, match="is no axis with its size; expected axes of replica, data, model"):
        mesh.sizes(text)


def test_an_axis_twice_is_refused():
    with pytest.raises(ValueError, match="has data twice"):
        mesh.sizes("data=2,data=2")


@pytest.mark.parametrize(
    ("text", "shard", "ranks", "message"),
    [
        ("data=3", "fsdp", 2, "has 3 places, but 2 processes run"),
        ("replica=2", "fsdp", 2, "replicas, which are of --shard hsdp"),
        ("model=2", "replicate", 2, "an axis model, which --shard replicate does not use"),
    ],
)
def test_a_mesh_must_fit(text, shard, ranks, message):
    with pytest.raises(ValueError, match=message):
        mesh.check(mesh.sizes(text), shard, ranks)


def test_every_rank_has_a_place_of_its_own():
    sizes = mesh.sizes("replica=2,data=3,model=2")
    places = [tuple(mesh.coordinates(sizes, rank).values()) for rank in range(12)]
    assert len(set(places)) == 12 and places[1] == (0, 0, 1) and places[2] == (0, 1, 0) and places[6] == (1, 0, 0)


def test_default_meshes():
    assert mesh.default_sizes("fsdp", 16, 8) == {"replica": 1, "data": 16, "model": 1}
    assert mesh.default_sizes("hsdp", 16, 8) == {"replica": 2, "data": 8, "model": 1}
    assert mesh.default_sizes("tensor", 4, 4) == {"replica": 1, "data": 1, "model": 4}


def test_fsdp_cuts_the_first_dimension_that_divides():
    model = {"a": Param((3, 4)), "b": Param((6,)), "c": Param((5, 7)), "d": Param(()), "s": Stat((4,))}
    assert plan(model, {"data": 2}, RULES["fsdp"]) == {
        "a": Shard(1, "data"),
        "b": Shard(0, "data"),
        "c": None,
        "d": None,
        "s": None,
    }


def test_tensor_cuts_the_layers_of_a_gpt():
    cuts = plan(gpt2.spec(gpt2.PRESETS["tiny"]), {"model": 2}, RULES["tensor"])
    assert cuts["blocks.0.attn.qkv.weight"] == Shard(0, "model", (128, 128, 128))
    assert cuts["blocks.0.attn.proj.weight"] == Shard(1, "model")
    assert cuts["blocks.0.mlp.up.weight"] == Shard(0, "model") and cuts["blocks.0.mlp.down.weight"] == Shard(1, "model")
    assert cuts["tokens.weight"] == Shard(0, "model") and cuts["norm.weight"] is None


def test_gate_and_up_are_cut_one_by_one():
    cfg = llama.PRESETS["tiny"]
    cuts = plan(llama.spec(cfg), {"model": 2}, RULES["tensor"])
    assert cuts["blocks.0.mlp.up.weight"] == Shard(0, "model", (cfg.hidden, cfg.hidden))


def test_an_axis_that_does_not_divide_everywhere_is_cut_nowhere():
    model = {
        "a": Param((4, 6), axes=("mlp", "heads")),
        "b": Param((6, 8), axes=("heads", None)),
        "c": Param((7,), axes=("mlp",)),
    }
    cuts = plan(model, {"model": 2}, RULES["tensor"])
    assert cuts == {"a": Shard(1, "model"), "b": Shard(0, "model"), "c": None}


@pytest.mark.parametrize(("way", "axis"), [("fsdp", "data"), ("tensor", "model")])
def test_a_rule_that_cuts_nothing_is_refused(way, axis):
    with pytest.raises(ValueError, match=f"nothing to cut over {axis}=2: no dimension"):
        plan({"w": Param((3, 5), axes=("mlp", None))}, {axis: 2}, RULES[way])


def test_a_mesh_of_one_cuts_nothing():
    model = resnet.spec(resnet.PRESETS["cifar-resnet8"])
    assert not any(plan(model, {"data": 1}, RULES["fsdp"]).values())


def test_table_sums_the_bytes():
    model, sizes = gpt2.spec(gpt2.PRESETS["tiny"]), {"data": 4}
    cuts = plan(model, sizes, RULES["fsdp"])
    lines = shards.table(model, sizes, cuts).splitlines()
    assert len(lines) == 1 + len(tree.leaves(model)) + 2
    assert lines[-1].split()[-1].replace(",", "") == str(4 * tree.count(model))
    assert lines[-2].split()[-1].replace(",", "") == str(tree.count(model))  # a quarter of 4 bytes each
    local = sum(math.prod(shards.local_shape(x.shape, cuts[name], sizes)) for name, x in tree.items(model))
    assert local * 4 == shards.local_bytes(model, sizes, cuts)


def test_parts_must_cover_the_first_dimension():
    with pytest.raises(ValueError, match="parts"):
        Param((6, 2), initializers.zeros, ("heads", None), parts=(2, 2))
    assert spec.abstract(Param((6, 2), parts=(4, 2))).shape == (6, 2)
