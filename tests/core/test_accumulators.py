import numpy as np
import pytest
import torch

from core import random, tree
from core.accumulators import histogram, log_edges, moments, products, quantiles, top

VALUES = random.normal(random.key(3), (1000,), torch.float64).exp() * torch.where(torch.arange(1000) % 3 == 0, -1, 1)


def run(accumulator, values, cuts=(1, 400, 401, 777)):
    """The state after the batches between the cuts."""
    count = len(tree.leaves(values)[0])
    state = accumulator.init(values)
    for start, end in zip((0, *cuts), (*cuts, count), strict=True):
        part = tree.map(lambda x, start=start, end=end: x[start:end], values)
        state = accumulator.update(state, part, torch.arange(start, end))
    return state


def halves(accumulator, values):
    """The merged states of two halves, the second first."""
    n = len(values)
    states = []
    for part in (torch.arange(n // 2, n), torch.arange(n // 2)):
        states.append(accumulator.update(accumulator.init(values), values[part], part))
    return accumulator.merge(*states)


def test_moments_of_a_tree_are_numpys():
    key = random.key(0)
    values = {"a": random.normal(key, (900, 3, 2)), "b": (1e6 + random.normal(random.fold_in(key, 1), (900,)),)}
    out = moments().result(run(moments(), values))
    assert out.count == 900
    for name, x in tree.items(values):
        x = x.numpy().astype(np.float64)
        np.testing.assert_allclose(tree.get(out.mean, name), x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(tree.get(out.variance, name), x.var(0, ddof=1), rtol=1e-10)


def test_moments_of_none_and_of_one():
    state = moments().init(VALUES)
    assert moments().result(state).count == 0 and moments().result(state).mean == 0
    one = moments().result(moments().update(state, VALUES[:1], torch.arange(1)))
    assert one.mean == VALUES[0] and one.variance.isnan()


@pytest.mark.parametrize("edges", [torch.linspace(-3, 4, 8), log_edges(1e-3, 10, 12)], ids=["linear", "log"])
def test_histogram_is_numpys(edges):
    values = torch.cat([VALUES, edges, edges[:1], torch.tensor([float("nan"), float("inf"), -float("inf")])])
    out = histogram(edges).result(run(histogram(edges), values))
    finite = values[values.isfinite()].numpy()
    np.testing.assert_array_equal(out.counts, np.histogram(finite, edges.numpy())[0])
    assert out.below == (values < edges[0]).sum() and out.above == (values > edges[-1]).sum() and out.nan == 1
    assert out.counts.sum() + out.below + out.above + out.nan == len(values)


@pytest.mark.parametrize("accuracy", [0.01, 0.1])
def test_quantiles_are_within_the_accuracy(accuracy):
    scale = torch.cat([VALUES, torch.zeros(50), 1e-30 * VALUES, 1e30 * VALUES])
    levels = [0.0, 0.01, 0.25, 0.49, 0.5, 0.51, 0.9, 1.0]
    sketch = quantiles(levels, accuracy)
    out = sketch.result(run(sketch, scale))
    exact = scale.sort().values[(torch.tensor(levels, dtype=torch.float64) * (len(scale) - 1)).floor().long()]
    assert ((out - exact).abs() <= accuracy * exact.abs() * (1 + 1e-9)).all()
    assert (exact == 0).any() or (exact < 0).any() and (exact > 0).any()


def test_quantiles_of_extremes():
    sketch = quantiles([0.0, 0.5, 1.0])
    extremes = torch.tensor(
        [-float("inf"), torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max, float("inf")]
    )
    out = sketch.result(sketch.update(sketch.init(extremes), extremes, torch.arange(4)))
    assert out[0] == -float("inf") and out[2] == float("inf")
    assert out[1] == pytest.approx(float(extremes[1]), rel=0.0101)
    largest = sketch.update(sketch.init(extremes), extremes[2:3], torch.arange(1))
    assert sketch.result(largest)[1] == pytest.approx(float(extremes[2]), rel=0.0101)
    assert sketch.result(sketch.init(extremes)).isnan().all()
    broken = sketch.update(largest, torch.tensor([float("nan")]), torch.arange(1))
    assert sketch.result(broken).isnan().all()


def test_size_of_the_quantile_sketch():
    assert len(quantiles().init(VALUES)) == 17612


@pytest.mark.parametrize("largest", [True, False])
def test_top_has_the_extremes_and_whose_they_are(largest):
    values = VALUES.round(decimals=1)  # has many equal ones
    out = top(40, largest).result(run(top(40, largest), values))
    order = (-values if largest else values).argsort(stable=True)[:40]
    assert torch.equal(out.indices, order) and torch.equal(out.values, values[order])


def test_top_of_fewer_than_k_leaves_nan_out_and_keeps_infinity():
    values = torch.tensor([1.0, float("nan"), -float("inf"), 3.0])
    out = top(9).result(run(top(9), values, cuts=(2,)))
    assert out.indices.tolist() == [3, 0, 2] and out.values.tolist() == [3.0, 1.0, -float("inf")]


def test_products():
    vectors = random.normal(random.key(5), (300, 4))
    out = run(products(), vectors, cuts=(100, 250))
    assert out.count == 300
    torch.testing.assert_close(out.products, vectors.double().T @ vectors.double())
    torch.testing.assert_close(out.sum, vectors.double().sum(0))


ALL = {
    "moments": moments(),
    "histogram": histogram(torch.linspace(-3, 4, 8)),
    "quantiles": quantiles(),
    "top": top(7),
    "smallest": top(7, largest=False),
}


@pytest.mark.parametrize("name", ALL)
def test_merged_halves_are_the_whole(name):
    merged, whole = (ALL[name].result(f(ALL[name], VALUES)) for f in (halves, run))
    exact = {} if name == "moments" else {"rtol": 0, "atol": 0}  # sums depend on their order in the last bits
    torch.testing.assert_close(tuple(tree.leaves(merged)), tuple(tree.leaves(whole)), **exact)


@pytest.mark.parametrize("name", ALL)
def test_updates_are_pure_and_compile(name):
    torch._dynamo.reset()
    state = run(ALL[name], VALUES[:500], cuts=(200,))
    before = tree.map(torch.clone, state)
    part = VALUES[500:], torch.arange(500, 1000)
    after = ALL[name].update(state, *part)
    compiled = torch.compile(ALL[name].update, fullgraph=True, dynamic=False, backend="aot_eager")(state, *part)
    assert all(map(torch.equal, tree.leaves(state), tree.leaves(before)))
    torch.testing.assert_close(tuple(tree.leaves(compiled)), tuple(tree.leaves(after)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: histogram([0.0, 2.0, 1.0]), r"histogram: edges must increase, and be at least two, got \[0.0, 2.0"),
        (lambda: histogram([1.0]), "at least two"),
        (
            lambda: log_edges(0.0, 1.0, 3),
            "log_edges: expected 0 < low < high and at least one bin, got 0.0, 1.0 and 3 bins",
        ),
        (lambda: quantiles([1.5]), r"quantiles: levels must lie in \[0, 1\], got \[1.5\]"),
        (lambda: quantiles([0.5], 1.0), "quantiles: accuracy must lie in"),
        (lambda: top(0), "top: k must be at least 1, got 0"),
        (lambda: top(3).init(torch.zeros(4, 2)), r"top: expected one number per example, \(N,\), got \(4, 2\)"),
        (lambda: quantiles().init({"a": VALUES}), "quantiles: expected one number per example, .* got dict"),
        (lambda: products().init(VALUES), r"products: expected vectors \(N, size\), got \(1000,\)"),
    ],
    ids=["order", "one", "log", "level", "accuracy", "k", "matrix", "tree", "vector"],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
