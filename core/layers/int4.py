"""Weights as 4-bit integers, W = s Q with one s per group of columns of a row."""

import torch
from torch import Tensor
from torch.nn import functional as F

from core.layers.unformed import Scaled


class Int4(Scaled):
    """s Q.

    Args:
        int4: (rows, columns / 2) uint8, two integers in each, both plus 8: the first in the lower bits.
        scale: s, (rows, groups), of the dtype of W.
    """

    fields = ("int4", "scale")

    def __init__(self, int4: Tensor, scale: Tensor):
        self.int4, self.scale = int4, scale

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrix, (rows, columns)."""
        return torch.Size((self.int4.shape[0], 2 * self.int4.shape[1]))

    def dense(self) -> Tensor:
        """The matrix as floating-point numbers, (rows, columns)."""
        return _dense(self.int4, self.scale)

    def rows(self, ids: Tensor, padding_id: int | None = None) -> Tensor:
        """Rows of the table: ids (...) -> (..., columns)."""
        return _dense(F.embedding(ids, self.int4, padding_id), F.embedding(ids, self.scale, padding_id))


def _dense(pairs: Tensor, scale: Tensor) -> Tensor:
    """s Q: (..., columns / 2) and (..., groups) -> (..., columns)."""
    # Not >> and &, which some exporters lack.
    high = torch.div(pairs, 16, rounding_mode="floor")
    q = torch.stack([pairs - 16 * high, high], -1).flatten(-2).to(scale.dtype) - 8  # (..., columns)
    return (q.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)
