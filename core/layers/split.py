"""Weights of which each process has a piece, in tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053, section 3).

    by outputs  y_r = W_r x         x enters: its gradient is summed over the processes
    by inputs   y = Σ_r W_r x_r     the sum leaves
    by rows     of a table: rows that another process has are zeros, and the sum leaves

A layer by outputs and the next one by inputs need one sum forward and one backward between them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from core.collectives import enter, join, leave, stack_over
from core.layers.unformed import Unformed
from core.tree import Tree


class Split(Unformed):
    """A process's piece of a matrix, inside a loss.

    Args:
        piece: (rows, columns) of this process.
        dim: 0 for a matrix cut by its outputs, the rows; 1 for one cut by its inputs.
        group, ways: see `core.collectives`.
        place: rank of this process in the group.
        joined: the outputs of a layer cut by outputs are joined, as logits are.
    """

    fields = ("piece", "dim", "group", "place", "ways", "joined")

    def __init__(self, piece: Tensor, dim: int, group: str, place: int, ways: int, joined: bool = False):
        self.piece, self.dim, self.group, self.place, self.ways = piece, dim, group, place, ways
        self.joined = joined

    @property
    def shape(self) -> torch.Size:
        """Shape of this process's piece."""
        return self.piece.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the piece."""
        return self.piece.dtype

    @property
    def device(self) -> torch.device:
        """Device of the piece."""
        return self.piece.device

    def dense(self) -> Tensor:
        """Raise TypeError: no process has the whole weight."""
        raise TypeError("a weight cut among processes is used by linear and embedding alone; expected no other layer")

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b, or this process's part of its last axis."""
        if self.dim == 1:
            y = leave(F.linear(x, self.piece), self.group)  # (..., d_out)
            return y if bias is None else y + bias
        y = F.linear(enter(x, self.group), self.piece, bias)  # (..., d_out / ways)
        return join(y, -1, self.group, self.place, self.ways) if self.joined else y

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a table: ids (...) -> (..., width)."""
        own = ids - self.place * self.piece.shape[0]
        here = (own >= 0) & (own < self.piece.shape[0])
        rows = F.embedding(torch.where(here, own, 0), self.piece)  # (..., width)
        return leave(torch.where(here[..., None], rows, 0), self.group)


def ways_of(weight: Tensor | Unformed) -> int:
    """Among how many processes the outputs of a layer are cut; 1 for a whole weight."""
    return weight.ways if isinstance(weight, Split) and weight.dim == 0 else 1


def own_heads(drop: Callable[[Tensor], Tensor] | None, p: Tree) -> Callable[[Tensor], Tensor] | None:
    """The dropout of all heads' attention weights, (batch, heads, queries, keys), for the heads of this process.

    p: parameters of a self-attention, with `qkv`.
    """
    weight = p["qkv"]["weight"]
    ways = ways_of(weight)
    if drop is None or ways == 1:
        return drop

    def of_own(x: Tensor) -> Tensor:
        before, after = weight.place * x.shape[1], (ways - 1 - weight.place) * x.shape[1]
        return drop(F.pad(x, (0, 0, 0, 0, before, after))).narrow(1, before, x.shape[1])

    return of_own


def vocabulary_cross_entropy(weight: Split, x: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(x Wᵀ)[target] where W is cut by its rows, the vocabulary; the logits of all are nowhere together.

    log Σ_v exp(l_v) - l_target,   both sums over the processes

    Args:
        x: (..., width).
        targets: (...) integers.

    Returns (...).
    """
    logits = F.linear(enter(x, weight.group), weight.piece)  # (..., vocabulary / ways)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = stack_over(logits.detach().amax(-1), weight.group, weight.ways).amax(0)  # (...)
    total = leave((logits - largest[..., None]).exp().sum(-1), weight.group)  # (...)
    own = targets - weight.place * weight.piece.shape[0]
    here = (own >= 0) & (own < weight.piece.shape[0])
    mine = logits.gather(-1, torch.where(here, own, 0)[..., None])[..., 0]  # (...)
    return largest + total.log() - leave(torch.where(here, mine, 0), weight.group)
