"""Reports per example against a loop of plain gradients over batches of one, for every model of the two tables."""

import functools

import pytest
import torch

from core import per_example, tree
from tests.core.per_example import net_models  # noqa: F401 - adds its models
from tests.core.per_example.models import BUILDS, Model, make

WANT = ("norm", "dot", "gram", "square")
# torch.vmap has no rule of its own for bilinear forms.
quiet = pytest.mark.filterwarnings("ignore:There is a performance drop")
every_model = pytest.mark.parametrize("name", BUILDS)


@functools.cache
def _loop_of(name: str):
    model = make(name)
    return loop(model, model.params, model.batch)


def loop(model: Model, params=None, batch=None):
    """The gradient of every example, (N, *shape) at each leaf, and the losses: plain autograd on batches of one."""
    if params is None and batch is None:
        return _loop_of(model.name)
    params, batch = model.params if params is None else params, model.batch if batch is None else batch
    rows, losses = [], []
    for i in range(len(tree.leaves(batch)[0])):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in tree.leaves(params)]
        loss = model.loss(tree.unflatten(params, leaves), tree.map(lambda x, i=i: x[i : i + 1], batch)).squeeze(0)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)]
        rows.append(tree.unflatten(params, zeros))
        losses.append(loss.detach())
    return tree.map(lambda *gs: torch.stack(gs), *rows), torch.stack(losses)


def direction_of(params):
    generator = torch.Generator().manual_seed(1)
    return tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype), params)


def quantities_of(gradients, direction):
    """The quantities of Reports from the gradients themselves, in float64."""
    wide = tree.cast(gradients, torch.float64)
    flat = tree.map(lambda g: g.reshape(len(g), -1), wide)
    return {
        "norm": tree.map(lambda g: g.norm(dim=1), flat),
        "dot": tree.map(lambda g, v: g @ v.double().flatten(), flat, direction),
        "gram": tree.map(lambda g: g @ g.T, flat),
        "square": tree.map(lambda g: g.square().sum(0), wide),
        "sum": tree.map(lambda g: g.sum(0), wide),
    }


def assert_reports(model, out, params=None, indices=None, tolerance=1e-10):
    """Compare with the loop; `indices`: of the examples in `out`, if they are not those of the model's batch."""
    gradients, losses = loop(model, params)
    params = model.params if params is None else params
    if indices is not None:
        gradients, losses = tree.map(lambda g: g[indices], gradients), losses[indices]
    direction = direction_of(params)
    expected = quantities_of(gradients, direction)
    total = torch.stack(tree.leaves(expected["norm"])).square().sum(0).sqrt()
    assert total.isfinite().all() and (total > 0).any()
    assert float((out.losses - losses).abs().max()) <= tolerance * float(1 + losses.abs().max())
    length = float(tree.norm(direction))
    scales = {"norm": total, "dot": total * length, "gram": total[:, None] * total, "sum": total.sum()}
    scales["square"] = total.square().sum()
    for quantity, by_leaf in expected.items():
        values = getattr(out, quantity)
        if values is None:
            continue
        assert tree.names(values) == tree.names(params)
        for (leaf, want), value in zip(tree.items(by_leaf), tree.leaves(values), strict=True):
            assert value.shape == want.shape, f"{quantity} of '{leaf}': {tuple(value.shape)}"
            scale = scales[quantity].clamp(min=1e-300)
            error = float(((value.double() - want).abs() / scale).max()) if want.numel() else 0.0
            assert error <= tolerance, f"{quantity} of '{leaf}' is off by {error:.1e}"
    return expected, total


def assert_totals(out, expected, total, n):
    torch.testing.assert_close(out.total_norm, total)
    torch.testing.assert_close(out.total_dot, sum(tree.leaves(expected["dot"])))
    torch.testing.assert_close(out.total_gram, sum(tree.leaves(expected["gram"])))
    noise = 1e-10 * float(total.max()) ** 2
    pairs = zip(*(tree.leaves(expected[q]) for q in ("sum", "square")), strict=True)
    for (s, square), mean, moment, variance in zip(
        pairs, *(tree.leaves(x) for x in (out.mean, out.second_moment, out.variance)), strict=True
    ):
        torch.testing.assert_close(mean, s / n, check_dtype=False, rtol=1e-6, atol=noise)
        torch.testing.assert_close(moment, square / n, check_dtype=False, rtol=1e-6, atol=noise)
        direct = (square - s.square() / n) / (n - 1)
        torch.testing.assert_close(variance, direct.clamp(min=0), check_dtype=False, rtol=1e-6, atol=noise)


def run(model, params=None, batch=None, **options):
    params, batch = model.params if params is None else params, model.batch if batch is None else batch
    return per_example.reports(model.loss, params, batch, WANT, direction=direction_of(params), **options)


def tolerance_of(model):
    return 1e-10 if all(p.dtype == torch.float64 for p in tree.leaves(model.params)) else 1e-6


@every_model
@quiet
def test_reports_equal_a_loop(name):
    model = make(name)
    before = tree.map(torch.clone, (model.params, model.batch))
    out = run(model)
    expected, total = assert_reports(model, out, tolerance=tolerance_of(model))
    if tolerance_of(model) == 1e-10:
        assert_totals(out, expected, total, len(out.losses))
    torch.testing.assert_close((model.params, model.batch), before, rtol=0, atol=0)


@every_model
@quiet
def test_norms_alone_equal_a_loop(name):
    """Other ways than where a Gram matrix is wanted."""
    model = make(name)
    assert_reports(model, per_example.reports(model.loss, model.params, model.batch), tolerance=tolerance_of(model))
