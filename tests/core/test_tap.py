"""Taps deliver their report through every transform, and compiled values equal eager ones."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from core.tap import tap

X = torch.linspace(-1.0, 2.0, 12, dtype=torch.float64).reshape(4, 3)
SINK = torch.zeros(3, dtype=torch.float64)


def loss(x, sink):
    """The gradient by x is that of sum(sin x); the report is the mean over the batch."""
    return torch.sin(tap(x, sink, x.mean(0))).sum()


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")


@pytest.fixture(params=["eager", "compiled"])
def mode(request):
    return compiled if request.param == "compiled" else lambda f: f


def test_grad_delivers_the_report_and_leaves_the_gradient_alone(mode):
    gradient, report = mode(grad(loss, argnums=(0, 1)))(X, SINK)
    torch.testing.assert_close(gradient, X.cos())
    torch.testing.assert_close(report, X.mean(0))


def test_the_report_is_not_scaled_by_the_cotangent(mode):
    report = mode(grad(lambda sink: 7.0 * loss(X, sink)))(SINK)
    torch.testing.assert_close(report, X.mean(0))


def test_two_uses_add_up_and_no_use_reports_nothing(mode):
    twice, never = mode(grad(lambda s, unused: loss(X, s) + loss(2 * X, s), argnums=(0, 1)))(SINK, SINK)
    torch.testing.assert_close(twice, 3 * X.mean(0))
    assert (never == 0).all()


def test_vmap_of_grad_reports_for_each(mode):
    stacked = torch.stack([X, 2 * X])
    report = mode(vmap(grad(loss, argnums=1), in_dims=(0, None)))(stacked, SINK)
    torch.testing.assert_close(report, stacked.mean(1))


def test_grad_of_vmap_sums_the_reports(mode):
    def mean_of_two(sink, xs):
        return vmap(loss, in_dims=(0, None))(xs, sink).mean()

    xs = torch.stack([X, 2 * X])
    torch.testing.assert_close(mode(grad(mean_of_two))(SINK, xs), 3 * X.mean(0))


def test_jvp_passes_the_tangent_through(mode):
    tangent = torch.ones_like(X)
    value, out = mode(lambda x: jvp(lambda x: loss(x, SINK), (x,), (tangent,)))(X)
    torch.testing.assert_close(out, X.cos().sum())


def test_forward_over_reverse_gives_the_hessian_product(mode):
    def product(x):
        return jvp(grad(lambda x: loss(x, SINK)), (x,), (torch.ones_like(x),))[1]

    torch.testing.assert_close(mode(product)(X), -X.sin())


def test_reverse_over_reverse_carries_no_derivative_of_the_report(mode):
    def inner(x):
        gradient, report = grad(loss, argnums=(0, 1))(x, SINK)
        return gradient.sum() + report.sum()

    torch.testing.assert_close(mode(grad(inner))(X), -X.sin())


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"sink has shape \(2,\), the report \(3,\)"):
        tap(X, torch.zeros(2), X.mean(0))
