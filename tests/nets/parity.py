"""A net held against a module that nobody here wrote, with the same random weights."""

from collections.abc import Iterable
from fnmatch import fnmatch
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from core import random, spec, stats, tree
from nets.weights import fill


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Replace the ones and zeros of norms and biases, and the running statistics, by random values."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.ndim == 1:
            p.data.copy_(0.2 * torch.randn(p.shape, generator=generator) + (0.8 if p.data.mean() > 0.5 else 0.0))
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            values = 0.1 * torch.randn(buffer.shape, generator=generator)
            buffer.copy_(values if name.endswith("mean") else 1 + values.abs())
    return module


def assert_same(actual: Any, expected: Any, what: str, tolerance: float = 1e-4) -> None:
    """Trees of tensors are equal up to a tolerance, relative to the largest value of each leaf."""
    for (name, a), b in zip(tree.items(actual), tree.leaves(expected), strict=True):
        error = (a - b).abs().max() / b.abs().max().clamp(min=1e-6)
        assert a.shape == b.shape and error <= tolerance, f"{what}{name}: off by {float(error):.1e}"


def check_names(net: ModuleType, cfg: Any, module: nn.Module, source: str | None = None) -> None:
    """The rename table maps our leaves to all names of the module, each of our shape.

    source: the library of the module, for nets that know several.
    """
    table = net.rename_table(cfg) if source is None else net.rename_table(cfg, source)
    ours = {table[name].theirs: tuple(leaf.shape) for name, leaf in tree.items(net.spec(cfg))}
    assert ours == {name: tuple(x.shape) for name, x in module.state_dict().items()}


def check_parity(net: ModuleType, cfg: Any, module: nn.Module, x: Tensor, key: Tensor | None = None) -> None:
    """The parameter count, the output in eval mode, in training mode, and the running statistics after it.

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


def check_initial(net: ModuleType, cfg: Any, module: nn.Module, without: Iterable[str] = ()) -> None:
    """Initial values have the distribution of a new module's: the same constants, standard deviation and kind.

    without: patterns of leaves that are not compared.
    """
    model = net.spec(cfg)
    theirs = fill(model, module.state_dict(), net.rename_table(cfg))
    for (name, a), b in zip(tree.items(spec.init(random.key(0), model)), tree.leaves(theirs), strict=True):
        if any(fnmatch(name, pattern) for pattern in without):
            continue
        if b.numel() < 2 or (b == b.flatten()[0]).all():
            assert torch.equal(a, b.to(a.dtype)), name
        elif b.numel() >= 2000:
            assert abs(a.std() / b.std() - 1) < 0.1 and abs(a.mean()) < 0.1 * b.std(), name
            # Mean distance in standard deviations (Geary 1935): 0.866 for a uniform distribution, 0.798 for a normal
            # one. Its standard error in n samples is 0.21 / sqrt(n), so 0.03 is more than four of a difference.
            assert abs(a.abs().mean() / a.std() - b.abs().mean() / b.std()) < 0.03, name
