"""Queries of Dynamo's state while it traces: functions that run in Python then, and are constants in the graph.

They read private attributes of torch, for which there is no public function. Where a version of torch lacks them, less
is refused while compiling; the eager checks and `verify` stay.
"""

import importlib
import sys
import warnings
from types import FrameType
from typing import Any

import torch

from core.compiling import assume_constant_result

_VARIABLES = "torch._dynamo.variables.misc"


def _output() -> Any:
    """The graph being traced, from the tracer's frame in the Python stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not hasattr(frame.f_locals.get("tx"), "output"):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["tx"].output


@assume_constant_result
def transform_depth() -> int:
    """Number of torch.func transforms that are active."""
    try:
        return len(torch._C._functorch.get_interpreter_stack() or [])
    except AttributeError:
        return max(0, torch._C._functorch.maybe_current_level() or 0)


@assume_constant_result
def functions_applied() -> tuple[int, str]:
    """(calls of custom autograd.Functions, names of the Functions that were met); (0, "") where nobody can tell."""
    try:
        return _functions_of(_output())
    except (ImportError, AttributeError) as error:
        # Once per place: the message is the same at every call.
        warnings.warn(
            f"torch {torch.__version__} does not show whether a loss calls a custom autograd.Function ({error}), whose "
            "backward torch.compile may drop: compare with per_example.verify(..., compiled=True)",
            stacklevel=2,
        )
        return 0, ""


@assume_constant_result
def like_draws() -> int:
    """Number of `torch.rand_like` and the like in the graph, which Dynamo hides from function modes."""
    output = _output()
    functions = (torch.rand_like, torch.randn_like, torch.randint_like)
    return 0 if output is None else sum(node.target in functions for node in output.graph.nodes)


def _functions_of(output: Any) -> tuple[int, str]:
    variables = importlib.import_module(_VARIABLES)
    context, function = variables.AutogradFunctionContextVariable, variables.AutogradFunctionVariable
    if output is None:
        raise AttributeError("no tracer in the stack")
    # Each call makes a context, also where the forward does nothing that a graph would show.
    contexts = [x for x in output.side_effects.id_to_variable.values() if type(x) is context]
    functions = [x for x in list(output.variable_tracker_cache.values()) if type(x) is function]
    return len(contexts), ", ".join(sorted({getattr(x.fn_cls, "__name__", "?") for x in functions}))


PARTS = frozenset(
    "getitem __getitem__ select narrow index_select take unbind split chunk tensor_split split_with_sizes".split()
)
"""Functions that take some of the examples out of a batch."""


@assume_constant_result
def parts_taken(size: int) -> int:
    """Number of tensors without an axis of this size that were taken out of tensors with one; 0 if nobody can tell."""
    try:
        return sum(_takes_part(node, size) for node in _output().graph.nodes)
    except AttributeError:
        return 0


def _takes_part(node: Any, size: int) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name not in PARTS:
        return False
    whole, part = (getattr(x, "meta", {}).get("example_value") for x in (node.args[0], node))
    return isinstance(whole, torch.Tensor) and isinstance(part, torch.Tensor) and loses_axis(whole, part, size)


def loses_axis(whole: torch.Tensor, part: torch.Tensor, size: int) -> bool:
    """True if fewer axes of this size are left."""
    return list(part.shape).count(size) < list(whole.shape).count(size)
