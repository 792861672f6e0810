"""Custom autograd.Functions in a loss.

Called with a parameter they are mapped over the examples, if they have a vmap rule. While compiling they are refused:
under torch.func.grad and vjp, Dynamo traces the forward of a `torch.autograd.Function` and drops its backward in
silence (pytorch#193279), so that the gradients are those of the operations of the forward. A Function that is called
through a function marked `torch.compiler.allow_in_graph` keeps its backward (see `core.tap`).
"""

import sys
from collections.abc import Callable
from types import FrameType

import torch

from core import tree
from core.per_example.dynamo import functions_applied
from core.per_example.errors import PerExampleError
from core.tree import Tree


class CustomFunction(Exception):
    """An operation on a parameter inside the forward of a custom autograd.Function."""


def inside_custom_function() -> bool:
    """True inside `torch.autograd.Function.apply`."""
    code = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]  # a class method
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


def refuse_custom_functions(loss: Callable) -> Callable:
    """`loss`, which raises while compiling if it calls a custom autograd.Function.

    Raises:
        PerExampleError: from the function; it names the Functions.
    """
    if not torch.compiler.is_compiling():
        return loss

    def checked(*args):
        before, _ = functions_applied()
        out = loss(*args)
        after, names = functions_applied()
        if after != before:
            raise PerExampleError(
                f"the loss calls a custom autograd.Function ({names}), whose backward torch.compile drops under "
                "torch.func (pytorch#193279): compile without it, or call it through a function marked "
                "torch.compiler.allow_in_graph"
            )
        return out

    return checked


def check_while_compiling(loss: Callable, params: Tree, batch: Tree) -> None:
    """Trace the loss of one example before vmap and grad do, in whose midst Dynamo fails in words of its own.

    Raises:
        PerExampleError: while compiling, the loss calls a custom autograd.Function.
    """
    if torch.compiler.is_compiling():
        example = tree.map(lambda x: x[:1].detach(), batch)
        refuse_custom_functions(loss)(tree.map(lambda x: x.detach(), params), example)
