"""Weighted and clipped sums, micro-batches, verify and each."""

import pytest
import torch

from core import per_example, tree
from core.per_example import PerExampleError
from tests.core.per_example import net_models  # noqa: F401 - adds its models
from tests.core.per_example.models import make
from tests.core.per_example.test_reports import assert_reports, direction_of, loop, quiet, run, tolerance_of

SOME = (
    *(
        "cnn",
        "conv_of_different_groups",
        "detached",
        "embedding, padding",
        "gpt2_with_dropout",
        "half_inside",
        "layer_norm",
    ),
    *("linear 2-D", "linear_used_twice", "odd_tree", "positions", "tied, ghost, with bias", "weight_norm"),
    *("zero_gradient_for_some", "conv_transpose2d, groups, dilated", "weight_in_a_rule_and_without"),
)
some = pytest.mark.parametrize("name", SOME)


def assert_weighted(model, out, weights_of):
    gradients, losses = loop(model)
    gradients = tree.cast(gradients, torch.float64)
    norms = tree.map(lambda g: g.reshape(len(g), -1).norm(dim=1), gradients)
    total = torch.stack(tree.leaves(norms)).square().sum(0).sqrt()
    weights = weights_of(norms)
    tolerance = tolerance_of(model) * float(total.max())
    torch.testing.assert_close(out.losses, losses)
    torch.testing.assert_close(out.weights.double(), weights, rtol=1e-6, atol=10 * tolerance_of(model))
    torch.testing.assert_close(out.total_norm.double(), total, rtol=1e-6, atol=tolerance)
    for (name, g), norm, s, n in zip(
        tree.items(gradients), *(tree.leaves(x) for x in (norms, out.sum, out.norm)), strict=True
    ):
        assert s.dtype == tree.get(model.params, name).dtype
        assert float((n - norm).abs().max()) <= tolerance, name
        expected = torch.einsum("n,n...->...", weights, g)
        assert float((s - expected).abs().max()) <= tolerance * float(weights.abs().sum()), name
    return total


def signed(norm):
    """Weights that may be negative and depend on single parameters."""
    first = tree.leaves(norm)[0]
    return torch.cos(7 * first) + torch.arange(len(first), dtype=first.dtype)


@some
@pytest.mark.parametrize("method", ["kept", "twice", "auto"])
def test_weighted(name, method):
    model = make(name)
    for budget in (2**26, 64):
        out = per_example.weighted(model.loss, model.params, model.batch, signed, method=method, budget=budget)
        assert_weighted(model, out, signed)


@some
@pytest.mark.parametrize("method", ["kept", "twice"])
def test_clipped(name, method):
    model = make(name)
    total = per_example.reports(model.loss, model.params, model.batch).total_norm
    bound = float(total.sort().values[1:3].mean())  # between the second and the third
    out = per_example.clipped(model.loss, model.params, model.batch, bound, method=method)
    total = assert_weighted(model, out, per_example.clip_factor(bound))
    assert (out.weights * total <= bound * (1 + 1e-6)).all()
    assert (out.weights == 1).sum() >= 2 and (out.weights < 1).any()


def test_clipped_where_a_gradient_is_zero():
    def loss(p, x):
        return (p["w"] * x).sum(1).square()

    params, batch = (
        {"w": torch.ones(3, dtype=torch.float64)},
        torch.tensor([[0.0, 0, 0], [1, 2, 3]], dtype=torch.float64),
    )
    for method in ("kept", "twice"):
        out = per_example.clipped(loss, params, batch, 1.0, method=method)
        assert out.weights[0] == 1 and out.total_norm[0] == 0
        torch.testing.assert_close(out.sum["w"], batch[1] / batch[1].norm())


@some
@quiet
def test_micro_batches_combine(name):
    model = make(name)
    direction, parts = direction_of(model.params), []
    for part in (slice(1), slice(1, None)):
        batch = tree.map(lambda x, part=part: x[part], model.batch)
        want = ("norm", "dot", "square")
        parts.append(per_example.reports(model.loss, model.params, batch, want, direction=direction))
    whole = per_example.combine(parts)
    assert whole.gram is None
    assert_reports(model, whole, tolerance=tolerance_of(model))


