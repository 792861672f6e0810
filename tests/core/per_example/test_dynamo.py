"""Queries of Dynamo's state where a version of torch lacks its private attributes."""

import pytest
import torch
from torch.nn import functional as F

from core import per_example
from core.per_example import PerExampleError, dynamo
from tests.core.per_example.models import Draw, N, value
from tests.core.per_example.test_custom_functions import TimesTen, compiled

DRAW = Draw("dynamo")
P, X = {"w": DRAW(3, 4)}, DRAW(N, 4)


def loss(p, x):
    return value(F.linear(x, p["w"]))


def scaled(p, x):
    return value(F.linear(x, TimesTen.apply(p["w"])))


def without_classes(monkeypatch):
    monkeypatch.setattr(dynamo, "_VARIABLES", "torch._dynamo.variables.tensor")


def without_module(monkeypatch):
    monkeypatch.setattr(dynamo, "_VARIABLES", "torch._dynamo.variables.nowhere")


def without_tracer(monkeypatch):
    monkeypatch.setattr(dynamo, "_output", lambda: None)


@pytest.mark.parametrize("lacks", [without_classes, without_module, without_tracer])
def test_reports_compile_and_say_what_is_not_seen(lacks, monkeypatch):
    expected = per_example.reports(loss, P, X).total_norm
    lacks(monkeypatch)
    with pytest.warns(UserWarning, match="does not show whether a loss calls a custom autograd.Function"):
        actual = compiled(lambda p, x: per_example.reports(loss, p, x).total_norm)(P, X)
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_verify_still_sees_the_dropped_backward(monkeypatch):
    without_classes(monkeypatch)
    torch._dynamo.reset()
    with (
        pytest.warns(UserWarning, match="does not show whether"),
        pytest.raises(PerExampleError, match="'w': the norm of example 0 is off by .* whose backward is dropped"),
    ):
        per_example.verify(scaled, P, X, compiled=True)


def test_transforms_inside_the_loss_without_the_stack(monkeypatch):
    """The level of the innermost transform takes the place of the length of the stack."""
    monkeypatch.delattr(torch._C._functorch, "get_interpreter_stack")

    def penalty(p, x):
        return torch.func.grad(lambda x: loss(p, x).sum())(x).square().sum(1)

    assert dynamo.transform_depth() == 0
    depths = []
    torch.func.grad(lambda x: (depths.append(dynamo.transform_depth()), x)[1])(torch.ones(()))
    assert depths == [1]
    assert per_example.verify(loss, P, X) <= 1e-10
    with pytest.raises(PerExampleError, match="inside another transform"):
        per_example.reports(penalty, P, X)
