"""Trees of tensors: dicts, lists, tuples and NamedTuples with tensors at the leaves.

Parameters, gradients, optimizer states and batches are all such trees. A leaf's *name* is its dotted path,
`blocks.0.attn.qkv.weight`; it is the same in tables, masks, checkpoints and errors. Dict keys are walked in sorted
order (an OrderedDict's in its own) and `None` is an empty node, as optree does. `merge`, `partition`, `nest` and `sort`
build plain dicts with sorted keys, because torch.func zips trees by insertion order; `map`, `stack` and the like keep
the dicts of their argument. No function changes its input.
"""

import math
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any

import optree
import torch
from torch import Tensor
from torch.overrides import is_tensor_like

from core import nodes
from core.nodes import Tree, children, rebuild


def map(f: Callable, tree: Tree, *rest: Tree) -> Tree:  # noqa: A001 - read as tree.map
    """Apply `f(leaf, *leaves of rest)` at each leaf; `rest` as in `aligned`."""
    return unflatten(tree, [f(*row) for row in zip(*aligned(tree, *rest), strict=True)])


def map_with_names(f: Callable, tree: Tree, *rest: Tree) -> Tree:
    """Apply `f(name, leaf, *leaves of rest)` at each leaf; `rest` as in `aligned`."""
    return unflatten(tree, [f(*row) for row in zip(names(tree), *aligned(tree, *rest), strict=True)])


def leaves(tree: Tree) -> list:
    """The leaves in order of their names' walk (dict keys sorted)."""
    return aligned(tree)[0]


def aligned(tree: Tree, *rest: Tree) -> list[list]:
    """Lists of equal length: the leaves of `tree`, and the leaves of each tree of `rest` in the same positions.

    The trees of `rest` must have the structure of `tree`; in place of a leaf, they may have a whole subtree.

    Raises:
        ValueError: the structures differ; it names the first path that does.
    """
    _check_tree(tree)
    if torch.compiler.is_compiling():
        columns: list[list] = [[] for _ in (tree, *rest)]
        if not nodes.gather(tree, rest, columns):
            differences = [nodes.difference(tree, other) for other in rest]
            raise ValueError(f"the trees differ in structure: {'; '.join(filter(None, differences))}")
        return columns
    first, treespec = optree.tree_flatten(tree)
    others = []
    for other in rest:
        try:
            others.append(treespec.flatten_up_to(other))
        except ValueError:
            raise ValueError(f"the trees differ in structure: {nodes.difference(tree, other)}") from None
    return [first, *others]


def structure(tree: Tree) -> optree.PyTreeSpec:
    """The tree without its leaves, to compare with; inside a compiled function use `aligned` and `unflatten`."""
    return optree.tree_structure(tree)


def unflatten(like: Tree, values: list) -> Tree:
    """A tree of the structure of `like` (a tree, or the `structure` of one) with the leaves `values`, in order."""
    if isinstance(like, optree.PyTreeSpec):
        return optree.tree_unflatten(like, values)
    if not torch.compiler.is_compiling():
        return optree.tree_unflatten(optree.tree_structure(like), values)
    return nodes.fill(like, iter(values))


def items(tree: Tree, prefix: str = "", none_is_leaf: bool = False) -> Iterator[tuple[str, Any]]:
    """(name, leaf) pairs in the order of `leaves`; with `none_is_leaf`, (name, None) pairs too."""
    _check_tree(tree)
    pairs: list[tuple[str, Any]] = []
    _collect(tree, prefix, none_is_leaf, pairs)
    return iter(pairs)


def _check_tree(tree: Tree) -> None:
    """Raise TypeError for an nn.Module or its `parameters()`, which would pass for a single leaf."""
    if isinstance(tree, (torch.nn.Module, GeneratorType)):
        kind = "the nn.Module " if isinstance(tree, torch.nn.Module) else "a "
        hint = "core.lift.lift(module).params is the tree of a module's"
        raise TypeError(f"expected a tree of parameters, got {kind}{type(tree).__name__}; {hint}")


def _collect(node: Tree, name: str, none_is_leaf: bool, pairs: list[tuple[str, Any]]) -> None:
    """Append the (name, leaf) pairs of `node` to `pairs`."""
    inner = None if node is None and none_is_leaf else children(node)
    if inner is None:
        pairs.append((name, node))
    else:
        for key, child in inner:
            _collect(child, f"{name}.{key}" if name else key, none_is_leaf, pairs)


def names(tree: Tree) -> list[str]:
    """The dotted path of each leaf, in the order of `leaves`."""
    return [name for name, _ in items(tree)]