def test_gram_matrices_do_not_combine():
    out = run(make("linear 2-D"))
    with pytest.raises(PerExampleError, match="Gram matrix is of one batch"):
        per_example.combine([out, out])


@some
def test_verify_and_each(name):
    model = make(name)
    tolerance = tolerance_of(model)
    assert 0 <= per_example.verify(model.loss, model.params, model.batch, tolerance=tolerance) <= tolerance
    per_example.verify(model.loss, model.params, model.batch, tolerance=tolerance, examples=2)
    gradients, _ = loop(model)
    for chunk in (None, 3, 1):
        out = per_example.each(model.loss, model.params, model.batch, chunk=chunk)
        torch.testing.assert_close(out, tree.sort(gradients), rtol=1e-6, atol=1e-9)


def test_each_takes_what_reports_refuses():
    def penalty(p, x):
        slope = torch.func.grad(lambda x: torch.tanh(x @ p["w"]).sum())(x)
        return slope.square().sum(1)

    params, x = (
        {"w": torch.linspace(-1, 1, 12).double().reshape(4, 3)},
        torch.linspace(-2, 1, 20).double().reshape(5, 4),
    )
    out = per_example.each(penalty, params, x)["w"]
    for i in range(5):
        torch.testing.assert_close(out[i], torch.func.grad(lambda p, i=i: penalty(p, x[i : i + 1])[0])(params)["w"])
    with pytest.raises(PerExampleError, match="per_example.each"):
        per_example.reports(penalty, params, x)


@some
def test_a_small_budget_changes_nothing(name):
    model = make(name)
    assert_reports(model, run(model, budget=1), tolerance=tolerance_of(model))


def test_compiled_clipping():
    """The method "twice"; "kept" is compiled in test_outputs."""
    model = make("tied, ghost, with bias")
    torch._dynamo.reset()
    step = torch.compile(
        lambda p, b: per_example.clipped(model.loss, p, b, 0.5, method="twice"),
        backend="aot_eager",
        fullgraph=True,
        dynamic=False,
    )
    assert_weighted(model, step(model.params, model.batch), per_example.clip_factor(0.5))


def changed_in_place(p, x):
    """The layer's input is multiplied after the layer has used it."""
    h = x.clone()
    y = (h @ p["w"].T).sin()
    h.mul_(2.0)
    return (y.sum(1) + h.sum(1)).square()


def table_changed_in_place(p, ids):
    ids = ids.clone()
    y = torch.nn.functional.embedding(ids, p["w"]).sin()
    ids.zero_()
    return y.sum((1, 2)) + ids.sum(1)


def used_twice(p, x):
    return changed_in_place(p, x) + (x @ p["w"].T).cos().sum(1)


W, INPUTS, IDS = torch.randn(4, 3).double(), torch.randn(5, 3).double(), torch.randint(4, (5, 3))
CALLS = {
    "reports": per_example.reports,
    "reports, gram": lambda *args: per_example.reports(*args, ("gram",)),
    "kept": lambda *args: per_example.clipped(*args, 1e9, method="kept"),
    "twice": lambda *args: per_example.clipped(*args, 1e9, method="twice"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("loss", "x"), [(changed_in_place, INPUTS), (table_changed_in_place, IDS), (used_twice, INPUTS)]
)
def test_input_changed_in_place_raises(loss, x, call):
    """As plain autograd does, whose check of versions kept inputs must not get past."""
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        CALLS[call](loss, {"w": W}, x)


@pytest.mark.parametrize("call", ["reports", "kept"])
def test_input_changed_in_place_raises_while_compiling(call):
    torch._dynamo.reset()
    f = torch.compile(
        lambda p, x: CALLS[call](used_twice, p, x).total_norm, backend="aot_eager", fullgraph=True, dynamic=False
    )
    with pytest.raises(Exception, match="modified by an inplace operation"):
        f({"w": W}, INPUTS)
