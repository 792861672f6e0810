"""The optimizers that the tests compare with torch and optax, and a small problem for them."""

import jax
import optax
import optax.contrib
import torch

from core import tree
from train import optimizers as opt

STEPS = 20
F32, F64 = torch.float32, torch.float64


def start(dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype)

    return {
        "blocks": [{"bias": draw(3), "weight": draw(3, 4)}, {"bias": draw(5), "weight": draw(5, 3)}],
        "empty": {},
        "head": {"scale": draw(), "weight": draw(6, 5)},
    }


def grads_at(step, params):
    """Gradients that depend on the parameters, some of them zero, with scales from 1e-3 to 10."""
    generator = torch.Generator().manual_seed(100 + step)

    def grad(name, p):
        noise = torch.randn(p.shape, generator=generator, dtype=F64).to(p.dtype)
        scale = 10.0 ** (len(name) % 5 - 3)
        return scale * (noise + 0.3 * p) * (noise.abs() > 0.1)

    return tree.map_with_names(grad, params)


def run(optimizer, params, steps=STEPS, donate=False):
    state = optimizer.init(params)
    for step in range(steps):
        grads = grads_at(step, params)
        if donate:
            params, state = opt.donated_update(optimizer)(grads, state, params)
        else:
            updates, state = optimizer.update(grads, state, params)
            params = opt.apply_updates(params, updates)
    return params, state


def assert_close(actual, expected, atol=1e-12, rtol=1e-10):
    assert tree.names(actual) == tree.names(expected)
    for (name, x), y in zip(tree.items(actual), tree.leaves(expected), strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=rtol, msg=lambda m, name=name: f"{name}: {m}")


def clone(values):
    return tree.map(torch.clone, values)


def matrices_only(name, leaf):
    return leaf.ndim >= 2


def tensors(named):
    return [p for _, p in named]


def halving(count):
    return 0.1 * torch.pow(0.5, count.to(F32))


TORCH = {
    "sgd": (opt.sgd(0.1), lambda n: torch.optim.SGD(tensors(n), 0.1)),
    "sgd decay": (opt.sgd(0.1, weight_decay=0.1), lambda n: torch.optim.SGD(tensors(n), 0.1, weight_decay=0.1)),
    "momentum": (
        opt.sgd(0.1, momentum=0.9, weight_decay=0.1),
        lambda n: torch.optim.SGD(tensors(n), 0.1, momentum=0.9, weight_decay=0.1),
    ),
    "dampening": (
        opt.sgd(0.1, momentum=0.9, dampening=0.3),
        lambda n: torch.optim.SGD(tensors(n), 0.1, momentum=0.9, dampening=0.3),
    ),
    "nesterov": (
        opt.sgd(0.1, momentum=0.9, nesterov=True),
        lambda n: torch.optim.SGD(tensors(n), 0.1, momentum=0.9, nesterov=True),
    ),
    "rmsprop": (opt.rmsprop(0.01), lambda n: torch.optim.RMSprop(tensors(n), 0.01)),
    "rmsprop centered": (
        opt.rmsprop(0.01, decay=0.9, eps=1e-5, centered=True, momentum=0.8, weight_decay=0.1),
        lambda n: torch.optim.RMSprop(
            tensors(n), 0.01, alpha=0.9, eps=1e-5, centered=True, momentum=0.8, weight_decay=0.1
        ),
    ),
    "adagrad": (
        opt.adagrad(0.1, initial_accumulator=0.2, weight_decay=0.1),
        lambda n: torch.optim.Adagrad(tensors(n), 0.1, initial_accumulator_value=0.2, weight_decay=0.1),
    ),
    "adam": (
        opt.adam(0.01, 0.8, 0.95, eps=1e-6, weight_decay=0.1),
        lambda n: torch.optim.Adam(tensors(n), 0.01, (0.8, 0.95), 1e-6, 0.1),
    ),
    "adamw": (opt.adamw(0.01), lambda n: torch.optim.AdamW(tensors(n), 0.01)),
    "adamw mask": (
        opt.adamw(0.01, weight_decay=0.5, mask=matrices_only),
        lambda n: torch.optim.AdamW(
            [
                {"params": [p for _, p in n if p.ndim >= 2], "weight_decay": 0.5},
                {"params": [p for _, p in n if p.ndim < 2], "weight_decay": 0.0},
            ],
            0.01,
        ),
    ),
    "by path": (
        opt.by_path(
            {"body": opt.sgd(0.1, momentum=0.9), "head": opt.adamw(0.02)},
            lambda name, leaf: "head" if name.startswith("head") else "body",
        ),
        lambda n: [
            torch.optim.SGD([p for name, p in n if not name.startswith("head")], 0.1, momentum=0.9),
            torch.optim.AdamW([p for name, p in n if name.startswith("head")], 0.02),
        ],
    ),
    "freeze": (
        opt.freeze(opt.adam(0.1), lambda name, leaf: name.startswith("blocks.0")),
        lambda n: torch.optim.Adam([p for name, p in n if not name.startswith("blocks.0")], 0.1),
    ),
}

