"""Weights with a low-rank part, W + s B A, which layers apply without forming it: W x + s B (A x).

A `LowRank` takes the place of a weight in a tree of parameters (`core.lora.adapted`). `linear`, `conv`,
`conv_transpose` and `embedding` know it; to all other code it is the tensor W + s B A, formed where it is needed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from core.layers.unformed import Unformed
from core.tree import Tree


def blocks(adapter: Tree) -> Iterator[tuple[int, Tree]]:
    """(first row, entries) of each block of an adapter: the whole weight, or those of the keys `from_0`, `from_128`."""
    if "a" in adapter:
        yield 0, adapter
        return
    for key in sorted(adapter, key=lambda key: int(key.removeprefix("from_"))):
        yield int(key.removeprefix("from_")), adapter[key]


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: Any) -> Tensor:
    """Norm of each row of W + s B A, (rows,), without forming it; a constant to the gradient.

    |w_i + s b_i A|² = |w_i|² + 2 s b_i (A w_i) + s² b_i A Aᵀ b_iᵀ
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    w, a, b = weight.detach().to(wide).flatten(1), a.detach().to(wide).flatten(1), b.detach().to(wide)
    scale = scale.detach() if isinstance(scale, Tensor) else scale
    cross = (b * (w @ a.T)).sum(1)  # (rows,)
    square = w.square().sum(1) + 2 * scale * cross + scale**2 * (b * (b @ (a @ a.T))).sum(1)  # (rows,)
    return square.clamp(min=0).sqrt()


class LowRank(Unformed):
    """W + s B A.

    Args:
        weight: W, (rows, *rest).
        adapter: `a` (rank, *rest) and `b` (rows, rank); for DoRA `magnitude` (rows,) too. Or a dict of these per block
            of rows, under `from_` and the block's first row.
        scale: s, a number or a 0-D tensor.
    """

    fields = ("weight", "adapter", "scale")

    def __init__(self, weight: Tensor, adapter: Tree, scale: Any):
        self.weight, self.adapter, self.scale = weight, adapter, scale

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.weight.device

    def dense(self) -> Tensor:
        """The tensor, computed in float32 or wider and rounded once to the dtype of W."""
        first = next(blocks(self.adapter))[1]["a"]
        wide = torch.promote_types(torch.promote_types(self.weight.dtype, first.dtype), torch.float32)
        w, parts, row = self.weight.to(wide), [], 0
        for start, block in blocks(self.adapter):
            a, b = block["a"].to(wide), block["b"].to(wide)
            own = w[start : start + b.shape[0]]  # (block's rows, *rest)
            value = own + self.scale * (b @ a.flatten(1)).reshape(own.shape)  # W + s B A
            if "magnitude" in block:  # m V / |V|
                factor = block["magnitude"].to(wide) / row_norms(own, a, b, self.scale)  # (block's rows,)
                value = value * factor.reshape(-1, *(1,) * (own.ndim - 1))
            parts += [w[row:start], value]
            row = start + b.shape[0]
        return torch.cat([*parts, w[row:]]).to(self.weight.dtype)  # (rows, *rest)


def low_rank(weight: LowRank, product: Callable[[Tensor], Tensor], low: Callable, axis: int, rows_axis: int = 0):
    """The product with a LowRank, without bias.

    Args:
        product: W -> W x.
        low: (a, b) -> B (A x), in the dtype of a.
        axis: axis of W x that has the rows of W; for the magnitudes of DoRA and blocks of rows.
        rows_axis: 1 where the product sums over the rows (a transposed convolution, a table that is looked up), so that
            neither magnitudes nor blocks have a place.

    Raises:
        ValueError: magnitudes or blocks of rows where they have no place.
    """
    y = product(weight.weight)  # W x
    total = y
    for start, block in blocks(weight.adapter):
        part = weight.scale * low(block["a"], block["b"])  # s B (A x), a block of rows along the axis
        rows = block["b"].shape[0]
        if rows_axis and ("magnitude" in block or rows != weight.shape[0]):
            raise ValueError("low rank: magnitudes (DoRA) and blocks of rows are for linear and convolution weights")
        if "magnitude" in block:
            own = weight.weight.narrow(0, start, rows)
            factor = block["magnitude"] / row_norms(own, block["a"], block["b"], weight.scale)  # m / |V|, (rows,)
            factor = factor.reshape(-1, *(1,) * (y.ndim - 1 - axis % y.ndim))
            part = (factor - 1) * y.narrow(axis, start, rows) + factor * part  # m V x / |V| - W x
        if not rows_axis and rows != weight.shape[0]:
            pads = (0, 0) * (y.ndim - 1 - axis % y.ndim) + (start, weight.shape[0] - start - rows)
            part = torch.nn.functional.pad(part, pads)
        total = total + part
    return total.to(y.dtype)
