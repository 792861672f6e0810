"""The recursion as one operator: under every transform it equals the loop, which is plain torch."""

import pytest
import torch
from torch.func import grad, jacrev, jvp, vmap

from core import tree
from core.recurrence import recurrence
from core.recurrence.operators import KINDS
from core.transforms import linearize

EXAMPLES, TIME, WIDTH = 3, 5, 4


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.7


def arguments(kind: str) -> tuple:
    """xw, w, b, then the tensors of the state."""
    gates = KINDS[kind] * WIDTH
    state = [normal(EXAMPLES, WIDTH, seed=i) for i in range(3, 5 if kind == "lstm" else 4)]
    return (
        normal(EXAMPLES, TIME, gates, seed=0),
        normal(gates, WIDTH, seed=1),
        normal(gates, seed=2),
        *state,
    )


def loss(kind: str, method: str):
    """A scalar of all outputs; of an LSTM the last cells too."""

    def value(xw, w, b, *state):
        states = recurrence(kind, xw, w, b, state, method=method)
        weights = torch.arange(states[0][0].numel()).reshape(states[0].shape[1:]).cos().to(xw.dtype)
        return (states[0] * weights).sum() + states[-1][:, -1].square().sum()

    return value


def per_example(f):
    """Gradients of f for every example, a batch of one each, by everything."""

    def one(xw, w, b, *state):
        return f(xw[None], w, b, *(x[None] for x in state))

    def run(xw, w, b, *state):
        wrt = tuple(range(3 + len(state)))
        return vmap(grad(one, wrt), (0, None, None, *(0 for _ in state)))(xw, w, b, *state)

    return run


def members(f, n: int = 2):
    """f of an ensemble: each member has weights of its own."""

    def run(xw, w, b, *state):
        scales = torch.linspace(1.0, 0.5, n, dtype=w.dtype)
        own = (w * scales[:, None, None], b * scales[:, None])
        return vmap(f, (None, 0, 0, *(None for _ in state)))(xw, *own, *state)

    return run


def inputs(f, n: int = 2):
    """f of several inputs, with the same weights."""

    def run(xw, *rest):
        scales = torch.linspace(1.0, -0.5, n, dtype=xw.dtype)
        return vmap(f, (0, *(None for _ in rest)))(xw * scales[:, None, None, None], *rest)

    return run


def all_gradients(f):
    return lambda *args: grad(f, tuple(range(len(args))))(*args)


def squared_gradient(f):
    return lambda *args: sum(x.square().sum() for x in all_gradients(f)(*args))


def tangents(args: tuple) -> tuple:
    return tuple(torch.arange(x.numel(), dtype=x.dtype).cos().reshape(x.shape) for x in args)