def get(tree: Tree, name: str) -> Tree:
    """The leaf or subtree at a dotted path. Raises KeyError naming the part that is missing."""
    node, walked = tree, ""
    for key in name.split(".") if name else []:
        inner = dict(children(node) or [])
        if key not in inner:
            raise KeyError(f"no '{key}' under '{walked}': it has {', '.join(inner) or 'no children'}")
        node, walked = inner[key], f"{walked}.{key}" if walked else key
    return node


def sort(tree: Tree) -> Tree:
    """The same tree with every dict a plain dict whose keys are in sorted order."""
    inner = children(tree)
    if inner is None:
        return tree
    if isinstance(tree, dict):
        return {key: sort(tree[key]) for key in nodes.sorted_keys(tree)}
    return rebuild(tree, [sort(child) for _, child in inner])


def _is_empty(tree: Tree) -> bool:
    inner = children(tree)
    return inner is not None and all(_is_empty(child) for _, child in inner)


def partition(tree: Tree, predicate: Callable[[str, Any], bool]) -> tuple[Tree, Tree]:
    """Split into (leaves where `predicate(name, leaf)`, the others).

    Every leaf keeps its name: a dict drops an entry of which it has no leaf, a list or tuple keeps `{}` in its place.
    Nodes without leaves (`{}` of a layer without parameters) stay in the first half. `merge` puts the halves together
    again.
    """

    def half(node: Tree, prefix: str, first: bool) -> Tree:
        inner = children(node)
        if inner is None:
            return node if bool(predicate(prefix, node)) == first else _NOTHING
        if _is_empty(node):
            return sort(node) if first else _NOTHING
        parts = [half(child, f"{prefix}.{key}" if prefix else key, first) for key, child in inner]
        if all(child is _NOTHING for child in parts):
            return _NOTHING
        if isinstance(node, dict):
            named = dict(zip(nodes.keys(node), parts, strict=True))
            return {key: named[key] for key in nodes.sorted_keys(named) if named[key] is not _NOTHING}
        return rebuild(node, [{} if child is _NOTHING else child for child in parts])

    first, second = half(tree, "", True), half(tree, "", False)
    return ({} if first is _NOTHING else first), ({} if second is _NOTHING else second)


# No leaf of this half is here; `{}` would not do, since that may be a layer without parameters.
_NOTHING = object()


def merge(*trees: Tree) -> Tree:
    """Join trees that have no leaf in common (the halves of `partition`, params and stats) into one, keys sorted.

    Raises:
        ValueError: two of them meet; it names the path.
    """

    def join(a: Tree, b: Tree, name: str) -> Tree:
        if isinstance(a, dict) and isinstance(b, dict):
            both = nodes.sorted_keys({*a, *b})
            return {key: join(a.get(key, {}), b.get(key, {}), f"{name}.{key}" if name else str(key)) for key in both}
        if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
            pairs = zip(nodes.entries(a), nodes.entries(b), strict=True)
            return rebuild(a, [join(x, y, f"{name}.{key}" if name else key) for (key, x), (_, y) in pairs])
        # Of two nodes without leaves the first stays, unless it is the `{}` that partition leaves in a list.
        if _is_empty(b) and not (_is_empty(a) and isinstance(a, dict)):
            return a
        if _is_empty(a):
            return b
        kinds = " and ".join(f"{type(x).__name__} of {len(x)}" if children(x) else type(x).__name__ for x in (a, b))
        where = f"at '{name}'" if name else "at the top"
        raise ValueError(f"cannot merge {where}: both trees have something there, {kinds}")

    merged: Tree = {}
    for tree in trees:
        merged = join(merged, tree, "")
    return sort(merged)


def stack(trees: list[Tree]) -> Tree:
    """One tree whose leaves have a new leading axis, one entry per tree: the form that ensembles are vmapped over.

    Raises:
        ValueError: no trees, or trees of different structure or shapes; it names the leaf.
    """
    trees = list(trees)
    if not trees:
        raise ValueError("cannot stack: there are no trees")

    def stacked(name: str, *xs: Tensor) -> Tensor:
        if len({x.shape for x in xs}) > 1:
            raise ValueError(f"cannot stack: '{name}' has the shapes {', '.join(str(tuple(x.shape)) for x in xs)}")
        return torch.stack(xs)

    return map_with_names(stacked, *trees)  # each leaf (len(trees), ...)


