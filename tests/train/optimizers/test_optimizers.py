"""Optimizers against torch.optim and optax, leaf by leaf over 20 steps in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from core import tree
from tests.train.optimizers.cases import (
    F32,
    F64,
    OPTAX,
    STEPS,
    TORCH,
    assert_close,
    grads_at,
    halving,
    run,
    start,
    tensors,
)
from train import optimizers as opt


def run_torch(make, params, steps=STEPS):
    """`make(list of (name, parameter))` returns one or several torch optimizers."""
    named = [(name, torch.nn.Parameter(p.clone())) for name, p in tree.items(params)]
    optimizers = make(named)
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    for step in range(steps):
        current = tree.unflatten(params, [p.detach() for _, p in named])
        for (_, p), g in zip(named, tree.leaves(grads_at(step, current)), strict=True):
            p.grad = g
        for optimizer in optimizers:
            optimizer.step()
    return tree.unflatten(params, [p.detach() for _, p in named])


def to_jax(values):
    return tree.map(lambda x: jnp.asarray(x.numpy()), values)


def run_optax(optimizer, params, steps=STEPS):
    with jax.enable_x64(True):
        values = to_jax(params)
        state = optimizer.init(values)
        update = jax.jit(optimizer.update)
        for step in range(steps):
            back = tree.unflatten(params, [torch.tensor(np.asarray(x)) for x in tree.leaves(values)])
            updates, state = update(to_jax(grads_at(step, back)), state, values)
            values = optax.apply_updates(values, updates)
        return tree.unflatten(params, [torch.tensor(np.asarray(x)) for x in tree.leaves(values)])


@pytest.mark.parametrize("name", TORCH)
def test_equals_torch(name):
    ours, make = TORCH[name]
    assert_close(run(ours, start())[0], run_torch(make, start()))


@pytest.mark.parametrize("name", OPTAX)
def test_equals_optax(name):
    ours, theirs = OPTAX[name]
    # optax keeps Muon's coefficients, and MultiSteps' sums, in float32; Newton-Schulz amplifies the difference.
    atol = {"muon": 1e-4, "accumulate": 1e-7}.get(name, 1e-9)
    assert_close(run(ours, start())[0], run_optax(theirs, start()), atol=atol, rtol=1e-6)


def test_muon_equals_torch_in_bfloat16():
    matrices = {
        "wide": start()["head"]["weight"].T.contiguous().float(),
        "tall": start()["blocks"][1]["weight"].float(),
    }
    ours = opt.muon(0.02, opt.identity(), weight_decay=0.1)
    expected = run_torch(lambda n: torch.optim.Muon(tensors(n), 0.02, weight_decay=0.1), matrices, steps=5)
    assert_close(run(ours, matrices, steps=5)[0], expected, atol=5e-3, rtol=0)
    rescaled = opt.muon(0.02, opt.identity(), weight_decay=0.1, adjust="match_rms_adamw")
    expected = run_torch(
        lambda n: torch.optim.Muon(tensors(n), 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), matrices, 5
    )
    assert_close(run(rescaled, matrices, steps=5)[0], expected, atol=5e-3, rtol=0)


def test_muon_flattens_convolutions():
    values = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    flat, convolution = {"w": values.flatten(1)}, {"w": values}
    of_matrix, of_convolution = opt.scale_by_muon(dtype=F64), opt.scale_by_muon(flatten=True, dtype=F64)
    updates, state = of_matrix.update(flat, of_matrix.init(flat), flat)
    directions, momenta = of_convolution.update(convolution, of_convolution.init(convolution), convolution)
    assert torch.equal(directions["w"], updates["w"].reshape(values.shape))
    assert torch.equal(momenta.momentum["w"].flatten(1), state.momentum["w"])


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (2, 5, 3)])
def test_newton_schulz_gives_nearly_orthogonal_rows(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(opt.newton_schulz(matrix, dtype=F32))
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    # It shares the singular vectors: U^T X V is diagonal.
    core = u.mT @ opt.newton_schulz(matrix, dtype=F32) @ v.mT
    torch.testing.assert_close(core, torch.diag_embed(core.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)


def test_clip_by_global_norm_equals_torch():
    params, grads = start(), grads_at(0, start())
    named = [torch.nn.Parameter(p) for p in tree.leaves(params)]
    for p, g in zip(named, tree.leaves(grads), strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(named, 0.5)
    clipped, _ = opt.clip_by_global_norm(0.5).update(grads, (), params)
    torch.testing.assert_close(tree.leaves(clipped), [p.grad for p in named])


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_clip_by_norm_quantile_is_that_of_numpy(quantile):
    """The limit is the quantile of the last four norms; one that is infinite is not among them."""
    optimizer, params = opt.clip_by_norm_quantile(quantile, window=4), {"a": torch.zeros(2), "b": torch.zeros(())}
    norms = [3.0, 1.0, 2.0, 7.0, 0.5, np.inf, 4.0, 4.0, 1e-15, 1e15]
    state, history = optimizer.init(params), []
    for norm in norms:
        grads = {"a": torch.tensor([0.6, 0.0]) * norm, "b": torch.tensor(0.8) * norm}
        updates, state = optimizer.update(grads, state, params)
        if np.isfinite(norm):
            history.append(norm)
            expected = min(norm, np.quantile(history[-4:], quantile))
            assert float(tree.norm(updates)) == pytest.approx(expected, rel=1e-5)
            assert updates["a"][0] / updates["b"] == pytest.approx(0.75)


def test_zero_gradients_stay_zero_under_a_quantile_of_zeros():
    optimizer, params = opt.clip_by_norm_quantile(0.5), {"a": torch.zeros(2)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert updates["a"].tolist() == [0.0, 0.0]


def test_schedule_equals_optax_and_starts_at_zero():
    ours = run(opt.adamw(halving, weight_decay=0.1), start())[0]
    theirs = run_optax(optax.adamw(lambda count: 0.1 * 0.5**count, weight_decay=0.1), start())
    assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("debias", [True, False])
def test_ema_equals_optax_and_torch(debias):
    optimizer, params = opt.ema(opt.sgd(0.1), 0.9, debias=debias), start()
    state = optimizer.init(params)
    theirs = optax.ema(0.9, debias=True)
    with jax.enable_x64(True):
        their_state = theirs.init(to_jax(params))
    modules = torch.nn.ParameterList([torch.nn.Parameter(p.clone()) for p in tree.leaves(params)])
    swa = torch.optim.swa_utils.AveragedModel(modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    swa.update_parameters(modules)  # the first call copies
    for step in range(STEPS):
        updates, state = optimizer.update(grads_at(step, params), state, params)
        params = opt.apply_updates(params, updates)
        with torch.no_grad():
            for p, value in zip(modules, tree.leaves(params), strict=True):
                p.copy_(value)
        swa.update_parameters(modules)
        with jax.enable_x64(True):
            average, their_state = theirs.update(to_jax(params), their_state)
    expected = [torch.tensor(np.asarray(x)) for x in tree.leaves(average)] if debias else list(swa.module)
    for x, y in zip(tree.leaves(opt.averaged(state)), expected, strict=True):
        torch.testing.assert_close(x, y.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: opt.sgd(-0.1), "learning_rate must be at least 0, got -0.1"),
        (lambda: opt.sgd(0.1, nesterov=True), "need a momentum"),
        (lambda: opt.sgd(0.1, momentum=0.9, nesterov=True, dampening=0.1), "no dampening"),
        (lambda: opt.sgd(0.1, weight_decay=-1.0), "weight_decay must be at least 0"),
        (lambda: opt.adam(0.1, 1.0), r"beta1 must be in \[0, 1\), got 1.0"),
        (lambda: opt.adamw(0.1, beta2=-0.1), "beta2 must be"),
        (lambda: opt.rmsprop(0.1, decay=1.0), "decay must be"),
        (lambda: opt.adagrad(0.1, initial_accumulator=-1.0), "initial_accumulator"),
        (lambda: opt.muon(0.1, opt.sgd(0.1), adjust="keller"), "'original' or 'match_rms_adamw', got 'keller'"),
        (lambda: opt.scale_by_muon().init(start()), r"'blocks.0.bias' must be a matrix, got \(3,\)"),
        (lambda: opt.clip_by_global_norm(0.0), "limit must be positive"),
        (lambda: opt.clip_by_value(-1.0), "limit must be positive"),
        (lambda: opt.clip_by_norm_quantile(1.5), r"quantile must be in \[0, 1\], got 1.5"),
        (lambda: opt.clip_by_norm_quantile(window=0), "window must be at least 1, got 0"),
        (lambda: opt.accumulate(opt.sgd(0.1), 0), "every must be at least 1"),
        (lambda: opt.ema(opt.sgd(0.1), 1.0), "decay must be"),
        (lambda: opt.by_path({"a.b": opt.sgd(0.1)}, lambda n, x: "a.b"), "without dots"),
        (
            lambda: opt.by_path({"a": opt.sgd(0.1)}, lambda n, x: "b").init(start()),
            "'blocks.0.bias' is labelled 'b'.* a",
        ),
        (
            lambda: opt.adamw(0.1).donated({"w": 0}, opt.adamw(0.1).init({"v": torch.ones(1)}), {"v": torch.ones(1)}),
            "v",
        ),
    ],
)
def test_errors_name_the_fault(make, message):
    with pytest.raises(ValueError, match=message):
        make()
