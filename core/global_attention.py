"""Attention of recurrent decoders to the annotations h_1 ... h_T of a source: Bahdanau's (additive) and Luong's.

    score(s, h_j) = v^T tanh(W_a s + U_a h_j)      additive: Bahdanau et al. 2015 (arXiv:1409.0473), A.1.2
    score(s, h_j) = s^T h_j                        dot:      Luong et al. 2015 (arXiv:1508.04025), eq. 8
    score(s, h_j) = s^T W_a h_j                    general:  the same
    a = softmax(score(s, h_1) ... score(s, h_T)),   c = sum_j a_j h_j

The part of a score that depends on h alone, its keys, is computed once for all queries:

    keys = additive_keys(p, annotations)
    context, weights = attend(additive_scores(p, query, keys), annotations, mask)

Attention of several heads between positions, as in transformers, is in `core.attention`.
"""

import torch
from torch import Tensor

from core.initializers import Initializer, uniform
from core.layers import linear, linear_spec
from core.tree import Tree


def additive_spec(query: int, width: int, hidden: int, *, init: Initializer | None = None) -> Tree:
    """`query` W_a (hidden, query), `keys` U_a (hidden, width) with a bias, `score` v (1, hidden).

    Args:
        query: width of the queries.
        width: width of the annotations.
        init: of all; by default torch's for a linear layer of [s; h], U(-1/sqrt(n), 1/sqrt(n)) of its n inputs.
    """
    both = uniform(-((query + width) ** -0.5), (query + width) ** -0.5) if init is None else init
    last = uniform(-(hidden**-0.5), hidden**-0.5) if init is None else init
    return {
        "keys": linear_spec(width, hidden, init=both, bias_init=both),
        "query": linear_spec(query, hidden, bias=False, init=both),
        "score": linear_spec(hidden, 1, bias=False, init=last),
    }


def additive_keys(p: Tree, annotations: Tensor) -> Tensor:
    """U_a h + b: (batch, time, width) -> (batch, time, hidden)."""
    return linear(p["keys"], annotations)


def additive_scores(p: Tree, query: Tensor, keys: Tensor) -> Tensor:
    """v^T tanh(W_a s + U_a h). query: (batch, queries, n), keys: (batch, time, hidden) -> (batch, queries, time)."""
    _check(query, keys)
    hidden = torch.tanh(linear(p["query"], query).unsqueeze(2) + keys.unsqueeze(1))  # (batch, queries, time, hidden)
    return linear(p["score"], hidden).squeeze(-1)  # (batch, queries, time)


def general_spec(query: int, width: int, *, init: Initializer | None = None) -> Tree:
    """`keys` W_a (query, width), the widths of the queries and of the annotations; by default U(+-1/sqrt(width))."""
    init = uniform(-(width**-0.5), width**-0.5) if init is None else init
    return {"keys": linear_spec(width, query, bias=False, init=init)}


def general_keys(p: Tree, annotations: Tensor) -> Tensor:
    """W_a h: (batch, time, width) -> (batch, time, query). Their scores are `dot_scores`."""
    return linear(p["keys"], annotations)


def dot_scores(query: Tensor, keys: Tensor) -> Tensor:
    """s^T k. query: (batch, queries, n), keys: (batch, time, n) -> (batch, queries, time)."""
    _check(query, keys)
    if query.shape[2] != keys.shape[2]:
        raise ValueError(f"global_attention: queries of width {query.shape[2]}, keys of width {keys.shape[2]}")
    return query @ keys.mT


def attend(scores: Tensor, values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights a = softmax(scores) over the source, and the contexts c = sum_j a_j values_j.

    Args:
        scores: (batch, queries, time).
        values: (batch, time, width); zeros, or any finite values, where the mask is False.
        mask: (batch, time) boolean, True at the source's tokens; all if None. Without any token the context is 0.

    Returns:
        Contexts (batch, queries, width) and weights (batch, queries, time).

    Raises:
        ValueError: shapes that do not fit, a mask that is not boolean.
    """
    if scores.ndim != 3 or values.ndim != 3 or (scores.shape[0], scores.shape[2]) != values.shape[:2]:
        shapes = f"{tuple(scores.shape)} and {tuple(values.shape)}"
        raise ValueError(f"global_attention: scores and values of shapes {shapes} do not fit each other")
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != values.shape[:2]:
            kind = f"{mask.dtype} of shape {tuple(mask.shape)}"
            expected = f"expected a mask {tuple(values.shape[:2])} of torch.bool"
            raise ValueError(f"global_attention: {expected}, found {kind}")
        mask = mask.unsqueeze(1)  # (batch, 1, time)
        # Not -inf: a row without any token would be NaN, and so would its gradient.
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
    half = scores.dtype in (torch.float16, torch.bfloat16)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32 if half else None).to(values.dtype)
    if mask is not None:
        weights = torch.where(mask, weights, 0)  # equal scores of a row without any token
    return weights @ values, weights


def _check(query: Tensor, keys: Tensor) -> None:
    if query.ndim != 3 or keys.ndim != 3 or query.shape[0] != keys.shape[0]:
        shapes = f"{tuple(query.shape)} and {tuple(keys.shape)}"
        raise ValueError(f"global_attention: expected (batch, queries, n) and (batch, time, n), found {shapes}")
