"""Transforms: the values of torch.func and of jax, compiled too, and errors that name the argument and the leaf."""

import jax
import jax.numpy as jnp
import numpy
import pytest
import torch
from torch.nn import functional as F

from core import random, transforms, tree
from core.transforms import grad, hvp, jvp, linearize, value_and_grad, vmap

F64 = torch.float64
PARAMS = {
    "w": random.normal(random.key(0), (3, 4), F64),
    "layers": [{"scale": random.normal(random.key(1), (4,), F64)}, {"bias": random.normal(random.key(2), (), F64)}],
}
DIRECTION = tree.map_with_names(lambda name, x: random.normal(random.key(len(name)), x.shape, F64), PARAMS)
X = random.normal(random.key(7), (5, 3), F64)


def loss(p, x):
    return (torch.tanh(x @ p["w"]) * torch.exp(p["layers"][0]["scale"]) + p["layers"][1]["bias"]).square().mean()


def jax_loss(p, x):
    return jnp.square(jnp.tanh(x @ p["w"]) * jnp.exp(p["layers"][0]["scale"]) + p["layers"][1]["bias"]).mean()


def outputs(p):
    return {"y": torch.tanh(X @ p["w"]), "x": p["layers"][0]["scale"] * p["layers"][1]["bias"]}


def jax_outputs(p):
    return {"y": jnp.tanh(X.numpy() @ p["w"]), "x": p["layers"][0]["scale"] * p["layers"][1]["bias"]}


def compiled(f):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, dynamic=False, backend="aot_eager")


@pytest.fixture(params=["eager", "compiled"])
def mode(request):
    return compiled if request.param == "compiled" else lambda f: f


def to_jax(t):
    return tree.map(lambda x: jnp.asarray(x.numpy()), t)


def assert_like_jax(ours, theirs):
    flat, reference = tree.flatten(ours), tree.flatten(theirs)
    assert list(flat) == list(reference)
    for name, x in flat.items():
        numpy.testing.assert_allclose(x.numpy(), numpy.asarray(reference[name]), rtol=1e-12, atol=1e-14)


def test_grad_and_value_equal_torch_func(mode):
    gradient, value = torch.func.grad_and_value(loss)(PARAMS, X)
    torch.testing.assert_close(mode(grad(loss))(PARAMS, X), gradient)
    torch.testing.assert_close(mode(value_and_grad(loss))(PARAMS, X), (value, gradient))
    torch.testing.assert_close(mode(grad(loss, argnums=(1, 0)))(PARAMS, X)[1], gradient)
    assert list(gradient) == ["w", "layers"] and list(grad(loss)(PARAMS, X)) == ["layers", "w"]


def test_aux_comes_beside_the_value():
    def with_aux(p, x):
        return loss(p, x), {"mean": p["w"].mean()}

    (value, aux), gradient = value_and_grad(with_aux, has_aux=True)(PARAMS, X)
    torch.testing.assert_close((value, aux["mean"]), (loss(PARAMS, X), PARAMS["w"].mean()))
    torch.testing.assert_close(gradient, grad(loss)(PARAMS, X))
    torch.testing.assert_close(grad(with_aux, has_aux=True)(PARAMS, X)[0], gradient)


def test_jvp_equals_jax(mode):
    with jax.enable_x64(True):
        reference = jax.jvp(jax_outputs, (to_jax(PARAMS),), (to_jax(DIRECTION),))
        ours = mode(lambda p, d: jvp(outputs, (p,), (d,)))(PARAMS, DIRECTION)
        assert_like_jax(tree.sort(ours), tree.sort(reference))


def test_linearize_equals_jax(mode):
    other = tree.map(lambda x: x.cos(), DIRECTION)

    def along_two(p, d, e):
        value, derivative = linearize(outputs, p)
        return value, derivative(d), derivative(e)

    with jax.enable_x64(True):
        value, derivative = jax.linearize(jax_outputs, to_jax(PARAMS))
        reference = (value, derivative(to_jax(DIRECTION)), derivative(to_jax(other)))
        assert_like_jax(tree.sort(mode(along_two)(PARAMS, DIRECTION, other)), tree.sort(reference))


