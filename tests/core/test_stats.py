"""Running statistics: batch norm and `update` against the running statistics of torch.nn.BatchNorm."""

import pytest
import torch
from torch.func import grad, vmap

from core import random, spec, stats, tree
from core.layers import batch_norm, batch_norm_spec, linear, linear_spec

SPEC = {"head": linear_spec(4, 2), "norm": batch_norm_spec(4), "unused": batch_norm_spec(4)}


def start(dtype=torch.float64, key=None):
    """(params, stats), the Stats in float32 as they are declared, or in float64 to be compared closely."""
    params, running = spec.split(SPEC, spec.init(random.key(0) if key is None else key, SPEC, dtype))
    return params, tree.cast(running, torch.float64) if dtype == torch.float64 else running


def batches(n, batch=8):
    return [2 * x + 1 for x in random.normal(random.key(1), (n, batch, 4, 3), torch.float64)]


def loss(params, running, x, momentum=0.1):
    p = tree.merge(params, running)
    return torch.sin(linear(p["head"], batch_norm(p["norm"], x, train=True, momentum=momentum).mean(-1))).sum()


def step(params, running, x, loss=loss):
    """One step of gradient descent: new (params, stats)."""
    gradients, increments = grad(loss, argnums=(0, 1))(params, running, x)
    return tree.map(lambda p, g: p - 0.1 * g, params, gradients), stats.update(running, increments)


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_training_equals_torch_over_steps(momentum):
    params, running = start()
    norm = torch.nn.BatchNorm1d(4, momentum=momentum, dtype=torch.float64)
    head = torch.nn.Linear(4, 2, dtype=torch.float64)
    head.load_state_dict(params["head"])
    trained = [*norm.parameters(), *head.parameters()]
    for x in batches(4):
        params, running = step(params, running, x, lambda p, s, x: loss(p, s, x, momentum))
        gradients = torch.autograd.grad(torch.sin(head(norm(x).mean(-1))).sum(), trained)
        with torch.no_grad():
            torch._foreach_sub_(trained, gradients, alpha=0.1)
        torch.testing.assert_close(running["norm"]["mean"], norm.running_mean)
        torch.testing.assert_close(running["norm"]["var"], norm.running_var)
        assert running["norm"]["count"] == norm.num_batches_tracked
    torch.testing.assert_close(tree.leaves(params["norm"]), [norm.bias.detach(), norm.weight.detach()])
    torch.testing.assert_close(tree.leaves(params["head"]), [head.bias.detach(), head.weight.detach()])


def mean_of_updates(running, xs, momentum=0.1):
    """The running statistics of torch.nn.BatchNorm after each batch alone, averaged."""
    norms = []
    for x in xs:
        norm = torch.nn.BatchNorm1d(4, momentum=momentum, dtype=torch.float64)
        norm.running_mean, norm.running_var = running["mean"].clone(), running["var"].clone()
        norm(x)
        norms.append(norm)
    mean = torch.stack([n.running_mean for n in norms]).mean(0)
    return {"count": running["count"] + 1, "mean": mean, "var": torch.stack([n.running_var for n in norms]).mean(0)}


def two_uses(params, running, xs):
    return loss(params, running, xs[0]) + 3 * loss(params, running, xs[1])


def vmap_inside(params, running, xs):
    return vmap(loss, in_dims=(None, None, 0))(params, running, torch.stack(xs)).mean()


def nested_vmap_inside(params, running, xs):
    halves = torch.stack(xs).unflatten(0, (-1, 2))
    return vmap(vmap(loss, in_dims=(None, None, 0)), in_dims=(None, None, 0))(params, running, halves).sum()


