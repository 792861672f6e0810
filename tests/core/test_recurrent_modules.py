"""torch's recurrent modules, lifted: on the recurrences of this library, whatever transform is open."""

import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from core import per_example, tree
from core.lift import lift
from core.per_example import reports

TOKENS = torch.arange(28).reshape(4, 7) % 11


class Tagger(nn.Module):
    def __init__(self, layer: type, **options):
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.memory = layer(5, 6, 2, batch_first=True, **options)
        width = (options.get("proj_size") or 6) * (2 if options.get("bidirectional") else 1)
        self.head = nn.ModuleList([nn.Linear(width, 3)])

    def forward(self, tokens):
        self.memory.flatten_parameters()
        h, _ = self.memory(self.embedding(tokens))
        return self.head[0](h).square().mean((1, 2))


CASES = {
    "lstm": (nn.LSTM, {}),
    "lstm, projection": (nn.LSTM, {"proj_size": 3}),
    "lstm, no bias": (nn.LSTM, {"bias": False}),
    "gru, both directions": (nn.GRU, {"bidirectional": True}),
    "rnn, relu": (nn.RNN, {"nonlinearity": "relu"}),
}


def tagger(case: str) -> nn.Module:
    layer, options = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tagger(layer, **options).double()


@pytest.mark.parametrize("case", CASES)
def test_gradients_reports_and_ensembles(case):
    module = tagger(case)
    params, _, apply = lift(module)
    expected = torch.autograd.grad(module(TOKENS).sum(), list(module.parameters()))
    expected = tree.nest(dict(zip([name for name, _ in module.named_parameters()], expected, strict=True)))
    torch.testing.assert_close(grad(lambda p: apply(p, TOKENS).sum())(params), expected, rtol=1e-12, atol=1e-12)
    out = reports(apply, params, TOKENS)
    each = per_example.each(apply, params, TOKENS)
    norms = tree.map(lambda g: g.flatten(1).norm(dim=1), each)
    torch.testing.assert_close((out.sum, out.norm), (expected, norms), rtol=1e-12, atol=1e-12)
    assert max(len(leaf.uses) for leaf in per_example.plan(apply, params, TOKENS).leaves.values()) == 1
    halved = tree.map(lambda x: x / 2, params)
    members = vmap(lambda p: apply(p, TOKENS))(tree.stack([params, halved]))
    torch.testing.assert_close(members, torch.stack([apply(params, TOKENS), apply(halved, TOKENS)]))


@pytest.mark.slow  # the functional layer's is in the default suite
@pytest.mark.parametrize("case", ["lstm", "gru, both directions"])
def test_compiled(case):
    """torch refuses to compile its own."""
    torch._dynamo.reset()
    params, _, apply = lift(tagger(case))

    def f(params):
        return reports(apply, params, TOKENS)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)(params)
    torch.testing.assert_close(compiled[:3], f(params)[:3], rtol=1e-12, atol=1e-12)


def test_forward_mode():
    params, _, apply = lift(tagger("lstm"))
    params, direction = tree.cast(params, torch.float32), tree.map(lambda x: torch.ones_like(x).float(), params)
    _, tangent = jvp(lambda p: apply(p, TOKENS).sum(), (params,), (direction,))
    gradient = grad(lambda p: apply(p, TOKENS).sum())(params)
    expected = sum((g * d).sum() for g, d in zip(tree.leaves(gradient), tree.leaves(direction), strict=True))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sorted_already", [True, False])
def test_packed_sequences(batch_first, sorted_already):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.LSTM(5, 6, 2, bidirectional=True, batch_first=batch_first).double()
        x, state = torch.randn(4, 7, 5).double(), tuple(torch.randn(4, 4, 6).double() for _ in range(2))
    lengths = torch.tensor([7, 5, 3, 1] if sorted_already else [3, 7, 1, 5])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=sorted_already)
    params, _, apply = lift(module)
    (expected, ends), (actual, our_ends) = module(packed, state), apply(params, packed, state)
    torch.testing.assert_close(pad_packed_sequence(actual), pad_packed_sequence(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(our_ends, ends, rtol=0, atol=1e-12)
    assert torch.equal(actual.batch_sizes, expected.batch_sizes)


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_unbatched_and_time_first_inputs(layer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, x = layer(5, 6, 2).double(), torch.randn(7, 3, 5).double()
    params, _, apply = lift(module)
    for inputs in (x, x[:, 0]):
        torch.testing.assert_close(apply(params, inputs), module(inputs), rtol=0, atol=1e-12)
        _, state = module(inputs)
        torch.testing.assert_close(apply(params, inputs, state), module(inputs, state), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells(cell):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell(5, 6)

        def forward(self, x):
            state = None
            for step in x.unbind(1):
                state = self.cell(step, state)
            return (state[0] if isinstance(state, tuple) else state).square().sum(1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, x = Loop().double(), torch.randn(4, 3, 5).double()
    params, _, apply = lift(module)
    torch.testing.assert_close(apply(params, x), module(x), rtol=0, atol=1e-12)
    assert per_example.verify(apply, params, x) < 1e-12
    members = vmap(lambda p: apply(p, x))(tree.stack([params, params]))
    torch.testing.assert_close(members[1], module(x).detach(), rtol=0, atol=1e-12)


def test_a_first_state_of_another_kind():
    params, _, apply = lift(nn.LSTM(5, 6))
    with pytest.raises(ValueError, match=r"the lifted LSTM: expected a first state \(h, c\), found 1 tensors"):
        apply(params, torch.ones(7, 3, 5), torch.zeros(1, 3, 6))


def test_hooks_of_a_layer_run():
    module = tagger("lstm")
    module.memory.register_forward_hook(lambda layer, inputs, out: (out[0] * 2, out[1]))
    params, _, apply = lift(module)
    torch.testing.assert_close(apply(params, TOKENS), module(TOKENS), rtol=0, atol=1e-12)


def test_the_module_is_unchanged():
    module = tagger("lstm")
    layers = dict(module.named_modules())
    before = {name: x.clone() for name, x in module.state_dict().items()}
    params, _, apply = lift(module)
    grad(lambda p: apply(p, TOKENS).sum())(tree.map(lambda x: x * 2, params))
    assert dict(module.named_modules()) == layers and isinstance(module.memory, nn.LSTM)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


def test_a_layer_under_two_names_is_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.GRU(4, 4, batch_first=True)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x)[0])[0].sum((1, 2))

    module, x = Twice().double(), torch.ones(3, 5, 4, dtype=torch.float64)
    params, _, apply = lift(module)
    assert sorted(params) == ["first"]
    torch.testing.assert_close(apply(params, x), module(x), rtol=0, atol=1e-12)
    assert per_example.verify(apply, params, x) < 1e-12