def test_linearize_is_differentiable_and_maps():
    def speed(p):
        return linearize(outputs, p)[1](DIRECTION)["y"].square().sum()

    def reference(p):
        return torch.func.jvp(outputs, (tree.sort(p),), (tree.sort(DIRECTION),))[1]["y"].square().sum()

    torch.testing.assert_close(grad(speed)(PARAMS), grad(reference)(PARAMS))
    _, derivative = linearize(outputs, PARAMS)
    basis = torch.eye(12, dtype=F64).reshape(12, 3, 4)
    columns = vmap(lambda w: derivative({**tree.map(torch.zeros_like, PARAMS), "w": w})["y"])(basis)
    jacobian = torch.func.jacrev(outputs)(PARAMS)["y"]["w"]
    torch.testing.assert_close(columns, jacobian.reshape(5, 4, 12).movedim(-1, 0))


def test_hvp_equals_jax(mode):
    with jax.enable_x64(True):
        gradient = jax.grad(lambda p: jax_loss(p, X.numpy()))
        reference = jax.jvp(gradient, (to_jax(PARAMS),), (to_jax(DIRECTION),))
        ours = mode(lambda p, d: hvp(loss, p, d, X))(PARAMS, DIRECTION)
        assert_like_jax(ours, tree.sort(reference))


def test_keys_of_tangents_come_in_any_order():
    reordered = dict(reversed(DIRECTION.items()))
    assert list(reordered) != list(PARAMS)
    torch.testing.assert_close(hvp(loss, PARAMS, reordered, X), hvp(loss, PARAMS, DIRECTION, X))


def test_in_dims_in_another_key_order_map_the_right_leaf(mode):
    # One square leaf each: torch.func.vmap maps the wrong axes here without a word.
    t = {"b": torch.arange(4.0).reshape(2, 2), "a": torch.arange(4.0, 8.0).reshape(2, 2)}
    dims = {"a": 0, "b": 1}
    expected = torch.stack([t["a"][i] - 10 * t["b"][:, i] for i in range(2)])
    torch.testing.assert_close(mode(vmap(lambda t: t["a"] - 10 * t["b"], in_dims=(dims,)))(t), expected)
    assert not torch.equal(torch.func.vmap(lambda t: t["a"] - 10 * t["b"], in_dims=(dims,))(t), expected)


def test_in_dims_of_parts_and_none(mode):
    stacked = tree.stack([PARAMS["layers"], DIRECTION["layers"]])
    p = {"w": PARAMS["w"], "layers": stacked}
    values = mode(vmap(loss, in_dims=({"layers": 0, "w": None}, None)))(p, X)
    one_by_one = [loss({"w": PARAMS["w"], "layers": q["layers"]}, X) for q in (PARAMS, DIRECTION)]
    torch.testing.assert_close(values, torch.stack(one_by_one))
    torch.testing.assert_close(vmap(loss, in_dims=({"layers": [0, 0], "w": None}, None))(p, X), values)


def test_out_dims_and_chunks():
    rows = vmap(lambda x: {"x": 2 * x, "sum": x.sum()}, out_dims={"x": 1, "sum": 0}, chunk_size=2)(X)
    torch.testing.assert_close(rows, {"x": 2 * X.T, "sum": X.sum(1)})


def test_nested_vmap_of_grad_of_vmap(mode):
    """Per member of an ensemble, the gradient of a mean of per-example losses."""
    ensemble = tree.stack([PARAMS, DIRECTION])

    def of_each(transform):
        def mean_loss(p, x):
            return transform.vmap(loss, in_dims=(None, 0))(p, x[:, None]).mean()

        return transform.vmap(transform.grad(mean_loss), in_dims=(0, None))

    looped = tree.stack([torch.func.grad(loss)(tree.sort(p), X) for p in (PARAMS, DIRECTION)])
    torch.testing.assert_close(mode(of_each(transforms))(ensemble, X), looped)
    torch.testing.assert_close(of_each(torch.func)(tree.sort(ensemble), X), looped)


def test_hessian_by_vmapped_products(mode):
    w = PARAMS["layers"][0]["scale"]

    def energy(w):
        return loss({**PARAMS, "layers": [{"scale": w}, PARAMS["layers"][1]]}, X)

    rows = mode(lambda w: vmap(lambda v: hvp(energy, w, v)[1])(torch.eye(4, dtype=F64)))(w)
    torch.testing.assert_close(rows, torch.func.hessian(energy)(w))