@pytest.mark.parametrize(
    ("several", "n", "compiled"),
    [
        (two_uses, 2, False),
        (vmap_inside, 3, False),
        (nested_vmap_inside, 4, False),
        pytest.param(nested_vmap_inside, 4, True, marks=pytest.mark.slow),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_several_uses_in_one_loss_make_one_update_with_the_mean(several, n, compiled):
    params, running = start()
    xs = batches(n)

    def updated(params, running, xs):
        return stats.update(running, grad(several, argnums=1)(params, running, xs))

    if compiled:
        torch._dynamo.reset()
        updated = torch.compile(updated, fullgraph=True, dynamic=False, backend="aot_eager")
    new = updated(params, running, xs)
    torch.testing.assert_close(new["norm"], mean_of_updates(running["norm"], xs))
    torch.testing.assert_close(new["unused"], running["unused"], rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1 / 4])
def test_summed_and_averaged_micro_batches_make_one_update_with_the_mean(scale):
    params, running = start()
    xs = batches(4)
    parts = [grad(loss, argnums=1)(params, running, x) for x in xs]
    new = stats.update(running, tree.map(lambda *leaves: sum(leaves) * scale, *parts))
    torch.testing.assert_close(new["norm"], mean_of_updates(running["norm"], xs))


def test_a_layer_that_only_some_micro_batches_reach_gets_the_mean_of_those():
    params, running = start()
    x = batches(1)[0]
    reached = grad(loss, argnums=1)(params, running, x)
    new = stats.update(running, tree.map(lambda a: (a + torch.zeros_like(a)) / 2, reached))
    torch.testing.assert_close(new["norm"], mean_of_updates(running["norm"], [x]))


def test_gradient_of_a_gradient_does_not_flow_through_increments():
    params, running = start()
    x = batches(1)[0]

    def reported(params, running, x):
        return sum(leaf.square().sum() for leaf in tree.leaves(grad(loss, argnums=1)(params, running, x)))

    gradients = grad(reported, argnums=(0, 1, 2))(params, running, x)
    assert all((leaf == 0).all() for leaf in tree.leaves(gradients))


def test_a_loss_with_a_gradient_inside_equals_torch():
    params, running = start()
    x = batches(1)[0]
    module = torch.nn.BatchNorm1d(4, dtype=torch.float64)

    def penalty(params, x):
        p = tree.merge(params, running)
        return grad(lambda x: torch.sin(batch_norm(p["norm"], x, train=True)).sum())(x).square().sum()

    leaf = x.clone().requires_grad_()
    (inner,) = torch.autograd.grad(torch.sin(module(leaf)).sum(), leaf, create_graph=True)
    expected = torch.autograd.grad(inner.square().sum(), leaf)[0]
    torch.testing.assert_close(grad(penalty, argnums=1)(params, x), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_ensemble_equals_the_members(compiled):
    members = [start(key=key) for key in random.split(random.key(0), 3)]
    params, running = tree.stack(members)
    ensemble = vmap(step, in_dims=(0, 0, None))
    if compiled:
        torch._dynamo.reset()
        ensemble = torch.compile(ensemble, fullgraph=True, dynamic=False, backend="aot_eager")
    alone, together = members, (params, running)
    for x in batches(2):
        together = ensemble(*together, x)
        alone = [step(*member, x) for member in alone]
    torch.testing.assert_close(together, tree.stack(alone))
    assert together[1]["norm"]["count"].tolist() == [2, 2, 2]


def test_update_takes_a_stacked_ensemble():
    members = [start(key=key) for key in random.split(random.key(0), 3)]
    params, running = tree.stack(members)
    increments = vmap(grad(two_uses, argnums=1), in_dims=(0, 0, None))(params, running, batches(2))
    torch.testing.assert_close(stats.update(running, increments), vmap(stats.update)(running, increments))


def test_stats_stay_float32_under_half_precision_activations():
    params, running = start(torch.bfloat16)
    x = batches(1)[0].bfloat16()
    _, new = step(params, running, x)
    assert {leaf.dtype for leaf in tree.leaves(new)} == {torch.float32}
    expected = mean_of_updates(tree.cast(running["norm"], torch.float64), [x.double()])
    torch.testing.assert_close(new["norm"], tree.cast(expected, torch.float32))


def test_update_looks_for_the_count_beside_and_then_further_up():
    def leaf(value):
        return torch.tensor(float(value))

    old = {
        "count": leaf(5),
        "inner": {"deep": [{"mean": leaf(1)}], "own": {"count": leaf(2), "mean": leaf(1)}},
        "unreached": {"count": leaf(3), "mean": leaf(1)},
    }
    increments = {
        "count": leaf(2),
        "inner": {"deep": [{"mean": leaf(6)}], "own": {"count": leaf(3), "mean": leaf(6)}},
        "unreached": {"count": leaf(0), "mean": leaf(0)},
    }
    new = stats.update(old, increments)
    assert tree.flatten(new) == {
        "count": 6,
        "inner.deep.0.mean": 4,
        "inner.own.count": 3,
        "inner.own.mean": 3,
        "unreached.count": 3,
        "unreached.mean": 1,
    }
    assert stats.update({"mean": leaf(1)}, {"mean": leaf(6)}) == {"mean": 7}
    assert stats.update({}, {}) == {}
