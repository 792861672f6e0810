"""Parameters and gradients that an optimizer refuses, each in one line that names the leaf."""

import pytest
import torch

from core import random, spec, tree
from core.layers import batch_norm, batch_norm_spec, linear, linear_spec
from tests.train.optimizers.cases import ALL, F32, grads_at, start
from train import optimizers as opt

PARAMS = {"b": torch.ones(2), "w": [torch.ones(3, 2)]}
MUON = opt.muon(0.1, opt.sgd(0.1))
EVERY = {**ALL, "muon": MUON, "masked": opt.chain(opt.masked(opt.clip_by_value(1.0), lambda name, leaf: True))}


def replaced(name, leaf):
    values = dict(tree.items(grads_at(0, start(F32))))
    return tree.unflatten(start(F32), [leaf if key == name else value for key, value in values.items()])


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_gradients_of_another_shape_are_not_broadcast(name, donate):
    optimizer, params = EVERY[name], start(F32)
    step = opt.donated_update(optimizer) if donate else optimizer.update
    match = r"the gradient or update of 'blocks.0.bias' has shape \(4, 3\); expected a tensor of shape \(3,\)"
    with pytest.raises(ValueError, match=match):
        step(replaced("blocks.0.bias", torch.ones(4, 3)), optimizer.init(params), params)
    with pytest.raises(ValueError, match=r"of 'head.scale' is None; expected a tensor of shape \(\)"):
        step(replaced("head.scale", None), optimizer.init(params), params)
    with pytest.raises(ValueError, match="parameters and gradients: the trees differ in structure: 'head' is missing"):
        step({key: x for key, x in grads_at(0, params).items() if key != "head"}, optimizer.init(params), params)
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(params), tree.leaves(start(F32)), strict=True))


@pytest.mark.parametrize("shape", [(3, 2), (1,), (2, 1), ()])
def test_apply_updates_does_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"update of 'b' has shape .*; expected a tensor of shape \(2,\)"):
        opt.apply_updates(PARAMS, {**PARAMS, "b": torch.ones(shape)})
    with pytest.raises(ValueError, match="update of 'w.0' is None"):
        opt.apply_updates(PARAMS, {**PARAMS, "w": [None]})


@pytest.mark.parametrize("name", EVERY)
def test_parameters_are_floating_point_tensors(name):
    init = EVERY[name].init
    with pytest.raises(TypeError, match="parameter 'head.ids' is torch.int64; expected a floating-point tensor"):
        init({**start(F32), "head": {"ids": torch.arange(3)}})
    with pytest.raises(TypeError, match="parameter 'layer.bias' is Param; expected a floating-point tensor"):
        init({"layer": linear_spec(2, 3)})


# Running statistics.

MODEL = {"norm": batch_norm_spec(4), "out": linear_spec(4, 2)}
VALUES = spec.init(random.key(0), MODEL)


def loss(values, x):
    return linear(values["out"], batch_norm(values["norm"], x, train=True)).square().mean()


@pytest.mark.parametrize("name", EVERY)
def test_running_statistics_are_not_trained(name):
    match = r"'norm.count' belongs to running statistics \(Stats\).*`params, stats = spec.split\(model, values\)`"
    with pytest.raises(ValueError, match=match):
        EVERY[name].init(VALUES)
    with pytest.raises(ValueError, match=match):  # an ensemble
        EVERY[name].init(tree.stack([VALUES, VALUES]))


def test_the_gradient_of_a_whole_tree_is_not_applied():
    grads = torch.func.grad(loss)(VALUES, random.normal(random.key(1), (8, 4)))
    assert (grads["norm"]["mean"] != 0).any()  # an increment, which looks like a gradient
    with pytest.raises(ValueError, match="'norm.count' belongs to running statistics"):
        opt.apply_updates(VALUES, tree.map(lambda g: -0.1 * g, grads))
    frozen = opt.freeze(opt.sgd(0.1), lambda name, leaf: name.startswith("norm"))
    with pytest.raises(ValueError, match="'norm.count' belongs to running statistics"):
        frozen.init(VALUES)


def test_the_split_is_taken():
    params, stats = spec.split(MODEL, VALUES)
    optimizer = opt.adamw(0.1)
    grads = torch.func.grad(lambda p: loss(tree.merge(p, stats), random.normal(random.key(1), (8, 4))))(params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert tree.names(opt.apply_updates(params, updates)) == ["norm.bias", "norm.weight", "out.bias", "out.weight"]


def test_checks_leave_no_trace_in_a_compiled_step():
    """The graph has the arithmetic alone: a product and a sum per leaf (and casts that change nothing)."""
    torch._dynamo.reset()
    nodes = []

    def backend(module, inputs):
        nodes.extend(node.target for node in module.graph.nodes if node.op.startswith("call") and node.target != "to")
        return module

    optimizer = opt.sgd(0.1)

    def step(grads, params):
        return opt.apply_updates(params, optimizer.update(grads, ((), (), ()), params)[0])

    out = torch.compile(step, backend=backend, fullgraph=True)(PARAMS, PARAMS)
    torch._dynamo.reset()
    assert len(nodes) == 2 * len(tree.leaves(PARAMS))
    torch.testing.assert_close(out, tree.map(lambda x: 0.9 * x, PARAMS))