# torch's fused attention has neither forward nor second derivatives; the transforms take its other form.


def attend(p):
    y = F.scaled_dot_product_attention(p["q"], p["k"], p["v"], is_causal=True)
    return (y * p["q"]).square().mean()


def attend_explicitly(p):
    scores = (p["q"] @ p["k"].mT / 2).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -torch.inf)
    return ((scores.softmax(-1) @ p["v"]) * p["q"]).square().mean()


ATTENDED = {name: random.normal(random.key(i), (2, 3, 5, 4), F64) for i, name in enumerate("kqv")}
ALONG = tree.map(torch.cos, ATTENDED)
SECOND = {
    "jvp": lambda f: lambda p, v: jvp(f, (p,), (v,)),
    "hvp": lambda f: lambda p, v: hvp(f, p, v),
    "linearize": lambda f: lambda p, v: linearize(f, p)[1](v),
    "linearize of grad": lambda f: lambda p, v: linearize(grad(f), p)[1](v),
    "vmap of hvp": lambda f: lambda p, v: vmap(lambda v: hvp(f, p, v)[1])(tree.stack([v, p])),
}


@pytest.mark.parametrize("name", SECOND)
def test_fused_attention(name, mode):
    expected = SECOND[name](attend_explicitly)(ATTENDED, ALONG)
    torch.testing.assert_close(mode(SECOND[name](attend))(ATTENDED, ALONG), expected)


def test_an_operation_without_forward_mode_gets_a_hint():
    def loss(x):
        return F.grid_sample(x[None, None], torch.zeros(1, 2, 2, 2, dtype=F64), align_corners=False).square().sum()

    message = "^jvp: Trying to use forward AD with grid_sampler_2d that does not support it; `linearize.* reverse mode"
    with pytest.raises(NotImplementedError, match=message):
        jvp(loss, (X,), (X,))
    torch.testing.assert_close(linearize(loss, X)[1](X), 2 * loss(X))

    def unfinished(x):
        raise NotImplementedError("mine")

    with pytest.raises(NotImplementedError, match="^mine$"):
        jvp(unfinished, (X,), (X,))


INTS = {"w": torch.ones(2), "ids": torch.ones(2, dtype=torch.int64)}


