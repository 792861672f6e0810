"""Truncated back-propagation through time: a step that carries a state, against torch.nn.LSTM and plain autograd."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core import random, spec, tree
from core.layers import dropout, embedding, embedding_spec, linear, linear_spec
from tests.train.test_step import run
from train import optimizers
from train.carry import reset
from train.data.text.text import lane_batch, lane_steps
from train.losses.weighted import WeightedLoss
from train.step import Policy, create, make_step, start

F64 = torch.float64
VOCABULARY, WIDTH, BATCH, TIME = 7, 5, 4, 6
TOKENS = random.randint(random.key(1), (BATCH * 7 * TIME,), 0, VOCABULARY).long()
CLIPPED_SGD = optimizers.chain(optimizers.clip_by_global_norm(0.2), optimizers.sgd(2.0))
MODEL = {
    "hidden": linear_spec(WIDTH, 4 * WIDTH),
    "inputs": linear_spec(WIDTH, 4 * WIDTH),
    "last": linear_spec(WIDTH, VOCABULARY),
    "tokens": embedding_spec(VOCABULARY, WIDTH),
}


def initial(dtype=F64, optimizer=CLIPPED_SGD):
    return start(random.key(5), spec.init(random.key(5), MODEL, dtype), MODEL, optimizer)


def zeros(dtype=F64, batch=BATCH):
    return {"c": torch.zeros(batch, WIDTH, dtype=dtype), "h": torch.zeros(batch, WIDTH, dtype=dtype)}


def lstm(params, tokens, carry, keys, rate):
    """Logits (batch, time, vocabulary) and the state after the last token, in the dtype of the one before."""
    c, h = carry["c"], carry["h"]
    x = dropout(embedding(params["tokens"], tokens), rate, keys, rate > 0)  # (batch, time, width)
    states = []
    for x_t in x.unbind(1):
        gates = linear(params["inputs"], x_t) + linear(params["hidden"], h.to(x.dtype))
        i, f, g, o = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h.to(x.dtype))
    return linear(params["last"], torch.stack(states, 1)), {"c": c, "h": h}


def make_loss(form="scalar", rate=0.0):
    def loss(params, inputs, keys):
        (tokens, targets, fresh), carry = inputs
        logits, carry = lstm(params, tokens, reset(carry, fresh), keys, rate)
        losses = F.cross_entropy(logits.mT, targets, reduction="none").mean(1)  # (batch,)
        weights = 1.0 + tokens[:, 0]
        value = {"scalar": losses.mean(), "examples": losses, "weighted": WeightedLoss(weights * losses, weights)}[form]
        return value, {"accuracy": (logits.argmax(-1) == targets).double().mean()}, carry

    return loss


def batches(first, last):
    return [lane_batch(TOKENS, step, BATCH, TIME) for step in range(first, last)]


def carried(step, state, data, carry):
    """The result of the last step."""
    for batch in data:
        state, metrics, carry = step(state, (batch, carry))
    return state, metrics, carry


class Reference(nn.Module):
    """The same net in torch's own words, with the parameters of a state."""

    def __init__(self, params):
        super().__init__()
        self.tokens, self.last = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        names = {"hidden.weight": "weight_hh_l0", "hidden.bias": "bias_hh_l0"}
        names |= {"inputs.weight": "weight_ih_l0", "inputs.bias": "bias_ih_l0"}
        flat = {name: deepcopy(x) for name, x in tree.flatten(params).items()}
        values = {f"lstm.{new}": flat.pop(old) for old, new in names.items()}
        self.double().load_state_dict(values | flat)

    def forward(self, tokens, state):
        out, state = self.lstm(self.tokens(tokens), state)
        return self.last(out), state


