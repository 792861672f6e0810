"""LoRA: adapters of low rank as functions from a tree of parameters to a tree of parameters.

    W' = W + s B A            W (rows, *rest), B (rows, rank), A (rank, *rest);  s = alpha / rank

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. With s = alpha / sqrt(rank),
Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv:2312.03732. With magnitudes,
Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, eq. 5, per row:

    W' = m (W + s B A) / |W + s B A|        the norm is a constant to the gradient (section 4.3), m starts as |W|

Adapters are a tree of their own: `a`, `b` (and `magnitude`) under the names of the weights that they adapt. A
convolution's weight is a matrix of its rows, (d_out, d_in * kernel). An embedding's b are the factors of its rows, so
what the paper calls A is b there.

    adapters = lora.init(key, lora.spec(model, ["attn.qkv.weight"], rank=8), params)
    loss = lambda adapters, batch: ...apply(lora.adapted(params, adapters, lora.scale(8, alpha=16)), batch)...
    params = lora.merge(params, adapters, lora.scale(8, alpha=16))
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from core import initializers, nodes, tree
from core import spec as specs
from core.layers.low_rank import LowRank, blocks, row_norms
from core.spec import Param, Table
from core.tree import Tree

Rows = Sequence[tuple[int, int]]
Targets = Sequence[str] | Mapping[str, Rows | None] | Callable[[str, Any], bool]


def scale(rank: int, alpha: float, stabilised: bool = False) -> float:
    """s: alpha / rank, or with `stabilised` alpha / sqrt(rank)."""
    return alpha / math.sqrt(rank) if stabilised else alpha / rank


def spec(model: Tree, targets: Targets, rank: int, *, magnitudes: bool = False) -> Tree:
    """The spec of adapters for some weights of a spec (or of values).

    a ~ U(-1 / sqrt(fan in), 1 / sqrt(fan in)), which is kaiming_uniform(sqrt 5), and N(0, 1) for embeddings; b = 0, so
    that at first W' = W.

    Args:
        targets: names of weights, or the ends of names after a dot, with `*` for any part: "attn.qkv.weight". Or
            {name: ((first, last + 1), ...)}: the blocks of rows with an adapter of their own each, None for all rows;
            the queries and values alone of a fused matrix are ((0, width), (2 * width, 3 * width)). Or a predicate of
            (name, leaf).
        magnitudes: DoRA; their initial values need `init`.

    Raises:
        ValueError: a target that is no weight of the model (it is named), rows outside a weight, a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"lora: rank is {rank}; expected at least 1")
    rows = _rows_of_targets(model, targets)

    def adapter(name: str, leaf: Any) -> Tree:
        shape = tuple(leaf.shape)
        if len(shape) < 2:
            raise ValueError(f"lora: '{name}' of shape {shape} is no matrix; adapt weights of two or more axes")
        if (own := rows[name]) is None:
            return _block(leaf, shape[0], rank, magnitudes)
        inside = [0 <= first < last <= shape[0] for first, last in own]
        apart = all(a[1] <= b[0] for a, b in zip(sorted(own), sorted(own)[1:], strict=False))
        if not all(inside) or not apart or not inside:
            raise ValueError(f"lora: rows {list(own)} of '{name}' are no blocks of its {shape[0]} rows")
        return {f"from_{first}": _block(leaf, last - first, rank, magnitudes) for first, last in own}

    targeted, _ = tree.partition(model, lambda name, leaf: name in rows)
    return tree.sort(tree.map_with_names(adapter, targeted))


