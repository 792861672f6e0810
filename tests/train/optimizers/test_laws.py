"""Laws of every optimizer: purity, donation, dtypes, vmap and one compilation; and those of the wrappers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from core import tree
from tests.train.optimizers.cases import ALL, F32, F64, STEPS, assert_close, clone, grads_at, matrices_only, run, start
from train import optimizers as opt


@pytest.mark.parametrize("name", ALL)
def test_donated_equals_pure_and_reuses_the_buffers(name):
    optimizer, params = ALL[name], start(F32)
    state, pure_params = optimizer.init(params), clone(params)
    pure_state = clone(state)
    buffers = [x.data_ptr() for x in tree.leaves((params, state))]
    step_donated = opt.donated_update(optimizer)
    for step in range(STEPS):
        grads = grads_at(step, pure_params)
        copies = clone(grads)
        params, state = step_donated(grads, state, params)
        assert all(torch.equal(x, y) for x, y in zip(tree.leaves(grads), tree.leaves(copies), strict=True))
        updates, pure_state = optimizer.update(grads, pure_state, pure_params)
        pure_params = opt.apply_updates(pure_params, updates)
    assert [x.data_ptr() for x in tree.leaves((params, state))] == buffers
    # 20 roundings to float32, each at most one ulp apart
    assert_close(params, pure_params, atol=2e-6, rtol=2e-6)
    assert_close(state, pure_state, atol=2e-6, rtol=2e-6)


def test_one_donated_adamw_step_is_the_pure_one_up_to_rounding():
    """Each form rounds the decayed parameter twice and its update about eight times, by half an eps of the term."""
    optimizer = opt.adamw(1e-3, weight_decay=0.1, mask=matrices_only)
    params = tree.map(lambda x: x.float(), run(optimizer, start(F32), steps=7)[0])
    state = optimizer.init(params)
    for step in range(3):
        grads = grads_at(step, params)
        updates, pure_state = optimizer.update(grads, state, params)
        pure = opt.apply_updates(params, updates)
        before = clone(params)
        params, state = optimizer.donated(grads, state, params)
        for p, x, y in zip(*map(tree.leaves, (before, pure, params)), strict=True):
            assert ((y - x).abs() <= 2**-23 * (2 * p.abs() + 8 * (x - p).abs())).all()


@pytest.mark.parametrize("name", ["torch adamw mask", "torch sgd", "torch momentum", "torch adagrad", "optax lion"])
@pytest.mark.parametrize("which", ["params", "grads", "both"])
def test_donated_is_right_for_transposed_buffers(name, which):
    # torch's fused kernels would pair a transposed buffer's numbers with the wrong gradients, silently.
    optimizer, params = ALL[name], {"w": start(F32)["head"]["weight"]}
    expected = run(optimizer, params, steps=1)[0]
    grads = grads_at(0, params)

    def turn(x):
        return x.T.contiguous().T

    params = tree.map(turn, params) if which != "grads" else clone(params)
    grads = tree.map(turn, grads) if which != "params" else grads
    actual, _ = opt.donated_update(optimizer)(grads, optimizer.init(params), params)
    assert_close(actual, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, F64])
@pytest.mark.parametrize(
    "name", ["torch adamw mask", "torch momentum", "wide moments", "optax accumulate", "ema debias"]
)
def test_dtypes_are_kept(name, dtype):
    optimizer, params = ALL[name], start(dtype)
    for donate in (False, True):
        actual, state = run(optimizer, clone(params), steps=2, donate=donate)
        assert {x.dtype for x in tree.leaves(actual)} == {dtype}
        assert [x.dtype for x in tree.leaves(state)] == [x.dtype for x in tree.leaves(optimizer.init(params))]


def test_mixed_dtypes_step_together():
    params = {"half": torch.ones(3, dtype=torch.bfloat16), "single": torch.ones(3)}
    optimizer = opt.adamw(0.1)
    pure, donated = run(optimizer, clone(params), 3)[0], run(optimizer, clone(params), 3, donate=True)[0]
    assert_close(pure, {k: torch.tensor(np.asarray(v.float())).to(v.dtype) for k, v in donated.items()}, 1e-2, 1e-2)
    assert not torch.equal(pure["half"], params["half"])


@pytest.mark.parametrize("name", ALL)
def test_pure_update_leaves_its_inputs_alone(name):
    optimizer, params = ALL[name], start(F32)
    inputs = (grads_at(0, params), optimizer.init(params), params)
    before = clone(inputs)
    optimizer.update(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(inputs), tree.leaves(before), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_ensemble_under_vmap(name):
    optimizer = ALL[name]
    members = [tree.sort(start(F32, seed)) for seed in range(3)]
    params, grads = tree.stack(members), tree.stack([grads_at(seed, m) for seed, m in enumerate(members)])
    state = torch.func.vmap(optimizer.init)(params)
    step = torch.func.vmap(optimizer.update)
    updates, state = step(grads, state, params)
    updates, state = step(grads, state, params)
    for i, member in enumerate(members):
        alone = optimizer.init(member)
        _, alone = optimizer.update(grads_at(i, member), alone, member)
        expected, alone = optimizer.update(grads_at(i, member), alone, member)
        tolerance = 5e-3 if "muon" in name else 1e-6
        assert_close(tree.map(lambda x, i=i: x[i], updates), expected, tolerance, tolerance)
        assert_close(tree.map(lambda x, i=i: x[i], state), alone, 1e-6, 1e-6)


COMPILED = [
    ("schedule adamw", True),
    ("schedule adamw", False),
    ("torch freeze", False),
    ("ema debias", True),
    ("optax muon", False),
    ("torch dampening", False),
    ("optax lion", False),
    ("clip by quantile", False),
]


@pytest.mark.parametrize(
    ("name", "donate"), [*COMPILED[:2], *(pytest.param(*row, marks=pytest.mark.slow) for row in COMPILED[2:])]
)
def test_compiles_once(name, donate):
    torch._dynamo.reset()
    optimizer, params = ALL[name], {"blocks": start(F32)["blocks"][:1], "head": torch.ones(3)}
    graphs = 0

    def backend(module, inputs):
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    def pure(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return opt.apply_updates(params, updates), state

    step = opt.donated_update(optimizer) if donate else pure
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
    state, expected, expected_state = optimizer.init(params), clone(params), optimizer.init(params)
    for i in range(4):
        grads = grads_at(i, expected)
        params, state = compiled(grads, state, params)
        expected, expected_state = pure(grads, expected_state, expected)
    assert graphs == 1
    assert_close(params, expected, 1e-5, 1e-5)
    assert_close(state, expected_state, 1e-5, 1e-5)
    torch._dynamo.reset()


def test_update_is_differentiable():
    optimizer, p, g = opt.sgd(0.1, momentum=0.9), {"w": torch.ones(2)}, {"w": torch.tensor([1.0, 2.0])}

    def after(g):
        return opt.apply_updates(p, optimizer.update(g, optimizer.init(p), p)[0])["w"].sum()

    torch.testing.assert_close(torch.func.grad(after)(g)["w"], torch.full((2,), -0.1))


def test_averaged_needs_the_state_of_ema():
    with pytest.raises(TypeError, match="averaged.*tuple"):
        opt.averaged(opt.chain(opt.ema(opt.sgd(0.1))).init(start()))


def test_ema_owns_its_buffers():
    optimizer, params = opt.ema(opt.sgd(0.1), 0.5), {"w": torch.ones(2)}
    params, state = optimizer.donated({"w": torch.ones(2)}, optimizer.init(params), params)
    torch.testing.assert_close(opt.averaged(state)["w"], torch.full((2,), 0.95))


def test_ema_of_bfloat16_moves_in_float32():
    params = {"w": torch.ones(1, dtype=torch.bfloat16)}
    optimizer = opt.ema(opt.sgd(1.0), 0.9999)
    state = optimizer.init(params)
    _, state = optimizer.update({"w": torch.ones_like(params["w"])}, state, params)
    assert 0 < 1 - opt.averaged(state)["w"].item() < 2e-4


def test_frozen_leaves_have_no_state_and_stay_as_they_are():
    optimizer = opt.freeze(opt.adam(0.1), lambda name, leaf: name != "head.weight")
    params = start(F32)
    assert sum(x.numel() for x in tree.leaves(optimizer.init(params))) == 2 * 30 + 1
    actual, state = run(optimizer, params)
    for (name, x), y in zip(tree.items(actual), tree.leaves(params), strict=True):
        assert torch.equal(x, y) == (name != "head.weight")
    assert tree.flatten(state).keys() >= {"inner.trained.1.mean.head.weight"}


def test_accumulated_half_precision_sums_in_float32():
    params = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    optimizer = opt.accumulate(opt.sgd(1.0), 512)
    state = optimizer.init(params)
    for _ in range(512):
        updates, state = optimizer.update({"w": torch.ones(1, dtype=torch.bfloat16)}, state, params)
    assert updates["w"].item() == -1.0


def test_centered_rmsprop_survives_constant_gradients():
    optimizer, params = opt.rmsprop(1e-3, centered=True, decay=0.5), {"w": torch.ones(100)}
    state = optimizer.init(params)
    grads = {"w": torch.linspace(0.1, 3.0, 100)}
    for _ in range(60):
        updates, state = optimizer.update(grads, state, params)
    assert updates["w"].isfinite().all()


def test_donation_is_passed_on():
    assert opt.chain(opt.clip_by_value(1.0), opt.adamw(0.1)).donated
    assert not opt.chain(opt.adamw(0.1), opt.clip_by_value(1.0)).donated
    assert not opt.chain().donated


def test_a_bare_tensor_is_a_tree():
    params: Tensor = torch.ones(3)
    for optimizer in (opt.adamw(0.1), opt.freeze(opt.sgd(0.1), lambda name, leaf: False)):
        state = optimizer.init(params)
        updates, state = optimizer.update(torch.ones(3), state, params)
        assert opt.apply_updates(params, updates).shape == (3,)
