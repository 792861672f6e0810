"""Operations without a rule, mapped over the examples: each has its own copy of the parameters, of stride 0, and comes
as a batch of one. The gradients of the examples are then the copies'.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from core import tree
from core.per_example.errors import ADVICE, PerExampleError
from core.per_example.leaves import Spread, Watched, called, watched_in

_ELEMENTWISE = frozenset(
    "add sub mul div true_divide __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ "
    "__pow__ __rpow__ pow subtract multiply divide rsub maximum minimum where addcmul addcdiv lerp lt le gt ge eq ne "
    "__lt__ __le__ __gt__ __ge__ neg abs exp log sqrt rsqrt square tanh sigmoid relu silu gelu softplus clamp sign sin "
    "cos reciprocal".split()
)


# Of these, a size may be that of the batch.
_SIZED = frozenset("expand broadcast_to repeat tile reshape view".split())


def spread_call(session, func: Callable, args: tuple, kwargs: dict) -> Any:
    """The function mapped over the examples, each with its own copy of the parameters and a batch of one.

    Returns:
        a tensor (or a tree of them) with the batch leading if an argument had it, else Spread values.
    """
    given, what = (args, kwargs), called(func)
    name = watched_in(given)[0].name
    values, batched = [], []
    for value in tree.leaves(given):
        if isinstance(value, Watched):
            value = session.spread(value)
        sized = what in _SIZED and type(value) is int
        values.append(value)
        batched.append((isinstance(value, Tensor) or sized) and session.batched(value, name, what))

    def function(flat: list) -> Any:
        args, kwargs = tree.unflatten(given, flat)
        return func(*args, **kwargs)

    try:
        if what in _ELEMENTWISE:
            out = _aligned(function, values, batched)
        else:
            out = _one_by_one(function, values, batched, session.examples if session.planning else None)
    except PerExampleError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        raise PerExampleError(
            f"'{name}' is used by {what}, which has no rule here and cannot be mapped over the examples "
            f"({str(error).splitlines()[0]}): {ADVICE}"
        ) from error
    if session.planning:
        whole = function([v.plain if isinstance(v, Spread) else v for v in values])
        _check_axes(session, whole, out, any(batched), name, what)
    if any(batched):
        return out
    return pytree.tree_map(lambda x: Spread(session, name, x) if isinstance(x, Tensor) else x, out)


def _aligned(function: Callable, values: list, batched: list[bool]) -> Tensor:
    """An elementwise function: the copies broadcast against the batch, nothing is mapped."""
    ranks = [v.ndim for v in values if isinstance(v, (Tensor, Spread))]
    rank = max(ranks)  # of the result, a batch of one with it
    flat = []
    for value in values:
        if isinstance(value, Spread):
            shape = (1,) * (rank - value.ndim) + tuple(value.value.shape[1:])
            if any(batched) and shape[0] != 1:
                raise PerExampleError(
                    f"'{value.name}': a value of shape {tuple(shape)}, the same for every example, meets the batch in "
                    "its first axis; everything with a batch axis must come in through `batch`"
                )
            shape = shape[1:] if any(batched) else shape
            value = value.value.reshape(value.value.shape[0], *shape)
        flat.append(value)
    return function(flat)


def _one_by_one(function: Callable, values: list, batched: list[bool], planned: int | None) -> Any:
    """Any other function, by vmap. While planning for so many examples one shows the shapes: vmap runs a function that
    it has no rule for as often as there are examples."""
    sized = [type(v) is int and b for v, b in zip(values, batched, strict=True)]
    mapped = [isinstance(v, Spread) or (isinstance(v, Tensor) and b) for v, b in zip(values, batched, strict=True)]

    def one(*parts: Tensor) -> Any:
        remaining = iter(parts)
        flat = []
        for value, is_batched, is_sized, is_mapped in zip(values, batched, sized, mapped, strict=True):
            if is_mapped:
                part = next(remaining)
                flat.append(part.unsqueeze(0) if is_batched else part)
            else:
                flat.append(1 if is_sized else value)
        return function(flat)

    parts = [v.value if isinstance(v, Spread) else v for v, m in zip(values, mapped, strict=True) if m]
    if planned is None:
        out = torch.func.vmap(one)(*parts)
    else:
        out = pytree.tree_map(lambda x: x.new_empty((planned, *x.shape)), one(*(part[0] for part in parts)))
    # torch's trees, because the outputs of transformers are registered with these.
    return pytree.tree_map(lambda x: x.squeeze(1) if x.shape[1] == 1 else x, out) if any(batched) else out


def _check_axes(session, whole: Any, out: Any, batched: bool, name: str, what: str) -> None:
    """That mapping gave the shapes which the function itself gives."""
    for expected, found in zip(pytree.tree_leaves(whole), pytree.tree_leaves(out), strict=True):
        shape = tuple(found.shape) if batched else tuple(found.shape[1:])
        if tuple(expected.shape) != shape:
            raise PerExampleError(
                f"'{name}': the result of {what} keeps no batch axis of its own in front (it mixes or moves the "
                f"examples): {ADVICE}"
            )
