"""A pure function and its parameters as a program: one graph, whose inputs have names, dtypes and ranges of sizes.

    program = export(lambda p, x: resnet.apply(p, x, cfg), params, {"x": images}, {"x": {0: Axis("batch", 1, 64)}})
    y = program(x=images[:5])

`train.ship.package` writes it for AOTInductor, ONNX and TorchScript.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from core import nodes, tree
from core.tree import Tree


class ShipError(ValueError):
    """A function that cannot be exported, a package that does not fit, or an input outside its range: one line."""


class Axis(NamedTuple):
    """An axis whose size may change, from `low` to `high`; axes of one name have one size."""

    name: str
    low: int = 1
    high: int = 64


@dataclass(frozen=True)
class Leaf:
    """A tensor that goes in or comes out: its dotted name, dtype, and per axis a size or an `Axis`."""

    name: str
    dtype: str
    shape: tuple[int | Axis, ...]


class Program(NamedTuple):
    """An exported function.

    exported: torch's `ExportedProgram`; its inputs are the leaves in order, its outputs a tuple.
    module: the function that was traced, of the same inputs.
    run: the exported graph, of the same inputs.
    inputs: the leaves that it takes.
    outputs: the names of the leaves that it returns.
    form: the tree that it returns, with the numbers of the outputs as leaves; a NamedTuple is a dict.
    example: the leaves that it was traced with.
    """

    exported: Any
    module: nn.Module
    run: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Leaf, ...]
    outputs: tuple[str, ...]
    form: Any
    example: tuple[Tensor, ...]

    @torch.no_grad()
    def __call__(self, **inputs: Tree) -> Tree:
        """The outputs, computed by torch. Raises ShipError: an input that is not in range."""
        return shaped(self.form, self.run(*checked(self.inputs, inputs)))


Ranges = Mapping[str, Mapping[int, Axis | tuple]]


def export(
    apply: Callable[..., Tree], params: Tree, example: Mapping[str, Tree], ranges: Ranges | None = None
) -> Program:
    """Trace a pure function into one graph that holds the parameters.

    Args:
        apply: `apply(params, **inputs)` -> a tensor or a tree of tensors; traced in evaluation, without a gradient.
        example: {name: tensor or tree of tensors}, of the right dtypes and sizes.
        ranges: {name of an input or of a part of it: {axis: Axis}}, the sizes that may change; all others are fixed.
            In the example they must be at least 2, since torch.export makes a size of 1 a constant.

    Raises ShipError: a range that names no input or does not hold the example; a function that fixes a size; parameters
        or inputs that are not on the CPU.
    """
    for name, leaf in (*tree.items(params), *tree.items(dict(example))):
        if not isinstance(leaf, Tensor):
            raise ShipError(f"'{name}' is a {type(leaf).__name__}; expected a tensor")
        if leaf.device.type != "cpu":
            raise ShipError(f"'{name}' is on {leaf.device}; expected the CPU, where packages run")
    example = {name: example[name] for name in sorted(example)}
    leaves = _leaves(example, ranges or {})
    values = tuple(value.detach().contiguous() for value in tree.leaves(example))
    form: dict[str, Any] = {}

    def call(params: Tree, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        out = apply(params, **tree.unflatten(example, list(values)))
        form["names"], form["form"] = tuple(tree.names(out)), _form(out, iter(range(len(tree.leaves(out)))))
        # An output that is a parameter or an input itself would share its memory.
        return tuple(leaf.clone() if any(leaf is v for v in values) else leaf for leaf in tree.leaves(out))

    dims = {axis.name: axis for leaf in leaves for axis in leaf.shape if isinstance(axis, Axis)}
    symbols = {name: torch.export.Dim(name, min=axis.low, max=axis.high) for name, axis in dims.items()}
    shapes = tuple(
        {i: symbols[axis.name] for i, axis in enumerate(leaf.shape) if isinstance(axis, Axis)} for leaf in leaves
    )
    module = Closed(call, params)
    try:
        with torch.no_grad(), quiet():
            exported = torch.export.export(module, values, dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # torch raises errors of many classes here
        raise ShipError(f"torch.export: {_reason(error)}") from error
    return Program(exported, module, exported.module(), leaves, form["names"], form["form"], values)


class Closed(nn.Module):
    """A function of (params, tensors) as a module whose buffers are the parameters, by their dotted names."""

    def __init__(self, call: Callable, params: Tree):
        super().__init__()
        self._call, self._params = call, _hung(self, params)
        self.eval()

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the function with the module's own parameters."""
        return self._call(tree.map(lambda read: read(), self._params), values)


def _hung(module: nn.Module, params: Tree) -> Tree:
    """Hang the parameters into nested modules; a tree of functions that read them."""
    inner: list[Any] = []
    for key, child in nodes.children(params) or []:
        if nodes.children(child) is not None:
            module.add_module(_safe(key), own := nn.Module())
            inner.append(_hung(own, child))
            continue
        if type(child) in (Tensor, nn.Parameter):
            module.register_buffer(_safe(key), child.detach())
        else:  # a subclass of another library, which knows itself as a parameter
            module.register_parameter(_safe(key), nn.Parameter(child, requires_grad=False))
        inner.append(partial(getattr, module, _safe(key)))
    return nodes.rebuild(params, inner)


RESERVED = frozenset(dir(nn.Module())) | {"_call", "_params"}


def _safe(key: str) -> str:
    """A key as the name of a module's attribute: without dots, and none of a module's own, such as "type"."""
    key = key.replace(".", "__")
    return key + "_" if key in RESERVED else key


