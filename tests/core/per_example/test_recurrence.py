"""Per-example reports of recurrent layers: exact, with one use of each weight."""

import pytest
import torch
from torch.func import grad, vmap

from core import per_example, random, spec, tree
from core.layers import linear, linear_spec, recurrent, recurrent_spec
from core.per_example import reports

KINDS = {
    "rnn": ("rnn", {}),
    "gru, both directions": ("gru", {"bidirectional": True}),
    "lstm": ("lstm", {}),
    "lstm, projection": ("lstm", {"projection": 3}),
    "lstm, peepholes": ("lstm", {"peephole": True}),
    "lstm, no bias": ("lstm", {"bias": False}),
    "layer-norm lstm": ("layer_norm_lstm", {}),
}
WANT = ("norm", "square", "gram")


def case(name: str, layers: int = 2):
    """(loss, params, batch): ragged, all outputs and last states in the loss; a GRU's first state is learned."""
    kind, options = KINDS[name]
    model = {"rnn": recurrent_spec(kind, 5, 6, layers=layers, **options), "start": linear_spec(1, 6)}
    params = spec.init(random.key(0), model, torch.float64)
    batch = {"lengths": torch.tensor([7, 0, 4, 6]), "x": random.normal(random.key(1), (4, 7, 5), torch.float64)}

    def loss(params, batch):
        x, start = batch["x"], None
        if kind == "gru":
            first = linear(params["start"], x[:, :1, :1].sum((1, 2))[:, None])  # (batch, width)
            start = [{"backward": {"h": first}, "forward": {"h": -first}}] * layers
        out, states = recurrent(kind, params["rnn"], x, start, lengths=batch["lengths"])
        return out.square().sum((1, 2)) + sum(end.sin().sum(1) for end in tree.leaves(states))

    return loss, params, batch


def check(loss, params, batch, out) -> None:
    each = per_example.each(loss, params, batch)
    gram = tree.map(lambda g: g.flatten(1) @ g.flatten(1).T, each)
    expected = (
        tree.map(lambda g: g.sum(0), each),
        tree.map(lambda g: g.flatten(1).norm(dim=1), each),
        tree.map(lambda g: g.square().sum(0), each),
        gram,
    )
    torch.testing.assert_close((out.sum, out.norm, out.square, out.gram), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_reports_are_exact(name):
    loss, params, batch = case(name)
    check(loss, params, batch, reports(loss, params, batch, WANT))
    plan = per_example.plan(loss, params, batch)
    assert {len(leaf.uses) for leaf in plan.leaves.values()} <= {0, 1, 2}  # both directions use `start`
    assert all(len(leaf.uses) == 1 for path, leaf in plan.leaves.items() if path.startswith("rnn"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gru, both directions", "layer-norm lstm"])
def test_compiled(name):
    torch._dynamo.reset()
    loss, params, batch = case(name, layers=1)
    compiled = torch.compile(lambda p, b: reports(loss, p, b).norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(params, batch), reports(loss, params, batch).norm, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["lstm", "layer-norm lstm"])
def test_members_of_an_ensemble(name):
    loss, params, batch = case(name)
    halved = tree.map(lambda x: x / 2, params)
    out = vmap(lambda p: reports(loss, p, batch).norm)(tree.stack([params, halved]))
    expected = tree.stack([reports(loss, p, batch).norm for p in (params, halved)])
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("leaf", ["weight", "bias"])
@pytest.mark.parametrize("name", ["lstm", "layer-norm lstm"])
def test_reports_of_some_parameters_only(name, leaf):
    loss, params, batch = case(name)
    out = reports(loss, params, batch, only=lambda path, _: "_h." in path.replace("hh.", "_h.") and path.endswith(leaf))
    whole = tree.flatten(reports(loss, params, batch).norm)
    assert all(torch.allclose(value, whole[path], rtol=1e-10) for path, value in tree.flatten(out.norm).items())
    total = grad(lambda p: loss(p, batch).sum())(params)
    torch.testing.assert_close(out.sum, total, rtol=1e-10, atol=1e-10)


def test_clipped():
    loss, params, batch = case("lstm")
    each = per_example.each(loss, params, batch)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in tree.leaves(each)]).norm(dim=0)  # (N,)
    factors = (1.0 / norms).clamp(max=1.0)
    expected = tree.map(lambda g: torch.einsum("n,n...->...", factors, g), each)
    for method in ("kept", "twice"):
        out = per_example.clipped(loss, params, batch, 1.0, method=method)
        torch.testing.assert_close(out.sum, expected, rtol=1e-10, atol=1e-10)


def test_half_precision_computes_in_it():
    loss, params, batch = case("lstm")

    def half(params, batch):
        inputs = {**batch, "x": batch["x"].bfloat16()}
        return loss(tree.cast(params, torch.bfloat16), inputs).double()

    out, plain = reports(half, params, batch), grad(lambda p: half(p, batch).sum())(params)
    # Rounded in other places: to a few of bfloat16's 2^-8, relative to the largest entry.
    for g, s in zip(tree.leaves(plain), tree.leaves(out.sum), strict=True):
        assert (g - s).abs().max() <= 8 * 2**-8 * g.abs().max().clamp(min=1.0)
