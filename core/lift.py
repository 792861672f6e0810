"""Conversion of an `nn.Module` to parameters, Stats and a pure function."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from core import tree
from core.attention_module import Attention
from core.draws import Draws
from core.fallbacks import with_fallbacks
from core.per_example import PerExampleError
from core.per_example.dynamo import like_draws
from core.per_example.leaves import Watched
from core.recurrent_modules import replaced
from core.tap import tap
from core.tree import Tree


class Lifted(NamedTuple):
    """`params` and `stats` are trees by the module's own dotted names; see `lift` for `apply`."""

    params: Tree
    stats: Tree
    apply: Callable


def lift(module: nn.Module) -> Lifted:
    """Turn a module into (params, stats, apply). The module is only read: its values are copied, never changed.

    `apply(tree.merge(params, stats), *args, train=False, key=None, **kwargs)` calls the module with these values; what
    it draws in training mode, it draws from the key, (2,) or one per example (batch, 2), see `core.draws`. A parameter
    that the module uses under several names (tied weights) is one leaf, under the first of them. Buffers that a state
    dict holds become `stats`: floating-point ones as they are, integer ones (torch's num_batches_tracked) as float64.

    In training mode the change of a buffer is tapped to its leaf, and 1 to the leaf `count`, as batch norm of
    `core.layers` does: `increments = grad(loss, argnums=1)(params, stats)`, then `core.stats.update`.
    Every floating-point output carries the reports, so the loss may use any of them.

    Inside a loss of `core.per_example` the layers run on watched parameters as they are written; see `core.fallbacks`.

    Raises:
        TypeError: not a module.
        ValueError: a lazy parameter that has no shape yet, or a buffer called `count`, here; from `apply`, values that
            are missing or left over, and training mode with a layer that draws random numbers and no key. All are
            named.
    """
    if not isinstance(module, nn.Module):
        called = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise TypeError(f"lift: expected an nn.Module, got {called}")
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"lift: '{name}' has no shape yet; call the module once before lifting it")
    # A buffer that no state dict holds (a causal mask, say) is a constant of the module, not a statistic.
    constants = {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        for name in layer._non_persistent_buffers_set
    }
    buffers = {name: b for name, b in module.named_buffers() if name not in constants}
    dtypes = {name: b.dtype for name, b in buffers.items()}
    for name in (*parameters, *buffers):
        if name == "count" or (name in buffers and name.endswith(".count")):
            raise ValueError(f"lift: '{name}' is called `count`, which is where the number of updates is kept")

    values = {name: p.detach().clone() for name, p in parameters.items()}
    for name, b in buffers.items():
        numeric = b.is_floating_point() or b.is_complex()
        values[name] = b.detach().clone() if numeric else b.detach().to(torch.float64)
    if buffers:
        values["count"] = torch.zeros((), device=next(iter(buffers.values())).device)
    params, stats = tree.partition(tree.nest(values), lambda name, _: name in parameters)
    names = frozenset(values)
    drawing = [name or type(layer).__name__ for name, layer in module.named_modules() if _draws(layer)]
    attending = any(
        isinstance(layer, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for layer in module.modules()
    )
    mixing = {
        train: [name or type(layer).__name__ for name, layer in module.named_modules() if _mixes(layer, train)]
        for train in (False, True)
    }
    module = replaced(module)
    written_out = replaced(module, {nn.MultiheadAttention: Attention})
    layered = with_fallbacks(written_out)

    def apply(values: Tree, *args, train: bool = False, key: Tensor | None = None, **kwargs):
        watched = any(isinstance(leaf, Watched) for leaf in tree.leaves(values))
        if watched and mixing[train]:
            mode, advice = ("in training mode", "use train=False") if train else ("in eval mode too", "use group norm")
            raise PerExampleError(
                f"lift: layer '{mixing[train][0]}' {mode} mixes the examples of a batch, so no example has a gradient "
                f"of its own; {advice}"
            )
        if train and drawing and key is None:
            raise ValueError(
                f"lift: layer '{drawing[0]}' draws random numbers in training mode; pass a key, set its rate to 0 or "
                "use train=False"
            )
        is_tree = isinstance(values, (dict, list))  # a list if all names are numbers
        flat = tree.flatten(values) if is_tree else {}
        missing, extra = sorted(names - flat.keys()), sorted(flat.keys() - names)
        if missing or extra:
            kind = "" if is_tree else f"{type(values).__name__} "
            raise ValueError(
                f"lift: apply expects tree.merge(params, stats) first, and got {kind}missing {missing[:5]}, "
                f"left over {extra[:5]}"
            )
        sinks = {name: flat.pop(name) for name in ((*dtypes, "count") if dtypes else ())}
        # In-place updates of buffers inside the module land on these copies.
        fresh = {name: sinks[name].detach().to(dtype, copy=True) for name, dtype in dtypes.items()}
        fixed = {name: b.clone() for name, b in module.named_buffers() if name in constants}
        draws = Draws(key) if train and key is not None else nullcontext()
        called = layered if watched else module if isinstance(draws, nullcontext) else written_out
        modes = [(layer, layer.training) for layer in called.modules()]
        fast = torch.backends.mha.get_fastpath_enabled()
        try:
            called.train(train)
            if attending:  # the fused kernels for inference have no derivative
                torch.backends.mha._is_fastpath_enabled = False  # its setter is not compiled
            before = like_draws() if train and torch.compiler.is_compiling() else 0
            with draws, _attention_kernel():
                out = torch.func.functional_call(called, {**flat, **fresh, **fixed}, args, kwargs, tie_weights=True)
            if train and torch.compiler.is_compiling() and like_draws() != before:
                raise ValueError(
                    "lift: torch.rand_like and the like draw past the key while compiling; use torch.rand(x.shape)"
                )
        finally:
            if attending:
                torch.backends.mha._is_fastpath_enabled = fast
            for layer, training in modes:
                layer.training = training
        if not (train and dtypes):
            return out
        reports = {name: fresh[name].detach().to(sinks[name].dtype) - sinks[name].detach() for name in dtypes}
        # Made from a report, so that it is batched by vmap where they are.
        reports["count"] = torch.ones_like(next(iter(reports.values())).sum(), dtype=sinks["count"].dtype)

        def carry(leaf):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                for name, report in reports.items():
                    leaf = tap(leaf, sinks[name], report)
            return leaf

        # torch's trees, because the outputs of transformers are registered with these.
        return pytree.tree_map(carry, out)

    apply.__name__ = f"the lifted {type(module).__name__}"
    return Lifted(params, stats, apply)


def _attention_kernel() -> AbstractContextManager:
    """The math form of scaled dot-product attention under vmap: the fused one of the CPU has no batching rule there."""
    if torch.compiler.is_compiling():
        return nullcontext()
    stack = torch._C._functorch.get_interpreter_stack() or []
    vmapped = any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)
    return sdpa_kernel(SDPBackend.MATH) if vmapped else nullcontext()


def _draws(layer: nn.Module) -> bool:
    """A dropout rate above 0, or one of the few other sources of randomness."""
    if isinstance(layer, (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return getattr(layer, "p", 1.0) > 0.0
    # Layers that call F.dropout themselves keep the rate as a number: dropout, attention_dropout, drop_prob ...
    return any("drop" in name and isinstance(rate, float) and rate > 0.0 for name, rate in vars(layer).items())


def _mixes(layer: nn.Module, train: bool) -> bool:
    """Normalisation by statistics of the batch, or an update of running statistics."""
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return train and layer.track_running_stats
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and (train or layer.running_mean is None)