@pytest.fixture(scope="module")
def reference():
    """(parameters, metrics, state) after 20 steps of plain autograd and torch.optim.SGD; a pass has 6."""
    assert lane_steps(TOKENS, BATCH, TIME) == 6
    state = initial()
    module, hidden, clipped = Reference(state.params), None, 0
    optimizer = torch.optim.SGD(module.parameters(), 2.0)
    for tokens, targets, fresh in batches(0, 20):
        hidden = None if fresh.all() else tuple(x.detach() for x in hidden)
        logits, hidden = module(tokens, hidden)
        loss = F.cross_entropy(logits.mT, targets)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 0.2)
        clipped += int(norm > 0.2)
        optimizer.step()
    assert 0 < clipped < 20
    accuracy = (logits.argmax(-1) == targets).double().mean()
    h, c = (x.detach()[0] for x in hidden)
    metrics = {"accuracy": accuracy, "grad_norm": norm, "loss": loss.detach()}
    return tree.sort(dict(module.named_parameters())), metrics, {"c": c, "h": h}


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
@pytest.mark.parametrize(("form", "micro_batches"), [("scalar", 1), ("examples", 1), ("scalar", 2), ("examples", 4)])
def test_equals_torch(form, micro_batches, donate, reference):
    options = {"micro_batches": micro_batches, "donate": donate, "carry": True, "update_norm": False}
    step = make_step(make_loss(form), CLIPPED_SGD, compile=False, **options)
    state, metrics, carry = carried(step, initial(), batches(0, 20), zeros())
    params, *expected = reference
    torch.testing.assert_close([tree.sort(metrics), carry], expected, rtol=1e-12, atol=1e-12)
    module = Reference(state.params)
    torch.testing.assert_close(tree.sort(dict(module.named_parameters())), params, rtol=1e-12, atol=1e-12)
    assert state.step == 20 and carry["h"].abs().min() > 0


def test_without_the_carry_it_is_another_net(reference):
    """The carry matters: with a state of zeros before each step the result is another one."""
    step, state = make_step(make_loss(), CLIPPED_SGD, carry=True, compile=False), initial()
    for batch in batches(0, 20):
        state, metrics, _ = step(state, (batch, zeros()))
    assert (metrics["loss"] - reference[1]["loss"]).abs() > 1e-4


