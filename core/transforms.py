"""torch.func's transforms for trees, with errors that name the argument and the leaf.

Use torch.func directly wherever you like: these add only checks, sorted dict keys (torch.func zips dicts by insertion
order, and `vmap(in_dims=dict)` in another key order silently maps the wrong leaf), products with second derivatives,
and the form of `scaled_dot_product_attention` that has forward and second derivatives.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from core import tree
from core.tree import Tree


def _leaf(argument: str, name: str) -> str:
    return f"{argument}, leaf '{name}'" if name else argument


def _kind(leaf: Any) -> str:
    return "None" if leaf is None else type(leaf).__name__


def _check_function(transform: str, f: Any) -> None:
    if not callable(f):
        form = f"{transform}(f)(params, ...)"
        raise TypeError(f"{transform}: the first argument is {type(f).__name__}; expected a function f, as in {form}")


def _check_tensors(transform: str, what: str, out: Tree) -> None:
    for name, leaf in tree.items(out, none_is_leaf=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{transform}: {_leaf(what, name)} is {_kind(leaf)}; expected a tensor")


def _checked_outputs(transform: str, f: Callable, has_aux: bool = False) -> Callable:
    """`f`, with a check that its outputs are tensors."""

    def checked(*args, **kwargs):
        out = f(*args, **kwargs)
        if has_aux and (not isinstance(out, tuple) or len(out) != 2):
            raise TypeError(f"{transform}: with has_aux the function must return (value, aux)")
        _check_tensors(transform, "the function's output", out)
        return out

    return checked


def _check_differentiable(transform: str, args: tuple, argnums: int | tuple[int, ...]) -> None:
    for number in (argnums,) if isinstance(argnums, int) else argnums:
        if not -len(args) <= number < len(args):
            raise ValueError(f"{transform}: argnums has {number}, but the function got {len(args)} arguments")
        for name, leaf in tree.items(args[number], none_is_leaf=True):
            where = _leaf(f"argument {number}", name)
            if not isinstance(leaf, Tensor):
                hint = " (leave its key out)" if leaf is None and name else ""
                raise TypeError(f"{transform}: {where} is {_kind(leaf)}; expected a tensor{hint}")
            if not (leaf.is_floating_point() or leaf.is_complex()):
                raise TypeError(f"{transform}: {where} is {leaf.dtype}; only floating-point leaves have a gradient")


def _scalar(transform: str, f: Callable, has_aux: bool) -> Callable:
    def checked(*args, **kwargs):
        out = f(*args, **kwargs)
        value = out
        if has_aux:
            if not isinstance(out, tuple) or len(out) != 2:
                raise TypeError(f"{transform}: with has_aux the function must return (loss, aux)")
            value = out[0]
        if not isinstance(value, Tensor):
            raise TypeError(f"{transform}: the function returned {_kind(value)}; expected a scalar tensor")
        if value.ndim > 0:
            raise ValueError(f"{transform}: the function returned shape {tuple(value.shape)}; expected a scalar ()")
        if not value.is_floating_point():
            raise TypeError(f"{transform}: the function returned {value.dtype}; expected a floating-point scalar")
        if has_aux:
            _check_tensors(transform, "aux", out[1])
        return out

    return checked


def grad(f: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """As `torch.func.grad`: the gradient of a scalar function by its arguments `argnums`, as trees.

    Raises:
        TypeError, ValueError: a leaf that has no gradient (named), or an output that is not a scalar (its shape).
    """

    _check_function("grad", f)

    def gradient(*args, **kwargs):
        args = tuple(tree.sort(arg) for arg in args)
        _check_differentiable("grad", args, argnums)
        return torch.func.grad(_scalar("grad", f, has_aux), argnums, has_aux)(*args, **kwargs)

    return gradient


def value_and_grad(f: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """`(value, gradient)`, or `((value, aux), gradient)`.

    torch.func.grad_and_value returns them the other way round. Errors as in `grad`.
    """

    _check_function("value_and_grad", f)

    def both(*args, **kwargs):
        args = tuple(tree.sort(arg) for arg in args)
        _check_differentiable("value_and_grad", args, argnums)
        checked = _scalar("value_and_grad", f, has_aux)
        gradient, value = torch.func.grad_and_value(checked, argnums, has_aux)(*args, **kwargs)
        return value, gradient

    return both


def _spread(dims: Any, arg: Tree, where: str, name: str = "") -> Tree:
    """in_dims of one argument as a full tree of its structure."""
    if dims is None or isinstance(dims, int):
        return tree.map(lambda _: dims, arg)
    inner, outer = tree.children(dims), tree.children(arg)
    if inner is None:
        kind = type(dims).__name__
        raise TypeError(f"vmap: in_dims of {_leaf(where, name)} is {kind}; expected an int, None or a tree of them")
    if outer is None:
        kinds = f"is a {type(dims).__name__}, the argument a {type(arg).__name__}"
        raise ValueError(f"vmap: in_dims of {_leaf(where, name)} {kinds}; one entry per argument is a tuple")
    here, named = dict(outer), dict(inner)
    if set(here) != set(named):
        raise ValueError(f"vmap: in_dims of {_leaf(where, name)} has {sorted(named)}, the argument {sorted(here)}")
    parts = [_spread(named[key], here[key], where, f"{name}.{key}" if name else key) for key in here]
    return tree.rebuild(arg, parts)


def _check_sizes(dims: tuple, args: tuple) -> None:
    """Check that every mapped leaf is a tensor with its axis, and that all have one size along it."""
    first = None
    for i, (dim, arg) in enumerate(zip(dims, args, strict=True)):
        # None is an empty node of a tree, so the leaf's axis is looked up by its name.
        axes = dict(tree.items(dim))
        for name, leaf in tree.items(arg):
            axis, where = axes.get(name), _leaf(f"argument {i}", name)
            if axis is None:
                continue
            if not isinstance(leaf, Tensor):
                kind = type(leaf).__name__
                raise TypeError(f"vmap: {where} is {kind}; only tensors are mapped, give it None in in_dims")
            if not -leaf.ndim <= axis < leaf.ndim:
                raise ValueError(f"vmap: {where} has shape {tuple(leaf.shape)}, so no axis {axis} to map over")
            size = leaf.shape[axis]
            first = first or (size, axis, where)
            if size != first[0]:
                there = f"{first[2]} has {first[0]} along its axis {first[1]}"
                raise ValueError(f"vmap: {where} has {size} along its axis {axis}, but {there}")
    if first is None:
        raise ValueError("vmap: in_dims maps over nothing; at least one leaf needs an axis")


def vmap(f: Callable, in_dims: Any = 0, out_dims: Any = 0, *, chunk_size: int | None = None) -> Callable:
    """As `torch.func.vmap`, with `in_dims` matched by key and the mapped sizes compared by name.

    Args:
        in_dims: an int or None for all arguments, or a tuple with an int, None or tree for each.
        chunk_size: slices mapped at once, to bound memory; all if None.

    Raises:
        TypeError: a leaf of an argument or output that is not a tensor.
        ValueError: a leaf without that axis, or with another size along it than the first; all are named.
    """

    _check_function("vmap", f)

    def mapped(*args):
        args = tuple(tree.sort(arg) for arg in args)
        per_argument = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
        if len(per_argument) != len(args):
            raise ValueError(f"vmap: in_dims names {len(per_argument)} arguments, the function got {len(args)}")
        dims = tuple(
            _spread(dim, arg, f"argument {i}") for i, (dim, arg) in enumerate(zip(per_argument, args, strict=True))
        )
        _check_sizes(dims, args)
        return torch.func.vmap(_checked_outputs("vmap", f), dims, out_dims, chunk_size=chunk_size)(*args)

    return mapped


def _matched(transform: str, primals: tuple, tangents: tuple) -> tuple:
    """The tangents in the structure of the primals, checked leaf by leaf."""
    if len(primals) != len(tangents):
        raise ValueError(f"{transform}: {len(primals)} primals, but {len(tangents)} tangents")
    matched = []
    for i, (primal, tangent) in enumerate(zip(primals, tangents, strict=True)):
        argument, named = f"the tangent of argument {i}", dict(tree.items(tangent))
        _check_tensors(transform, argument, tangent)
        for name, leaf in tree.items(primal):
            where = _leaf(argument, name)
            if name not in named:
                raise ValueError(f"{transform}: {where} is missing")
            shape, dtype = tuple(named[name].shape), named[name].dtype
            if shape != tuple(leaf.shape):
                raise ValueError(f"{transform}: {where} has shape {shape}, expected {tuple(leaf.shape)}")
            if dtype != leaf.dtype:
                raise TypeError(f"{transform}: {where} is {dtype}, expected {leaf.dtype}")
        left_over = [name for name in named if name not in set(tree.names(primal))]
        if left_over:
            raise ValueError(f"{transform}: {_leaf(argument, left_over[0])} is left over")
        matched.append(tree.unflatten(primal, [named[name] for name in tree.names(primal)]))
    return tuple(matched)


def jvp(f: Callable, primals: tuple, tangents: tuple, has_aux: bool = False) -> tuple:
    """(f(*primals), directional derivative along the tangents), and aux with `has_aux`.

    Raises:
        TypeError, ValueError: a leaf that has no derivative, or a tangent that is missing, left over, or of another
            shape or dtype than its primal; all are named. Dict keys may come in any order.
        NotImplementedError: an operation of f without a derivative in forward mode.
    """
    primals = tuple(tree.sort(primal) for primal in primals)
    _check_differentiable("jvp", primals, tuple(range(len(primals))))
    tangents = _matched("jvp", primals, tangents)
    if torch.compiler.is_compiling():
        # torch 2.13 cannot compile a vmap over tangents alone where f makes a view of a primal, as every linear layer
        # does: "Expected ... the tangent have the same layout as primal". So the primals are batched too.
        primals = tree.map(lambda p, v: p + torch.zeros_like(v), primals, tangents)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward derivative
        if torch.compiler.is_compiling():
            return torch.func.jvp(_checked_outputs("jvp", f, has_aux), primals, tangents, has_aux=has_aux)
        try:
            return torch.func.jvp(_checked_outputs("jvp", f, has_aux), primals, tangents, has_aux=has_aux)
        except NotImplementedError as error:
            if "forward AD" not in str(error):
                raise
            reason = str(error).partition(" because")[0]
            hint = "`linearize(f, *primals)` needs reverse mode alone (of a Hessian product, f is the gradient)"
            raise NotImplementedError(f"jvp: {reason}; {hint}") from error


def linearize(f: Callable, *primals: Tree) -> tuple[Tree, Callable]:
    """(f(*primals), the linear map `tangents -> directional derivative`): f is run once, the map many times.

    The map is the transpose of the reverse pass, itself a reverse pass: cotangents c -> Jᵀ c is linear, and its own
    vjp is J. So f must have second derivatives in reverse mode; errors as in `jvp`.
    """
    # torch.func.linearize traces f into constants: no gradient goes through it, and it does not compile.
    primals = tuple(tree.sort(primal) for primal in primals)
    _check_differentiable("linearize", primals, tuple(range(len(primals))))
    # torch's stub of vjp allows for has_aux, and so for three values.
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
        value, pull_back = torch.func.vjp(_checked_outputs("linearize", f), *primals)  # type: ignore[misc]
    _, push_forward = torch.func.vjp(pull_back, tree.map(torch.zeros_like, value))  # type: ignore[misc]

    def derivative(*tangents: Tree) -> Tree:
        return push_forward(_matched("linearize", primals, tangents))[0]

    return value, derivative


def hvp(f: Callable, params: Tree, direction: Tree, *args) -> tuple[Tree, Tree]:
    """(gradient, Hessian times direction) of the scalar function `f(params, *args)`, forward over reverse:

    H v = d/dε ∇f(θ + ε v) at ε = 0            (Pearlmutter 1994, "Fast Exact Multiplication by the Hessian")

    Errors as in `grad` and `jvp`.
    """
    return jvp(grad(lambda p: f(p, *args)), (params,), (direction,))
