"""The same reports compiled, under vmap over an ensemble, and with a plan for another N."""

import pytest
import torch
from torch.func import vmap

from core import per_example, tree
from tests.core.per_example.models import BUILDS, N, make
from tests.core.per_example.test_reports import assert_reports, direction_of, every_model, quiet, run, tolerance_of

QUICK = ("class_token", "embedding, padding", "linear 3-D", "tied, ghost, with bias")
# A model or two for each rule, and for operations without one.
SWEEP = """
linear 4-D; x @ W; W @ x; einsum; bmm; linear_used_twice; tied_autoencoder; zero_gradient_for_some
weight_in_a_rule_and_without; conv1d, dilated; conv2d, stride leaves pixels; conv2d, depthwise; conv3d
conv2d, same, even kernel; conv2d, circular; conv_transpose2d, groups, dilated; conv_of_different_groups; cnn
embedding; embedding twice; W[negative ids]; one hot; tied; positions; layer_norm; rms_norm; group_norm; instance_norm
batch_norm, eval; F.batch_norm, eval; layer scale; bias of an image; softmax over a parameter; rows by index
concatenated; a kernel out of a parameter; weight_norm; class_token_by_repeat; mixture; hypernetwork; keys_of_dropout
half_inside; odd_tree; gru; lstm; attention; learned_queries; vision_transformer; gpt2_with_dropout
"""
STACKED = """
class_token; embedding, padding; linear 3-D; tied, ghost, with bias; F.batch_norm, eval; attention; batch_norm, eval
cnn; conv_of_different_groups; einsum; half_inside; conv_transpose2d, groups, dilated; hypernetwork; lstm; odd_tree
positions; weight_norm
"""
SWEEP, STACKED = (tuple(text.strip().replace("\n", "; ").split("; ")) for text in (SWEEP, STACKED))
assert {*QUICK, *SWEEP, *STACKED} <= set(BUILDS)


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")


def reported(model):
    def f(params, batch, direction):
        return per_example.reports(model.loss, params, batch, ("norm", "dot", "gram", "square"), direction=direction)

    return f


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SWEEP)])
@quiet
def test_compiled(name):
    model = make(name)
    out = compiled(reported(model))(model.params, model.batch, direction_of(model.params))
    assert_reports(model, out, tolerance=tolerance_of(model))


SQUARE = {"a": torch.randn(4, 4).double(), "b": torch.randn(4, 4).double()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        lambda p, x: (p["a"] @ x).sin().sum((1, 2)) + (x.mT @ p["b"]).cos().sum((1, 2)),
        lambda p, x: (x @ (p["b"] @ p["a"])).sin().sum((1, 2)),
        lambda p, x: (x @ (p["b"].norm(dim=1) * p["a"].flatten().unflatten(0, (4, 4)))).sin().sum((1, 2)),
    ],
    ids=["either order", "product of parameters", "methods written in Python"],
)
def test_compiled_matmul_of_square_matrices(loss):
    x = torch.randn(3, 4, 4).double()
    expected = per_example.reports(loss, SQUARE, x)
    assert per_example.verify(loss, SQUARE, x) <= 1e-10
    torch.testing.assert_close(compiled(per_example.reports)(loss, SQUARE, x).norm, expected.norm)


@pytest.mark.parametrize("planned", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled_functions_of_tuples(planned):
    """Dynamo looks for tensors of a subclass in lists, not in tuples."""

    def loss(p, x):
        a, b, none = p["a"][0], p["b"][0], torch.zeros(4, dtype=torch.float64)
        rows = torch.stack((a, none, b)).sum(0) * torch.cat(tensors=(b[:2], a[2:]))
        return (x @ p["a"] + rows).sin().sum(1) + (x.repeat(1, 3) * torch.cat((a, none, b))).cos().sum(1)

    x = torch.randn(3, 4).double()
    expected = per_example.reports(loss, SQUARE, x)
    assert per_example.verify(loss, SQUARE, x) <= 1e-10
    plan = per_example.plan(loss, SQUARE, x) if planned else None
    out = compiled(lambda p, x: per_example.reports(loss, p, x, plan=plan))(SQUARE, x)
    torch.testing.assert_close(out.norm, expected.norm)
    weights = torch.tensor([0.5, -1.0, 2.0]).double()
    actual = compiled(lambda p, x: per_example.weighted(loss, p, x, lambda report: weights).sum)(SQUARE, x)
    torch.testing.assert_close(actual, per_example.weighted(loss, SQUARE, x, lambda report: weights).sum)


def ensemble(model):
    """Two members and their directions, stacked."""
    members = [model.params, tree.map(lambda p: 0.9 * p + 0.1, model.params)]
    return members, tree.stack(members), tree.stack([direction_of(p) for p in members])


@pytest.mark.parametrize("name", [n if n in STACKED else pytest.param(n, marks=pytest.mark.slow) for n in BUILDS])
@quiet
def test_vmap_over_members(name):
    model = make(name)
    members, stacked, directions = ensemble(model)
    out = vmap(reported(model), (0, None, 0))(stacked, model.batch, directions)
    for i, member in enumerate(members):
        alone = per_example.Reports(*(None if x is None else tree.map(lambda x, i=i: x[i], x) for x in out))
        assert_reports(model, alone, params=member, tolerance=tolerance_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["class_token", "cnn", "lstm", "tied"])
def test_compiled_vmap_over_members(name):
    model = make(name)
    members, stacked, directions = ensemble(model)
    out = compiled(vmap(reported(model), (0, None, 0)))(stacked, model.batch, directions)
    for i, member in enumerate(members):
        alone = per_example.Reports(*(None if x is None else tree.map(lambda x, i=i: x[i], x) for x in out))
        assert_reports(model, alone, params=member)


@every_model
@quiet
def test_a_plan_of_another_n(name):
    """Made for all examples, used on two of them and on one."""
    model = make(name)
    plan = per_example.plan(model.loss, model.params, model.batch, ("norm", "dot", "gram", "square"))
    assert all(leaf in str(plan) for leaf in tree.names(model.params))
    for indices in ([2, 0], [1], [*range(N), 0, 1, 2]):
        batch = tree.map(lambda x, i=indices: x[i], model.batch)
        assert_reports(model, run(model, batch=batch, plan=plan), indices=indices, tolerance=tolerance_of(model))