TRANSFORMS = {
    "value": lambda f: f,
    "grad": all_gradients,
    "vmap(grad)": per_example,
    "members": members,
    "vmap(grad) of members": lambda f: members(all_gradients(f)),
    "members of vmap(grad)": lambda f: members(per_example(f)),
    "members of members": lambda f: members(members(all_gradients(f)), 3),
    "members of inputs": lambda f: members(inputs(all_gradients(f))),
    "inputs of members": lambda f: inputs(members(all_gradients(f))),
    "grad of grad": lambda f: all_gradients(squared_gradient(f)),
    "hvp": lambda f: lambda *args: jvp(all_gradients(f), args, tangents(args)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_transforms(kind, transform):
    args = arguments(kind)
    expected = TRANSFORMS[transform](loss(kind, "loop"))(*args)
    actual = TRANSFORMS[transform](loss(kind, "auto"))(*args)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["grad", "vmap(grad)", "vmap(grad) of members"])
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_the_operator_compile(kind, transform):
    torch._dynamo.reset()
    args = arguments(kind)
    compiled = torch.compile(TRANSFORMS[transform](loss(kind, "auto")), backend="aot_eager", fullgraph=True)
    expected = TRANSFORMS[transform](loss(kind, "loop"))(*args)
    torch.testing.assert_close(compiled(*args), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["value", "members", "grad of grad", "hvp"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_transforms_compile(kind, transform):
    test_transforms_of_the_operator_compile(kind, transform)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_the_operator(kind):
    """Those of plain autograd, of torch.func, of the transposed transpose, and a Jacobian by a mapped pull-back."""
    args = arguments(kind)
    expected = all_gradients(squared_gradient(loss(kind, "loop")))(*args)
    assert_close = torch.testing.assert_close
    assert_close(all_gradients(squared_gradient(loss(kind, "op")))(*args), expected, rtol=1e-12, atol=1e-12)
    leaves = [x.clone().requires_grad_() for x in args]
    first = torch.autograd.grad(loss(kind, "op")(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
    assert_close(second, expected, rtol=1e-12, atol=1e-12)

    def states(method):
        return lambda w: recurrence(kind, args[0], w, args[2], args[3:], method=method)[-1]

    jacobian = jacrev(states("loop"))(args[1])
    assert_close(jacrev(states("op"))(args[1]), jacobian, rtol=1e-12, atol=1e-12)
    direction = torch.ones_like(args[1])
    _, derivative = linearize(states("op"), args[1])
    assert_close(derivative(direction), jacobian.sum((-2, -1)), rtol=1e-12, atol=1e-12)


def count_nodes(time: int) -> int:
    """Nodes of the graphs of a gradient by the operator, after AOTAutograd."""
    torch._dynamo.reset()
    counts = []

    def count(graph, example_inputs):
        counts.append(len(graph.graph.nodes))
        return graph.forward

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=count)
    xw, *rest = arguments("lstm")
    xw = normal(EXAMPLES, time, xw.shape[2], seed=0)
    torch.compile(all_gradients(loss("lstm", "auto")), backend=backend, fullgraph=True, dynamic=False)(xw, *rest)
    return sum(counts)


def test_the_graph_does_not_grow_with_time():
    assert count_nodes(256) == count_nodes(16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype):
    """Rounded in other places than the loop: TIME roundings of values up to 1, each a sum of WIDTH."""
    args = tuple(x.to(dtype) for x in arguments(kind))
    out = recurrence(kind, *args[:3], args[3:], method="op")
    expected = recurrence(kind, *(x.double() for x in args[:3]), tuple(x.double() for x in args[3:]), method="loop")
    tolerance = TIME * WIDTH * torch.finfo(dtype).eps
    assert out[0].dtype == dtype
    torch.testing.assert_close(out[0].double(), expected[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_unchanged(kind):
    args = arguments(kind)
    before = tree.map(torch.clone, args)
    all_gradients(loss(kind, "op"))(*args)
    assert all(torch.equal(x, y) for x, y in zip(args, before, strict=True))


def test_without_bias():
    xw, w, b, *state = arguments("gru")
    expected = recurrence("gru", xw, w, torch.zeros_like(b), tuple(state))
    assert torch.equal(recurrence("gru", xw, w, None, tuple(state))[0], expected[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "lstn"}, "recurrence: kind 'lstn' is unknown; expected one of tanh, relu, lstm, gru"),
        ({"method": "fast"}, "recurrence: method 'fast' is unknown; expected one of auto, loop, op"),
        ({"kind": "lstm"}, r"recurrence: the state of kind 'lstm' has 2 tensors, found 1"),
        ({"xw": normal(3, 0, 12, seed=0)}, r"expected \(batch, time > 0, 3 width\)"),
        ({"xw": normal(3, 5, 11, seed=0)}, r"found xw of shape \(3, 5, 11\) and w \(12, 4\)"),
        ({"b": normal(4, seed=0)}, r"recurrence: expected b of shape \(12,\), found \(4,\)"),
        ({"state": (normal(2, 4, seed=0),)}, r"recurrence: expected a state of shape \(3, 4\), found \(2, 4\)"),
        ({"state": (torch.zeros(3, 4),)}, "recurrence: the state is torch.float32, the input torch.float64"),
    ],
)
def test_errors(changes, message):
    xw, w, b, *state = arguments("gru")
    call = {"kind": "gru", "xw": xw, "w": w, "b": b, "state": tuple(state), "method": "auto"} | changes
    with pytest.raises(ValueError, match=message):
        recurrence(call["kind"], call["xw"], call["w"], call["b"], call["state"], method=call["method"])
