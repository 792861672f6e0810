"""Frozen batch norms use and keep their running statistics in training."""

import pytest
import torch
from torch.func import grad, grad_and_value

from core import per_example, random, spec, stats, tree
from core.layers import batch_norm, batch_norm_spec, conv, conv_spec, freeze_batch_norms

SPEC = {
    "a": {"conv": conv_spec(2, 3, 1), "norm": batch_norm_spec(3)},
    "b": [{"conv": conv_spec(3, 3, 1), "norm": batch_norm_spec(3)}, {"norm": batch_norm_spec(3, affine=False)}],
}


def net(params, x, train=True):
    """Three batch norms, the last one without weight and bias."""
    for p in (params["a"], params["b"][0]):
        x = batch_norm(p["norm"], conv(p["conv"], x), train=train).relu()
    return batch_norm(params["b"][1]["norm"], x, train=train)


@pytest.fixture
def values():
    """(params, Stats), the Stats unlike those of any batch."""
    values = spec.init(random.key(0), SPEC, torch.float64)
    return spec.split(SPEC, tree.map_with_names(lambda n, x: x + 0.5 if n.endswith(("mean", "var")) else x, values))


@pytest.fixture
def x():
    return random.normal(random.key(1), (4, 2, 3, 3), torch.float64)


def gradients(params, running, x, frozen):
    def loss(params, running):
        out = net(freeze_batch_norms(tree.merge(params, running), frozen), x)
        return out.sin().sum(), out

    (grads, increments), (_, out) = grad_and_value(loss, argnums=(0, 1), has_aux=True)(params, running)
    return out, grads, stats.update(running, increments)


def test_all_frozen_is_eval_mode_in_training(values, x):
    params, running = values
    out, grads, updated = gradients(params, running, x, lambda name: True)
    expected = net(tree.merge(params, running), x, train=False)
    torch.testing.assert_close(out, expected)
    for (name, a), b in zip(tree.items(updated), tree.leaves(running), strict=True):
        assert torch.equal(a, b), f"'{name}' moved"
    theirs = grad(lambda p: net(tree.merge(p, running), x, train=False).sin().sum())(params)
    torch.testing.assert_close(grads, theirs)


def test_only_frozen_norms_keep_their_statistics(values, x):
    params, running = values
    _, _, updated = gradients(params, running, x, lambda name: name.startswith("a."))
    moved = [
        name for (name, a), b in zip(tree.items(updated), tree.leaves(running), strict=True) if not torch.equal(a, b)
    ]
    assert moved == [name for name in tree.names(running) if name.startswith("b.")]


@pytest.mark.parametrize(
    ("frozen", "marked"),
    [
        (lambda name: name.endswith("weight"), []),
        (lambda name: name in ("a.norm.bias", "a.norm.weight"), ["a.norm"]),
        (lambda name: name.startswith("b.1."), ["b.1.norm"]),
        (lambda name: name == "b.1.norm.mean", []),
        (lambda name: False, []),
    ],
    ids=["weights", "weight and bias", "without weight", "one of the Stats", "nothing"],
)
def test_a_norm_is_frozen_as_a_whole(frozen, marked):
    before = tree.names(SPEC)
    names = tree.names(freeze_batch_norms(SPEC, frozen))
    assert [name.removesuffix(".frozen") for name in names if name not in before] == marked
    assert tree.names(SPEC) == before
    inner = tree.names(freeze_batch_norms(SPEC["b"], frozen, "b."))
    assert [f"b.{name}" for name in inner] == [name for name in names if name.startswith("b.")]


def test_compiled_equals_eager(values, x):
    torch._dynamo.reset()
    params, running = values

    def step(params, running, x):
        return gradients(params, running, x, lambda name: name.startswith("b.0."))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(params, running, x), step(params, running, x))


def test_frozen_norms_do_not_mix_examples(values, x):
    """So the gradients per example of a fine-tuned net are defined, in training mode."""
    params, running = values

    def losses(params, x):
        out = net(freeze_batch_norms(tree.merge(params, running), lambda name: True), x)
        return out.sin().sum((1, 2, 3))

    out = per_example.reports(losses, params, x)
    each = per_example.each(losses, params, x)
    norms = tree.map(lambda g: g.flatten(1).norm(dim=1), each)
    torch.testing.assert_close(out.norm, norms)
    with pytest.raises(per_example.PerExampleError, match="batch norm"):
        per_example.reports(lambda p, x: net(tree.merge(p, running), x).sin().sum((1, 2, 3)), params, x)
