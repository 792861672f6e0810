"""Observation of every operation of a loss while it is planned, also of those without a parameter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from core.per_example.dynamo import PARTS, loses_axis, parts_taken
from core.per_example.errors import PerExampleError
from core.per_example.forward_rules import batch_statistics
from core.per_example.leaves import Watched, contents, in_tuple, invoke

# In all of these `training` is the sixth argument.
_BATCH_NORMS = (F.batch_norm, torch.batch_norm, torch.native_batch_norm)

LOOP = 100
"""Number of parts that a loss may take out of its batch; more is a loop over the examples."""

MANY_CALLS = 2000
"""Number of operations after which `count_calls` is asked whether their number grows with the batch."""

SMALL, LARGER = 61, 127
"""Batch sizes at which it counts."""


class Observer(TorchFunctionMode):
    """Refuses batch norm in training mode and loops over the examples, and records the coarsest precision and
    whether a tuple of tensors has a parameter in it.

    Args:
        examples: the batch size while planning.
        count_calls: the number of operations of the loss on a batch of this size.
    """

    def __init__(self, examples: int, count_calls: Callable[[int], int] | None = None):
        super().__init__()
        self.examples, self.count_calls = examples, count_calls
        self.parts, self.calls, self.eps = 0, 0, torch.finfo(torch.float64).eps
        self.tuples = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        own = bool(args) and isinstance(args[0], Watched)  # of a weight: its rule decides
        if func in _BATCH_NORMS and not own and kwargs.get("training", args[5] if len(args) > 5 else False):
            leaves = [x for x in (*args, *kwargs.values()) if isinstance(x, Watched)]
            raise batch_statistics(contents(leaves[0]) if leaves else None, "batch norm")
        name = getattr(func, "__name__", "")
        takes_part = name in PARTS and bool(args) and type(args[0]) is not Watched and isinstance(args[0], Tensor)
        takes_part = takes_part and self.examples in args[0].shape
        if takes_part and self._list_length(name, args, kwargs) > LOOP:
            self._refuse_loop(f"by {name}")
        self.tuples = self.tuples or in_tuple(args, kwargs)
        out = invoke(func, args, kwargs)
        self.calls += 1
        if takes_part and isinstance(out, Tensor) and loses_axis(args[0], out, self.examples):
            self.parts += 1
            if self.parts > LOOP:
                self._refuse_loop(f"by {name}")
        if self.calls == MANY_CALLS and self.count_calls is not None:
            small, larger = self.count_calls(SMALL), self.count_calls(LARGER)
            if larger >= small + LARGER - SMALL:
                self._refuse_loop(f"{small} operations for {SMALL} examples, {larger} for {LARGER}")
        if torch.compiler.is_compiling():
            if self.calls % 10 == 0 and parts_taken(self.examples) > LOOP:
                self._refuse_loop("by iteration")
            return out
        if isinstance(out, Tensor) and out.is_floating_point():
            self.eps = max(self.eps, torch.finfo(out.dtype).eps)
        return out

    def _list_length(self, name: str, args: tuple, kwargs: dict) -> int:
        """Number of tensors into which a function cuts the batch axis; 0 if it does something else."""
        rest = list(args[1:])
        parts: Any = None
        if name in ("split", "chunk", "tensor_split", "split_with_sizes"):
            parts = rest.pop(0) if rest else next((x for key, x in kwargs.items() if key != "dim"), None)
        elif name != "unbind":
            return 0
        size = args[0].shape[rest[0] if rest else kwargs.get("dim", 0)]
        if size != self.examples:
            return 0
        if name == "unbind":
            return size
        if isinstance(parts, int):
            return -(-size // max(1, parts)) if name == "split" else parts
        return len(parts) if isinstance(parts, (tuple, list)) else 0

    def _refuse_loop(self, how: str) -> None:
        raise PerExampleError(
            f"the loss loops over its examples ({how}): compute the losses of the whole batch at once, or use "
            "per_example.each (vmap of grad), which calls the loss with batches of one"
        )


class Counter(TorchFunctionMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))
