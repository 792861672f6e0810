"""Half precision and extreme scales: the update is that of float32, to the rounding of the parameters."""

import pytest
import torch

from core import tree
from tests.train.optimizers.cases import ALL, F32, F64, run, start
from train import optimizers as opt

HALF = (torch.float16, torch.bfloat16)

OPTIMIZERS = {
    "sgd": opt.sgd(1e-2),
    "momentum": opt.sgd(1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": opt.adam(1e-2, weight_decay=0.1),
    "adamw": opt.adamw(1e-2),
    "adamw schedule": opt.adamw(lambda count: torch.full_like(count, 1e-2, dtype=F32)),
    "rmsprop": opt.rmsprop(1e-2),
    "rmsprop centered": opt.rmsprop(1e-2, centered=True, momentum=0.9),
    "rmsprop in sqrt": opt.rmsprop(1e-2, decay=0.9, eps_in_sqrt=True),
    "adagrad": opt.adagrad(1e-2),
    "adagrad in sqrt": opt.adagrad(1e-2, eps_in_sqrt=True),
    "lion": opt.lion(1e-2, weight_decay=0.1),
    "accumulate": opt.accumulate(opt.adamw(1e-2), 2),
    "clipped": opt.chain(opt.clip_by_global_norm(1e-3), opt.adamw(1e-2)),
}


def steps(optimizer, dtype, gradient, donate, count=4):
    """The parameters after some steps with a constant gradient, from values that half precision has exactly."""
    params = {"w": torch.tensor([0.0, 0.25, -0.5], dtype=dtype)}
    grads, state = {"w": torch.full((3,), gradient, dtype=dtype)}, optimizer.init(params)
    for _ in range(count):
        if donate:
            params, state = opt.donated_update(optimizer)(grads, state, params)
        else:
            updates, state = optimizer.update(grads, state, params)
            params = opt.apply_updates(params, updates)
    return params["w"]


@pytest.mark.parametrize("gradient", [0.0, 1e-5, 1e-3, 300.0])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_half_precision_follows_float32(name, dtype, gradient):
    """In float16 an epsilon of 1e-8 is 0, and the square of a gradient of 1e-5 or of 300 is 0 or infinite."""
    pure, donated = (steps(OPTIMIZERS[name], dtype, gradient, donate) for donate in (False, True))
    # The gradient itself is rounded, and each step rounds the parameters once.
    rounded = float(torch.tensor(gradient, dtype=dtype))
    expected = steps(OPTIMIZERS[name], F32, rounded, donate=False)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(pure.float(), expected, rtol=3 * eps, atol=torch.finfo(dtype).smallest_normal * eps * 4)
    torch.testing.assert_close(donated, pure)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["adam", "rmsprop", "rmsprop centered", "adagrad", "lion", "momentum"])
def test_half_precision_moments_on_demand(name, dtype):
    rules = {
        "adam": opt.adam,
        "adagrad": opt.adagrad,
        "lion": opt.lion,
        "momentum": lambda rate, **options: opt.sgd(rate, momentum=0.9, **options),
        "rmsprop": opt.rmsprop,
        "rmsprop centered": lambda rate, **options: opt.rmsprop(rate, centered=True, **options),
    }
    optimizer = rules[name](1e-2, moment_dtype=dtype)
    params = {"w": torch.zeros(3, dtype=dtype)}
    moments = [x for x in tree.leaves(optimizer.init(params)) if x.ndim]
    assert moments and {x.dtype for x in moments} == {dtype}
    for gradient in (0.0, 1e-3, 1.0):
        pure, donated = (steps(optimizer, dtype, gradient, donate) for donate in (False, True))
        assert pure.isfinite().all()
        torch.testing.assert_close(donated, pure)


@pytest.mark.parametrize("name", ["torch adamw mask", "torch momentum", "torch rmsprop centered", "optax lion"])
def test_moments_are_float32_at_least(name):
    for dtype in HALF:
        assert {x.dtype for x in tree.leaves(ALL[name].init(start(dtype))) if x.is_floating_point()} == {F32}
    assert {x.dtype for x in tree.leaves(ALL[name].init(start(F64))) if x.is_floating_point()} == {F64}


def test_moment_dtype_is_kept_over_steps():
    optimizer = opt.adamw(1e-2, moment_dtype=torch.bfloat16)
    for donate in (False, True):
        _, state = run(optimizer, start(F32), steps=2, donate=donate)
        assert {x.dtype for x in tree.leaves(state) if x.is_floating_point()} == {torch.bfloat16}


def test_a_learning_rate_below_the_range_of_float16_still_moves():
    optimizer = opt.sgd(lambda count: torch.full_like(count, 1e-8, dtype=F32))
    params = {"w": torch.zeros(1, dtype=torch.float16)}
    updates, _ = optimizer.update({"w": torch.full((1,), 1e4, dtype=torch.float16)}, optimizer.init(params), params)
    torch.testing.assert_close(opt.apply_updates(params, updates)["w"].item(), -1e-4, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-35, 1e-25, 1e-12, 1.0, 1e25, 1e37])
@pytest.mark.parametrize("mode", ["eager", "compiled", "vmap"])
def test_clip_by_global_norm_at_every_scale(mode, scale):
    """The direction stays, the norm becomes the limit, though float32 has no squares of such gradients."""
    direction = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    grads = tree.map(lambda x: x * scale, direction)

    def clip(grads):
        return opt.clip_by_global_norm(scale / 2, eps=0.0).update(grads, (), grads)[0]

    if mode == "compiled":
        torch._dynamo.reset()
        clip = torch.compile(clip, backend="aot_eager", fullgraph=True)
    if mode == "vmap":
        clipped = tree.map(lambda x: x[1], torch.func.vmap(clip)(tree.stack([direction, grads])))
    else:
        clipped = clip(grads)
    torch.testing.assert_close(tree.map(lambda x: x / scale, clipped), tree.map(lambda x: x / 10, direction))


def test_clip_by_global_norm_in_float16():
    grads = {"w": torch.full((10_000,), 600.0, dtype=torch.float16)}  # of norm 6e4; their squares are infinite
    clipped, _ = opt.clip_by_global_norm(1.0, eps=0.0).update(grads, (), grads)
    assert clipped["w"].dtype == torch.float16
    torch.testing.assert_close(clipped["w"].float(), torch.full((10_000,), 0.01), rtol=1e-3, atol=0)
