"""The norms against torch.nn, and under the transforms. Batch norm over several steps is in test_stats.py."""

from functools import partial

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from core import random, spec, tree
from core.initializers import uniform
from core.layers import (
    batch_norm,
    batch_norm_spec,
    group_norm,
    group_norm_spec,
    instance_norm,
    instance_norm_spec,
    layer_norm,
    layer_norm_spec,
    rms_norm,
    rms_norm_spec,
)
from core.spec import Stat

SLOPES = uniform(0.5, 1.5)


def values(layer, dtype=torch.float64, key=None):
    p = spec.init(random.key(0) if key is None else key, layer, dtype)
    return {**p, "bias": p["weight"] - 0.7} if "bias" in p else p


def data(*shape, dtype=torch.float64):
    return (3 * random.normal(random.key(1), shape, torch.float64) + 1).to(dtype)


def check(f, module, p, x, **tolerance):
    def expected(p, x):
        return functional_call(module, p, (x,))

    torch.testing.assert_close(f(p, x), expected(p, x), **tolerance)
    actual, reference = (grad(lambda p, x, g=g: torch.sin(g(p, x)).sum(), argnums=(0, 1))(p, x) for g in (f, expected))
    torch.testing.assert_close(actual, reference, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}], ids=str)
@pytest.mark.parametrize("shape", [6, (4, 6)])
def test_layer_norm_equals_torch(shape, options, dtype):
    p = values(layer_norm_spec(shape, init=SLOPES, **options), dtype)
    # Without a weight to tell the shape, it is the last axis.
    module = torch.nn.LayerNorm(shape if p else 6, 1e-3, bool(p), "bias" in p, dtype=dtype)
    check(partial(layer_norm, eps=1e-3), module, p, data(2, 3, 4, 6, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_rms_norm_equals_torch(affine, eps, dtype, scale):
    p = values(rms_norm_spec(6, affine=affine, init=SLOPES), dtype)
    assert list(p) == (["weight"] if affine else [])
    module = torch.nn.RMSNorm(6, eps, affine, dtype=dtype)
    check(partial(rms_norm, eps=eps), module, p, data(2, 3, 4, 6, dtype=dtype) * scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("space", [(), (5,), (5, 3), (2, 5, 3)])
def test_group_norm_equals_torch(space, affine, groups, dtype):
    p = values(group_norm_spec(4, affine=affine, init=SLOPES), dtype)
    module = torch.nn.GroupNorm(groups, 4, 1e-3, affine, dtype=dtype)
    check(lambda p, x: group_norm(p, x, groups, eps=1e-3), module, p, data(2, 4, *space, dtype=dtype))


INSTANCE = {1: torch.nn.InstanceNorm1d, 2: torch.nn.InstanceNorm2d, 3: torch.nn.InstanceNorm3d}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("space", [(5,), (5, 3), (2, 5, 3)])
def test_instance_norm_equals_torch(space, affine):
    p = values(instance_norm_spec(4, affine=affine, init=SLOPES))
    module = INSTANCE[len(space)](4, 1e-3, affine=affine, dtype=torch.float64)
    check(partial(instance_norm, eps=1e-3), module, p, data(2, 4, *space))


BATCH = {0: torch.nn.BatchNorm1d, 1: torch.nn.BatchNorm1d, 2: torch.nn.BatchNorm2d, 3: torch.nn.BatchNorm3d}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("space", [(), (5,), (5, 3), (2, 5, 3)])
def test_batch_norm_equals_torch(space, affine, train):
    p = values(batch_norm_spec(4, affine=affine, init=SLOPES))
    stats = {"mean": data(4), "var": data(4).abs() + 0.1, "count": torch.tensor(7.0)}
    module = BATCH[len(space)](4, 1e-3, affine=affine, track_running_stats=not train, dtype=torch.float64).train(train)
    if not train:
        module.running_mean, module.running_var = stats["mean"], stats["var"]
    x, params = data(6, 4, *space), {name: p[name] for name in p if name not in stats}
    check(lambda p, x: batch_norm({**p, **stats}, x, train=train, eps=1e-3), module, params, x)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_eval_takes_its_stats_as_constants(affine):
    p, x = values(batch_norm_spec(4, affine=affine)), data(6, 4)
    gradient = grad(lambda p: batch_norm(p, x, train=False).pow(3).sum())(p)
    assert all((gradient[name] == 0).all() for name in ("count", "mean", "var"))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_keeps_half_precision_and_never_casts_its_stats(affine, train):
    p = values(batch_norm_spec(4, affine=affine, init=SLOPES), torch.bfloat16)
    x = data(64, 4, 3)
    assert {p[name].dtype for name in ("count", "mean", "var")} == {torch.float32}
    gradient = grad(lambda p, x: batch_norm(p, x, train=train).float().sum())(p, x.bfloat16())
    assert {name: g.dtype for name, g in gradient.items()} == {name: value.dtype for name, value in p.items()}
    y = batch_norm(p, x.bfloat16(), train=train)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.double(), batch_norm(tree.cast(p, torch.float64), x, train=train), rtol=0.02, atol=0.02
    )
    if train:
        torch.testing.assert_close(gradient["mean"], 0.1 * x.bfloat16().float().mean((0, 2)))


def test_default_specs():
    assert [leaf.shape for leaf in tree.leaves(batch_norm_spec(4))] == [(4,), (), (4,), (4,), (4,)]
    stats = [name for name, leaf in tree.items(batch_norm_spec(4)) if isinstance(leaf, Stat)]
    assert stats == ["count", "mean", "var"]
    for layer in (layer_norm_spec(4), group_norm_spec(4), instance_norm_spec(4), batch_norm_spec(4)):
        p = spec.init(random.key(0), layer)
        assert list(p) == sorted(p) and (p["weight"] == 1).all() and (p["bias"] == 0).all()
    assert layer_norm_spec((2, 3), axes=("a", "b"))["bias"].axes == ("a", "b")


LAYERS = {
    "layer": (layer_norm_spec(6, init=SLOPES), layer_norm),
    "rms": (rms_norm_spec((4, 6), init=SLOPES), rms_norm),
    "group": (group_norm_spec(4, init=SLOPES), lambda p, x: group_norm(p, x, 2)),
    "instance": (instance_norm_spec(4, init=SLOPES), instance_norm),
    "batch, train": (batch_norm_spec(4, init=SLOPES), lambda p, x: batch_norm(p, x, train=True)),
    "batch, eval": (batch_norm_spec(4, init=SLOPES), lambda p, x: batch_norm(p, x, train=False)),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_ensemble_equals_the_members(name, compiled):
    layer, f = LAYERS[name]
    gradient = grad(lambda p, x: torch.sin(f(p, x)).sum(), argnums=(0, 1))
    p, x = vmap(lambda key: values(layer, key=key))(random.split(random.key(0), 3)), data(5, 4, 6)
    ensemble = vmap(gradient, in_dims=(0, None))
    if compiled:
        torch._dynamo.reset()
        ensemble = torch.compile(ensemble, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(ensemble(p, x), tree.stack([gradient(q, x) for q in tree.unstack(p)]))


@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_ensemble_equals_the_members(name):
    layer, f = LAYERS[name]
    p = vmap(lambda key: values(layer, torch.bfloat16, key))(random.split(random.key(0), 3))
    x = data(5, 4, 6, dtype=torch.bfloat16)
    stacked = vmap(f, in_dims=(0, None))(p, x)
    assert stacked.dtype == torch.bfloat16
    alone = torch.stack([f(q, x) for q in tree.unstack(p)])
    torch.testing.assert_close(stacked, alone, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_mode_equals_reverse_mode(name):
    layer, f = LAYERS[name]
    p, x, tangent = values(layer), data(5, 4, 6), data(5, 4, 6).cos()
    _, forward = jvp(lambda x: torch.sin(f(p, x)).sum(), (x,), (tangent,))
    torch.testing.assert_close(forward, (grad(lambda x: torch.sin(f(p, x)).sum())(x) * tangent).sum())


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "batch, train"])
def test_gradients_of_examples_add_up(name):
    layer, f = LAYERS[name]
    p, x = values(layer), data(3, 4, 6)
    gradient = grad(lambda p, x: torch.sin(f(p, x)).sum())
    each = vmap(lambda p, x: gradient(p, x[None]), in_dims=(None, 0))(p, x)
    torch.testing.assert_close(tree.map(lambda g: g.sum(0), each), gradient(p, x))


@pytest.mark.parametrize(
    ("layer", "f", "shape", "message"),
    [
        (layer_norm_spec(6), layer_norm, (2, 5), r"layer_norm: expected x to end in \(6,\), found \(2, 5\)"),
        (rms_norm_spec((4, 6)), rms_norm, (6,), r"rms_norm: expected x to end in \(4, 6\), found \(6,\)"),
        (group_norm_spec(4), lambda p, x: group_norm(p, x, 3), (2, 4), r"3 groups do not divide 4 channels"),
        (group_norm_spec(4), lambda p, x: group_norm(p, x, 2), (2, 6), r"group_norm: .* \(batch, 4, \*space\), found"),
        (instance_norm_spec(4), instance_norm, (2, 3, 5), r"expected x of shape \(batch, 4, \*space\), found \(2, 3"),
        (batch_norm_spec(4), partial(batch_norm, train=True), (2, 3), r"batch_norm: .* \(batch, 4, \*space\), found"),
        (batch_norm_spec(4), partial(batch_norm, train=True), (1, 4), r"more than 1 value per channel"),
    ],
)
def test_a_wrong_shape_is_an_error(layer, f, shape, message):
    with pytest.raises(ValueError, match=message):
        f(values(layer), torch.zeros(shape, dtype=torch.float64))
