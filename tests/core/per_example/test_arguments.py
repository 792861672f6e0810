"""Wrong arguments of the functions on per-example gradients: one line that says what was expected."""

import pytest
import torch

from core import per_example, tree
from core.layers import linear
from core.per_example import PerExampleError
from tests.core.per_example.models import Draw, N, value

DRAW = Draw("arguments")
X = DRAW(N, 4)


def plain(p, batch):
    return value(linear({"weight": p["weight"]}, batch["x"]))


P, B = {"weight": DRAW(3, 4)}, {"x": X}


@pytest.mark.parametrize(
    ("params", "batch", "options", "message"),
    [
        (P, {"x": X, "y": X[:3]}, {}, r"agree in their leading axis, N > 0: 'x' \(4, 4\), 'y' \(3, 4\)"),
        (P, {"x": X[:0]}, {}, r"N > 0: 'x' \(0, 4\)"),
        (P, {"x": X, "y": 3}, {}, "must be tensors .* 'y' int"),
        (P, {"x": X, "y": torch.tensor(1.0)}, {}, r"'y' \(\)"),
        (P, {}, {}, "leaves of a batch must be tensors"),
        ({"ids": torch.arange(3), **P}, B, {}, "parameter 'ids' is torch.int64; expected a floating-point tensor"),
        ({"rate": 0.1, **P}, B, {}, "parameter 'rate' is float; expected a floating-point tensor"),
        (P, B, {"want": ("norm", "hessian")}, "want has 'hessian'; expected some of norm, dot, gram, square"),
        (P, B, {"want": ("dot",)}, "needs a direction like the parameters"),
        (P, B, {"direction": P}, 'a direction is only used if want has "dot"'),
        (P, B, {"want": ("dot",), "direction": {}}, "the direction lacks 'weight'"),
        (P, B, {"want": ("dot",), "direction": {"x": X, **P}}, "the direction has no parameter for 'x'"),
        (
            P,
            B,
            {"want": ("dot",), "direction": {"weight": X.T[:, :2]}},
            r"'weight' has shape \(4, 2\), expected \(3, 4\)",
        ),
        (
            P,
            B,
            {"want": ("dot",), "direction": {"weight": torch.ones(3, 4).int()}},
            "'weight' is torch.int32; expected fl",
        ),
        ({}, B, {}, "there are no parameters"),
        ({"a": {}, "b": None}, B, {}, "there are no parameters"),
        ({1j: X, 2j: X}, B, {}, "the keys of a dict in the parameters have no order"),
        (P, {1j: X, 2j: X}, {}, "the keys of a dict in the batch have no order"),
        ({0: X, "0": X}, B, {}, "two parameters are called '0': keys of a dict must differ as strings"),
        ({"a.b": X, "a": {"b": X}}, B, {}, "two parameters are called 'a.b'"),
        (P, B, {"want": "hessian"}, "want has 'hessian'"),
        (P, B, {"want": None}, "want has 'None'"),
        (P, B, {"only": ["weight"]}, r"only is list; expected a predicate \(name, leaf\) -> bool"),
        (P, B, {"plan": ("norm",)}, r"plan is tuple; expected per_example.plan\(loss, params, batch\)"),
        (P, B, {"want": ("dot",), "direction": {"weight": 1.0}}, r"'weight' has shape \(\), expected \(3, 4\)"),
    ],
)
def test_arguments(params, batch, options, message):
    with pytest.raises(PerExampleError, match=message):
        per_example.reports(plain, params, batch, **options)


def test_want_as_a_string_and_twice():
    expected = per_example.reports(plain, P, B)
    for want in ("norm", ["norm"], ("norm", "norm")):
        torch.testing.assert_close(per_example.reports(plain, P, B, want).norm, expected.norm)
    plan = per_example.plan(plain, P, B, "norm")
    torch.testing.assert_close(per_example.reports(plain, P, B, ("norm", "norm"), plan=plan).norm, expected.norm)


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        ("total_norm", "norm"),
        ("total_dot", "dot"),
        ("total_gram", "gram"),
        ("second_moment", "square"),
        ("variance", "square"),
    ],
)
def test_quantity_that_was_not_wanted_is_named(name, quantity):
    want = ("gram",) if quantity == "norm" else ("norm",)
    out = per_example.reports(plain, P, B, want)
    with pytest.raises(PerExampleError, match=f'{name} needs "{quantity}", which was not asked for'):
        getattr(out, name)
    assert not hasattr(out, name) and getattr(out, quantity) is None


@pytest.mark.parametrize("params", [{0: P["weight"]}, {"a": X, 0: P["weight"]}])
def test_integer_keys(params):
    out = per_example.reports(lambda p, b: plain({"weight": p[0]}, b), params, {0: X, "x": X})
    torch.testing.assert_close(out.norm[0], per_example.reports(plain, P, B).norm["weight"])