def constant_name(name: str) -> str:
    """The name in a package of the parameter with a dotted name."""
    return ".".join(map(_safe, name.split(".")))


# Inputs and outputs.


def _leaves(example: Mapping[str, Tree], ranges: Ranges) -> tuple[Leaf, ...]:
    """The leaves of the example with their ranges. Raises ShipError."""
    used, sizes, leaves = set(), {}, []
    for name, value in tree.items(example):
        shape: list[int | Axis] = list(value.shape)
        for key, axes in ranges.items():
            if name != key and not name.startswith(f"{key}."):
                continue
            used.add(key)
            for i, axis in axes.items():
                axis = Axis(*axis)
                if not -value.ndim <= i < value.ndim:
                    raise ShipError(f"input '{name}' of shape {tuple(value.shape)} has no axis {i}")
                size = value.shape[i]
                if not 1 <= axis.low <= axis.high or not axis.low <= size <= axis.high:
                    raise ShipError(f"{_axis(name, i, axis)} is {size} in the example; expected {_range(axis)}")
                if size < 2:
                    wanted = f"expected at least 2: torch.export makes a size of {size} a constant"
                    raise ShipError(f"{_axis(name, i, axis)} is {size} in the example; {wanted}")
                if sizes.setdefault(axis.name, (axis, size)) != (axis, size):
                    raise ShipError(f"{_axis(name, i, axis)} has another range or size than elsewhere in the example")
                shape[i] = axis
        leaves.append(Leaf(name, str(value.dtype).removeprefix("torch."), tuple(shape)))
    if unknown := [key for key in ranges if key not in used]:
        raise ShipError(f"the range of '{unknown[0]}' names no input; there are {', '.join(tree.names(example))}")
    return tuple(leaves)


def checked(leaves: tuple[Leaf, ...], inputs: Mapping[str, Tree]) -> list[Tensor]:
    """The inputs in order, contiguous and without a gradient.

    Compiled packages check nothing: a wrong channel count reads memory that is not theirs, another layout gives wrong
    numbers. So this is done at every call.

    Raises ShipError: an input is missing or unknown, no tensor, or not of its dtype, device or range.
    """
    values, sizes, out = dict(tree.items(dict(inputs))), {}, []
    if set(values) != {leaf.name for leaf in leaves}:
        names, expected = ", ".join([*values][:8]), ", ".join(leaf.name for leaf in leaves)
        more = f" and {len(values) - 8} more" if len(values) > 8 else ""
        raise ShipError(f"inputs {names or 'none'}{more}; expected {expected}")
    for leaf in leaves:
        value = values[leaf.name]
        if not isinstance(value, Tensor):
            raise ShipError(f"input '{leaf.name}' is a {type(value).__name__}; expected a tensor")
        if value.dtype != getattr(torch, leaf.dtype):
            raise ShipError(f"input '{leaf.name}' is {value.dtype}; expected torch.{leaf.dtype}")
        if value.device.type != "cpu":
            raise ShipError(f"input '{leaf.name}' is on {value.device}; expected the CPU")
        shape = tuple(value.shape)
        fixed = [(i, n) for i, n in enumerate(leaf.shape) if not isinstance(n, Axis)]
        if len(shape) != len(leaf.shape) or any(shape[i] != n for i, n in fixed):
            raise ShipError(f"input '{leaf.name}' has shape {shape}; expected {shape_line(leaf)}")
        for i, axis in enumerate(leaf.shape):
            if not isinstance(axis, Axis):
                continue
            if not axis.low <= shape[i] <= axis.high:
                raise ShipError(f"{_axis(leaf.name, i, axis)} is {shape[i]}; expected {_range(axis)}")
            if sizes.setdefault(axis.name, shape[i]) != shape[i]:
                other = f"but {sizes[axis.name]} in another input"
                raise ShipError(f"{_axis(leaf.name, i, axis)} is {shape[i]}, {other}; expected the same")
        out.append(value.detach().contiguous())
    return out


def _axis(name: str, i: int, axis: Axis) -> str:
    return f"axis {i} ('{axis.name}') of input '{name}'"


def _range(axis: Axis) -> str:
    return f"{axis.low} to {axis.high}"


def shape_line(leaf: Leaf) -> str:
    """(batch, 3, 32, 32), as it is printed."""
    inner = ", ".join(axis.name if isinstance(axis, Axis) else str(axis) for axis in leaf.shape)
    return f"({inner},)" if len(leaf.shape) == 1 else f"({inner})"


def _form(out: Tree, numbers: Iterator[int]) -> Any:
    """The tree as JSON can hold it: dicts and lists around the numbers of the leaves."""
    inner = nodes.children(out)
    if inner is None:
        return next(numbers)
    values = [_form(child, numbers) for _, child in inner]
    named = isinstance(out, dict) or nodes.is_namedtuple(out)
    return dict(zip((key for key, _ in inner), values, strict=True)) if named else values


def shaped(form: Any, outputs: Any) -> Tree:
    """The outputs in the form of a program."""
    if isinstance(form, dict):
        return {key: shaped(child, outputs) for key, child in form.items()}
    return [shaped(child, outputs) for child in form] if isinstance(form, list) else outputs[form]


# torch's own words.


@contextmanager
def quiet() -> Iterator[None]:
    """Context without the warnings of torch's exporters about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: Exception) -> str:
    """The reason of torch for a function that it cannot export, as one line."""
    text = str(error)
    if fixed := re.search(r"You marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)", text):
        return (
            f"the function fixes '{fixed[1]}' at {fixed[2]}; use x.shape[0], not len(x), or leave it out of the ranges"
        )
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    return lines[0][:300] if lines else type(error).__name__