def unstack(tree: Tree) -> list[Tree]:
    """The inverse of `stack`.

    Raises:
        ValueError: no leaves, or leading axes that differ.
    """
    values = leaves(tree)
    if len({x.shape[:1] for x in values}) != 1 or values[0].ndim == 0:
        raise ValueError(f"cannot unstack: the leaves need one leading axis in common, found {_shapes(tree) or 'none'}")
    columns = [x.unbind(0) for x in values]
    return [unflatten(tree, list(row)) for row in zip(*columns, strict=True)]


def _shapes(tree: Tree) -> str:
    return ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in items(tree))


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Floating-point leaves in another dtype; all other leaves as they are."""
    return map(lambda x: x.to(dtype) if is_tensor_like(x) and x.is_floating_point() else x, tree)


def move(tree: Tree, device: torch.device | str) -> Tree:
    """Every tensor on `device`."""
    return map(lambda x: x.to(device) if is_tensor_like(x) else x, tree)


def count(tree: Tree) -> int:
    """Total number of elements; works on tensors and on specs alike."""
    return sum(torch.Size(leaf.shape).numel() for leaf in leaves(tree))


def norm(tree: Tree) -> Tensor:
    """Euclidean norm of all leaves together, sqrt(sum of squares), in float32 or wider; 0-D.

    Right at every scale, though in float32 the squares of values below 1e-23 vanish and those above 1e19 are infinite.
    """
    norms = [_norm(x) for x in leaves(tree)]
    if len(norms) < 2:
        return norms[0] if norms else torch.zeros(())
    return _norm(torch.stack(norms))


def _norm(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    if dtype != torch.float32:
        return torch.linalg.vector_norm(x, dtype=dtype)
    if _is_readable(x):  # float32 is faster, and its norm tells whether it was good enough
        short = torch.linalg.vector_norm(x, dtype=dtype)
        if 1e-15 < float(short.detach()) < math.inf:
            return short
    # Squares of float32 neither vanish nor overflow in float64, which Apple's GPUs do not have.
    wide = dtype if x.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(x, dtype=wide).to(dtype)


def _is_readable(x: Tensor) -> bool:
    """True if reading a value costs nothing: a tensor on the CPU, neither traced nor transformed."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    return torch._C._functorch.maybe_current_level() is None


def table(tree: Tree) -> str:
    """A printable table: name, shape, dtype and number of elements per leaf, and the total. Works on specs too."""
    rows = [(n, str(tuple(x.shape)), str(x.dtype).removeprefix("torch."), f"{count(x):,}") for n, x in items(tree)]
    rows = [("name", "shape", "dtype", "numbers"), *rows, ("total", "", "", f"{count(tree):,}")]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows]
    return "\n".join(lines)


def flatten(tree: Tree) -> dict[str, Any]:
    """{name: leaf}, the form in which trees are written to files.

    Raises:
        ValueError: a dict key that is not a string, is empty or has a dot, so that names would not be unique.
    """

    def check(node: Tree) -> None:
        if isinstance(node, dict):
            for key in node:
                if not isinstance(key, str) or "." in key or not key:
                    raise ValueError(f"cannot name the leaves under key {key!r}: keys must be strings without dots")
        for _, child in children(node) or []:
            check(child)

    check(tree)
    return dict(items(tree))


class _Branch(dict):
    """A dict made by `nest` itself, which is not a leaf."""


def nest(flat: dict[str, Any], like: Tree = None) -> Tree:
    """The inverse of `flatten`.

    Without `like`, keys 0..n-1 become a list and everything else a dict with sorted keys; nodes without leaves are
    lost. With `like`, the result has its structure.

    Raises:
        ValueError: a name that is missing or left over beside `like`, or one that is both a leaf and a branch.
    """
    if like is not None:
        expected = names(like)
        missing, extra = [n for n in expected if n not in flat], sorted(set(flat) - set(expected))
        if missing or extra:
            raise ValueError(f"names do not match: missing {missing[:5]}, left over {extra[:5]}")
        return unflatten(like, [flat[name] for name in expected])

    if set(flat) == {""}:
        return flat[""]
    root = _Branch()
    for name, leaf in flat.items():
        *path, last = name.split(".")
        node = root
        for key in path:
            node = node.setdefault(key, _Branch())
            if not isinstance(node, _Branch):
                raise ValueError(f"'{name}' lies under a name that is itself a leaf")
        if last in node:
            raise ValueError(f"'{name}' is both a leaf and a branch")
        node[last] = leaf

    def listed(node: Tree) -> Tree:
        if not isinstance(node, _Branch):
            return node
        if node and set(node) == {str(i) for i in range(len(node))}:
            return [listed(node[str(i)]) for i in range(len(node))]
        return {key: listed(node[key]) for key in sorted(node)}

    return listed(root)
