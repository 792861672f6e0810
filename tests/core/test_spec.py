"""Specs: parameters from data, keyed by path."""

import dataclasses
import random as stdlib_random

import jax
import numpy
import pytest
import torch

from core import initializers, random, tree
from core import spec as specs
from core.layers import batch_norm_spec, layer_norm_spec, linear_spec
from core.spec import Param, Stat

KEY = random.key(3)


def model(layers=2):
    return {
        "head": linear_spec(8, 3, init=initializers.normal(0.5)),
        "blocks": [{"norm": layer_norm_spec(8, affine=False), "fc": linear_spec(8, 8)} for _ in range(layers)],
        "bn": batch_norm_spec(8),
        "scale": Param((), initializers.uniform(1.0, 2.0)),
    }


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_init_gives_shapes_dtypes_and_the_same_bits_again():
    spec = model()
    values = specs.init(KEY, spec)
    assert {n: (tuple(x.shape), x.dtype) for n, x in tree.items(values)} == {
        n: (p.shape, p.dtype) for n, p in tree.items(spec)
    }
    assert list(values) == sorted(values)
    assert_same(specs.init(KEY, spec), values)
    other = specs.init(random.key(4), spec)
    assert not torch.equal(other["head"]["weight"], values["head"]["weight"])
    assert not torch.equal(values["blocks"][0]["fc"]["weight"], values["blocks"][1]["fc"]["weight"])


def test_init_leaves_global_generators_alone():
    before = torch.get_rng_state(), stdlib_random.getstate(), numpy.random.get_state()[1]
    specs.init(KEY, model())
    assert torch.equal(torch.get_rng_state(), before[0]) and stdlib_random.getstate() == before[1]
    assert (numpy.random.get_state()[1] == before[2]).all()


def test_a_leaf_draws_from_its_folded_path_as_jax_would():
    name = "head.weight"
    key = jax.random.fold_in(jax.random.key(3), specs.name_hash(name))
    ours = specs.init(KEY, model())["head"]["weight"].numpy()
    numpy.testing.assert_allclose(ours, 0.5 * numpy.asarray(jax.random.normal(key, (3, 8))), rtol=2e-6)


def test_adding_layers_changes_no_other_layer():
    small, large = specs.init(KEY, model(2)), specs.init(KEY, {**model(5), "extra": linear_spec(2, 2)})
    named = tree.flatten(large)
    assert all(torch.equal(x, named[name]) for name, x in tree.items(small))
    assert_same(specs.init(KEY, {"head": model()["head"]})["head"], small["head"])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_vmapped_init_is_an_ensemble(compiled):
    spec, keys = model(1) if compiled else model(), random.split(KEY, 3)

    def ensemble(keys):
        return torch.func.vmap(lambda key: specs.init(key, spec))(keys)

    if compiled:
        torch._dynamo.reset()
        ensemble = torch.compile(ensemble, fullgraph=True, dynamic=False, backend="aot_eager")
    assert_same(ensemble(keys), tree.stack([specs.init(key, spec) for key in keys]))


def test_dtype_replaces_that_of_floating_point_params_only():
    spec = {**model(), "ids": Param((2,), dtype=torch.int64)}
    values = specs.init(KEY, spec, torch.bfloat16)
    params, stats = specs.split(spec, values)
    assert params.pop("ids").dtype == torch.int64
    assert {x.dtype for x in tree.leaves(params)} == {torch.bfloat16}
    assert {x.dtype for x in tree.leaves(stats)} == {torch.float32}
    # Drawn wide and rounded: the same numbers at lower precision.
    wide = specs.init(KEY, spec)["head"]["weight"]
    assert_same(params["head"]["weight"], wide.to(torch.bfloat16))


def test_abstract_allocates_nothing():
    spec = {"w": Param((10**6, 10**6)), "b": Param((3,), dtype=torch.float16), "none": {}}
    meta = specs.abstract(spec)
    assert meta["w"].is_meta and meta["w"].shape == (10**6, 10**6) and meta["b"].dtype == torch.float16
    assert tree.count(spec) == tree.count(meta) == 10**12 + 3
    assert tree.table(spec) == tree.table(meta) and list(meta) == ["b", "none", "w"]


def test_mask_by_name_and_leaf():
    spec = model()
    mask = specs.mask(spec, lambda name, leaf: name.endswith("weight") and len(leaf.shape) > 1)
    expected = {"blocks.0.fc.weight", "blocks.1.fc.weight", "head.weight"}
    assert {name for name, x in tree.items(mask) if x is True} == expected
    assert all(x in (True, False) for x in tree.leaves(mask)) and tree.names(mask) == tree.names(spec)


def test_split_and_merge():
    spec = model()
    values = specs.init(KEY, spec)
    params, stats = specs.split(spec, values)
    assert tree.names(stats) == ["bn.count", "bn.mean", "bn.var"] and list(stats) == ["bn"]
    assert params["blocks"][0]["norm"] == {}  # the layer without parameters is still there
    assert_same(tree.merge(params, stats), values)
    assert tree.structure(tree.merge(params, stats)) == tree.structure(values)


def test_specs_are_plain_hashable_data():
    assert model() == model() and hash(tree.leaves(model())[-1]) == hash(tree.leaves(model())[-1])
    assert Param((2,)) != Stat((2,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Param((2,)).shape = (3,)


def without(values, name):
    return tree.partition(values, lambda n, _: n != name)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: without(v, "head.bias"), r"weights: 'head\.bias' is missing; expected shape \(3,\)"),
        (lambda v: {**v, "more": torch.ones(1)}, "weights: 'more' is left over; the model has no such parameter"),
        (lambda v: {**v, "scale": torch.ones(2)}, r"weights: 'scale' has shape \(2,\), expected \(\)"),
        (lambda v: {**v, "scale": 1.0}, r"weights: 'scale' has shape \('float',\), expected \(\)"),
        (
            lambda v: {**v, "blocks": dict(zip("01", v["blocks"], strict=True))},
            "at 'blocks', expected list, found dict",
        ),
    ],
)
def test_check_names_the_leaf(change, message):
    spec = model()
    values = specs.init(KEY, spec)
    specs.check(spec, values)
    specs.check(spec, specs.abstract(spec))
    with pytest.raises(ValueError, match=message):
        specs.check(spec, change(values), "weights")


def test_errors_of_init_and_param():
    with pytest.raises(ValueError, match=r"axes \('in',\) name 1 dimensions, but the shape is \(2, 3\)"):
        Param((2, 3), axes=("in",))
    with pytest.raises(ValueError, match="'a.b': keys must be strings without dots"):
        specs.init(KEY, {"a.b": Param(())})
    with pytest.raises(TypeError, match="'a.w' is Tensor; a spec's leaves are Param or Stat"):
        specs.init(KEY, {"a": {"w": torch.ones(1)}})
    with pytest.raises(ValueError, match=r"expected one key \(2,\), found \(3, 2\); vmap"):
        specs.init(random.split(KEY, 3), model())
    with pytest.raises(TypeError, match=r"a key must be a tensor, as core.random.key\(0\) is, got int"):
        specs.init(0, model())
    with pytest.raises(TypeError, match=r"a key must be a tensor, as core.random.key\(seed\) is, got dict"):
        specs.init(model(), KEY)
    with pytest.raises(TypeError, match="'fc.bias' is None; a spec's leaves are Param or Stat: leave the key out"):
        specs.init(KEY, {"fc": {"bias": None, "weight": Param((2, 3))}})
