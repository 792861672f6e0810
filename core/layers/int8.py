"""Weights as 8-bit integers, W = s Q with one s per row, which `linear` and `embedding` apply as they are."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from core.layers.unformed import Scaled

FEW = 8
"""Rows of x up to which a compiled product on a CPU is better written as a sum, which reads Q alone."""


class Int8(Scaled):
    """s Q.

    Args:
        int8: Q, (rows, *rest) of torch.int8.
        scale: s, (rows,), of the dtype of W.
    """

    fields = ("int8", "scale")

    def __init__(self, int8: Tensor, scale: Tensor):
        self.int8, self.scale = int8, scale

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight, (rows, ...)."""
        return self.int8.shape

    def dense(self) -> Tensor:
        """The weight as floating-point numbers, (rows, ...)."""
        return self.int8.to(self.scale.dtype) * self.scale.reshape(-1, *(1,) * (self.int8.ndim - 1))  # (rows, *rest)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ = s (x Qᵀ): (..., d_in) -> (..., rows)."""
        count = math.prod(x.shape[:-1])  # no number where torch.export leaves the batch open
        few = isinstance(count, int) and count <= FEW and x.device.type == "cpu"
        if few and torch.compiler.is_compiling():  # one loop over Q; a product would write it in the dtype of x first
            wide = torch.promote_types(x.dtype, torch.float32)
            y = (x[..., None, :].to(wide) * self.int8).sum(-1)  # (..., rows)
            return (y * self.scale).to(x.dtype)
        return F.linear(x, self.int8.to(x.dtype)) * self.scale  # (..., rows)

    def rows(self, ids: Tensor, padding_id: int | None = None) -> Tensor:
        """Rows of the table: ids (...) -> (..., *rest)."""
        scale = F.embedding(ids, self.scale[:, None])  # (..., 1)
        return F.embedding(ids, self.int8, padding_id).to(self.scale.dtype) * scale
