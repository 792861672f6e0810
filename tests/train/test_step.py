"""The train step against a plain torch loop, and its laws: pure, donated, in micro-batches, in mixed precision."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core import random, spec, tree
from core.layers import batch_norm, batch_norm_spec, dropout, linear, linear_spec
from train import optimizers
from train.step import Policy, TrainState, create, make_step, start, step_keys

KEY = random.key(5)
F64 = torch.float64


def model(norm=False):
    # No bias before the norm: its gradient is zero but for rounding, which Adam would blow up to whole steps.
    parts = {"first": linear_spec(6, 8, bias=not norm), "last": linear_spec(8, 3)}
    return {**parts, "norm": batch_norm_spec(8)} if norm else parts


def apply(params, x, keys, rate):
    h = linear(params["first"], x)
    h = batch_norm(params["norm"], h, train=True) if "norm" in params else h
    return linear(params["last"], dropout(torch.tanh(h), rate, keys, rate > 0))


def make_loss(rate=0.0):
    def loss(params, batch, keys):
        logits = apply(params, batch["x"], keys, rate)
        accuracy = (logits.argmax(-1) == batch["y"]).float().mean()
        return F.cross_entropy(logits, batch["y"]), {"accuracy": accuracy}

    return loss


def batches(n, size=8, dtype=torch.float32):
    keys = random.split(random.key(1), 2 * n).reshape(n, 2, 2)
    return [
        {"x": random.normal(a, (size, 6), dtype) + 1, "y": random.randint(b, (size,), 0, 3).to(torch.int64)}
        for a, b in keys
    ]


def initial(optimizer, norm=False, dtype=None):
    return start(KEY, spec.init(KEY, model(norm), dtype), model(norm), optimizer)


def run(step, state, data):
    for batch in data:
        state, metrics = step(state, batch)
    return state, metrics


CASES = {
    "sgd": (optimizers.sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "adamw": (
        optimizers.adamw(1e-2, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    ),
}


class Reference(nn.Module):
    """The same net in torch's own words, with the parameters of a state."""

    def __init__(self, params):
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(6, 8, bias=False), nn.Linear(8, 3), nn.BatchNorm1d(8)
        self.load_state_dict(tree.flatten(params), strict=False)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


