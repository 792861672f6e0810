"""Queries of Dynamo's state while it traces: functions that run in Python then, and are constants in the graph.

They read private attributes of torch's tracer, for which there is no public function.
"""

import operator
import sys
from typing import Any

import torch

from core.compiling import assume_constant_result


def _output() -> Any:
    """The graph being traced, from the tracer's frame in the Python stack."""
    frame = sys._getframe()
    while frame is not None and not hasattr(frame.f_locals.get("tx"), "output"):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["tx"].output


@assume_constant_result
def transform_depth() -> int:
    """Number of torch.func transforms that are active."""
    return len(torch._C._functorch.get_interpreter_stack() or [])


@assume_constant_result
def functions_applied() -> tuple[int, str]:
    """(calls of custom autograd.Functions, names of the Functions that were met)."""
    from torch._dynamo.variables.misc import AutogradFunctionContextVariable, AutogradFunctionVariable

    output = _output()
    if output is None:
        return 0, ""
    # Each call makes a context, also where the forward does nothing that a graph would show.
    contexts = [x for x in output.side_effects.id_to_variable.values() if type(x) is AutogradFunctionContextVariable]
    functions = [x for x in list(output.variable_tracker_cache.values()) if type(x) is AutogradFunctionVariable]
    return len(contexts), ", ".join(sorted({x.fn_cls.__name__ for x in functions}))


@assume_constant_result
def rows_taken(size: int) -> int:
    """Number of rows taken by integer indices out of tensors whose first axis has this size, as iteration does."""
    output, rows = _output(), 0
    for node in () if output is None else output.graph.nodes:
        if node.target is operator.getitem and isinstance(node.args[1], int):
            value = getattr(node.args[0], "meta", {}).get("example_value")
            rows += isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == size
    return rows