def test_combine():
    norms, squares = (per_example.reports(plain, P, B, want) for want in ("norm", "square"))
    for parts, message in (
        ([], "there are no reports to combine"),
        (iter([]), "there are no reports to combine"),
        ([norms, squares], "combine: the parts have different quantities: norm and square"),
        ([per_example.clipped(plain, P, B, 1.0)], "combine: expected Reports, got Weighted"),
    ):
        with pytest.raises(PerExampleError, match=message):
            per_example.combine(parts)
    torch.testing.assert_close(per_example.combine(norms), norms)


def test_plan_of_something_else():
    plan = per_example.plan(plain, P, B)
    wider = {"x": torch.cat([X, X], 1)}
    for params, batch, want in (
        ({"weight": DRAW(2, 4)}, B, ("norm",)),
        (P, wider, ("norm",)),
        (P, {"z": X}, ("norm",)),
        (tree.cast(P, torch.float32), tree.cast(B, torch.float32), ("norm",)),
        (P, B, ("gram",)),
    ):
        with pytest.raises(PerExampleError, match="the plan was made for"):
            per_example.reports(plain, params, batch, want, plan=plan)
    others = {
        "use 2 of 'weight'": lambda p, b: plain(p, b) + plain(p, {"x": b["x"].cos()}),
        "it has 1 uses of 'weight', the loss 0": lambda p, b: b["x"].sum(1),
        "the plan is of another loss": lambda p, b: value(b["x"] * p["weight"][0]),
        "plan is of another loss:": lambda p, b: value(b["x"] @ p["weight"].T),
    }
    for message, other in others.items():
        with pytest.raises(PerExampleError, match="the plan is of another loss") as caught:
            per_example.reports(other, P, B, plan=plan)
        assert "weight" in str(caught.value), message


def test_plan_of_clipping():
    expected = per_example.clipped(plain, P, B, 0.1)
    for keep, method in ((False, "twice"), (True, "kept")):
        plan = per_example.plan(plain, P, B, keep=keep)
        for name in (method, "auto"):
            out = per_example.clipped(plain, P, B, 0.1, method=name, plan=plan)
            torch.testing.assert_close((out.sum, out.norm), (expected.sum, expected.norm))
        other = "twice" if keep else "kept"
        with pytest.raises(PerExampleError, match=rf"not for the method '{other}': plan\(..., keep={not keep}\)"):
            per_example.clipped(plain, P, B, 0.1, method=other, plan=plan)
        torch.testing.assert_close(per_example.reports(plain, P, B, plan=plan).norm, expected.norm)
    with pytest.raises(PerExampleError, match="the plan was made for"):
        per_example.clipped(plain, P, B, 0.1, plan=per_example.plan(plain, P, B, "gram"))


def test_weighted_arguments():
    for options, message in (
        ({"max_norm": None}, "max_norm is None; expected a positive number"),
        ({"max_norm": "1"}, "max_norm is 1; expected a positive number"),
        ({"max_norm": {"*": -1.0}}, r"max_norm of '\*' is -1.0; expected a positive number"),
        ({"max_norm": {"bias": 1.0}}, "no pattern of max_norm fits parameter 'weight': bias"),
        ({"max_norm": {}}, "no pattern of max_norm fits parameter 'weight'"),
        ({"max_norm": torch.ones(2)}, r"max_norm is tensor\(\[1., 1.\]\); expected a positive number"),
        ({"max_norm": 0.0}, "max_norm is 0.0; expected a positive number"),
        ({"max_norm": float("nan")}, "expected a positive number"),
        ({"max_norm": 1.0, "method": "ghost"}, "method 'ghost' is unknown; expected one of auto, kept, twice"),
    ):
        with pytest.raises(PerExampleError, match=message):
            per_example.clipped(plain, P, B, **options)
    with pytest.raises(PerExampleError, match="weights is str; expected a function from the tree of norms"):
        per_example.weighted(plain, P, B, "norm")
    for weights in (lambda norm: norm["weight"][:3], lambda norm: 1.0, lambda norm: norm["weight"][:, None]):
        with pytest.raises(PerExampleError, match="the weights must be one for each of the 4 examples"):
            per_example.weighted(plain, P, B, weights)
    for weights, message in (
        (lambda norm: {"weight": norm["weight"][:3]}, r"the weights of 'weight' must be one for each .*, not \(3,\)"),
        (lambda norm: {"other": norm["weight"]}, "the weights are a tree unlike that of the norms"),
        (lambda norm: None, "the weights are a tree unlike"),
    ):
        with pytest.raises(PerExampleError, match=message):
            per_example.weighted(plain, P, B, weights)