OPTAX = {
    "sgd": (opt.sgd(0.1), optax.sgd(0.1)),
    "nesterov": (opt.sgd(0.1, momentum=0.9, nesterov=True), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "rmsprop": (opt.rmsprop(0.01, decay=0.9, eps_in_sqrt=True), optax.rmsprop(0.01)),
    "rmsprop centered": (
        opt.rmsprop(0.01, decay=0.9, eps=1e-4, eps_in_sqrt=True, centered=True, momentum=0.9),
        optax.rmsprop(0.01, eps=1e-4, centered=True, momentum=0.9),
    ),
    "adagrad": (
        opt.adagrad(0.1, eps=1e-7, initial_accumulator=0.1, eps_in_sqrt=True),
        optax.adagrad(0.1),
    ),
    "adam": (opt.adam(0.01), optax.adam(0.01)),
    "adamw mask": (
        opt.adamw(0.01, weight_decay=0.1, mask=matrices_only),
        optax.adamw(0.01, weight_decay=0.1, mask=lambda t: jax.tree.map(lambda x: x.ndim >= 2, t)),
    ),
    "lion": (
        opt.lion(0.01, weight_decay=0.1, mask=matrices_only),
        optax.lion(0.01, weight_decay=0.1, mask=lambda t: jax.tree.map(lambda x: x.ndim >= 2, t)),
    ),
    "clip by norm": (
        opt.chain(opt.clip_by_global_norm(1.0, eps=0.0), opt.sgd(0.1)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    ),
    "clip by norm, seldom": (
        opt.chain(opt.clip_by_global_norm(8.0, eps=0.0), opt.adam(0.1)),
        optax.chain(optax.clip_by_global_norm(8.0), optax.adam(0.1)),
    ),
    "clip by value": (
        opt.chain(opt.clip_by_value(0.2), opt.sgd(0.1)),
        optax.chain(optax.clip(0.2), optax.sgd(0.1)),
    ),
    "accumulate": (opt.accumulate(opt.adam(0.1), 3), optax.MultiSteps(optax.adam(0.1), 3)),
    "by path": (
        opt.by_path(
            {"matrix": opt.adam(0.1), "other": opt.sgd(0.2)}, lambda _, x: "matrix" if x.ndim == 2 else "other"
        ),
        optax.multi_transform(
            {"matrix": optax.adam(0.1), "other": optax.sgd(0.2)},
            lambda t: jax.tree.map(lambda x: "matrix" if x.ndim == 2 else "other", t),
        ),
    ),
    "masked": (
        opt.chain(opt.masked(opt.clip_by_value(0.01), matrices_only), opt.sgd(0.1)),
        optax.chain(
            optax.masked(optax.clip(0.01), lambda t: jax.tree.map(lambda x: x.ndim >= 2, t)),
            optax.sgd(0.1),
        ),
    ),
    "muon": (
        opt.muon(0.05, opt.adamw(0.01, weight_decay=0.0), nesterov=False, weight_decay=0.1, dtype=F64),
        optax.contrib.muon(
            0.05,
            nesterov=False,
            weight_decay=0.1,
            adam_learning_rate=0.01,
            # axis 1 of (out, in) is summed over: optax's scale sqrt(max(1, out / in)) is then torch's rows / columns
            muon_weight_dimension_numbers=lambda t: jax.tree.map(
                lambda x: optax.contrib.MuonDimensionNumbers((1,), (0,)) if x.ndim == 2 else None, t
            ),
        ),
    ),
}


ALL = {
    **{f"torch {name}": ours for name, (ours, _) in TORCH.items()},
    **{f"optax {name}": ours for name, (ours, _) in OPTAX.items()},
    "schedule sgd": opt.sgd(halving, momentum=0.9, nesterov=True, weight_decay=0.1, mask=matrices_only),
    "schedule rmsprop": opt.rmsprop(halving, momentum=0.9, weight_decay=0.1, mask=matrices_only),
    "schedule adagrad": opt.adagrad(halving, weight_decay=0.1, mask=matrices_only),
    "schedule adam": opt.adam(halving, weight_decay=0.1, mask=matrices_only),
    "schedule adamw": opt.chain(opt.clip_by_global_norm(1.0), opt.adamw(halving)),
    "schedule lion": opt.lion(halving),
    "clip by quantile": opt.chain(opt.clip_by_norm_quantile(0.5, 4), opt.adamw(0.01)),
    "wide moments": opt.adamw(0.01, moment_dtype=F64),
    "ema": opt.ema(opt.adamw(0.01), 0.9),
    "ema debias": opt.ema(opt.accumulate(opt.sgd(halving, momentum=0.5), 2), 0.9, debias=True),
}
