"""Custom autograd.Functions in the loss: exact where they map over the examples, refused while compiling."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core import per_example, random, tree
from core.lift import lift
from core.per_example import PerExampleError
from core.sketches import gradient_sketches, hashes
from core.tap import tap
from tests.core.per_example.models import Draw, N, value
from tests.core.per_example.test_casts import assert_equal_to_loop

# torch's own warning, where Dynamo traces one.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

DRAW = Draw("custom functions")
P, X = {"w": DRAW(3, 4)}, DRAW(N, 4)


class TimesTen(torch.autograd.Function):
    """The identity, whose backward multiplies by ten."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        return 10 * cotangent


class Untouched(TimesTen):
    """Nothing in its forward would show in a graph."""

    @staticmethod
    def forward(x):
        return x


class Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x @ w.T

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, cotangent):
        x, w = ctx.saved_tensors
        return cotangent @ w, 10 * cotangent.mT @ x


class Unmapped(Product):
    generate_vmap_rule = False


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, cotangent):
        x, w = ctx.saved_tensors
        return cotangent @ w, cotangent.mT @ x


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x):
        return TimesTen.apply(self.linear(x))


LIFTED = lift(Scaled())
LOSSES = {
    "of a parameter": (lambda p, x: value(F.linear(x, TimesTen.apply(p["w"]))), P),
    "of a parameter, untouched": (lambda p, x: value(F.linear(x, Untouched.apply(p["w"]))), P),
    "of an input and a parameter": (lambda p, x: value(Product.apply(x, p["w"])), P),
    "of activations": (lambda p, x: value(TimesTen.apply(F.linear(x, p["w"]))), P),
    "in a lifted module": (lambda p, x: value(LIFTED.apply(p, x)), LIFTED.params),
}


@pytest.mark.parametrize("name", LOSSES)
def test_custom_function(name):
    loss, params = LOSSES[name]
    assert_equal_to_loop(loss, params, X, per_example.reports(loss, params, X), 1e-10)
    assert per_example.verify(loss, params, X) <= 1e-10
    plain = per_example.reports(lambda p, x: value(F.linear(x, p["w"])), P, X).total_norm
    if params is P:
        torch.testing.assert_close(per_example.reports(loss, P, X).total_norm, 10 * plain)


def test_functions_that_do_not_map_are_named():
    with pytest.raises(
        PerExampleError, match="'w' is used by Unmapped, which has no rule .* does not have vmap support"
    ):
        per_example.reports(lambda p, x: value(Unmapped.apply(x, p["w"])), P, X)
    with pytest.raises(PerExampleError, match="must override the setup_context staticmethod"):
        per_example.reports(lambda p, x: value(OldStyle.apply(x, p["w"])), P, X)


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=False)


def of_each(loss, params, x):
    return per_example.each(loss, params, x)


def of_a_plan(loss, params, x):
    return per_example.reports(loss, params, x, plan=PLANS[loss])


PLANS = {loss: per_example.plan(loss, params, X) for loss, params in LOSSES.values()}
HASHES = hashes(random.key(0), P, 8)
CALLS = {
    "reports": per_example.reports,
    "reports with a plan": of_a_plan,
    "each": of_each,
    "clipped": lambda loss, p, x: per_example.clipped(loss, p, x, 1.0),
    "gradient_sketches": lambda loss, p, x: gradient_sketches(loss, p, x, HASHES, 8),
}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        *(("reports", name) for name in LOSSES if name != "of a parameter"),
        ("each", "of activations"),
        *(
            pytest.param(call, "of activations", marks=pytest.mark.slow)
            for call in CALLS
            if call not in ("reports", "each")
        ),
        ("each", "of a parameter, untouched"),
    ],
)
def test_custom_function_is_refused_while_compiling(call, name):
    """Dynamo drops its backward in silence (pytorch#193279)."""
    loss, params = LOSSES[name]
    with pytest.raises(Exception, match="the loss calls a custom autograd.Function .*(TimesTen|Untouched|Product)"):
        compiled(lambda p, x: CALLS[call](loss, p, x))(params, X)


def test_verify_sees_the_dropped_backward():
    loss, params = LOSSES["of activations"]
    with pytest.raises(Exception, match="the loss calls a custom autograd.Function"):
        per_example.verify(loss, params, X, compiled=True)


@torch.compiler.allow_in_graph
def times_ten(x):
    return TimesTen.apply(x)


def test_allowed_in_graph_it_keeps_its_backward():
    sink = torch.zeros((), dtype=torch.float64)

    def loss(p, x):
        return value(times_ten(tap(F.linear(x, p["w"]), sink, sink)))

    torch._dynamo.reset()
    assert per_example.verify(loss, P, X, compiled=True) <= 1e-10


def test_function_outside_the_loss_is_not_refused():
    def step(p, x):
        x = TimesTen.apply(x)  # no gradient goes through it
        return per_example.reports(LINEAR, p, x).total_norm

    torch.testing.assert_close(compiled(step)(P, X), per_example.reports(LINEAR, P, X).total_norm)


def LINEAR(p, x):
    return value(F.linear(x, p["w"]))


def test_tree_of_no_leaves_is_kept():
    params = {"none": None, **P}
    out = per_example.reports(LINEAR, params, X)
    assert tree.names(out.norm) == ["w"] and out.sum["none"] is None
    torch.testing.assert_close(per_example.each(LINEAR, params, X)["w"], per_example.each(LINEAR, P, X)["w"])
