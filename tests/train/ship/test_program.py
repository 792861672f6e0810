"""Programs: what they take and refuse, the trees that go in and come out, and what cannot be exported."""

import pytest
import torch

from core import int4, int8, random, spec, tree
from core.attention import Cache
from nets.classifiers import mlp
from tests.train.ship.exports import face, inputs_of
from train.ship import Axis, ShipError, export

CONFIG = mlp.Config((6, 8, 4))
PARAMS = spec.init(random.key(0), mlp.spec(CONFIG))
X = random.normal(random.key(1), (3, 6))


def apply(params, x):
    return mlp.apply(params, x, CONFIG)


@pytest.fixture(scope="module")
def program():
    return export(apply, PARAMS, {"x": X}, {"x": {0: Axis("batch", 1, 5)}})


def test_program_equals_the_function_at_both_ends(program):
    for n in (1, 5):
        x = random.normal(random.key(n), (n, 6))
        torch.testing.assert_close(program(x=x), apply(PARAMS, x))
    wide = random.normal(random.key(2), (6, 5)).T  # not contiguous
    torch.testing.assert_close(program(x=wide), apply(PARAMS, wide))
    assert not program(x=X.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ({"x": X[:, :5]}, "input 'x' has shape (3, 5); expected (batch, 6)"),
        ({"x": X[0]}, "input 'x' has shape (6,); expected (batch, 6)"),
        ({"x": X.double()}, "input 'x' is torch.float64; expected torch.float32"),
        ({"x": X[:0]}, "axis 0 ('batch') of input 'x' is 0; expected 1 to 5"),
        ({"x": torch.zeros(6, 6)}, "axis 0 ('batch') of input 'x' is 6; expected 1 to 5"),
        ({"x": X.numpy()}, "input 'x' is a ndarray; expected a tensor"),
        ({"x": X.to("meta")}, "input 'x' is on meta; expected the CPU"),
        ({"y": X}, "inputs y; expected x"),
        ({}, "inputs none; expected x"),
    ],
)
def test_each_call_is_checked(program, inputs, error):
    with pytest.raises(ShipError) as raised:
        program(**inputs)
    assert str(raised.value) == error


def test_axes_of_one_name_have_one_size():
    program = export(lambda p, a, b: a @ p["w"] + b, {"w": torch.ones(2, 2)}, {"a": X[:, :2], "b": X[:, 2:4]},
                     {"a": {0: Axis("batch")}, "b": {0: Axis("batch")}})  # fmt: skip
    with pytest.raises(ShipError, match=r"input 'b' is 2, but 3 in another input; expected the same"):
        program(a=X[:, :2], b=X[:2, 2:4])


def test_trees_go_in_and_come_out():
    """A NamedTuple comes back as a dict, which goes in again."""

    def step(params, caches, x):
        caches = [Cache(cache.keys + x, cache.values * params["type"]) for cache in caches]
        return {"caches": caches, "x": (x, caches[0].keys.sum())}

    caches, params = [Cache(X, X + 1), Cache(X + 2, X + 3)], {"type": torch.tensor(2.0), "0": [torch.zeros(1)]}
    program = export(step, params, {"caches": caches, "x": X}, {"caches": {0: Axis("n")}, "x": {0: Axis("n")}})
    assert program.outputs[:2] == ("caches.0.keys", "caches.0.values")
    out = program(caches=caches, x=X)
    expected = step(params, caches, X)
    assert torch.equal(out["caches"][1]["values"], expected["caches"][1].values)
    again = program(caches=out["caches"], x=out["x"][0])
    expected = step(params, expected["caches"], X)
    assert torch.equal(again["x"][1], expected["x"][1])


@pytest.mark.parametrize(
    ("f", "ranges", "error"),
    [
        (
            lambda p, x: x + torch.zeros(len(x), 6),
            {"x": {0: Axis("batch")}},
            "the function fixes 'batch' at 3; use x.sh",
        ),
        (apply, {"y": {0: Axis("batch")}}, "the range of 'y' names no input; there are x"),
        (apply, {"x": {2: Axis("batch")}}, "input 'x' of shape (3, 6) has no axis 2"),
        (apply, {"x": {0: Axis("batch", 4, 8)}}, "axis 0 ('batch') of input 'x' is 3 in the example; expected 4 to 8"),
        (lambda p, x: x[x > 0].sum() if x.sum() > 0 else x, {}, "torch.export: "),
        (lambda p, x: 1 / 0, {}, "torch.export: division by zero"),
    ],
)
def test_what_cannot_be_exported_is_one_line(f, ranges, error):
    with pytest.raises(ShipError) as raised:
        export(f, PARAMS, {"x": X}, ranges)
    assert error in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_no_tensor_of_the_cpu_is_named():
    with pytest.raises(ShipError, match="'layers.0.weight' is a Int8; expected a tensor"):
        export(apply, int8.unformed(int8.quantise(PARAMS)), {"x": X})
    with pytest.raises(ShipError, match="'x' is on meta; expected the CPU, where packages run"):
        export(apply, PARAMS, {"x": X.to("meta")})


def test_an_example_of_one_would_fix_the_size():
    with pytest.raises(ShipError, match="is 1 in the example; expected at least 2: torch.export makes a size of 1"):
        export(apply, PARAMS, {"x": X[:1]}, {"x": {0: Axis("batch")}})


@pytest.mark.parametrize("integers", [int8, int4])
def test_quantised_weights_are_exported_as_integers(integers):
    apply, params = face("gpt2")
    small = integers.quantise(params)
    inputs = inputs_of("gpt2", 3)
    program = export(lambda p, **x: apply(integers.unformed(p), **x), small, inputs, {"x": {0: Axis("batch", 1, 8)}})
    leaves = [v for v in program.exported.state_dict.values() if v.dtype in (torch.int8, torch.uint8)]
    assert len(leaves) == sum("weight" in name and leaf.ndim == 2 for name, leaf in tree.items(params)) > 4
    other = inputs_of("gpt2", 5, seed=3)
    torch.testing.assert_close(program(**other), apply(integers.unformed(small), **other), rtol=1e-4, atol=1e-4)
