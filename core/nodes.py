"""Nodes of trees: their keys and children, and the walk over several trees at once in compiled code.

Dynamo's version of optree cannot flatten a dict without tensors in it (`{}` of a layer without parameters, a mask of
bools), so compiled code walks its trees here, once, while it is traced. Dynamo needs milliseconds for each call and
each tuple of such a walk: hence plain recursion, and `difference` only after something has differed.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Tree = Any


def is_namedtuple(node: Tree) -> bool:
    """True for an instance of a NamedTuple."""
    return isinstance(node, tuple) and hasattr(node, "_fields")


def keys(node: dict) -> list:
    """The keys in the order in which optree walks them."""
    return list(node) if isinstance(node, OrderedDict) else sorted_keys(node)


def sorted_keys(keys: Iterable) -> list:
    """Keys in order; keys of several types, which do not compare, are ordered by their type first, as optree does."""
    try:
        return sorted(keys)
    except TypeError:
        return sorted(keys, key=lambda key: (f"{type(key).__module__}.{type(key).__qualname__}", key))


def entries(node: Tree) -> list[tuple[Any, Tree]]:
    """(key, child) pairs of an inner node, a dict's keys as they are."""
    if isinstance(node, dict):
        return [(key, node[key]) for key in keys(node)]
    return children(node)  # type: ignore[return-value]  # not None: no leaf comes here


def children(node: Tree) -> list[tuple[str, Tree]] | None:
    """(key, child) pairs of an inner node, None for a leaf."""
    if node is None:
        return []
    if isinstance(node, dict):
        return [(str(key), node[key]) for key in keys(node)]
    if is_namedtuple(node):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, (list, tuple)):
        return [(str(i), child) for i, child in enumerate(node)]
    return None


def rebuild(node: Tree, values: list[Tree]) -> Tree:
    """A node of the same kind as `node` around other children (in the order of `children(node)`)."""
    if node is None:
        return None
    if isinstance(node, dict):
        named = dict(zip(keys(node), values, strict=True))
        return {key: named[key] for key in node}
    return like(node, values)


def like(node: list | tuple, values: list) -> list | tuple:
    """A list, tuple or NamedTuple of the type of `node`."""
    return type(node)(*values) if is_namedtuple(node) else type(node)(values)


def gather(node: Tree, others: Sequence[Tree], columns: list[list]) -> bool:
    """Append the leaves of `node` to the first column, those of `others` to the rest; False if they do not fit."""
    if node is None:
        return all(other is None for other in others)
    if isinstance(node, dict):
        for other in others:
            if not isinstance(other, dict) or len(other) != len(node) or not all(key in other for key in node):
                return False
        return all([gather(node[key], [other[key] for other in others], columns) for key in keys(node)])
    if isinstance(node, (list, tuple)):
        for other in others:
            if type(other) is not type(node) or len(other) != len(node):
                return False
        return all([gather(child, [other[i] for other in others], columns) for i, child in enumerate(node)])
    for column, leaf in zip(columns, [node, *others], strict=True):
        column.append(leaf)
    return True


def fill(node: Tree, values: Iterator) -> Tree:
    """`node` with its leaves replaced by the next values, in order."""
    if node is None:
        return None
    if isinstance(node, dict):
        filled = {key: fill(node[key], values) for key in keys(node)}
        return {key: filled[key] for key in node}
    if isinstance(node, (list, tuple)):
        return like(node, [fill(child, values) for child in node])
    return next(values)


def difference(tree: Tree, other: Tree, name: str = "") -> str:
    """The first path at which the structure of `other` differs from that of `tree`; empty if none does."""
    inner = children(tree)
    if inner is None:
        return ""
    where = f"at '{name}'" if name else "at the top"
    if children(other) is None or isinstance(tree, dict) != isinstance(other, dict):
        return f"{where}, expected {type(tree).__name__}, found {type(other).__name__}"
    remaining = dict(entries(other))
    for key, child in entries(tree):
        path = f"{name}.{key}" if name else str(key)
        if key not in remaining:
            return f"'{path}' is missing"
        if below := difference(child, remaining.pop(key), path):
            return below
    if remaining:
        key = next(iter(remaining))
        return f"'{name}.{key}' is left over" if name else f"'{key}' is left over"
    if type(tree) is not type(other) and not isinstance(tree, dict):
        return f"{where}, expected {type(tree).__name__}, found {type(other).__name__}"
    return ""
