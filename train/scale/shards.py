"""The plan: along which dimension, and over which axis of the mesh, each leaf of a spec is cut.

A plan is made from the spec and the sizes of the mesh alone; nothing is allocated and no process group is needed:

    cuts = plan(gpt2.spec(cfg), {"data": 8}, RULES["fsdp"])
    print(table(gpt2.spec(cfg), {"data": 8}, cuts))

The rules of one way map logical axes (`Param.axes`) to axes of the mesh; "*" stands for any axis.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from core import tree
from core.spec import Param, Stat
from core.tree import Tree

ANY = "*"
RULES: dict[str, dict[str, str]] = {
    "replicate": {},
    "fsdp": {ANY: "data"},
    "hsdp": {ANY: "data"},
    "tensor": {"heads": "model", "mlp": "model", "vocabulary": "model"},
}
"""{way of `--shard`: {logical axis: axis of the mesh}}."""


class Shard(NamedTuple):
    """A cut of a leaf into equal pieces, one for each place on an axis of the mesh.

    parts: sizes along `dim` of parts that are cut one by one, such as those of queries, keys and values in one matrix;
        () for one part.
    """

    dim: int
    mesh_axis: str
    parts: tuple[int, ...] = ()


Plan = dict[str, Shard | None]
"""{dotted name of a leaf: its cut, or None where every process has the whole leaf}."""


def plan(spec: Tree, sizes: Mapping[str, int], rules: Mapping[str, str]) -> Plan:
    """The cut of every leaf of a spec.

    A rule for "*" cuts a leaf along the first of its dimensions that divides. A rule for a logical axis cuts all leaves
    that have the axis or, where one of them does not divide, none of them: they work together. Stats stay whole.

    Args:
        spec: a tree of Param and Stat.
        sizes: {axis of the mesh: processes}; an axis of size 1, or one that is missing, cuts nothing.
        rules: one of `RULES`.

    Raises ValueError: the mesh has an axis of more than one process that the rules use, and no leaf can be cut along
    it.
    """
    leaves = {name: leaf for name, leaf in tree.items(spec) if not isinstance(leaf, Stat)}
    whole = {
        axis
        for leaf in leaves.values()
        for dim, axis in enumerate(leaf.axes)
        if axis in rules and not _divides(leaf, dim, sizes.get(rules[axis], 1))
    }
    out: Plan = {name: None for name in tree.names(spec)}
    for name, leaf in leaves.items():
        for dim, size in enumerate(leaf.shape):
            axis = leaf.axes[dim] if leaf.axes else None
            mesh_axis = rules.get(ANY) if axis not in rules or axis in whole else rules[axis]
            ways = sizes.get(mesh_axis, 1) if mesh_axis else 1
            if ways > 1 and size and _divides(leaf, dim, ways):
                out[name] = Shard(dim, mesh_axis, _parts(leaf, dim) if axis in rules else ())
                break
    for axis in dict.fromkeys(rules.values()):
        ways = sizes.get(axis, 1)
        if ways > 1 and not any(cut and cut.mesh_axis == axis for cut in out.values()):
            names = ", ".join(rule for rule, mesh_axis in rules.items() if mesh_axis == axis and rule != ANY)
            of = f" named {names}" if names else ""
            raise ValueError(f"nothing to cut over {axis}={ways}: no dimension{of} of a parameter divides by {ways}")
    return out


def _parts(leaf: Param, dim: int) -> tuple[int, ...]:
    return leaf.parts if dim == 0 else ()


def _divides(leaf: Param, dim: int, ways: int) -> bool:
    return all(size % ways == 0 for size in _parts(leaf, dim) or (leaf.shape[dim],))


def local_shape(shape: tuple[int, ...], cut: Shard | None, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a process's piece of a leaf."""
    if cut is None:
        return tuple(shape)
    return tuple(size // sizes[cut.mesh_axis] if dim == cut.dim else size for dim, size in enumerate(shape))


def local_bytes(spec: Tree, sizes: Mapping[str, int], cuts: Plan) -> int:
    """Bytes of a process's pieces of all leaves; of the whole ones with `cuts` {}."""
    items = tree.items(spec)
    return sum(math.prod(local_shape(x.shape, cuts.get(name), sizes)) * x.dtype.itemsize for name, x in items)


def table(spec: Tree, sizes: Mapping[str, int], cuts: Plan) -> str:
    """A printable table: the cut, the local shape and the bytes per process of each leaf, and their sums."""
    rows, total, whole = [], 0, 0
    for name, leaf in tree.items(spec):
        cut, shape = cuts[name], local_shape(leaf.shape, cuts[name], sizes)
        size = math.prod(shape) * leaf.dtype.itemsize
        total, whole = total + size, whole + math.prod(leaf.shape) * leaf.dtype.itemsize
        axis = leaf.axes[cut.dim] if cut and leaf.axes and leaf.axes[cut.dim] else ""
        words = f"{axis or cut.dim} over {cut.mesh_axis}={sizes[cut.mesh_axis]}" if cut else "whole"
        rows.append((name, str(tuple(leaf.shape)), words, str(shape), f"{size:,}"))
    head = ("name", "shape", "cut", "per process", "bytes")
    rows = [head, *rows, ("total", "", "", "", f"{total:,}"), ("of one process alone", "", "", "", f"{whole:,}")]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(f"{word:{'>' if i == 4 else '<'}{widths[i]}}" for i, word in enumerate(row)).rstrip() for row in rows
    )
