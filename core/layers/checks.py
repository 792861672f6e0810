"""Checks of the arguments of layers, with errors in one line."""

from typing import Any

from torch.overrides import is_tensor_like


def check_tensor(name: str, x: Any, what: str = "x") -> None:
    """Raise TypeError unless x is a tensor, or stands for one (`core.per_example` calls nets with such leaves)."""
    if not is_tensor_like(x):
        raise TypeError(f"{name}: {what} is {type(x).__name__}; expected a tensor, such as torch.as_tensor({what})")


def check_arguments(name: str, p: Any, x: Any, what: str = "x") -> None:
    """Raise TypeError unless p is a dict of parameters and x a tensor."""
    if not isinstance(p, dict):
        raise TypeError(f"{name}: the parameters are {type(p).__name__}; expected a dict, as in {name}(p, {what})")
    check_tensor(name, x, what)
