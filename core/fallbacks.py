"""Layers of a lifted module inside a loss of `core.per_example`: as they are where all their uses of parameters can be
covered, else mapped over the examples.
"""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from core.per_example import PerExampleError
from core.per_example.leaves import Watched, call, contents


def with_fallbacks(module: nn.Module) -> nn.Module:
    """A copy of the module, without its tensors, whose layers run on watched parameters.

    The plan settles for each layer whether it runs whole or is mapped over the examples, each with its own copy of the
    layer's parameters: the innermost layer that can be covered so, and the module itself as the last resort.
    """
    names = {layer: name for name, layer in module.named_modules()}
    return _copied(module, names, {})


def _copied(module: nn.Module, names: Mapping[nn.Module, str], copies: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in copies:
        asks = _may_fail(module)
        own: Any = type(module)
        kind = _layer(own) if asks else own
        out = copies[module] = object.__new__(kind)  # a class may have a __new__ of its own, as torch.fx's has
        children = {name: child and _copied(child, names, copies) for name, child in module._modules.items()}
        # functional_call writes into these dicts.
        tensors = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}
        out.__dict__.update({**module.__dict__, **tensors, "_modules": children})
        if hasattr(module.__dict__.get("config"), "_experts_implementation"):
            out.config = _with_mappable_experts(module.config)
        if asks:
            name = f"{names[module]} ({type(module).__name__})".strip()
            out.__dict__.update(_lifted_name=name, _lifted_call=_call(out, name))
    return copies[module]


def _with_mappable_experts(config: Any) -> Any:
    """transformers' configuration, with the experts of a mixture in the one form of theirs that vmap takes: the weights
    of each token's experts are gathered, and no token is sorted by its value."""
    config = copy.copy(config)
    config._experts_implementation = "batched_mm"
    return config


def _may_fail(module: nn.Module) -> bool:
    """False for layers of torch that call one function, which has a rule or is mapped itself, and for containers."""
    simple = type(module).__module__.startswith("torch.nn.modules") and not any(module.children())
    has_forward = type(module).forward is not nn.Module.forward
    return has_forward and not simple and next(module.parameters(), None) is not None


_WRITTEN_OUT: dict[str, Callable] = {
    # x.view(-1, d) W + b: the batch would be folded.
    "transformers.pytorch_utils.Conv1D": lambda self, x: torch.matmul(x, self.weight) + self.bias,
}
"""Layers of others by another form of the same equation, whose uses have rules."""


@cache
def _layer(kind: Any) -> type[nn.Module]:
    """The class of a layer, whose forward asks the plan."""
    own_forward = _WRITTEN_OUT.get(f"{kind.__module__}.{kind.__qualname__}", kind.forward)

    def forward(self, *args, **kwargs):
        leaf = next((p for p in self.parameters() if isinstance(p, Watched)), None)
        if leaf is None:
            return kind.forward(self, *args, **kwargs)

        def run() -> Any:
            return own_forward(self, *args, **kwargs)

        def mapped() -> Any:
            _check(self._lifted_name, (args, kwargs))
            leaves = {name: p for name, p in self.named_parameters() if isinstance(p, Watched)}
            return call(self._lifted_call, (leaves, *args), kwargs)

        return contents(leaf).session.whole(self._lifted_name, run, mapped)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _call(layer: nn.Module, name: str) -> Callable:
    """A function of the layer's parameters; with a name, which Dynamo gives to none."""

    def function(leaves: dict[str, Tensor], *args, **kwargs) -> Any:
        return torch.func.functional_call(layer, leaves, args, kwargs, tie_weights=True)

    function.__name__ = f"layer {name}"
    return function


def _check(name: str, arguments: Any) -> None:
    """Raise unless all arguments are tensors and plain values: an object such as a cache changes when it is used, and
    what it holds would not be mapped."""
    plain = (Tensor, bool, int, float, str, torch.dtype, torch.device, type(None))
    for x in pytree.tree_leaves(arguments):
        if not isinstance(x, plain):
            raise PerExampleError(f"layer {name} takes a {type(x).__name__}, which cannot be mapped over the examples")
