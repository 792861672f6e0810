"""Reports per example against a loop of plain gradients over batches of one, for every model of the two tables."""

import pytest
import torch

from core import per_example, tree
from tests.core.per_example import net_models  # noqa: F401 - adds its models
from tests.core.per_example.models import BUILDS, Model, make

WANT = ("norm", "dot", "gram", "square")
# torch.vmap has no rule of its own for bilinear forms.
quiet = pytest.mark.filterwarnings("ignore:There is a performance drop")
every_model = pytest.mark.parametrize("name", BUILDS)


def loop(model: Model, params=None, batch=None):
    """Every example's gradient (N, *shape) at each leaf, and the losses: plain autograd on batches of one."""
    params, batch = model.params if params is None else params, model.batch if batch is None else batch
    rows, losses = [], []
    for i in range(len(tree.leaves(batch)[0])):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in tree.leaves(params)]
        loss = model.loss(tree.unflatten(params, leaves), tree.map(lambda x, i=i: x[i : i + 1], batch)).squeeze(0)
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]
        rows.append(tree.unflatten(params, zeros))
        losses.append(loss.detach())
    return tree.map(lambda *gs: torch.stack(gs), *rows), torch.stack(losses)


def direction_of(params):
    generator = torch.Generator().manual_seed(1)
    return tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype), params)


def expected(gradients, direction):
    """What Reports should have, from the gradients themselves; in float64."""
    wide = tree.cast(gradients, torch.float64)
    flat = tree.map(lambda g: g.reshape(len(g), -1), wide)
    return {
        "norm": tree.map(lambda g: g.norm(dim=1), flat),
        "dot": tree.map(lambda g, v: g @ v.double().flatten(), flat, direction),
        "gram": tree.map(lambda g: g @ g.T, flat),
        "square": tree.map(lambda g: g.square().sum(0), wide),
        "sum": tree.map(lambda g: g.sum(0), wide),
    }


def assert_reports(model, found, params=None, batch=None, tolerance=1e-10):
    params = model.params if params is None else params
    gradients, losses = loop(model, params, batch)
    direction = direction_of(params)
    wanted = expected(gradients, direction)
    total = torch.stack(tree.leaves(wanted["norm"])).square().sum(0).sqrt()
    assert total.isfinite().all() and (total > 0).any()
    assert float((found.losses - losses).abs().max()) <= tolerance * float(1 + losses.abs().max())
    length = float(tree.norm(direction))
    scales = {"norm": total, "dot": total * length, "gram": total[:, None] * total, "sum": total.sum()}
    scales["square"] = total.square().sum()
    for quantity, by_leaf in wanted.items():
        got = getattr(found, quantity)
        if got is None:
            continue
        assert tree.names(got) == tree.names(params)
        for (leaf, want), value in zip(tree.items(by_leaf), tree.leaves(got), strict=True):
            assert value.shape == want.shape, f"{quantity} of '{leaf}': {tuple(value.shape)}"
            scale = scales[quantity].clamp(min=1e-300)
            error = float(((value.double() - want).abs() / scale).max()) if want.numel() else 0.0
            assert error <= tolerance, f"{quantity} of '{leaf}' is off by {error:.1e}"
    return wanted, total


def assert_totals(found, wanted, total, n):
    torch.testing.assert_close(found.total_norm, total)
    torch.testing.assert_close(found.total_dot, sum(tree.leaves(wanted["dot"])))
    torch.testing.assert_close(found.total_gram, sum(tree.leaves(wanted["gram"])))
    noise = 1e-10 * float(total.max()) ** 2
    pairs = zip(*(tree.leaves(wanted[q]) for q in ("sum", "square")), strict=True)
    for (s, square), mean, moment, variance in zip(
        pairs, *(tree.leaves(x) for x in (found.mean, found.second_moment, found.variance)), strict=True
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
    found = run(model)
    wanted, total = assert_reports(model, found, tolerance=tolerance_of(model))
    if tolerance_of(model) == 1e-10:
        assert_totals(found, wanted, total, len(found.losses))
    torch.testing.assert_close((model.params, model.batch), before, rtol=0, atol=0)


@every_model
@quiet
def test_norms_alone_equal_a_loop(name):
    """Other ways are chosen than where a Gram matrix is wanted."""
    model = make(name)
    assert_reports(model, per_example.reports(model.loss, model.params, model.batch), tolerance=tolerance_of(model))
