"""Noise scale, gradient diversity and signal-to-noise ratio: unbiased on gradients of a known distribution."""

import pytest
import torch

from core import random, spec, tree
from core.per_example import combine, each, reports
from core.scores import gradient_diversity, gradient_snr, layer_snr, noise
from nets.classifiers import mlp

F64 = torch.float64
PARAMS = {"a": torch.zeros(3, 2, dtype=F64), "b": [torch.zeros(4, dtype=F64)]}
MEAN = {"a": torch.tensor([[1.0, -2.0], [0.5, 0.0], [0.0, 0.3]], dtype=F64), "b": [torch.full((4,), 0.2, dtype=F64)]}
DEVIATION = {"a": torch.tensor([[1.0, 3.0], [0.0, 2.0], [1.5, 0.1]], dtype=F64), "b": [torch.arange(4).to(F64)]}
TRACE = tree.map(lambda d: d.square().sum(), DEVIATION)
SQUARE = tree.map(lambda m: m.square().sum(), MEAN)


def loss(params, batch):
    """<params, g_n>: its gradient for example n is g_n, whatever the parameters."""
    return sum((g * p).flatten(1).sum(1) for g, p in zip(tree.leaves(batch), tree.leaves(params), strict=True))


def gradients(key, shape):
    """Normal, of expectation MEAN and independent entries of DEVIATION; every leaf leads with `shape`."""
    keys = iter(random.split(key, 2))
    return tree.map(lambda m, d: m + d * random.normal(next(keys), (*shape, *m.shape), F64), MEAN, DEVIATION)


BATCH = gradients(random.key(1), (7,))