def _rows_of_targets(model: Tree, targets: Targets) -> dict[str, Rows | None]:
    """The rows of each targeted leaf, None for all."""
    leaves = dict(tree.items(model))
    rows: dict[str, Rows | None] = {}
    if callable(targets):
        rows |= {name: None for name, leaf in leaves.items() if targets(name, leaf)}
        if not rows:
            raise ValueError("lora: the predicate is true of no weight")
        return rows
    if isinstance(targets, str):
        raise ValueError(f"lora: targets are '{targets}'; expected a list of names, as in ['{targets}']")
    pairs = targets.items() if isinstance(targets, Mapping) else [(name, None) for name in targets]
    for pattern, own in pairs:
        names = [name for name in leaves if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
        if not names:
            close = difflib.get_close_matches(pattern, leaves, 3, cutoff=0.0)
            raise ValueError(f"lora: '{pattern}' is no parameter of the model; the closest are {', '.join(close)}")
        rows |= {name: own for name in names}
    return rows


def _block(leaf: Any, rows: int, rank: int, magnitudes: bool) -> Tree:
    rest = tuple(leaf.shape[1:])
    axes = tuple(getattr(leaf, "axes", ())) or (None,) * (1 + len(rest))
    dtype = torch.promote_types(leaf.dtype, torch.float32)
    if isinstance(leaf, Table) and magnitudes:
        raise ValueError("lora: magnitudes (DoRA) are for linear and convolution weights, and not for embeddings")
    init = initializers.normal() if isinstance(leaf, Table) else initializers.kaiming_uniform(math.sqrt(5))
    parts = {
        "a": Param((rank, *rest), init, (None, *axes[1:]), dtype),
        "b": Param((rows, rank), initializers.zeros, (axes[0], None), dtype),
    }
    return parts | ({"magnitude": Param((rows,), initializers.ones, axes[:1], dtype)} if magnitudes else {})


def init(key: Tensor, adapters: Tree, params: Tree) -> Tree:
    """Initial adapters of a spec for these parameters: those of `core.spec.init`, magnitudes |W| of each row.

    Raises:
        ValueError: the spec is of another model.
    """
    values = specs.init(key, adapters)

    def start(name: str, weight: Tensor, adapter: Tree) -> Tree:
        def own(first: int, block: Tree) -> Tree:
            if "magnitude" not in block:
                return block
            rows = weight[first : first + block["b"].shape[0]]
            return block | {"magnitude": row_norms(rows, block["a"], block["b"], 0.0)}

        return _map_blocks(own, adapter)

    return _at_weights(start, params, values)[1]


def _map_blocks(f: Callable[[int, Tree], Tree], adapter: Tree) -> Tree:
    if "a" in adapter:
        return f(0, adapter)
    return {f"from_{first}": f(first, block) for first, block in blocks(adapter)}


def adapted(params: Tree, adapters: Tree, scale: float | Tensor) -> Tree:
    """The parameters with adapters, for use inside a function: each W replaced by a `LowRank`, W + s B A unformed.

    Layers compute W x + s B (A x), the low-rank part in the adapter's dtype; all other code meets W + s B A, formed.
    For many adapters in one batch, map over them, and W x is computed once for all:

        vmap(lambda adapters, x: apply(adapted(params, adapters, scale), x[None])[0])(stacked, x)

    with `tree.stack` of one adapter per example, or `choose(stacked, ids)`.

    Raises:
        ValueError: an adapter for a weight that is not there or has another shape; it is named.
    """
    return _at_weights(lambda name, weight, adapter: LowRank(weight, adapter, scale), params, adapters)[0]


def choose(stacked: Tree, ids: Tensor) -> Tree:
    """The adapter of each example: stacked (adapters, ...), ids (examples,) -> (examples, ...)."""
    return tree.map(lambda leaf: leaf[ids], stacked)


def merge(params: Tree, adapters: Tree, scale: float | Tensor) -> Tree:
    """The parameters with the adapters inside, W' formed: added in float32 or wider, rounded once to the dtype of W.

    Raises:
        ValueError: as `adapted`.
    """
    return _at_weights(lambda name, weight, adapter: LowRank(weight, adapter, scale).dense(), params, adapters)[0]


def unmerge(params: Tree, adapters: Tree, scale: float | Tensor) -> Tree:
    """The parameters before `merge`, W = W' - s B A, up to rounding: keep the old ones, if there is room.

    Raises:
        ValueError: as `adapted`, and for magnitudes: the norm of W + s B A is lost.
    """

    def without(name: str, weight: Tensor, adapter: Tree) -> Tensor:
        if any("magnitude" in block for _, block in blocks(adapter)):
            raise ValueError(f"lora: '{name}' was merged with magnitudes (DoRA), which is not reversible")
        return LowRank(weight, adapter, -scale).dense()

    return _at_weights(without, params, adapters)[0]


def items(params: Tree, adapters: Tree) -> list[tuple[str, Any, Tree]]:
    """(name, weight, adapter) of each adapted weight of parameters or a spec, checked. Raises as `adapted`."""
    rows: list[tuple[str, Any, Tree]] = []
    _at_weights(lambda name, weight, adapter: rows.append((name, weight, adapter)), params, adapters)
    return rows


def _at_weights(f: Callable[[str, Tensor, Tree], Any], params: Tree, adapters: Tree) -> tuple[Tree, Tree]:
    """(params with f(name, weight, adapter) at each adapted weight, and these values alone, as the adapters are)."""

    def walk(node: Tree, own: Tree, name: str) -> tuple[Tree, Tree]:
        inner = nodes.children(node)
        if inner is None:
            _check_adapter(name, node, own)
            value = f(name, node, own)
            return value, value
        if not nodes.children(own):
            return node, own
        theirs = dict(nodes.children(own) or [])
        if missing := [key for key in theirs if key not in dict(inner)]:
            path = f"{name}.{missing[0]}" if name else missing[0]
            raise ValueError(f"lora: the adapter has '{path}', which the model has not; it is for another model")
        pairs = {}
        for key, child in inner:
            pairs[key] = walk(child, theirs[key], f"{name}.{key}" if name else key) if key in theirs else (child, None)
        node = nodes.rebuild(node, [value for value, _ in pairs.values()])
        return node, nodes.rebuild(own, [pairs[key][1] for key in theirs])

    return walk(params, adapters, "")


def _check_adapter(name: str, weight: Any, adapter: Tree) -> None:
    """Raise ValueError unless the entries and shapes of an adapter fit the weight."""
    shape = tuple(weight.shape)
    named = isinstance(adapter, dict) and adapter
    parts = list(blocks(adapter)) if named and all(k == "a" or k[:5] == "from_" for k in list(adapter)[:1]) else []
    if not parts:
        raise ValueError(f"lora: at '{name}' expected an adapter, the entries 'a' and 'b'; found {_kind(adapter)}")
    for first, block in parts:
        if not {"a", "b"} <= set(block) <= {"a", "b", "magnitude"}:
            raise ValueError(f"lora: the adapter of '{name}' has {_kind(block)}; expected 'a' and 'b'")
        a, b = tuple(block["a"].shape), tuple(block["b"].shape)
        rows = shape[0] if "a" in adapter else b[0]
        if a[1:] != shape[1:] or b != (rows, a[0]) or first + rows > shape[0]:
            pair = f"a {a} and b {b}" + (f" from row {first}" if first else "")
            raise ValueError(f"lora: {pair} do not fit the shape {shape} of '{name}'; the adapter is for another model")


def _kind(node: Tree) -> str:
    return ", ".join(f"'{key}'" for key in node) or "none" if isinstance(node, dict) else f"a {type(node).__name__}"
