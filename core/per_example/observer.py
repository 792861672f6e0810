"""Observation of every operation of a loss while it is planned, also of those without a parameter."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from core.per_example.dynamo import rows_taken
from core.per_example.errors import PerExampleError
from core.per_example.forward_rules import batch_statistics
from core.per_example.leaves import Watched, contents, invoke

# In all of these `training` is the sixth argument.
_BATCH_NORMS = (F.batch_norm, torch.batch_norm, torch.native_batch_norm)

# Functions that take some of the examples out of a batch.
_PARTS = frozenset(
    "__getitem__ select narrow index_select take unbind split chunk tensor_split split_with_sizes".split()
)

LOOP = 100
"""Number of parts that a loss may take out of its batch; more is a loop over the examples."""


class Observer(TorchFunctionMode):
    """Refuses batch norm in training mode and loops over the examples, and records the coarsest precision.

    Args:
        examples: the batch size while planning.
    """

    def __init__(self, examples: int):
        super().__init__()
        self.examples, self.parts, self.eps = examples, 0, torch.finfo(torch.float64).eps
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _BATCH_NORMS and kwargs.get("training", args[5] if len(args) > 5 else False):
            leaves = [x for x in (*args, *kwargs.values()) if isinstance(x, Watched)]
            raise batch_statistics(contents(leaves[0]) if leaves else None, "batch norm")
        name = getattr(func, "__name__", "")
        whole = bool(args) and type(args[0]) is not Watched and isinstance(args[0], Tensor)
        whole = whole and name in _PARTS and args[0].ndim > 0 and args[0].shape[0] == self.examples
        if whole and name == "unbind" and self._first_axis(args, kwargs):
            self._refuse_loop(name)
        out = invoke(func, args, kwargs)
        if whole:
            self._count(name, out)
        if not torch.compiler.is_compiling():
            if isinstance(out, Tensor) and out.is_floating_point():
                self.eps = max(self.eps, torch.finfo(out.dtype).eps)
            return out
        self.calls += 1
        if self.calls % 10 == 0 and rows_taken(self.examples) > LOOP:
            self._refuse_loop("iteration")
        return out

    def _first_axis(self, args: tuple, kwargs: dict) -> bool:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        return dim in (0, -args[0].ndim)

    def _count(self, name: str, out: Any) -> None:
        if isinstance(out, (tuple, list)) and len(out) > LOOP and isinstance(out[0], Tensor):
            self._refuse_loop(name)
        if isinstance(out, Tensor) and self.examples not in out.shape:
            self.parts += 1
            if self.parts > LOOP:
                self._refuse_loop(name)

    def _refuse_loop(self, name: str) -> None:
        raise PerExampleError(
            f"the loss loops over its examples (by {name}): compute the losses of the whole batch at once, or use "
            "per_example.each (vmap of grad), which calls the loss with batches of one"
        )
