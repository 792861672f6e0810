"""Operations without a rule, mapped over the examples: each example is a batch of one and has its own copy of the
parameters, of stride 0. The per-example gradients are then those of the copies.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from core import tree
from core.per_example.errors import ADVICE, PerExampleError
from core.per_example.leaves import Copies, Parameter, called, contents_in, invoke, plain

_ELEMENTWISE = frozenset(
    "add sub mul div true_divide __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ "
    "__pow__ __rpow__ pow subtract multiply divide rsub maximum minimum where addcmul addcdiv lerp comparison neg abs "
    "exp log sqrt rsqrt square tanh sigmoid relu silu gelu softplus clamp sign sin cos reciprocal".split()
)

# A size among the arguments of these may be that of the batch.
_SIZED = frozenset("expand broadcast_to repeat tile reshape view".split())


def spread_call(session, func: Callable, args: tuple, kwargs: dict) -> Any:
    """Map a function over the examples, each a batch of one with its own copy of the parameters.

    Returns:
        a tensor (or a tree of them) with the batch leading if an argument had it, else `Copies`.

    Raises:
        PerExampleError: the function cannot be mapped, or its result has no leading batch axis of its own.
    """
    arguments, what = (args, kwargs), called(func, args)
    name = contents_in(arguments)[0].name
    values, batched = [], []
    for value in tree.leaves(arguments):
        if isinstance(value, Parameter):
            value = session.spread(value)
        sized = what in _SIZED and type(value) is int
        values.append(value)
        batched.append((isinstance(value, Tensor) or sized) and session.batched(value, name, what))

    def function(flat: list) -> Any:
        args, kwargs = tree.unflatten(arguments, flat)
        with session.observer:  # sees what happens inside
            return invoke(func, args, kwargs)

    try:
        if what in _ELEMENTWISE:
            out = _aligned(function, values, batched)
        else:
            out = _one_by_one(session, function, values, batched, name, what)
        if session.planning:
            whole = function([plain(v) for v in values])
            _check_axes(whole, out, any(batched), name, what)
    except PerExampleError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        raise PerExampleError(
            f"'{name}' is used by {what}, which has no rule here and cannot be mapped over the examples "
            f"({str(error).splitlines()[0]}): {ADVICE}"
        ) from error
    if any(batched):
        return out
    return pytree.tree_map(lambda x: Copies(session, name, x) if isinstance(x, Tensor) else x, out)


def _aligned(function: Callable, values: list, batched: list[bool]) -> Tensor:
    """An elementwise function: the copies broadcast against the batch, nothing is mapped."""
    ranks = [v.ndim if isinstance(v, Tensor) else v.value.ndim - 1 for v in values if isinstance(v, (Tensor, Copies))]
    rank = max(ranks)  # of the result, a batch of one with it
    flat = []
    for value in values:
        if isinstance(value, Copies):
            shape = (1,) * (rank - value.value.ndim + 1) + tuple(value.value.shape[1:])
            if any(batched) and shape[0] != 1:
                raise PerExampleError(
                    f"'{value.name}': a value of shape {tuple(shape)}, the same for every example, meets the batch in "
                    "its first axis; everything with a batch axis must come in through `batch`"
                )
            shape = shape[1:] if any(batched) else shape
            value = value.value.reshape(value.value.shape[0], *shape)  # (N, 1, ..., *shape of one copy)
        flat.append(value)
    return function(flat)


def _one_by_one(session, function: Callable, values: list, batched: list[bool], name: str, what: str) -> Any:
    """Any other function, by vmap. While planning, one example gives the shapes: vmap calls a function without a
    batching rule once per example."""
    sized = [type(v) is int and b for v, b in zip(values, batched, strict=True)]
    mapped = [isinstance(v, Copies) or (isinstance(v, Tensor) and b) for v, b in zip(values, batched, strict=True)]
    parts = [v.value if isinstance(v, Copies) else v for v, m in zip(values, mapped, strict=True) if m]
    structure: list = []  # of the output: its tree, whether each leaf is a tensor, and the leaves that are not

    def one(*parts: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(parts)
        flat: list[Any] = []
        for value, is_batched, is_sized, is_mapped in zip(values, batched, sized, mapped, strict=True):
            if is_mapped:
                part = next(remaining)
                flat.append(part.unsqueeze(0) if is_batched else part)
            else:
                flat.append(1 if is_sized else value)
        # torch's trees, because the outputs of transformers are registered with these.
        leaves, spec = pytree.tree_flatten(function(flat))
        tensors = [isinstance(x, Tensor) for x in leaves]
        structure[:] = [spec, tensors, [None if t else x for x, t in zip(leaves, tensors, strict=True)]]
        return tuple(x for x, t in zip(leaves, tensors, strict=True) if t)

    if session.planning:
        outs = one(*(part[0] for part in parts))
        outs = tuple(x.new_empty((session.examples, *x.shape)) for x in outs)  # (N, *shape)
        if (
            any(batched) and not torch.compiler.is_compiling()
        ):  # no losses are compared then; Dynamo has no name of conv2d
            session.mapped.setdefault(what, name)
    else:
        outs = torch.func.vmap(one)(*parts)
    if any(batched):
        outs = tuple(x.squeeze(1) if x.ndim > 1 else x for x in outs)  # (N, 1, ...) -> (N, ...)
    spec, tensors, others = structure
    remaining = iter(outs)
    return pytree.tree_unflatten([next(remaining) if t else x for x, t in zip(others, tensors, strict=True)], spec)


def _check_axes(whole: Any, out: Any, batched: bool, name: str, what: str) -> None:
    """Raise unless mapping gave the shapes that the function itself gives."""
    pairs = zip(pytree.tree_leaves(whole), pytree.tree_leaves(out), strict=True)
    for expected, mapped in ((a, b) for a, b in pairs if isinstance(a, Tensor)):
        if tuple(expected.shape) != tuple(mapped.shape if batched else mapped.shape[1:]):
            raise PerExampleError(
                f"'{name}': the result of {what} has no leading batch axis of its own (it mixes or moves the "
                f"examples): {ADVICE}"
            )
