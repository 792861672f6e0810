"""Recurrent layers against torch.nn's: all options, packed sequences, both directions."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from core import random, spec, tree
from core.layers import empty_state, gru, layer_norm_lstm, lstm, lstm_spec, recurrent, recurrent_spec, rnn, rnn_spec
from core.layers.recurrent import reversed_in_time
from core.recurrence import lstm_cell

D_IN, WIDTH, TIME, LAYERS = 5, 6, 7, 2
LENGTHS = torch.tensor([7, 1, 4, 6, 4])

# The kind, torch's class, options of ours, of torch's, and of the call.
CASES = {
    "rnn": ("rnn", nn.RNN, {}, {}, {}),
    "relu": ("rnn", nn.RNN, {}, {"nonlinearity": "relu"}, {"nonlinearity": "relu"}),
    "gru": ("gru", nn.GRU, {}, {}, {}),
    "lstm": ("lstm", nn.LSTM, {}, {}, {}),
    "gru, no bias": ("gru", nn.GRU, {"bias": False}, {"bias": False}, {}),
    "lstm, no bias": ("lstm", nn.LSTM, {"bias": False}, {"bias": False}, {}),
    "lstm, projection": ("lstm", nn.LSTM, {"projection": 3}, {"proj_size": 3}, {}),
}


def with_torchs_values(p: list, module: nn.Module) -> list:
    """p with the values of the module."""
    state, out = module.state_dict(), tree.map(torch.clone, p)
    for i, layer in enumerate(out):
        for suffix, part in [("", layer.get("forward", layer)), ("_reverse", layer.get("backward", {}))]:
            for name, short in [("ih", "ih"), ("hh", "hh"), ("projection", "hr")]:
                for kind in part.get(name, ()):
                    part[name][kind] = state[f"{kind}_{short}_l{i}{suffix}"]
    return out


def pair(case: str, bidirectional: bool):
    kind, module, options, theirs, call = CASES[case]
    model = recurrent_spec(kind, D_IN, WIDTH, layers=LAYERS, bidirectional=bidirectional, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = module(D_IN, WIDTH, LAYERS, bidirectional=bidirectional, batch_first=True, **theirs).double()
    return kind, with_torchs_values(spec.init(random.key(0), model, torch.float64), module), module, call


def values(batch: int = 5, d_in: int = D_IN, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, TIME, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def torchs_state(states: list, part: str) -> torch.Tensor:
    """(layers * directions, batch, n)"""
    parts = [state[d] for state in states for d in ("forward", "backward")] if "forward" in states[0] else states
    return torch.stack([state[part] for state in parts])


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs_states_and_gradients_equal_torchs(case, bidirectional, ragged):
    kind, p, module, call = pair(case, bidirectional)
    x, lengths = values(), LENGTHS if ragged else None
    with torch.random.fork_rng():
        torch.manual_seed(1)
        start = tree.map(torch.randn_like, empty_state(kind, p, len(x), torch.float64))
    h = torchs_state(start, "h")
    theirs = (h, torchs_state(start, "c")) if kind == "lstm" else h

    def reference(x):
        if not ragged:
            return module(x, theirs)
        out, state = module(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False), theirs)
        return pad_packed_sequence(out, batch_first=True)[0], state

    leaf = x.clone().requires_grad_()
    out, state = reference(leaf)
    ends = {"h": state[0], "c": state[1]} if kind == "lstm" else {"h": state}
    objective = out.square().sum() + sum(end.sin().sum() for end in ends.values())
    of_x, *of_parameters = torch.autograd.grad(objective, [leaf, *module.parameters()])

    def loss(p, x):
        out, states = recurrent(kind, p, x, start, lengths=lengths, **call)
        stacked = {part: torchs_state(states, part) for part in ends}
        return out.square().sum() + sum(end.sin().sum() for end in stacked.values()), (out, stacked)

    if ragged:  # what comes after an end reaches nothing
        x = torch.where(torch.arange(TIME)[:, None] < LENGTHS[:, None, None], x, torch.nan)
    (of_p, our_x), (our_out, our_ends) = grad(loss, (0, 1), has_aux=True)(p, x)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), of_parameters, strict=True):
            parameter.copy_(value)
    expected = with_torchs_values(p, module)
    torch.testing.assert_close((our_out, our_ends), (out.detach(), tree.map(torch.detach, ends)), rtol=0, atol=1e-12)
    torch.testing.assert_close((our_x, of_p), (of_x, expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_the_kernels_of_float32_equal_the_operator(bias, ragged):
    """In value and gradient, eager; they round in other places: 1e-5 is a hundred roundings of float32."""
    p = spec.init(random.key(0), recurrent_spec("lstm", D_IN, WIDTH, layers=2, bidirectional=True, bias=bias))
    x, lengths = values().float(), torch.tensor([7, 0, 4, 6, 3]) if ragged else None
    with torch.random.fork_rng():
        torch.manual_seed(1)
        start = tree.map(torch.randn_like, empty_state("lstm", p, len(x)))

    def loss(p, x, start, method):
        out, states = recurrent("lstm", p, x, start, lengths=lengths, method=method)
        return out.square().sum() + sum(end.sin().sum() for end in tree.leaves(states))

    by_kernels, by_operator = (grad(loss, (0, 1, 2))(p, x, start, method) for method in ("auto", "op"))
    torch.testing.assert_close(by_kernels, by_operator, rtol=1e-5, atol=1e-5)


def squared_gradient(loss):
    return lambda p: sum(x.square().sum() for x in tree.leaves(grad(loss)(p)))


@pytest.mark.parametrize(
    "transform",
    [
        grad,
        lambda f: lambda p: vmap(grad(f))(tree.map(lambda x: torch.stack([x, x * 0.5]), p)),
        lambda f: lambda p: torch.func.jvp(f, (p,), (tree.map(torch.ones_like, p),)),
        lambda f: grad(squared_gradient(f)),
    ],
    ids=["grad", "members", "jvp", "grad of grad"],
)
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_transform_of_a_float32_lstm(transform, compile):
    torch._dynamo.reset()
    model = recurrent_spec("lstm", D_IN, WIDTH)
    p, x = spec.init(random.key(0), model), values().float()

    def loss(p, method="auto"):
        out, (state,) = recurrent("lstm", p, x, method=method)
        return out.square().sum() + state["c"].sin().sum()

    f = transform(loss)
    actual = (torch.compile(f, backend="aot_eager", fullgraph=True) if compile else f)(p)
    torch.testing.assert_close(actual, transform(lambda p: loss(p, "loop"))(p), rtol=1e-4, atol=1e-5)


def test_second_derivatives_of_the_kernels():
    """By plain autograd, where no transform is open that could choose another route."""
    p, x = spec.init(random.key(0), recurrent_spec("lstm", D_IN, WIDTH)), values().float()
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in tree.flatten(p).items()}

    def second(method):
        out, _ = recurrent("lstm", tree.nest(leaves, like=p), x, method=method)
        first = torch.autograd.grad(out.square().sum(), list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))

    torch.testing.assert_close(second("auto"), second("loop"), rtol=1e-4, atol=1e-4)


def reference_layer_norm_lstm(p, x):
    def norm(q, y):
        mean, variance = y.mean(-1, keepdim=True), y.var(-1, unbiased=False, keepdim=True)
        return (y - mean) / (variance + 1e-5).sqrt() * q["weight"] + q["bias"]

    h = c = x.new_zeros(len(x), WIDTH)
    for step in x.unbind(1):
        gates = norm(p["norm_x"], step @ p["ih"]["weight"].T) + norm(p["norm_h"], h @ p["hh"]["weight"].T)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * norm(p["norm_c"], c).tanh()
    return h, c


def test_layer_norm_lstm():
    (p,) = spec.init(random.key(0), recurrent_spec("layer_norm_lstm", D_IN, WIDTH), torch.float64)
    p = tree.map_with_names(lambda name, x: x + 0.1 * torch.arange(len(x)) if "norm" in name else x, p)
    out, state = layer_norm_lstm(p, values())
    h, c = reference_layer_norm_lstm(p, values())
    torch.testing.assert_close((out[:, -1], state["h"], state["c"]), (h, h, c), rtol=1e-12, atol=1e-12)


def test_peepholes():
    (p,) = spec.init(random.key(0), recurrent_spec("lstm", D_IN, WIDTH, peephole=True), torch.float64)
    x, (of_i, of_f, of_o) = values(), p["peephole"]
    h = c = x.new_zeros(len(x), WIDTH)
    for step in x.unbind(1):
        gates = step @ p["ih"]["weight"].T + p["ih"]["bias"] + h @ p["hh"]["weight"].T + p["hh"]["bias"]
        i, f, g, o = gates.chunk(4, -1)
        i, f = (i + of_i * c).sigmoid(), (f + of_f * c).sigmoid()
        c = f * c + i * g.tanh()
        h = (o + of_o * c).sigmoid() * c.tanh()
    _, state = lstm(p, x)
    torch.testing.assert_close((state["h"], state["c"]), (h, c), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["gru", "layer_norm_lstm", "lstm", "rnn"])
def test_a_text_in_two_parts_is_the_text(kind):
    p = spec.init(random.key(0), recurrent_spec(kind, D_IN, WIDTH, layers=2), torch.float64)
    whole, ends = recurrent(kind, p, values())
    first, state = recurrent(kind, p, values()[:, :3])
    second, last = recurrent(kind, p, values()[:, 3:], state)
    torch.testing.assert_close((torch.cat([first, second], 1), last), (whole, ends), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["gru", "layer_norm_lstm", "lstm", "rnn"])
def test_states_of_every_step(kind):
    p = spec.init(random.key(0), recurrent_spec(kind, D_IN, WIDTH, bidirectional=True), torch.float64)
    _, (states,) = recurrent(kind, p, values(), lengths=LENGTHS, every_step=True)
    _, (ends,) = recurrent(kind, p, values(), lengths=LENGTHS)
    rows = torch.arange(5)
    for part, end in ends["forward"].items():
        assert torch.equal(states["forward"][part][rows, LENGTHS - 1], end)
        assert torch.equal(states["backward"][part][:, 0], ends["backward"][part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["gru", "layer_norm_lstm", "lstm", "rnn"])
def test_an_example_of_length_zero_keeps_its_start(kind, dtype):
    p = spec.init(random.key(0), recurrent_spec(kind, D_IN, WIDTH), dtype)
    start = tree.map(torch.ones_like, empty_state(kind, p, 2, dtype))
    x = torch.full((2, TIME, D_IN), torch.nan, dtype=dtype)

    def total(p, start):
        out, states = recurrent(kind, p, x, start, lengths=torch.tensor([0, 0]))
        return out.sum() + sum(end.sum() for end in tree.leaves(states)), (out, states)

    grads, (out, states) = grad(total, (0, 1), has_aux=True)(p, start)
    assert not out.any()
    assert all(torch.equal(end, torch.ones_like(end)) for end in tree.leaves(states))
    # A closed gate of the kernels may be the smallest number of its type instead of 0.
    assert all(g.abs().max() < 1e-30 for g in tree.leaves(grads[0]))
    assert all(torch.equal(g, torch.ones_like(g)) for g in tree.leaves(grads[1]))


@pytest.mark.parametrize("kind", ["gru", "layer_norm_lstm", "lstm", "rnn"])
def test_no_examples(kind):
    p = spec.init(random.key(0), recurrent_spec(kind, D_IN, WIDTH))
    x = torch.zeros(0, TIME, D_IN)
    grads, out = grad(lambda p: (recurrent(kind, p, x)[0].sum(), recurrent(kind, p, x)[0]), has_aux=True)(p)
    assert out.shape == (0, TIME, WIDTH)
    assert not any(g.any() for g in tree.leaves(grads))


@pytest.mark.parametrize("kind", ["gru", "layer_norm_lstm", "lstm", "rnn"])
def test_autocast(kind):
    """Products in bfloat16, sums over time in float32: the roundings of 2^-8 in 7 steps add up to under a tenth."""
    p, x = spec.init(random.key(0), recurrent_spec(kind, D_IN, WIDTH)), values().float()

    def loss(p):
        return recurrent(kind, p, x)[0].float().square().mean()

    expected = grad(loss)(p)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = grad(loss)(p)
    for g, e in zip(tree.leaves(narrow), tree.leaves(expected), strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0.1 * float(e.abs().max()))


def test_dropout_is_between_layers_only():
    p = spec.init(random.key(0), recurrent_spec("gru", D_IN, WIDTH, layers=3))
    sites = []
    recurrent("gru", p, values().float(), drop=lambda i, x: sites.append((i, tuple(x.shape))) or x)
    assert sites == [(0, (5, TIME, WIDTH)), (1, (5, TIME, WIDTH))]


def test_reversed_in_time():
    x = torch.arange(8).reshape(2, 4, 1)
    assert reversed_in_time(x)[..., 0].tolist() == [[3, 2, 1, 0], [7, 6, 5, 4]]
    assert reversed_in_time(x, torch.tensor([3, 0]))[..., 0].tolist() == [[2, 1, 0, 3], [4, 5, 6, 7]]


def test_initial_values_are_torchs():
    """U(-1/sqrt(width), 1/sqrt(width)) for all."""
    p = spec.init(random.key(0), recurrent_spec("lstm", 300, 100))
    values = torch.cat([x.flatten() for x in tree.leaves(p)])
    assert values.abs().max() <= 0.1
    torch.testing.assert_close(values.std(), torch.tensor(0.1 / 3**0.5), rtol=0.01, atol=0)


P = spec.init(random.key(0), rnn_spec(D_IN, WIDTH), torch.float64)
FLOAT = spec.init(random.key(0), lstm_spec(D_IN, WIDTH))
BOTH = [{"backward": P, "forward": P}]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rnn(P, values()[0]), r"rnn: expected x of shape \(batch, time > 0, d_in\), found \(7, 5\)"),
        (lambda: rnn(P, values()[:, :0]), r"found \(5, 0, 5\)"),
        (lambda: rnn(P, values(d_in=4)), "rnn: expected a last axis of 5"),
        (lambda: lstm(FLOAT, values(d_in=4).float()), "lstm: expected a last axis of 5"),
        (lambda: gru(P, values()), r"expected \(batch, time > 0, 3 width\) .* found xw of shape \(5, 7, 6\)"),
        (
            lambda: rnn(P, values(), lengths=torch.tensor([8, 1, 1, 1, 1])),
            "lengths are from 1 to 8; expected from 0 to",
        ),
        (lambda: rnn(P, values(), lengths=torch.tensor([-1, 1, 1, 1, 1])), "lengths are from -1 to 1"),
        (lambda: rnn(P, values(), lengths=torch.tensor([1, 2])), r"expected lengths of integers, shape \(5,\), found"),
        (lambda: rnn(P, values(), lengths=torch.ones(5)), "expected lengths of integers"),
        (lambda: rnn(P, values(), {"c": torch.zeros(5, 6)}), "rnn: expected a state with h, found c"),
        (lambda: rnn(P, values(), torch.zeros(5, 6)), "rnn: expected a state with h, found Tensor"),
        (lambda: rnn(P, values(), {"h": torch.zeros(4, 6)}), r"'h' of the state of shape \(5, 6\), found \(4, 6\)"),
        (lambda: rnn(P, values(), nonlinearity="selu"), "nonlinearity 'selu' is unknown; expected tanh or relu"),
        (lambda: rnn({"ih": P["ih"]}, values()), "rnn: 'hh' is not among the parameters, which are ih"),
        (lambda: recurrent("lstn", [P], values()), "recurrent: kind 'lstn' is unknown; expected one of"),
        (lambda: recurrent_spec("lstn", 1, 1), "recurrent: kind 'lstn' is unknown"),
        (lambda: recurrent_spec("gru", 1, 0), "gru: width is 0; expected at least 1"),
        (lambda: recurrent_spec("lstm", 1, 2, projection=0), "lstm: projection is 0; expected at least 1"),
        (lambda: recurrent("rnn", [P], values(), []), "expected a list with a state for each of 1 layers, found 0"),
        (lambda: recurrent("rnn", [P], values(), torch.zeros(1, 5, 6)), "each of 1 layers, found Tensor"),
        (
            lambda: recurrent("rnn", BOTH, values(), [{"h": torch.zeros(5, 6)}]),
            "backward and forward in the .* found h",
        ),
        (
            lambda: rnn(P, values(), {"h": torch.zeros(5, 6)}),
            "is torch.float32, the parameters are torch.float64",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_cells_take_any_leading_axes():
    (p,) = spec.init(random.key(0), recurrent_spec("lstm", D_IN, WIDTH))
    xw, state = torch.ones(2, 3, 4 * WIDTH), (torch.ones(2, 3, WIDTH), torch.ones(2, 3, WIDTH))
    h, c = lstm_cell(p, xw, state)
    torch.testing.assert_close(h[1, 2], lstm_cell(p, xw[1, 2], (state[0][1, 2], state[1][1, 2]))[0])
    assert h.shape == c.shape == (2, 3, WIDTH)
