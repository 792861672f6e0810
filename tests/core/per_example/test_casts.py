"""Casts of parameters inside the loss: chains of them, integers, complex numbers, and autocast."""

import pytest
import torch
from torch.nn import functional as F

from core import per_example, tree
from tests.core.per_example.models import Draw, N, value

DRAW = Draw("casts")
P = {"v": 3 * DRAW(4, 4), "w": DRAW(4, 4)}
X = DRAW(N, 4)


def loop(loss, params, batch):
    """Gradients and losses of batches of one by plain autograd: ({name: (N, *shape)}, (N,))."""
    rows, losses = [], []
    for i in range(len(tree.leaves(batch)[0])):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in tree.leaves(params)]
        out = loss(tree.unflatten(params, leaves), tree.map(lambda x, i=i: x[i : i + 1], batch))[0]
        gradients = torch.autograd.grad(out, leaves, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)])
        losses.append(out.detach())
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    return dict(zip(tree.names(params), stacked, strict=True)), torch.stack(losses)


def assert_equal_to_loop(loss, params, batch, out, tolerance):
    """Losses and norms, the latter relative to the example's total norm."""
    gradients, losses = loop(loss, params, batch)
    torch.testing.assert_close(out.losses, losses, rtol=tolerance, atol=tolerance)
    norms = {name: g.flatten(1).double().norm(dim=1) for name, g in gradients.items()}
    total = torch.stack(list(norms.values())).norm(dim=0).clamp(min=1e-9)
    for name, norm in tree.items(out.norm):
        error = float(((norm.double() - norms[name]) / total).abs().max())
        assert error <= tolerance, f"'{name}' is off by {error:.1e}"


CHAINS = {
    "to integers and back": lambda p, x: F.linear(x, p["v"].to(torch.int32).double()) * p["w"][0],
    "to bool and back": lambda p, x: F.linear(x, (p["v"] > 0).double()) * p["w"][0],
    "int() of a copy": lambda p, x: (x * p["v"][0].int().double()) + p["w"][0],
    "elementwise": lambda p, x: p["w"][0].bfloat16().double() * x,
    "elementwise, after the cast": lambda p, x: p["w"].bfloat16().double()[0] * x,
    "elementwise, transposed": lambda p, x: x @ (p["w"].T.bfloat16().float().double() * 2).T,
    "type_as": lambda p, x: p["w"].half().type_as(x)[0] * x,
    "to like another": lambda p, x: p["w"].half().to(p["v"])[0] * x,
    "of another parameter": lambda p, x: x.float().to(p["w"]) * p["w"][0],
    "twice the same": lambda p, x: F.linear(x, p["w"].double().double()),
    "complex parts": lambda p, x: p["w"].to(torch.complex128)[0].real * x + (1j * p["v"][0]).imag,
    "complex": lambda p, x: torch.view_as_real(x.to(torch.complex128) @ p["w"].to(torch.complex128)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chain_of_casts(name):
    """Exactly as plain autograd: the value after every cast, no gradient through integers."""

    def loss(p, x):
        return value(CHAINS[name](p, x))

    assert_equal_to_loop(loss, P, X, per_example.reports(loss, P, X), 1e-12)
    out = per_example.clipped(loss, P, X, 1e9)
    assert_equal_to_loop(loss, P, X, out, 1e-12)


def test_rule_of_a_chain_of_casts_sees_the_rounded_weight():
    """Its value is that of the rounded weight; the gradient is reported before the cast back would round it."""

    def loss(p, x):
        return value(F.linear(x, p["w"].bfloat16().double()))

    out = per_example.reports(loss, P, X)
    torch.testing.assert_close(out.losses, loss(P, X), rtol=1e-12, atol=1e-12)
    rounded = {"w": P["w"].bfloat16().double()}
    gradients, _ = loop(lambda p, x: value(F.linear(x, p["w"])), rounded, X)
    torch.testing.assert_close(out.norm["w"], gradients["w"].flatten(1).norm(dim=1))
    torch.testing.assert_close(out.norm["v"], torch.zeros(N, dtype=torch.float64))


@pytest.mark.slow
def test_compiled_chain_of_casts():
    def loss(p, x):
        return value(p["w"][0].bfloat16().double() * F.linear(x, p["v"].to(torch.int32).double()))

    torch._dynamo.reset()
    f = torch.compile(per_example.reports, backend="aot_eager", fullgraph=True, dynamic=False)
    assert_equal_to_loop(loss, P, X, f(loss, P, X), 1e-12)


def test_chain_of_casts_under_no_grad_around_the_call():
    def loss(p, x):
        return value(F.linear(x, p["w"].float().double()))

    expected = per_example.reports(loss, P, X).total_norm
    with torch.no_grad():
        torch.testing.assert_close(per_example.reports(loss, P, X).total_norm, expected, rtol=0, atol=0)


SINGLE = tree.cast({"b": DRAW(4), "s": DRAW(4), "w": DRAW(4, 4)}, torch.float32)
SEQUENCES, IDS = DRAW(N, 5, 4).float(), DRAW.ids(4, N, 5)
AUTOCAST = {
    "linear of vectors": (lambda p, x: F.linear(x[:, 0], p["w"], p["b"]), SEQUENCES),
    "linear of sequences": (lambda p, x: F.linear(x, p["w"], p["b"]), SEQUENCES),
    "matmul": (lambda p, x: x @ p["w"].T + p["b"] * p["s"], SEQUENCES),
    "tied": (lambda p, x: F.linear(F.linear(x, p["w"]), p["w"].T), SEQUENCES),
    "conv": (lambda p, x: F.conv1d(x.mT, p["w"][:, :, None], p["b"]), SEQUENCES),
    "conv_transpose": (lambda p, x: F.conv_transpose1d(x.mT, p["w"][:, :, None], p["b"]), SEQUENCES),
    "layer norm": (lambda p, x: F.layer_norm(F.linear(x, p["w"]), (4,), p["s"], p["b"]), SEQUENCES),
    "einsum": (lambda p, x: torch.einsum("nti,oi->nto", x * p["s"], p["w"]), SEQUENCES),
    "embedding": (lambda p, ids: F.linear(F.embedding(ids, p["w"]), p["w"]), IDS),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_inside_the_loss(name):
    """To the rounding of bfloat16, 2^-8, some of which adds up."""
    function, batch = AUTOCAST[name]

    def loss(p, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return value(function(p, x).float())

    for want in (("norm",), ("norm", "gram", "square")):
        assert_equal_to_loop(loss, SINGLE, batch, per_example.reports(loss, SINGLE, batch, want), 2e-2)
    for method in ("kept", "twice"):
        assert_equal_to_loop(loss, SINGLE, batch, per_example.clipped(loss, SINGLE, batch, 1.0, method=method), 2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("function", [lambda p, x: F.linear(x, p["w"]), lambda p, x: x * p["w"][0]])
def test_direction_of_another_dtype(function, dtype):
    def loss(p, x):
        return value(function(p, x))

    params = {"w": SINGLE["w"]}
    direction = {"w": DRAW(4, 4).to(dtype)}
    for x in (SEQUENCES, SEQUENCES[:, 0]):
        out = per_example.reports(loss, params, x, ("dot",), direction=direction)
        gradients, _ = loop(loss, params, x)
        expected = (gradients["w"] * direction["w"].float()).sum((1, 2))
        torch.testing.assert_close(out.total_dot, expected, rtol=1e-4, atol=1e-4)
