"""Running statistics: the update of the Stats by the increments that the taps reported."""

import torch
from torch import Tensor

from core import tree
from core.tree import Tree


def update(stats: Tree, increments: Tree) -> Tree:
    """The Stats after one step.

    A leaf `mean` moves by the mean of the increments reported to it: mean + increment / n, where n is the report of the
    `count` leaf beside it or, failing that, of the nearest one further up; without any, mean + increment. So a layer
    used twice, a vmap inside the loss, and summed or averaged micro-batches all make one update. `count` itself grows
    by one, whatever n. A layer that was not reached (n = 0) keeps its Stats.

    Args:
        stats, increments: one structure; the increments are the gradient by the Stats (see `core.tap`). Leaves may
            have a leading ensemble axis, count's too.
    """
    reported = dict(tree.items(increments))

    def new(name: str, value: Tensor, increment: Tensor) -> Tensor:
        governing = _governing_count(name, reported)
        if governing is None:
            return value + increment
        if governing == name:
            return value + (increment > 0).to(value.dtype)
        n = reported[governing]
        n = torch.where(n > 0, n, 1).reshape(n.shape + (1,) * (increment.ndim - n.ndim))
        return value + increment / n

    return tree.sort(tree.map_with_names(new, stats, increments))


def _governing_count(name: str, names: dict) -> str | None:
    """The name of the `count` in the same dict as `name`, or in the nearest dict around it."""
    *path, _ = name.split(".")
    for depth in range(len(path), -1, -1):
        candidate = ".".join([*path[:depth], "count"])
        if candidate in names:
            return candidate
    return None