def total(t):
    return tree.leaves(t)[-1].sum()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: grad(total)(INTS), TypeError, r"grad: argument 0, leaf 'ids' is torch.int64; only floating-point"),
        (
            lambda: value_and_grad(total)([X, 2.0]),
            TypeError,
            r"value_and_grad: argument 0, leaf '1' is float",
        ),
        (lambda: grad(total)("x"), TypeError, r"grad: argument 0 is str; expected a tensor"),
        (
            lambda: grad(total)({"w": X, "b": None}),
            TypeError,
            r"grad: argument 0, leaf 'b' is None; expected a tensor \(leave its key out\)",
        ),
        (
            lambda: hvp(loss, {**PARAMS, "layers": [None]}, DIRECTION, X),
            TypeError,
            r"argument 0, leaf 'layers.0' is None; expected a tensor",
        ),
        (lambda: grad(lambda x: None)(X), TypeError, r"grad: the function returned None; expected a scalar tensor"),
        (
            lambda: value_and_grad(lambda x: (x.sum(), None), has_aux=True)(X),
            TypeError,
            r"value_and_grad: aux is None; expected a tensor",
        ),
        (lambda: vmap(lambda x: None)(X), TypeError, r"vmap: the function's output is None; expected a tensor"),
        (
            lambda: jvp(lambda x: {"y": x, "z": None}, (X,), (X,)),
            TypeError,
            r"jvp: the function's output, leaf 'z' is None; expected a tensor",
        ),
        (lambda: grad(total, argnums=2)(X, X), ValueError, r"argnums has 2, but the function got 2 arguments"),
        (lambda: grad(torch.sin)(X), ValueError, r"grad: the function returned shape \(5, 3\); expected a scalar"),
        (lambda: grad(lambda x: 1.0)(X), TypeError, r"grad: the function returned float; expected a scalar tensor"),
        (lambda: grad(lambda x: x.argmax())(X), TypeError, r"the function returned torch.int64; expected a floating"),
        (lambda: grad(torch.sum, has_aux=True)(X), TypeError, r"with has_aux the function must return \(loss, aux\)"),
        (
            lambda: grad(lambda x: (x.sum(), {"n": 3}), has_aux=True)(X),
            TypeError,
            r"grad: aux, leaf 'n' is int; expected a tensor",
        ),
        (lambda: vmap(total, in_dims=(0, 0))(X), ValueError, r"in_dims names 2 arguments, the function got 1"),
        (lambda: vmap(total)({"a": X, "b": 3}), TypeError, r"argument 0, leaf 'b' is int; only tensors are mapped"),
        (
            lambda: vmap(lambda a, b: a)(X, {"w": [X, torch.ones(2)]}),
            ValueError,
            r"argument 1, leaf 'w\.1' has 2 along its axis 0, but argument 0 has 5 along its axis 0",
        ),
        (lambda: vmap(total, in_dims=3)({"a": X}), ValueError, r"leaf 'a' has shape \(5, 3\), so no axis 3"),
        (lambda: vmap(total, in_dims=None)(X), ValueError, r"in_dims maps over nothing"),
        (
            lambda: vmap(total, in_dims=({"a": {"b": 0}},))({"a": {"c": X}}),
            ValueError,
            r"in_dims of argument 0, leaf 'a' has \['b'\], the argument \['c'\]",
        ),
        (lambda: vmap(total, in_dims=("0",))(X), TypeError, r"in_dims of argument 0 is str; expected an int, None"),
        (
            lambda: vmap(lambda x: {"y": x, "n": 3})(X),
            TypeError,
            r"vmap: the function's output, leaf 'n' is int; expected a tensor",
        ),
        (lambda: jvp(total, (X, X), (X,)), ValueError, r"jvp: 2 primals, but 1 tangents"),
        (
            lambda: jvp(total, (X, {"a": X, "b": X}), (X, {"a": X})),
            ValueError,
            r"jvp: the tangent of argument 1, leaf 'b' is missing",
        ),
        (lambda: jvp(total, ({"a": X},), ({"a": X, "b": X},)), ValueError, r"argument 0, leaf 'b' is left over"),
        (lambda: jvp(total, ([X],), ([X[0]],)), ValueError, r"leaf '0' has shape \(3,\), expected \(5, 3\)"),
        (lambda: jvp(total, (X,), (X.float(),)), TypeError, r"argument 0 is torch.float32, expected torch.float64"),
        (lambda: jvp(total, (INTS,), (INTS,)), TypeError, r"jvp: argument 0, leaf 'ids' is torch.int64"),
        (lambda: jvp(total, ([X],), ([1.0],)), TypeError, r"the tangent of argument 0, leaf '0' is float; expected"),
        (lambda: jvp(lambda x: (x, 1), (X,), (X,)), TypeError, r"jvp: the function's output, leaf '1' is int"),
        (lambda: jvp(torch.sin, (X,), (X,), has_aux=True), TypeError, r"must return \(value, aux\)"),
        (
            lambda: linearize(torch.sin, X)[1](X[0]),
            ValueError,
            r"linearize: the tangent of argument 0 has shape",
        ),
        (lambda: linearize(lambda x: 1, X), TypeError, r"linearize: the function's output is int; expected a tensor"),
        (lambda: linearize(total, INTS), TypeError, r"linearize: argument 0, leaf 'ids' is torch.int64"),
        (
            lambda: hvp(loss, PARAMS, {**DIRECTION, "w": X}, X),
            ValueError,
            r"the tangent of argument 0, leaf 'w' has shape \(5, 3\), expected \(3, 4\)",
        ),
        (lambda: hvp(lambda p: p["w"], PARAMS, DIRECTION), ValueError, r"returned shape \(3, 4\); expected a scalar"),
    ],
)
def test_errors_name_the_argument_and_the_leaf(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_inputs_are_left_alone():
    before, order = tree.map(torch.clone, PARAMS), list(PARAMS)
    hvp(loss, PARAMS, DIRECTION, X), linearize(outputs, PARAMS)[1](DIRECTION), grad(loss)(PARAMS, X)
    torch.testing.assert_close(PARAMS, before, rtol=0, atol=0)
    assert list(PARAMS) == order and not any(x.requires_grad for x in tree.leaves(PARAMS))
