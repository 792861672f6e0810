"""Adaptive softmax: classes in order of frequency, the rarer ones in clusters with smaller projections.

Grave et al. 2017, "Efficient softmax approximation for GPUs" (arXiv:1609.04309). The head knows the most frequent
classes, and one class per cluster; for a class w of cluster i

    log p(w | x) = log p_head(cluster i | x) + log p_i(w | x),   p_i = softmax(U_i V_i x)

as torch.nn.AdaptiveLogSoftmaxWithLoss. But every cluster is computed for every x, so that no shape depends on the
targets and the functions vmap and compile; what is saved is the difference to one large matrix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.initializers import Initializer, uniform
from core.layers.checks import check_arguments
from core.layers.linear import linear, linear_spec
from core.tree import Tree


def adaptive_softmax_spec(
    d_in: int,
    classes: int,
    cutoffs: Sequence[int],
    *,
    divisor: float = 4.0,
    bias: bool = False,
    init: Initializer | None = None,
) -> Tree:
    """`head` (cutoffs[0] + clusters, d_in), and per cluster of `tails` `down` (n, d_in) and `up` (size, n).

    Args:
        cutoffs: first class of each cluster, rising, from 1 to classes - 1.
        divisor: n = d_in / divisor^i, rounded down, of cluster i = 1, 2, ...
        bias: of the head.
        init: U(-1/sqrt(fan in), 1/sqrt(fan in)) if None, as in torch.

    Raises:
        ValueError: cutoffs that do not rise or are out of range.
    """
    ends = [*cutoffs, classes]
    if not cutoffs or ends[0] < 1 or any(a >= b for a, b in zip(ends, ends[1:], strict=False)):
        raise ValueError(f"adaptive_softmax: expected cutoffs that rise from 1 to {classes - 1}, found {list(cutoffs)}")

    def product(rows: int, columns: int, bias: bool = False) -> Tree:
        own = uniform(-(columns**-0.5), columns**-0.5) if init is None else init
        return linear_spec(columns, rows, bias=bias, init=own, bias_init=own, axes=("vocabulary", "in"))

    tails = []
    for i, (first, stop) in enumerate(zip(ends, ends[1:], strict=False)):
        size = max(1, int(d_in // divisor ** (i + 1)))
        tails.append({"down": product(size, d_in), "up": product(stop - first, size)})
    return {"head": product(ends[0] + len(tails), d_in, bias), "tails": tails}


def adaptive_log_softmax(p: Tree, x: Tensor) -> Tensor:
    """Log-probabilities of all classes: (..., d_in) -> (..., classes)."""
    check_arguments("adaptive_softmax", p, x, needs=("head", "tails"))
    of_head = torch.log_softmax(linear(p["head"], x), -1)  # (..., cutoffs[0] + clusters)
    first = of_head.shape[-1] - len(p["tails"])
    parts = [of_head[..., :first]]
    for i, tail in enumerate(p["tails"]):
        of_cluster = torch.log_softmax(linear(tail["up"], linear(tail["down"], x)), -1)  # (..., size)
        parts.append(of_cluster + of_head[..., first + i, None])  # log p(cluster) + log p(class in it)
    return torch.cat(parts, -1)


def adaptive_cross_entropy(p: Tree, x: Tensor, targets: Tensor) -> Tensor:
    """-log p(target): (..., d_in), integers (...) -> (...), without the log-probabilities of the other classes."""
    check_arguments("adaptive_softmax", p, x, needs=("head", "tails"))
    scores = linear(p["head"], x)  # (..., cutoffs[0] + clusters)
    start = first = scores.shape[-1] - len(p["tails"])
    place, loss = targets, torch.zeros_like(scores[..., 0])
    for i, tail in enumerate(p["tails"]):
        of_cluster = linear(tail["up"], linear(tail["down"], x))  # (..., size)
        size = of_cluster.shape[-1]
        inside = (targets >= start) & (targets < start + size)
        loss = loss + torch.where(inside, _negative_log(of_cluster, (targets - start).clamp(0, size - 1)), 0)
        place, start = torch.where(inside, first + i, place), start + size
    return loss + _negative_log(scores, place)


def _negative_log(scores: Tensor, index: Tensor) -> Tensor:
    return torch.logsumexp(scores, -1) - scores.gather(-1, index.unsqueeze(-1)).squeeze(-1)
