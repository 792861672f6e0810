"""Scores from sketches of per-example gradients: self-influence, nearest neighbours, redundant and conflicting pairs.

`core.sketches` puts the gradients of a whole data set into (N, size) numbers whose inner products estimate those of
the gradients, with a standard deviation of about |g| |h| / sqrt(size). So what is found here are candidates: exact
products of a few pairs are `core.per_example.reports(want="gram")`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 2**24
"""Products of sketches that are held at once."""


class Neighbours(NamedTuple):
    """The neighbours of each example in gradient space, and extreme pairs of examples.

    indices, cosines: (N, k), the nearest first.
    redundant, conflicting: (pairs, 2), largest and smallest cosine first; no example is in two pairs of a kind.
    """

    indices: Tensor
    cosines: Tensor
    redundant: Tensor
    conflicting: Tensor


def sketched_self_influence(sketches: Tensor, damping: float = 0.1) -> Tensor:
    """Self-influence from sketches, s_nᵀ (F + λ)⁻¹ s_n with F = 1/N sum_n s_n s_nᵀ: influence functions (Koh and Liang
    2017, arXiv:1703.04730) whose curvature is the empirical Fisher matrix, of random projections (Park et al. 2023,
    "TRAK", arXiv:2303.14186, section 3), so of rank up to their size.

    Args:
        sketches: (N, size).
        damping: λ as a multiple of the mean eigenvalue of F.

    Returns:
        (N,) float64, at most N each; 0 where all gradients are 0.

    Raises:
        ValueError: not (N, size), or a damping that is not positive.
    """
    _check("sketched_self_influence", sketches)
    if not damping > 0.0:
        raise ValueError(f"sketched_self_influence: damping is {damping}; expected above 0")
    count, size = sketches.shape
    rows = max(1, BLOCK // size)
    fisher = sum(part.double().T @ part.double() for part in sketches.split(rows)) / count  # (size, size)
    mean = float(fisher.diagonal().mean())
    if mean == 0.0:
        return torch.zeros(count, dtype=torch.float64)
    factor = torch.linalg.cholesky(fisher + damping * mean * torch.eye(size, dtype=torch.float64))

    def scores(part: Tensor) -> Tensor:
        solved = torch.linalg.solve_triangular(factor, part.double().T, upper=False)  # L⁻¹ s, (size, rows)
        return solved.square().sum(0)

    return torch.cat([scores(part) for part in sketches.split(rows)])


def sketched_neighbours(sketches: Tensor, k: int, pairs: int = 0, among: Tensor | None = None) -> Neighbours:
    """The k examples with the most similar gradients, for each, and the pairs that are most and least alike.

    An example without a gradient has cosine 0 with all others.

    Args:
        sketches: (N, size).
        k: at least 1; N - 1 if that is less.
        pairs: of each kind.
        among: (N,) of bool, examples that may be in a pair; all if None.

    Raises:
        ValueError: not (N, size) with N > 1.
    """
    _check("sketched_neighbours", sketches)
    count = len(sketches)
    if count < 2 or k < 1:
        raise ValueError(f"sketched_neighbours: {count} examples, k = {k}; expected at least 2 examples and k of 1")
    k = min(k, count - 1)
    among = torch.ones(count, dtype=torch.bool) if among is None else among
    unit = torch.nn.functional.normalize(sketches.float(), dim=1)  # (N, size)
    nearest: list[Tensor] = []
    similarity: list[Tensor] = []
    extremes: dict[float, list[tuple[Tensor, Tensor]]] = {1.0: [], -1.0: []}
    rows = max(1, BLOCK // count)
    for start in range(0, count, rows):
        cosines = unit[start : start + rows] @ unit.T  # (rows, N)
        own = torch.arange(start, start + len(cosines))
        cosines[own - start, own] = -torch.inf
        best = cosines.topk(k, dim=1)
        nearest.append(best.indices)
        similarity.append(best.values)
        if not pairs:
            continue
        allowed = among & (torch.arange(count) > own[:, None]) & among[own, None]  # each pair once
        for sign, parts in extremes.items():
            signed = torch.where(allowed, sign * cosines, -torch.inf).flatten()
            top = signed.topk(min(50 * pairs, len(signed)))
            real = top.values > -torch.inf
            left, right = top.indices[real] // count + start, top.indices[real] % count
            parts.append((top.values[real], torch.stack([left, right], 1)))
    redundant, conflicting = (_disjoint(parts, pairs) for parts in extremes.values())
    return Neighbours(torch.cat(nearest), torch.cat(similarity).clamp(-1, 1), redundant, conflicting)


def _disjoint(parts: list[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Pairs of the greatest values, up to (count, 2); an example is in one pair only, that of its greatest value."""
    taken: set[int] = set()
    out: list[list[int]] = []
    if parts:
        values, pairs = (torch.cat(column) for column in zip(*parts, strict=True))
        for pair in pairs[values.argsort(descending=True, stable=True)].tolist():
            if len(out) < count and not taken & set(pair):
                out.append(pair)
                taken |= set(pair)
    return torch.tensor(out, dtype=torch.int64).reshape(-1, 2)


def _check(name: str, sketches: Tensor) -> None:
    if sketches.ndim != 2 or not sketches.is_floating_point():
        kind = f"{sketches.dtype} {tuple(sketches.shape)}"
        raise ValueError(f"{name}: the sketches are {kind}; expected floating-point (N, size)")