@pytest.mark.parametrize("form", ["examples", "weighted"])
def test_micro_batches_with_dropout(form):
    """Masks are those of the whole batch, and the parts of the carry come in its order."""
    results = [
        carried(
            make_step(make_loss(form, 0.3), CLIPPED_SGD, carry=True, compile=False, micro_batches=n),
            initial(),
            batches(0, 3),
            zeros(),
        )
        for n in (1, 2, 4)
    ]
    for state, metrics, carry in results[1:]:
        torch.testing.assert_close((state, carry), (results[0][0], results[0][2]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(metrics["loss"], results[0][1]["loss"], rtol=1e-12, atol=1e-12)
    assert len(results[0][2]["h"].unique(dim=0)) == BATCH


@pytest.mark.parametrize(
    ("micro_batches", "donate"), [(2, True), pytest.param(1, False, marks=pytest.mark.slow)], ids=str
)
def test_compiles_once_and_equals_eager(micro_batches, donate):
    torch._dynamo.reset()
    options = {"carry": True, "micro_batches": micro_batches, "donate": donate}
    step = make_step(make_loss("examples", 0.2), CLIPPED_SGD, backend="aot_eager", **options)
    out = carried(step, initial(), batches(0, 1), zeros())
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = carried(step, out[0], batches(1, 4), out[2])
    eager = make_step(make_loss("examples", 0.2), CLIPPED_SGD, compile=False, **options)
    torch.testing.assert_close(actual, carried(eager, initial(), batches(0, 4), zeros()), rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_inputs_are_unchanged_and_the_carry_is_its_own(donate):
    """Even a carry that is returned as it came, or is a view of a parameter that a donated step overwrites."""

    def loss(params, inputs, keys):
        (tokens, _, _), carry = inputs
        logits, _ = lstm(params, tokens, carry, keys, 0.0)
        view = params["tokens"]["weight"][:BATCH]
        return logits.square().mean(), {}, {"c": carry["c"], "h": view}

    step = make_step(loss, CLIPPED_SGD, carry=True, donate=donate, compile=False)
    state, carry, (batch,) = initial(), tree.map(torch.ones_like, zeros()), batches(0, 1)
    before = deepcopy((batch, carry, state.params["tokens"]["weight"]))
    after, _, new = step(state, (batch, carry))
    torch.testing.assert_close((batch, carry), before[:2], rtol=0, atol=0)
    torch.testing.assert_close(new, {"c": before[1]["c"], "h": before[2][:BATCH]}, rtol=0, atol=0)
    assert not torch.equal(after.params["tokens"]["weight"], before[2])
    assert not any(x.requires_grad for x in tree.leaves(new)) and new["c"].data_ptr() != carry["c"].data_ptr()
    assert new["h"].untyped_storage().nbytes() == new["h"].nbytes


def test_the_new_carry_has_no_gradient():
    """The loss of a step depends on the carry before it, the carry after it is a constant."""
    step, (batch,) = make_step(make_loss(), CLIPPED_SGD, carry=True, compile=False), batches(1, 2)

    def after(carry):
        _, metrics, new = step(initial(), (batch, carry))
        return metrics["loss"], new["h"].sum() + new["c"].sum()

    carry = tree.map(torch.ones_like, zeros())
    by_loss, by_carry = (torch.func.grad(lambda carry, i=i: after(carry)[i])(carry) for i in range(2))
    assert by_loss["h"].abs().min() > 0 and not any(x.any() for x in tree.leaves(by_carry))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_bfloat16_policy_leaves_the_carry_alone(micro_batches):
    dtypes = []

    def loss(params, inputs, keys):
        dtypes.append((params["tokens"]["weight"].dtype, inputs[1]["c"].dtype, inputs[0][3].dtype))
        return make_loss()(params, (inputs[0][:3], inputs[1]), keys)

    options = {"policy": Policy(torch.bfloat16), "micro_batches": micro_batches, "compile": False, "carry": True}
    data = [(*batch, torch.ones(BATCH)) for batch in batches(0, 3)]
    _, metrics, carry = carried(
        make_step(loss, CLIPPED_SGD, **options), initial(torch.float32), data, zeros(torch.float32)
    )
    assert set(dtypes) == {(torch.bfloat16, torch.float32, torch.bfloat16)}
    full = make_step(make_loss(), CLIPPED_SGD, carry=True, compile=False)
    _, wide, expected = carried(full, initial(torch.float32), batches(0, 3), zeros(torch.float32))
    torch.testing.assert_close(carry, expected, rtol=0.05, atol=0.02)  # float32 both
    torch.testing.assert_close(metrics["loss"], wide["loss"].float(), rtol=0.02, atol=0)


def test_the_carry_is_any_tree_of_tensors():
    """Integers and flags, or nothing; a step of members under vmap carries the state of each."""

    def loss(params, inputs, keys):
        x, (count, seen) = inputs
        return (
            linear(params, x).square().mean(),
            {},
            (count + x.shape[1], [seen[0] | (x > 0).any(1), seen[1] + x.sum(1)]),
        )

    model, x = linear_spec(3, 2), random.normal(random.key(2), (BATCH, 3))
    step = make_step(loss, optimizers.sgd(0.1), carry=True, micro_batches=2, compile=False)
    carry = torch.zeros(BATCH, dtype=torch.int64), [torch.zeros(BATCH, dtype=torch.bool), torch.zeros(BATCH)]
    state = create(random.key(0), model, optimizers.sgd(0.1))
    after, _, new = step(state, (x, carry))
    _, _, new = step(after, (-x, new))
    assert new[0].tolist() == [6] * BATCH and new[1][0].all()
    torch.testing.assert_close(new[1][1], torch.zeros(BATCH), rtol=0, atol=1e-6)
    states = [create(key, model, optimizers.sgd(0.1)) for key in random.split(random.key(0), 3)]
    carries = [tree.map(lambda leaf, n=n: leaf + leaf.new_tensor(n), carry) for n in (0, 1, 1)]
    mapped = torch.func.vmap(step, in_dims=(0, (None, 0)))(tree.stack(states), (x, tree.stack(carries)))
    alone = [step(state, (x, carry)) for state, carry in zip(states, carries, strict=True)]
    torch.testing.assert_close(mapped, tree.stack(alone), rtol=1e-5, atol=1e-6)

    def stateless(params, inputs, keys):
        return linear(params, inputs[0]).square().mean(), {}, inputs[1]

    for empty in ((), {}):
        out = make_step(stateless, optimizers.sgd(0.1), carry=True, compile=False)(state, (x, empty))
        plain = make_step(lambda p, b, k: linear(p, b).square().mean(), optimizers.sgd(0.1), compile=False)
        torch.testing.assert_close(out[:2], run(plain, state, [x]), rtol=0, atol=0)
        assert out[2] == empty


def test_reset():
    fresh = torch.tensor([False, True, True])
    carry = [torch.full((3, 2), torch.nan), torch.ones(3, dtype=torch.int64), torch.ones(3, 1, 1, dtype=torch.bool)]
    out = reset(carry, fresh)
    assert [x.dtype for x in out] == [x.dtype for x in carry] and [x.shape for x in out] == [x.shape for x in carry]
    assert out[1].tolist() == [1, 0, 0] and out[2].flatten().tolist() == [True, False, False]
    assert out[0][0].isnan().all() and not out[0][1:].any() and carry[0].isnan().all()


def returns(change):
    def loss(params, inputs, keys):
        value, metrics, carry = make_loss()(params, inputs, keys)
        return change(value, metrics, carry)

    return loss


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda v, m, c: (v, m, {**c, "h": c["h"].bfloat16()}),
            ValueError,
            r"^the loss returned a carry whose 'h' is bfloat16 \(4, 5\); expected float64 \(4, 5\) as before$",
        ),
        (lambda v, m, c: (v, m, {**c, "c": c["c"][:, :2]}), ValueError, r"carry whose 'c' is float64 \(4, 2\); exp"),
        (lambda v, m, c: (v, m, {**c, "c": (c["c"],)}), ValueError, "carry whose 'c' is tuple; expected float64"),
        (lambda v, m, c: (v, m, {"c": c["c"]}), ValueError, "^the loss returned another carry than it got: .*h"),
        (
            lambda v, m, c: (v, m),
            TypeError,
            r"^the loss returned \(Tensor, dict\); expected \(value, dict of metrics, c",
        ),
        (lambda v, m, c: v, TypeError, r"^the loss returned \(Tensor\); expected \(value, dict of metrics, carry\)$"),
        (lambda v, m, c: (v, c["h"], m), ValueError, "the loss returned another carry than it got"),
        (lambda v, m, c: (v, v, c), TypeError, r"the loss returned \(Tensor, Tensor\); expected its value, or"),
    ],
)
def test_errors_of_the_loss(change, error, message):
    step = make_step(returns(change), CLIPPED_SGD, carry=True, compile=False)
    with pytest.raises(error, match=message):
        step(initial(), (batches(0, 1)[0], zeros()))


def test_errors_are_the_same_compiled():
    torch._dynamo.reset()
    step = make_step(
        returns(lambda v, m, c: (v, m, {**c, "h": c["h"].float()})), CLIPPED_SGD, carry=True, backend="aot_eager"
    )
    with pytest.raises(ValueError, match=r"carry whose 'h' is float32 \(4, 5\); expected float64 \(4, 5\) as before$"):
        step(initial(), (batches(0, 1)[0], zeros()))
    torch._dynamo.reset()


def test_errors_of_the_call():
    with pytest.raises(ValueError, match="^make_step: carry and watch exclude each other; expected one of them$"):
        make_step(make_loss(), CLIPPED_SGD, carry=True, watch=lambda reports: {})
    step, (batch,) = make_step(make_loss(), CLIPPED_SGD, carry=True, compile=False), batches(0, 1)
    with pytest.raises(ValueError, match=r"agree in their leading axis: .*'1.h' \(3, 5\)$"):
        step(initial(), (batch, zeros(batch=3)))
    for wrong in (batch, batch[0]):
        with pytest.raises(
            TypeError, match=r"^step: the batch is \w+; with a carried state expected \(batch, carry\)$"
        ):
            step(initial(), wrong)
