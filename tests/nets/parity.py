"""An image network held against a module that nobody here wrote, on the same random weights."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from core import random, spec, stats, tree
from nets.weights import fill


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Other values than ones and zeros for what norms scale and shift by, and for their statistics."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.ndim == 1:
            p.data.copy_(0.2 * torch.randn(p.shape, generator=generator) + (0.8 if p.data.mean() > 0.5 else 0.0))
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            drawn = 0.1 * torch.randn(buffer.shape, generator=generator)
            buffer.copy_(drawn if name.endswith("mean") else 1 + drawn.abs())
    return module


def assert_same(found: Any, expected: Any, what: str, tolerance: float = 1e-4) -> None:
    """Trees of tensors, relative to the largest value of each."""
    for (name, a), b in zip(tree.items(found), tree.leaves(expected), strict=True):
        error = (a - b).abs().max() / b.abs().max().clamp(min=1e-6)
        assert a.shape == b.shape and error <= tolerance, f"{what}{name}: off by {float(error):.1e}"


def check_parity(net: ModuleType, cfg: Any, module: nn.Module, x: Tensor, key: Tensor | None = None) -> None:
    """Parameter count, logits in eval mode, outputs in training mode and the running statistics after it.

    The module must not draw random numbers in training: take it without dropout.
    """
    model, table = net.spec(cfg), net.rename_table(cfg)
    values = fill(model, module.state_dict(), table)
    params, running = spec.split(model, values)
    assert tree.count(params) == sum(p.numel() for p in module.parameters())

    with torch.no_grad():
        expected = module.eval()(x)
        assert_same(net.apply(values, x, cfg), expected, "eval")
        expected = module.train()(x)

    def loss(params: tree.Tree, running: tree.Tree):
        out = net.apply(tree.merge(params, running), x, cfg, key=key, train=True)
        return sum(leaf.square().mean() for leaf in tree.leaves(out)), out

    (_, increments), (_, out) = torch.func.grad_and_value(loss, argnums=(0, 1), has_aux=True)(params, running)
    assert_same(out, tuple(expected) if isinstance(expected, tuple) else expected, "training")
    _, after = spec.split(model, fill(model, module.state_dict(), table))
    assert_same(stats.update(running, increments), after, "statistics ", 1e-5)


def check_initial(net: ModuleType, cfg: Any, module: nn.Module) -> None:
    """Fresh weights are drawn as a fresh module's: the same constants, the same deviation and kind of distribution."""
    model = net.spec(cfg)
    theirs = fill(model, module.state_dict(), net.rename_table(cfg))
    for (name, a), b in zip(tree.items(spec.init(random.key(0), model)), tree.leaves(theirs), strict=True):
        if b.numel() < 2 or (b == b.flatten()[0]).all():
            assert torch.equal(a, b.to(a.dtype)), name
        elif b.numel() >= 2000:
            assert abs(a.std() / b.std() - 1) < 0.1 and abs(a.mean()) < 0.1 * b.std(), name
            # The largest in units of the deviation: 1.7 for a uniform distribution, above 3 for a normal one.
            assert abs(a.abs().max() / a.std() - b.abs().max() / b.std()) < 1.2, name
