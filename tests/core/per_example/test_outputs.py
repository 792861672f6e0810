"""Aux outputs, reports on some of the parameters, clipping by groups, and plans for each of them."""

import pytest
import torch
from torch.nn import functional as F

from core import per_example, tree
from core.per_example import PerExampleError
from tests.core.per_example import net_models  # noqa: F401 - adds its models
from tests.core.per_example.models import Draw, N, make
from tests.core.per_example.test_reports import direction_of, loop
from tests.core.per_example.test_weighted import SOME

DRAW = Draw("outputs")
P = {"first": DRAW.linear(4, 5), "last": DRAW.linear(5, 3), "scale": DRAW(3)}
X = {"x": DRAW(N, 4), "y": DRAW.ids(3, N)}


def logits(p, x):
    return F.linear(torch.tanh(F.linear(x, p["first"]["weight"], p["first"]["bias"])), **p["last"]) * p["scale"]


def losses(p, batch):
    return F.cross_entropy(logits(p, batch["x"]), batch["y"], reduction="none")


def with_aux(p, batch):
    z = logits(p, batch["x"])
    aux = {
        "logits": z,
        "right": z.argmax(1) == batch["y"],
        "scale": p["scale"],
        "size": p["scale"].norm(),
        "total": z.sum(),
    }
    return F.cross_entropy(z, batch["y"], reduction="none"), aux


def aux(P, X):
    z = logits(P, X["x"])
    return {
        "logits": z,
        "right": z.argmax(1) == X["y"],
        "scale": P["scale"],
        "size": P["scale"].norm(),
        "total": z.sum(),
    }


def test_aux():
    plain = per_example.reports(losses, P, X)
    out = per_example.reports(with_aux, P, X, has_aux=True)
    torch.testing.assert_close(out.aux, aux(P, X))
    assert all(type(leaf) is torch.Tensor and not leaf.requires_grad for leaf in tree.leaves(out.aux))
    torch.testing.assert_close((out.losses, out.sum, out.norm), (plain.losses, plain.sum, plain.norm))


def test_aux_everywhere():
    plan = per_example.plan(with_aux, P, X, has_aux=True)
    torch.testing.assert_close(per_example.reports(with_aux, P, X, has_aux=True, plan=plan).aux, aux(P, X))
    for method in ("kept", "twice"):
        out = per_example.clipped(with_aux, P, X, 0.1, method=method, has_aux=True)
        torch.testing.assert_close(out.aux, aux(P, X))
        torch.testing.assert_close(out.sum, per_example.clipped(losses, P, X, 0.1, method=method).sum)
    assert per_example.reports(losses, P, X).aux == ()
    none = per_example.reports(lambda p, x: (losses(p, x), None), P, X, has_aux=True)
    assert none.aux is None


def test_aux_of_micro_batches():
    parts = [tree.map(lambda x, s=s: x[s], X) for s in (slice(1), slice(1, None))]

    def loss(p, batch):
        z = logits(p, batch["x"])
        return losses(p, batch), {"logits": z, "mean": z.mean()}

    whole = per_example.combine([per_example.reports(loss, P, part, has_aux=True) for part in parts])
    z = logits(P, X["x"])
    torch.testing.assert_close(whole.aux, {"logits": z, "mean": z.mean()})


def test_aux_is_not_differentiated():
    def f(p):
        return per_example.reports(with_aux, p, X, has_aux=True).aux["logits"].sum()

    with pytest.raises(PerExampleError, match="cannot be differentiated again"):
        torch.func.grad(f)(P)


@pytest.mark.parametrize(
    ("loss", "has_aux", "message"),
    [
        (
            with_aux,
            False,
            r"must return one value per example, \(N,\); it returned tuple; with an aux output, give has_aux",
        ),
        (losses, True, r"with has_aux the loss must return \(losses, aux\); it returned a tensor"),
        (lambda p, x: (losses(p, x), {"n": 3}), True, "aux, leaf 'n', is int; expected a tensor"),
        (lambda p, x: (losses(p, x), "text"), True, "aux is str; expected a tensor"),
        (lambda p, x: (losses(p, x).sum(), ()), True, r"must return one value per example, \(N,\); it returned \(\)"),
    ],
)
def test_wrong_aux(loss, has_aux, message):
    with pytest.raises(PerExampleError, match=message):
        per_example.reports(loss, P, X, has_aux=has_aux)


def of_last(name, leaf):
    return name.startswith("last") or name == "scale"


def test_only_some_parameters():
    want, direction = ("norm", "dot", "gram", "square"), direction_of(P)
    whole = per_example.reports(losses, P, X, want, direction=direction)
    out = per_example.reports(losses, P, X, want, only=of_last, direction=direction)
    torch.testing.assert_close(out.sum, whole.sum)
    for quantity in want:
        expected = tree.partition(getattr(whole, quantity), of_last)[0]
        torch.testing.assert_close(getattr(out, quantity), expected)
    assert tree.names(out.norm) == ["last.bias", "last.weight", "scale"]
    torch.testing.assert_close(out.total_norm, per_example.total_norm(out.norm))
    torch.testing.assert_close(out.variance, tree.partition(whole.variance, of_last)[0])
    torch.testing.assert_close(out.mean, whole.mean)
    part = tree.partition(direction, of_last)[0]
    torch.testing.assert_close(per_example.reports(losses, P, X, want, only=of_last, direction=part), out)


