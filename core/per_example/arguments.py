"""Checks of the arguments of the per-example functions; errors name the leaf and the expected value."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core import tree
from core.per_example.errors import PerExampleError
from core.per_example.leaves import Watched
from core.tree import Tree

WANTED = ("norm", "dot", "gram", "square")

Predicate = Callable[[str, Tensor], bool]


def sort(what: str, values: Tree) -> Tree:
    """The tree with sorted keys.

    Raises:
        PerExampleError: keys of one dict that have no order, such as two complex numbers.
    """
    try:
        return tree.sort(values)
    except TypeError as error:
        raise PerExampleError(f"the keys of a dict in {what} have no order: {error}") from None


def check_want(want: str | tuple[str, ...]) -> tuple[str, ...]:
    """The wanted quantities, each once; a single one may be a string."""
    names = want if isinstance(want, (tuple, list)) else (want,)
    for name in names:
        if name not in WANTED:
            raise PerExampleError(f"want has '{name}'; expected some of {', '.join(WANTED)}")
    return tuple(name for i, name in enumerate(names) if name not in names[:i])


def check_params(params: Tree) -> None:
    """Raise unless the parameters are floating-point tensors, at least one."""
    for name, leaf in tree.items(params):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            what, expected = (f"parameter '{name}' is", "") if name else ("the parameters are", " or a tree")
            raise PerExampleError(f"{what} {kind}; expected a floating-point tensor{expected} (Stats stay outside)")
    names = tree.names(params)
    if not names:
        raise PerExampleError("there are no parameters: the tree has no leaf")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PerExampleError(f"two parameters are called '{twice}': keys of a dict must differ as strings")


def selected(params: Tree, only: Predicate | None) -> list[str]:
    """Names of the parameters that are reported on."""
    check_function("only", "a predicate (name, leaf) -> bool, or None", only)
    names = [name for name, leaf in tree.items(params) if only is None or only(name, leaf)]
    if not names:
        raise PerExampleError("`only` selects no parameter")
    return names


def check_function(name: str, expected: str, f: Any) -> None:
    """Raise PerExampleError for an argument that is neither None nor callable."""
    if f is not None and not callable(f):
        raise PerExampleError(f"{name} is {type(f).__name__}; expected {expected}")


def batch_size(batch: Tree) -> int:
    """N, the size of the leading axis that all leaves of the batch share.

    Raises:
        PerExampleError: they do not share one; or there is none.
    """
    sizes = {x.shape[0] if isinstance(x, Tensor) and x.ndim else 0 for x in tree.leaves(batch)}
    if len(sizes) != 1 or 0 in sizes:
        shapes = ", ".join(
            f"'{name}' {tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}" for name, x in tree.items(batch)
        )
        raise PerExampleError(
            f"the leaves of a batch must be tensors that agree in their leading axis, N > 0: {shapes or 'no leaf'}"
        )
    return sizes.pop()


def split_aux(out: Any, has_aux: bool) -> tuple[Any, Tree]:
    """(losses, aux) of what the loss returned."""
    if not has_aux:
        return out, ()
    if not isinstance(out, tuple) or len(out) != 2:
        kind = "a tensor" if isinstance(out, Tensor) else type(out).__name__
        raise PerExampleError(f"with has_aux the loss must return (losses, aux); it returned {kind}")
    for name, leaf in tree.items(out[1]):
        if not isinstance(leaf, Tensor):
            where = f"aux, leaf '{name}'," if name else "aux"
            raise PerExampleError(f"{where} is {type(leaf).__name__}; expected a tensor")
    return out


def check_losses(losses: Any, count: int) -> None:
    """Raise unless the losses are floating-point (count,)."""
    if isinstance(losses, Watched):
        raise PerExampleError("the loss is the same for every example: nothing in it came in through `batch`")
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if not isinstance(losses, Tensor) or shape != (count,):
        n = "" if isinstance(shape, str) or count not in shape else " (N is the batch)"
        text = shape if isinstance(shape, str) else "(" + ", ".join("N" if s == count else str(s) for s in shape) + ")"
        hint = "; with an aux output, give has_aux=True" if isinstance(losses, tuple) else ""
        raise PerExampleError(f"the loss must return one value per example, (N,); it returned {text}{n}{hint}")
    if not losses.is_floating_point():
        raise PerExampleError(f"the loss must return floating-point values, not {losses.dtype}")


def check_direction(params: Tree, names: list[str], direction: Tree | None, used: bool) -> dict[str, Tensor]:
    """The direction of each reported parameter, in float32 or wider."""
    if not used:
        if direction is not None:
            raise PerExampleError('a direction is only used if want has "dot"')
        return {}
    if direction is None:
        raise PerExampleError('want has "dot", which needs a direction like the parameters')
    leaves, expected = dict(tree.items(direction)), dict(tree.items(params))
    for name in [*(name for name in names if name not in leaves), *(name for name in leaves if name not in expected)]:
        raise PerExampleError(f"the direction {'lacks' if name in expected else 'has no parameter for'} '{name}'")
    directions = {}
    for name in names:
        leaf, shape = leaves[name], tuple(expected[name].shape)
        if not isinstance(leaf, Tensor) or tuple(leaf.shape) != shape:
            raise PerExampleError(
                f"the direction's '{name}' has shape {tuple(getattr(leaf, 'shape', ()))}, expected {shape}"
            )
        if not leaf.is_floating_point():
            raise PerExampleError(f"the direction's '{name}' is {leaf.dtype}; expected floating-point values")
        directions[name] = leaf.to(torch.promote_types(expected[name].dtype, torch.float32))
    return directions
