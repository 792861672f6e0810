"""Alignment of gradients: cosines with a direction and with each other, of examples and of tasks."""

from collections.abc import Callable

import torch
from torch import Tensor

from core import tree
from core.per_example import reports
from core.tree import Tree


def gradient_cosine(
    loss: Callable[[Tree, Tree], Tensor], params: Tree, batch: Tree, direction: Tree | None = None
) -> Tensor:
    """cos(g_n, v) = <g_n, v> / (|g_n| |v|) of each example's gradient and a direction.

    Where the cosine with the mean gradient is negative, a step along the mean raises the example's loss. The mean over
    the examples is the gradients' coherence (Chatterjee 2020, arXiv:2002.10657).

    Args:
        loss, params, batch: as in `core.per_example.reports`.
        direction: v, like the parameters; None for the batch's mean gradient, which takes a second pass.

    Returns:
        (N,); 0 where g_n or v is 0.

    Raises:
        PerExampleError: as in `reports`.
    """
    if direction is None:
        first = reports(loss, params, batch)
        norms, direction = first.total_norm, first.mean
        dots = reports(loss, params, batch, ("dot",), direction=direction).total_dot
    else:
        out = reports(loss, params, batch, ("norm", "dot"), direction=direction)
        norms, dots = out.total_norm, out.total_dot
    return _quotient(dots, norms * tree.norm(direction))


def cosine_matrix(gram: Tensor) -> Tensor:
    """cos(g_n, g_m) = K_nm / sqrt(K_nn K_mm) from a Gram matrix, such as `Reports.total_gram`.

    Args:
        gram: (..., N, N).

    Returns:
        (..., N, N); 0 where a gradient is 0.

    Raises:
        ValueError: no square matrix.
    """
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"cosine_matrix: the Gram matrix has shape {tuple(gram.shape)}; expected (..., N, N)")
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return _quotient(gram, norms[..., :, None] * norms[..., None, :])


def task_gram(losses: Callable[[Tree], Tensor], params: Tree) -> Tensor:
    """<∇L_k, ∇L_l> of the gradients of K losses (tasks) of the same parameters: one forward pass, K backward passes.

    Negative entries are tasks that conflict (Yu et al. 2020, "Gradient Surgery for Multi-Task Learning",
    arXiv:2001.06782): `cosine_matrix` of it has their cosines.

    Args:
        losses: `losses(params) -> (K,)`.
        params: a tree of floating-point tensors. K gradients are formed at once.

    Returns:
        (K, K).

    Raises:
        ValueError: losses that are not (K,).
    """
    values, pull = torch.func.vjp(losses, tree.sort(params))  # type: ignore[misc]  # torch's stub allows for has_aux
    if values.ndim != 1:
        raise ValueError(f"task_gram: the losses have shape {tuple(values.shape)}; expected one per task, (K,)")
    units = torch.eye(len(values), dtype=values.dtype, device=values.device)  # (K, K)
    gradients = [g.flatten(1) for g in tree.leaves(torch.func.vmap(pull)(units))]  # each (K, entries)
    return sum(g @ g.T for g in gradients)  # (K, K)


def _quotient(dots: Tensor, norms: Tensor) -> Tensor:
    """dots / norms, clamped to [-1, 1] after rounding; 0 where the norm is 0."""
    return torch.where(norms > 0, dots / torch.where(norms > 0, norms, 1.0), 0.0).clamp(-1, 1)