@pytest.mark.parametrize(
    ("name", "donate", "compile"),
    [
        ("sgd", False, False),
        ("sgd", True, True),
        ("adamw", False, False),
        ("adamw", True, False),
        pytest.param("adamw", False, True, marks=pytest.mark.slow),
    ],
)
def test_equals_a_plain_torch_loop(name, compile, donate):
    torch._dynamo.reset()
    optimizer, torch_optimizer = CASES[name]
    state, data = initial(optimizer, norm=True), batches(4)
    module = Reference(state.params)
    reference = torch_optimizer(module.parameters())
    step = make_step(make_loss(), optimizer, donate=donate, compile=compile, backend="aot_eager")
    for i, batch in enumerate(data):
        before = deepcopy(dict(module.named_parameters()))
        logits = module(batch["x"])
        loss = F.cross_entropy(logits, batch["y"])
        reference.zero_grad()
        loss.backward()
        reference.step()
        state, metrics = step(state, batch)
        changes = [p - before[name] for name, p in module.named_parameters()]
        expected = {
            "accuracy": (logits.argmax(-1) == batch["y"]).float().mean(),
            "grad_norm": nn.utils.get_total_norm([p.grad for p in module.parameters()]),
            "loss": loss,
            "update_norm": nn.utils.get_total_norm(changes),
        }
        assert all(x.ndim == 0 for x in metrics.values()) and state.step == i + 1
        torch.testing.assert_close(tree.sort(metrics), expected, rtol=2e-5, atol=1e-6)
    for name, p in module.named_parameters():
        torch.testing.assert_close(tree.get(state.params, name), p.detach(), rtol=1e-5, atol=1e-6)
    assert state.stats["norm"]["count"] == 4
    for name in ("mean", "var"):
        torch.testing.assert_close(state.stats["norm"][name], getattr(module.norm, f"running_{name}"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_donated_equals_pure_up_to_rounding(name, micro_batches):
    optimizer, data = CASES[name][0], batches(3)
    options = dict(compile=False, micro_batches=micro_batches)
    pure, pure_metrics = run(make_step(make_loss(0.3), optimizer, **options), initial(optimizer, True), data)
    state = initial(optimizer, True)
    pointers = [x.data_ptr() for x in tree.leaves((state.params, state.opt_state))]
    donated, metrics = run(make_step(make_loss(0.3), optimizer, donate=True, **options), state, data)
    assert [x.data_ptr() for x in tree.leaves((donated.params, donated.opt_state))] == pointers
    torch.testing.assert_close(donated, pure, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(metrics, pure_metrics, rtol=1e-5, atol=1e-6)
    # One step from equal states. Each form rounds the decayed parameter twice and its update about eight times, by half
    # an eps of the term; where the two nearly cancel, that is several units in the last place of their sum.
    before = initial(optimizer).params
    steps = [make_step(make_loss(), optimizer, donate=donate, **options) for donate in (False, True)]
    pure, donated = (run(step, initial(optimizer), data[:1])[0].params for step in steps)
    for p, x, y in zip(*map(tree.leaves, (before, pure, donated)), strict=True):
        assert ((y - x).abs() <= 2**-23 * (2 * p.abs() + 8 * (x - p).abs())).all()


@pytest.mark.parametrize(
    ("micro_batches", "compile"), [(2, False), (4, False), pytest.param(2, True, marks=pytest.mark.slow)]
)
def test_micro_batches_give_the_update_of_the_whole_batch(micro_batches, compile):
    """Dropout's masks are those of the whole batch, so the updates agree to rounding."""
    torch._dynamo.reset()
    optimizer, data = CASES["adamw"][0], batches(3, dtype=F64)
    results = [
        run(
            make_step(make_loss(0.4), optimizer, micro_batches=n, compile=compile, backend="aot_eager"),
            initial(optimizer, dtype=F64),
            data,
        )
        for n, compile in ((1, False), (micro_batches, compile))
    ]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_running_mean_of_micro_batches(micro_batches):
    optimizer, batch = optimizers.sgd(0.0), batches(1)[0]
    step = make_step(make_loss(), optimizer, micro_batches=micro_batches, compile=False)
    state = initial(optimizer, norm=True)
    after, _ = step(state, batch)
    reference = Reference(state.params)
    reference(batch["x"])
    torch.testing.assert_close(after.stats["norm"]["mean"], reference.norm.running_mean)
    # torch's own update for each part from the same start, averaged.
    parts = []
    for part in batch["x"].chunk(micro_batches):
        reference = Reference(state.params)
        reference(part)
        parts.append(reference.norm.running_var)
    torch.testing.assert_close(after.stats["norm"]["var"], torch.stack(parts).mean(0))
    assert after.stats["norm"]["count"] == 1


def test_the_key_of_an_example_depends_on_step_and_index_alone():
    optimizer = optimizers.sgd(0.1)
    state = initial(optimizer)
    keys = step_keys(state.key, state.step, 8)
    assert keys.shape == (8, 2) and torch.equal(keys[:3], step_keys(state.key, state.step, 3))
    assert torch.equal(keys[2], random.fold_in(random.fold_in(KEY, 0), 2))
    later = step_keys(state.key, state.step + 1, 8)
    assert not (keys == later).all(-1).any() and len(keys.unique(dim=0)) == 8
    calls = []

    def loss(params, batch, keys):
        calls.append(keys)
        return linear(params["first"], batch["x"]).mean()

    make_step(loss, optimizer, compile=False)(state, batches(1)[0])
    assert torch.equal(calls[0], keys)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("donate", [False, True], ids=["pure", "donated"])
def test_bfloat16_policy_keeps_master_values(micro_batches, donate):
    optimizer, calls = optimizers.adamw(1e-2), []

    def loss(params, batch, keys):
        leaves = {name: x.dtype for name, x in tree.items({"params": params, "batch": batch})}
        calls.append(leaves)
        return F.cross_entropy(apply(params, batch["x"], keys, 0.0), batch["y"])

    options = dict(policy=Policy(torch.bfloat16), micro_batches=micro_batches, donate=donate, compile=False)
    before = initial(optimizer, norm=True)
    dtypes = tree.map(lambda x: x.dtype, before)
    wide, wide_metrics = make_step(make_loss(), optimizer, compile=False)(before, batches(1)[0])
    state, metrics = make_step(loss, optimizer, **options)(before, batches(1)[0])
    for name, dtype in calls[0].items():
        stat = name.startswith("params.norm.") and name.split(".")[-1] in ("count", "mean", "var")
        assert dtype == (torch.int64 if name == "batch.y" else torch.float32 if stat else torch.bfloat16), name
    assert tree.map(lambda x: x.dtype, state) == dtypes and metrics["loss"].dtype == torch.float32
    torch.testing.assert_close(metrics["loss"], wide_metrics["loss"], rtol=0.05, atol=0.05)
    if micro_batches == 1:
        torch.testing.assert_close(state.stats, wide.stats, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("micro_batches", "donate"), [pytest.param(1, False, marks=pytest.mark.slow), (2, True)])
def test_compiles_once(micro_batches, donate):
    torch._dynamo.reset()
    optimizer = optimizers.adamw(lambda count: 1e-2 / (1.0 + count))
    options = dict(micro_batches=micro_batches, donate=donate)
    step = make_step(make_loss(), optimizer, backend="aot_eager", **options)
    state, _ = step(initial(optimizer, norm=True), batches(1)[0])
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        state, _ = run(step, state, batches(3))
    assert not torch._dynamo.utils.counters["stats"]
    eager, _ = run(
        make_step(make_loss(), optimizer, compile=False, **options),
        initial(optimizer, norm=True),
        batches(1) + batches(3),
    )
    torch.testing.assert_close(state, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_a_pure_step_leaves_its_inputs_alone(compile):
    torch._dynamo.reset()
    optimizer = CASES["adamw"][0]
    state, batch = initial(optimizer, norm=True), batches(1)[0]
    before, generator = deepcopy((state, batch)), torch.get_rng_state()
    step = make_step(make_loss(0.2), optimizer, compile=compile, backend="aot_eager")
    first, second = step(state, batch), step(state, batch)
    torch.testing.assert_close((state, batch), before, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(x.requires_grad for x in tree.leaves(first))
    assert isinstance(first[0], TrainState) and tree.structure(first[0]) == tree.structure(state)


def test_an_ensemble_is_a_vmapped_step():
    optimizer, batch = CASES["adamw"][0], batches(1)[0]
    step = make_step(make_loss(0.2), optimizer, compile=False)
    states = [create(key, model(norm=True), optimizer) for key in random.split(KEY, 3)]
    mapped = torch.func.vmap(step, in_dims=(0, None))(tree.stack(states), batch)
    torch.testing.assert_close(mapped, tree.stack([step(state, batch) for state in states]), rtol=1e-4, atol=1e-5)


def test_metrics_can_leave_out_the_update_norm():
    optimizer = optimizers.sgd(0.1)
    for donate in (False, True):
        step = make_step(make_loss(), optimizer, update_norm=False, donate=donate, compile=False)
        assert set(step(initial(optimizer), batches(1)[0])[1]) == {"accuracy", "grad_norm", "loss"}


def test_create_draws_from_half_of_the_key():
    optimizer = optimizers.sgd(0.1)
    state, again = (create(KEY, model(norm=True), optimizer) for _ in range(2))
    torch.testing.assert_close(state, again, rtol=0, atol=0)
    init_key, run_key = random.split(KEY)
    values = spec.init(init_key, model(norm=True))
    torch.testing.assert_close(tree.merge(state.params, state.stats), values, rtol=0, atol=0)
    assert torch.equal(state.key, run_key) and state.step == 0 and tree.names(state.stats)[0] == "norm.count"
    with pytest.raises(ValueError, match="'norm.bias' is missing"):
        start(KEY, tree.merge(spec.init(KEY, model())), model(norm=True), optimizer)


def bad(out):
    return lambda params, batch, keys: out(linear(params["first"], batch["x"]))


@pytest.mark.parametrize(
    ("loss", "change", "error", "message", "micro_batches"),
    [
        (make_loss(), lambda b: b, ValueError, "batch of 8 examples does not divide into 3 micro-batches", 3),
        (
            make_loss(),
            lambda b: {**b, "y": b["y"][:7]},
            ValueError,
            r"agree in their leading axis: 'x' \(8, 6\), 'y' \(7,\)",
            1,
        ),
        (make_loss(), lambda b: {**b, "z": torch.tensor(1.0)}, ValueError, r"leading axis: .* 'z' \(\)", 2),
        (make_loss(), lambda b: {}, ValueError, "leading axis", 1),
        (bad(lambda y: y), lambda b: b, ValueError, r"returned shape \(8, 8\); expected a scalar", 1),
        (bad(lambda y: (y.sum(), {"n": 3})), lambda b: b, TypeError, "metric 'n' is int; expected a 0-D tensor", 2),
        (make_loss(), lambda b: {**b, "x": b["x"][:, :5]}, ValueError, "linear: expected a last axis of 6", 1),
    ],
)
def test_errors_are_the_same_compiled(loss, change, error, message, micro_batches):
    torch._dynamo.reset()
    optimizer = optimizers.sgd(0.1)
    step = make_step(loss, optimizer, micro_batches=micro_batches, backend="aot_eager")
    with pytest.raises(error, match=message):
        step(initial(optimizer), change(batches(1)[0]))


def test_error_of_micro_batches():
    with pytest.raises(ValueError, match="micro_batches is 0; expected at least 1"):
        make_step(make_loss(), optimizers.sgd(0.1), micro_batches=0)