def test_others_may_be_used_in_any_way():
    """No report, no rule: what `reports` refuses of a parameter does not matter for the others."""

    def loss(p, batch):
        first = batch["x"].T @ batch["x"] @ p["first"]["weight"].T  # the batch axis comes second, and is summed over
        return losses(p, batch) + first.sum() / (1 + p["first"]["bias"].data.norm())

    out = per_example.reports(loss, P, X, only=of_last)
    torch.testing.assert_close(out.sum, torch.func.grad(lambda p: loss(p, X).sum())(P))
    torch.testing.assert_close(out.norm, tree.partition(per_example.reports(losses, P, X).norm, of_last)[0])
    with pytest.raises(PerExampleError):
        per_example.reports(loss, P, X)


def test_only_and_its_plan():
    plan = per_example.plan(losses, P, X, only=of_last)
    assert list(plan.leaves) == ["last.bias", "last.weight", "scale"]
    out = per_example.reports(losses, P, X, only=of_last, plan=plan)
    torch.testing.assert_close(out, per_example.reports(losses, P, X, only=of_last))
    for options in ({}, {"only": lambda name, leaf: name == "scale"}):
        with pytest.raises(PerExampleError, match="the plan was made for"):
            per_example.reports(losses, P, X, plan=plan, **options)
    with pytest.raises(PerExampleError, match="`only` selects no parameter"):
        per_example.reports(losses, P, X, only=lambda name, leaf: False)
    with pytest.raises(PerExampleError, match="the direction lacks 'last.bias'"):
        per_example.reports(losses, P, X, "dot", only=of_last, direction={"scale": P["scale"]})


@pytest.mark.parametrize("name", [n for n in SOME if n not in ("half_inside", "odd_tree")])
@pytest.mark.parametrize("method", ["kept", "twice"])
def test_clipping_by_parameter(name, method):
    """Each parameter alone, by a tree of weights."""
    model = make(name)
    gradients, _ = loop(model)
    norms = tree.map(lambda g: g.flatten(1).norm(dim=1), gradients)
    bounds = {leaf: float(norm.median()) + 1e-3 for leaf, norm in tree.items(norms)}
    out = per_example.clipped(model.loss, model.params, model.batch, bounds, method=method)
    for (leaf, g), sums, weights in zip(
        tree.items(gradients), tree.leaves(out.sum), tree.leaves(out.weights), strict=True
    ):
        factor = (bounds[leaf] / g.flatten(1).norm(dim=1)).clamp(max=1)
        torch.testing.assert_close(weights, factor)
        torch.testing.assert_close(sums, torch.einsum("n,n...->...", factor, g), rtol=1e-7, atol=1e-9)
    assert any((w < 1).any() for w in tree.leaves(out.weights))


@pytest.mark.parametrize("method", ["kept", "twice"])
def test_clipping_by_group(method):
    bounds = {"first.*": 0.05, "*.bias": 0.02, "*": 0.1}
    out = per_example.clipped(losses, P, X, bounds, method=method)
    gradients = per_example.each(losses, P, X)
    groups = {"first.*": ["first.bias", "first.weight"], "*.bias": ["last.bias"], "*": ["last.weight", "scale"]}
    for pattern, names in groups.items():
        norm = torch.cat([tree.get(gradients, name).flatten(1) for name in names], 1).norm(dim=1)
        factor = (bounds[pattern] / norm).clamp(max=1)
        assert (factor < 1).any()
        for name in names:
            torch.testing.assert_close(tree.get(out.weights, name), factor)
            expected = torch.einsum("n,n...->...", factor, tree.get(gradients, name))
            torch.testing.assert_close(tree.get(out.sum, name), expected)


def test_one_group_is_flat_clipping():
    flat, grouped = (per_example.clipped(losses, P, X, bound) for bound in (0.1, {"*": 0.1}))
    torch.testing.assert_close(grouped.sum, flat.sum)
    assert all(torch.equal(w, flat.weights) for w in tree.leaves(grouped.weights))


@pytest.mark.slow
def test_compiled():
    """Aux, some of the parameters and groups, of a small net: as eager."""
    params = {"scale": P["scale"], "weight": DRAW(3, 4)}

    def loss(p, batch):
        z = F.linear(batch["x"], p["weight"]) * p["scale"]
        return F.cross_entropy(z, batch["y"], reduction="none"), {"logits": z, "size": p["scale"].norm()}

    def f(p, x):
        out = per_example.reports(loss, p, x, only=of_last, has_aux=True)
        clipped = per_example.clipped(loss, p, x, {"s*": 0.02, "*": 0.1}, method="kept", has_aux=True)
        return out.aux, out.sum, out.norm, clipped.sum, clipped.weights

    torch._dynamo.reset()
    out = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=False)(params, X)
    torch.testing.assert_close(out, f(params, X))
