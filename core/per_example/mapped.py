"""Operations without a rule, mapped over the examples: each example is a batch of one and has its own copy of the
parameters, of stride 0. The per-example gradients are then those of the copies.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from core import tree
from core.attention import torch_attention
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
        a tensor (or a tree of them) with a batch axis if an argument had one, else `Copies`.

    Raises:
        PerExampleError: the function cannot be mapped, or its result has no batch axis of its own.
    """
    arguments, what = (args, kwargs), called(func, args)
    name = contents_in(arguments)[0].name
    values, axes = [], []
    for value in tree.leaves(arguments):
        if isinstance(value, Parameter):
            value = session.spread(value)
        sized = what in _SIZED and type(value) is int
        values.append(value)
        axes.append(session.axis(value, name, what) if isinstance(value, Tensor) or sized else None)
    batched = any(axis is not None for axis in axes)

    def function(flat: list) -> Any:
        args, kwargs = tree.unflatten(arguments, flat)
        with session.observer, _attention_that_maps():  # the observer sees what happens inside
            return invoke(func, args, kwargs)

    try:
        if what in _ELEMENTWISE:
            out = _aligned(function, values, axes, name, what)
            whole = function([plain(v) for v in values]) if session.planning else None
        else:
            whole = function([plain(v) for v in values]) if session.planning else None
            out = _one_by_one(session, function, values, axes, whole, name, what)
        if session.planning:
            _check_axes(whole, out, batched, name, what)
    except PerExampleError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        raise PerExampleError(
            f"'{name}' is used by {what}, which has no rule here and cannot be mapped over the examples "
            f"({str(error).splitlines()[0]}): {ADVICE}"
        ) from error
    if batched:
        return out
    return pytree.tree_map(lambda x: Copies(session, name, x) if isinstance(x, Tensor) else x, out)


def _aligned(function: Callable, values: list, axes: list, name: str, what: str) -> Tensor:
    """An elementwise function: the copies broadcast against the batch, nothing is mapped."""
    ranks = [v.ndim if isinstance(v, Tensor) else v.value.ndim - 1 for v in values if isinstance(v, (Tensor, Copies))]
    rank = max(ranks)  # of the result, a batch of one with it
    places = {axis + rank - v.ndim for v, axis in zip(values, axes, strict=True) if axis is not None}
    if len(places) > 1:
        raise PerExampleError(f"'{name}': the batch is not the same axis of all arguments of {what}: {ADVICE}")
    flat = []
    for value in values:
        if isinstance(value, Copies):
            shape = (1,) * (rank - value.value.ndim + 1) + tuple(value.value.shape[1:])
            copies = value.value.reshape(value.value.shape[0], *shape)  # (N, 1, ..., *shape of one copy)
            for place in places:
                if shape[place] != 1:
                    raise PerExampleError(
                        f"'{value.name}': a value of shape {tuple(shape)}, the same for every example, meets the batch "
                        f"in axis {place}; everything with a batch axis must come in through `batch`"
                    )
                copies = copies.squeeze(place + 1).movedim(0, place)  # N in the place of the batch
            value = copies
        flat.append(value)
    return function(flat)


def _one_by_one(session, function: Callable, values: list, axes: list, whole: Any, name: str, what: str) -> Any:
    """Any other function, by vmap. While planning, one example gives the shapes, and `whole`, the result for all, their
    batch axes: vmap calls a function without a batching rule once per example."""
    sized = [type(v) is int and axis is not None for v, axis in zip(values, axes, strict=True)]
    dims = [
        0 if isinstance(v, Copies) else axis if isinstance(v, Tensor) else None
        for v, axis in zip(values, axes, strict=True)
    ]
    parts = [v.value if isinstance(v, Copies) else v for v, dim in zip(values, dims, strict=True) if dim is not None]
    in_dims = tuple(dim for dim in dims if dim is not None)
    batched = any(axis is not None for axis in axes)
    structure: list = []  # of the output: its tree, whether each leaf is a tensor, and the leaves that are not

    def one(*parts: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(parts)
        flat: list[Any] = []
        for value, axis, dim, is_sized in zip(values, axes, dims, sized, strict=True):
            if dim is not None:
                part = next(remaining)
                flat.append(part if axis is None else part.unsqueeze(axis))
            else:
                flat.append(1 if is_sized else value)
        # torch's trees, because the outputs of transformers are registered with these.
        leaves, spec = pytree.tree_flatten(function(flat))
        tensors = [isinstance(x, Tensor) for x in leaves]
        structure[:] = [spec, tensors, [None if t else x for x, t in zip(leaves, tensors, strict=True)]]
        return tuple(x for x, t in zip(leaves, tensors, strict=True) if t)

    if session.planning:
        outs = one(*(part.select(dim, 0) for part, dim in zip(parts, in_dims, strict=True)))
        outs = tuple(x.new_empty((session.examples, *x.shape)) for x in outs)  # (N, *shape)
        if batched and not torch.compiler.is_compiling():  # no losses are compared then; Dynamo has no name of conv2d
            session.mapped.setdefault(what, name)
    else:
        outs = torch.func.vmap(one, in_dims)(*parts)
    spec, tensors, others = structure
    if batched:
        wholes = [x for x in pytree.tree_leaves(whole) if isinstance(x, Tensor)] if session.planning else outs
        outs = tuple(_as_batch(session, x, like, name, what) for x, like in zip(outs, wholes, strict=True))
    remaining = iter(outs)
    return pytree.tree_unflatten([next(remaining) if t else x for x, t in zip(others, tensors, strict=True)], spec)


def _attention_that_maps() -> AbstractContextManager:
    """torch's fused attention has no batching rule on the CPU: its math form, which torch.compile cannot choose."""
    return _ExplicitAttention() if torch.compiler.is_compiling() else sdpa_kernel(SDPBackend.MATH)


class _ExplicitAttention(TorchFunctionMode):
    """`core.attention` in place of torch's fused attention."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not (args[4:5] or (kwargs.get("dropout_p", 0.0),))[0]:
            return torch_attention(
                *args[:4], *args[5:], **{name: x for name, x in kwargs.items() if name != "dropout_p"}
            )
        return invoke(func, args, kwargs)


def _as_batch(session, x: Tensor, like: Tensor, name: str, what: str) -> Tensor:
    """Results of batches of one, (N, ..., 1, ...), as that of the batch, (..., N, ...)."""
    axis = session.axis(like, name, what)
    if axis is None or x.ndim < axis + 2 or x.shape[axis + 1] != 1:
        raise _mixed(name, what)
    return x.squeeze(axis + 1).movedim(0, axis)


def _mixed(name: str, what: str) -> PerExampleError:
    return PerExampleError(
        f"'{name}': the result of {what} has no batch axis of its own (it mixes or moves the examples): {ADVICE}"
    )


def _check_axes(whole: Any, out: Any, batched: bool, name: str, what: str) -> None:
    """Raise unless mapping gave the shapes that the function itself gives."""
    pairs = zip(pytree.tree_leaves(whole), pytree.tree_leaves(out), strict=True)
    for expected, mapped in ((a, b) for a, b in pairs if isinstance(a, Tensor)):
        if tuple(expected.shape) != tuple(mapped.shape if batched else mapped.shape[1:]):
            raise _mixed(name, what)