def close(a, b, **tolerance):
    for (name, x), y in zip(tree.items(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def mean_and_error(values):
    """The mean over the leading axis, and its standard error."""
    return values.mean(0), values.std(0) / len(values) ** 0.5


def test_parts_are_unbiased():
    """Over many batches of 3 the mean of each part is the population's within four standard errors."""
    many = gradients(random.key(2), (20_000, 3))
    out = torch.vmap(lambda batch: noise.estimate(reports(loss, PARAMS, batch)))(many)
    for part, truth in ((out.trace, TRACE), (out.square, SQUARE)):
        for values, true in zip(tree.leaves(part), tree.leaves(truth), strict=True):
            mean, error = mean_and_error(values)
            assert error < 0.1 and abs(mean - true) < 4 * error
    # The same sums without the correction are off by much more than that.
    naive, error = mean_and_error(many["a"].mean(1).square().sum((1, 2)))
    assert naive - SQUARE["a"] > 20 * error


def test_one_batch_is_the_covariance_of_numpy_style_loops():
    out = noise.estimate(reports(loss, PARAMS, BATCH))
    for name, g in tree.items(BATCH):
        rows = g.flatten(1)
        covariance = torch.cov(rows.T)
        squares = [rows[i] @ rows[j] for i in range(7) for j in range(7) if i != j]
        torch.testing.assert_close(tree.get(out.trace, name), covariance.trace(), rtol=1e-12, atol=0)
        # |G|² is the mean product of two different examples' gradients.
        torch.testing.assert_close(tree.get(out.square, name), sum(squares) / 42, rtol=1e-11, atol=1e-13)


def test_all_scores_of_a_net_are_those_of_a_loop_of_plain_gradients():
    net = mlp.Config((5, 7, 3))
    params = tree.cast(spec.init(random.key(3), mlp.spec(net)), F64)
    data = (random.normal(random.key(4), (6, 5), F64), torch.arange(6) % 3)

    def losses(p, batch):
        return torch.nn.functional.cross_entropy(mlp.apply(p, batch[0], net), batch[1], reduction="none")

    rows = []
    for i in range(6):
        variables = tree.map(lambda p: p.clone().requires_grad_(), params)
        value = losses(variables, tree.map(lambda x, i=i: x[i : i + 1], data)).sum()
        rows.append(torch.autograd.grad(value, tree.leaves(variables)))
    layers = [torch.stack(layer).flatten(1) for layer in zip(*rows, strict=True)]
    out = reports(losses, params, data, ("norm", "square"))
    exact = {"rtol": 1e-9, "atol": 1e-13}
    parts, whole = noise.estimate(out), torch.cat(layers, 1)
    assert len(layers) == len(tree.leaves(params)) > 3
    for trace, square, g in zip(tree.leaves(parts.trace), tree.leaves(parts.square), layers, strict=True):
        torch.testing.assert_close(trace, g.var(0).sum(), **exact)
        torch.testing.assert_close(square, ((g.sum(0) ** 2).sum() - (g**2).sum()) / 30, **exact)
    scale = whole.var(0).sum() / (((whole.sum(0) ** 2).sum() - (whole**2).sum()) / 30)
    torch.testing.assert_close(noise.scale(parts).total, scale, **exact)
    torch.testing.assert_close(gradient_diversity(out), (whole**2).sum() / (whole.sum(0) ** 2).sum(), **exact)
    means = layer_snr(out)
    for ratio, mean, g in zip(tree.leaves(gradient_snr(out)), tree.leaves(means), layers, strict=True):
        expected = torch.where(g.mean(0) == 0, 0.0, g.mean(0).square() / g.var(0))
        torch.testing.assert_close(ratio.flatten(), expected, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(mean, expected[expected > 0].mean(), rtol=1e-8, atol=1e-12)


def test_total_and_scale():
    out = noise.estimate(reports(loss, PARAMS, BATCH))
    whole, scale = noise.total(out), noise.scale(out)
    joined = torch.cat([g.flatten(1) for g in tree.leaves(BATCH)], 1)
    torch.testing.assert_close(whole.trace, torch.cov(joined.T).trace())
    torch.testing.assert_close(scale.total, whole.trace / whole.square)
    close(scale.layers, tree.map(lambda t, s: t / s, out.trace, out.square))
    assert scale.total.ndim == 0 and noise.scale(noise.Noise(TRACE, SQUARE)).total == pytest.approx(
        float(sum(tree.leaves(TRACE)) / sum(tree.leaves(SQUARE)))
    )


def test_micro_batches_are_one_batch():
    parts = [reports(loss, PARAMS, tree.map(lambda x, at=at: x[at], BATCH)) for at in (slice(0, 3), slice(3, 7))]
    close(noise.estimate(combine(parts)), noise.estimate(reports(loss, PARAMS, BATCH)), rtol=1e-12, atol=1e-13)


def test_two_batches_recover_what_they_were_made_of():
    norms = [tree.map(lambda s, t, size=size: s + t / size, SQUARE, TRACE) for size in (5, 40)]
    out = noise.two_batches(*norms, 5, 40)
    close(out, noise.Noise(TRACE, SQUARE), rtol=1e-12, atol=1e-13)


def test_average_is_a_loop():
    steps = [noise.estimate(reports(loss, PARAMS, gradients(random.key(i), (4,)))) for i in range(5)]
    corrected, plain = noise.init(PARAMS), noise.begin(steps[0])
    expected = steps[0]
    for step in steps:
        corrected = noise.update(corrected, step, 0.9)
    for step in steps[1:]:
        plain = noise.update(plain, step, 0.9)
        expected = tree.map(lambda old, new: 0.9 * old + 0.1 * new, expected, step)
    close(noise.average(plain), expected)
    weights = torch.tensor([0.9 ** (4 - i) for i in range(5)], dtype=F64)
    mean = tree.map(lambda *xs: (weights * torch.stack(xs)).sum() / weights.sum(), *steps)
    close(noise.average(corrected), mean, rtol=1e-6, atol=1e-9)
    assert all(x.ndim == 0 for x in tree.leaves(corrected))


def test_average_of_one_step_is_that_step():
    out = noise.estimate(reports(loss, PARAMS, BATCH))
    close(noise.average(noise.update(noise.init(PARAMS), out, 0.99)), out, rtol=1e-6, atol=0)
    assert all(x.isnan() for x in tree.leaves(noise.average(noise.init(PARAMS))))


def test_smoothed_record_is_the_average_after_each_step():
    steps = [noise.estimate(reports(loss, PARAMS, gradients(random.key(i), (4,)))) for i in range(4)]
    state, averages = noise.init(PARAMS), []
    for step in steps:
        state = noise.update(state, step, 0.9)
        averages.append(noise.average(state))
    close(noise.smooth(tree.stack(steps), 0.9), tree.stack(averages), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_compiled_step_is_the_eager_one():
    torch._dynamo.reset()

    def step(state, batch):
        return noise.update(state, noise.estimate(reports(loss, PARAMS, batch)), 0.95)

    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    eager = fast = noise.init(PARAMS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(3):
            batch = gradients(random.key(i), (4,))
            eager, fast = step(eager, batch), compiled(fast, batch)
    close(fast, eager, rtol=1e-6, atol=1e-9)
    torch._dynamo.reset()


def test_diversity_is_a_loop():
    out = reports(loss, PARAMS, BATCH)
    rows = [torch.cat([g[i].flatten() for g in tree.leaves(BATCH)]) for i in range(7)]
    expected = sum(r @ r for r in rows) / (sum(rows) @ sum(rows))
    torch.testing.assert_close(gradient_diversity(out), expected)


@pytest.mark.parametrize(
    ("rows", "value"), [([[2.0, 0.0]] * 4, 1 / 4), ([[1.0, 0.0], [0.0, 5.0]], 1.0)], ids=["equal", "orthogonal"]
)
def test_diversity_at_its_marks(rows, value):
    out = reports(loss, {"w": torch.zeros(2)}, {"w": torch.tensor(rows)})
    assert float(gradient_diversity(out)) == pytest.approx(value)


def test_snr_is_a_loop():
    out = reports(loss, PARAMS, BATCH, ("square",))
    gradients_of = each(loss, PARAMS, BATCH)
    expected = tree.map(lambda g: g.mean(0).square() / g.var(0), gradients_of)
    ratio = gradient_snr(out)
    positive = tree.map(lambda d: d > 0, DEVIATION)
    close(
        tree.map(lambda r, k: r[k], ratio, positive),
        tree.map(lambda e, k: e[k], expected, positive),
        rtol=1e-9,
        atol=1e-12,
    )
    layers = layer_snr(out)
    torch.testing.assert_close(layers["b"][0], ratio["b"][0][1:].mean())


def test_snr_of_many_examples_is_the_populations():
    out = reports(loss, PARAMS, gradients(random.key(5), (40_000,)), ("square",))
    ratio, truth = gradient_snr(out)["a"], (MEAN["a"] / DEVIATION["a"]).square()
    torch.testing.assert_close(ratio[0], truth[0], rtol=0.05, atol=0)
    assert ratio[1, 1] < 10 / 40_000  # no signal at all


def test_snr_of_what_has_no_gradient_is_zero():
    batch = {"w": torch.tensor([[1.0, 0.0], [2.0, 0.0]])}
    out = reports(loss, {"w": torch.zeros(2)}, batch, ("square",))
    torch.testing.assert_close(gradient_snr(out)["w"], torch.tensor([1.5**2 / 0.5, 0.0]))
    torch.testing.assert_close(layer_snr(out)["w"], torch.tensor(4.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: noise.estimate(reports(loss, PARAMS, BATCH, ("square",))),
            "noise.estimate: the reports have no norms",
        ),
        (
            lambda: noise.estimate(reports(loss, PARAMS, gradients(random.key(0), (1,)))),
            "at least two examples, got 1",
        ),
        (lambda: noise.two_batches(SQUARE, SQUARE, 4, 4), "1 <= small_size < large_size, got 4 and 4"),
        (lambda: gradient_diversity(reports(loss, PARAMS, BATCH, ("square",))), "the reports have no norms"),
        (lambda: gradient_snr(reports(loss, PARAMS, BATCH)), "the reports have no squares"),
    ],
    ids=["no_norms", "one_example", "sizes", "diversity", "snr"],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_reports_on_some_parameters():
    """Reports on some parameters give the scores of these alone."""
    name = tree.names(PARAMS)[0]
    want = ("norm", "square")
    whole = reports(loss, PARAMS, BATCH, want)
    part = reports(loss, PARAMS, BATCH, want, only=lambda leaf, _: leaf == name)
    for values, expected in zip(noise.estimate(part), noise.estimate(whole), strict=True):
        assert tree.names(values) == [name]
        torch.testing.assert_close(tree.get(values, name), tree.get(expected, name))
    torch.testing.assert_close(tree.leaves(gradient_snr(part))[0], tree.get(gradient_snr(whole), name))
    g = tree.get(each(loss, PARAMS, BATCH), name).flatten(1)
    torch.testing.assert_close(gradient_diversity(part), g.square().sum() / g.sum(0).square().sum())
