"""The losses that are reported on are the loss's own: checked on two examples where a plan is made."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core import per_example, tree
from core.lift import lift
from core.per_example import PerExampleError
from tests.core.per_example import net_models  # noqa: F401 - adds its models
from tests.core.per_example.models import Draw, N, make, value
from tests.core.per_example.test_casts import assert_equal_to_loop

DRAW = Draw("agreement")
P = {"bias": DRAW(3), "weight": DRAW(3, 4)}
X = DRAW(N, 4)


class Around(nn.Module):
    """A layer, and a function of its output."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(4, 3).double(), function

    def forward(self, x):
        return self.function(self.layer(x))


MIXING = {
    "centred": (lambda h: h - h.mean(0), "mixes its examples in a lifted module"),
    "softmax over the batch": (lambda h: h.softmax(0), "mixes its examples in a lifted module"),
    "weighted by its place": (
        lambda h: h * torch.arange(1, 1 + len(h))[:, None],
        "mixes its examples in a lifted module",
    ),
    "functional batch norm": (
        lambda h: F.batch_norm(h, None, None, training=True),
        "batch norm in training mode mixes",
    ),
    "batch norm": (nn.BatchNorm1d(3, track_running_stats=False), "layer 'function' in eval mode too mixes"),
}


@pytest.mark.parametrize("name", MIXING)
def test_lifted_module_that_mixes_is_refused(name):
    function, message = MIXING[name]
    params, _, apply = lift(Around(function))

    def loss(p, x):
        return value(apply(p, x))

    for f in (per_example.plan, per_example.reports, lambda *args: per_example.clipped(*args, 1.0)):
        with pytest.raises(PerExampleError, match=message):
            f(loss, params, X)
    if isinstance(function, nn.Module):
        return
    members = tree.stack([params, tree.map(lambda p: 0.5 * p, params)])
    with pytest.raises(PerExampleError, match=message):
        torch.func.vmap(lambda p: per_example.reports(loss, p, X).total_norm)(members)


def test_operation_without_a_rule_that_mixes_is_refused():
    def loss(p, x):
        return value(x.index_add(0, torch.zeros(1, dtype=torch.int64), p["weight"][:1]))

    with pytest.raises(PerExampleError, match="mixes its examples in index_add of 'weight', which is mapped"):
        per_example.reports(loss, P, X)


BY_TYPE = {
    "isinstance": lambda b: isinstance(b, torch.Tensor),
    "is_tensor": torch.is_tensor,
    "is_tensor_like": torch.overrides.is_tensor_like,
    "not a number": lambda b: not isinstance(b, (int, float)),
    "is learned": lambda b: b.requires_grad,
}


def added_if(is_tensor):
    return lambda p, x: value(F.linear(x, p["weight"], p["bias"] if is_tensor(p["bias"]) else None))


@pytest.mark.parametrize("name", BY_TYPE)
def test_parameter_is_a_tensor(name):
    """A bias that is only added where it is a tensor."""
    loss = added_if(BY_TYPE[name])
    out = per_example.reports(loss, P, X)
    assert (out.norm["bias"] > 0).all()
    assert_equal_to_loop(loss, P, X, out, 1e-10)


def test_parameter_is_a_tensor_while_compiling():
    loss = added_if(lambda b: all(f(b) for f in BY_TYPE.values()))
    torch._dynamo.reset()
    out = torch.compile(per_example.reports, backend="aot_eager", fullgraph=True, dynamic=False)(loss, P, X)
    assert_equal_to_loop(loss, P, X, out, 1e-10)


def test_exact_type_of_a_parameter_is_seen():
    def loss(p, x):
        return value(F.linear(x, p["weight"], p["bias"] if type(p["bias"]) is torch.Tensor else None))

    with pytest.raises(PerExampleError, match="of two examples is .* asks for the type of a parameter"):
        per_example.reports(loss, P, X)


def count_calls(loss):
    calls = []

    def counted(p, x):
        calls.append(tuple(x.shape))
        return loss(p, x)

    return counted, calls


def test_comparison_is_made_once_per_plan():
    """On two examples, where the plan is made; a call with a plan runs the loss once."""
    loss, calls = count_calls(lambda p, x: value(F.linear(x, p["weight"], p["bias"])))
    plan = per_example.plan(loss, P, X)
    assert calls == [(10007, 4), (2, 4), (2, 4)]
    calls.clear()
    per_example.reports(loss, P, X, plan=plan)
    per_example.clipped(loss, P, X, 1.0, plan=plan)
    assert calls == [(N, 4), (N, 4)]
    calls.clear()
    per_example.clipped(loss, P, X, 1.0)
    assert calls == [(10007, 4), (2, 4), (2, 4), (N, 4)]


def test_no_comparison_while_compiling():
    loss, calls = count_calls(lambda p, x: value(F.linear(x, p["weight"], p["bias"])))
    torch._dynamo.reset()
    torch.compile(per_example.reports, backend="aot_eager", fullgraph=True, dynamic=False)(loss, P, X)
    assert calls == [(1009, 4), (N, 4)]


def test_comparison_leaves_the_generator_alone():
    """A loss that draws from torch's generator is compared on equal draws."""

    def loss(p, x):
        return value(F.dropout(F.linear(x, p["weight"], p["bias"]), 0.5))

    state = torch.get_rng_state()
    per_example.plan(loss, P, X)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [1, 2])
def test_few_examples_and_values_that_are_not_finite(count):
    def loss(p, x):
        return value(F.linear(x, p["weight"], p["bias"])) / x[:, 0].relu()

    x = torch.stack([X[0].abs(), -X[0].abs()])[:count]
    out = per_example.reports(loss, P, x)
    assert out.losses[0].isfinite() and out.norm["bias"][0].isfinite()


@pytest.mark.parametrize("name", ["gpt2_with_dropout", "half_inside", "cnn"])
def test_lower_precision_is_allowed_its_rounding(name):
    model = make(name)
    params = tree.cast(model.params, torch.float32)

    def loss(p, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model.loss(p, batch).float()

    batch = tree.cast(model.batch, torch.float32)
    assert per_example.reports(loss, params, batch).total_norm.isfinite().all()


def test_verify_tells_the_causes_apart():
    with pytest.raises(
        PerExampleError, match=r"the loss mixes its examples: .* alone \(or it changes from call to call\)"
    ):
        per_example.verify(lambda p, x: value(F.linear(x - x.mean(0), p["weight"], p["bias"])), P, X)
    calls = []

    def other_in_the_batch(p, x):
        """From the fourth call on (a plan takes three) another function of a whole batch."""
        calls.append(len(x))
        return value(F.linear(x, p["weight"], p["bias"])) * (2.0 if len(calls) == 4 else 1.0)

    with pytest.raises(
        PerExampleError, match="the loss of example 0 is .*, reported .* asks for the type of a parameter"
    ):
        per_example.verify(other_in_the_batch, P, X)

    def gradient_of_the_batch(p, x):
        y = value(F.linear(x, p["weight"], p["bias"]))
        return y + (y - y.detach()).sum()

    with pytest.raises(
        PerExampleError,
        match="the norm of example 0 is off by .* mixes its examples, takes the parameter past its rule",
    ):
        per_example.verify(gradient_of_the_batch, P, X)
