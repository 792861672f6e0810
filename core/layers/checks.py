"""Checks of the arguments of layers, with errors in one line."""

from typing import Any

import torch
from torch.overrides import is_tensor_like

from core.spec import Param

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def check_tensor(name: str, x: Any, what: str = "x") -> None:
    """Raise TypeError unless x is a tensor, or stands for one (`core.per_example` calls nets with such leaves)."""
    if not is_tensor_like(x):
        raise TypeError(f"{name}: {what} is {type(x).__name__}; expected a tensor, such as torch.as_tensor({what})")


def check_arguments(name: str, p: Any, x: Any, what: str = "x", needs: tuple[str, ...] = ()) -> None:
    """Raise TypeError unless p is a dict of parameters and x a tensor, of floating point unless it is of ids.

    Raises:
        ValueError: p has no entry of a name in `needs`: it is another layer's tree, or its Stats were split off.
    """
    if not isinstance(p, dict):
        raise TypeError(f"{name}: the parameters are {type(p).__name__}; expected a dict, as in {name}(p, {what})")
    if not torch.compiler.is_compiling() and any(isinstance(leaf, Param) for leaf in p.values()):
        raise TypeError(f"{name}: the parameters are a spec; expected its values, spec.init(key, ...)")
    check_tensor(name, x, what)
    if what == "x" and x.dtype in INTEGERS:
        raise TypeError(f"{name}: x is {x.dtype}; expected floating point, such as x / 255 for the bytes of images")
    for entry in needs:
        if entry not in p:
            entries = ", ".join(map(str, p)) or "none"
            hint = "; merge the Stats with them, tree.merge(params, stats)" if entry == "mean" else ""
            raise ValueError(f"{name}: '{entry}' is not among the parameters, which are {entries}{hint}")
