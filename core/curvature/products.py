"""Products of a vector with the curvature matrices of a loss; the one with its Hessian is `core.transforms.hvp`.

θ are the parameters, z = f(θ) the outputs, J = dz/dθ. Each product costs a few gradients and forms no matrix.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from core import random, tree
from core.curvature.vectors import check_count
from core.transforms import hvp, jvp
from core.tree import Tree


def _transposed(f: Callable, params: Tree, cotangent: Tree) -> Tree:
    """Jᵀ times a tree like the outputs."""
    _, pull_back = torch.func.vjp(f, tree.sort(params))  # type: ignore[misc]  # torch's stub allows for has_aux
    return pull_back(cotangent)[0]


def ggn_vp(outputs: Callable, loss_of_outputs: Callable, params: Tree, direction: Tree) -> Tree:
    """Generalised Gauss-Newton matrix times direction (Schraudolph 2002, "Fast Curvature Matrix-Vector Products"):

    G v = Jᵀ H J v,   H the Hessian of the loss by the outputs

    It is the Hessian of the loss with f replaced by its linearisation, and positive semi-definite for a convex loss.

    Args:
        outputs: `outputs(params) -> z`, a tensor or a tree of them, such as logits.
        loss_of_outputs: `loss_of_outputs(z) -> scalar`.
        direction: as `params`.

    Raises:
        TypeError, ValueError: as `core.transforms.jvp` and `hvp`.
    """
    z, tangent = jvp(outputs, (params,), (direction,))  # J v
    _, curved = hvp(loss_of_outputs, z, tangent)  # H J v
    # hvp sorts the keys; torch's vjp wants the outputs' own order.
    return _transposed(outputs, params, tree.map(lambda _, c: c, z, curved))


def fisher_vp(losses: Callable, params: Tree, direction: Tree, *args) -> Tree:
    """Empirical Fisher matrix, with the labels of the data, times direction: 1/N sum_i g_i (g_iᵀ v).

    g_i is the gradient of example i's loss. It is not an estimate of the Fisher matrix, which takes its labels from the
    model (Kunstner et al. 2019, arXiv:1905.12558): see `sampled_fisher_vp`.

    Args:
        losses: `losses(params, *args) -> (N,)`, one per example, not divided by N.
        direction: as `params`.

    Raises:
        TypeError, ValueError: as `core.transforms.jvp`; losses that are not a vector.
    """

    def each(p: Tree) -> Tensor:
        return losses(p, *args)

    values, slopes = jvp(each, (params,), (direction,))  # slopes: g_iᵀ v, (N,)
    if not isinstance(values, Tensor) or values.ndim != 1:
        kind = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"fisher_vp: the losses have {kind}; expected one per example, (N,)")
    return _transposed(each, params, slopes / len(values))


def sampled_fisher_vp(logits: Callable, params: Tree, direction: Tree, key: Tensor, samples: int = 1) -> Tree:
    """Fisher matrix of a classifier times direction, with labels drawn from its own predictions p = softmax(z):

    F v = 1/N sum_i Jᵢᵀ (1/S sum_s (p - e_y)(p - e_y)ᵀ) Jᵢ v,   y ~ p(· | x_i)

    Its expectation is the exact Fisher matrix, and that the GGN of the mean cross entropy. The same key draws the same
    labels, so that products with one key are products with one matrix.

    Args:
        logits: `logits(params) -> (..., classes)`; every row is a prediction of its own, N rows in all.
        key: (2,).
        samples: labels per row; they cost next to nothing.
    """
    check_count("sampled_fisher_vp", samples=samples)
    z, tangent = jvp(logits, (params,), (direction,))
    if not isinstance(z, Tensor) or z.ndim < 1:
        raise ValueError(f"sampled_fisher_vp: the logits are {type(z).__name__}; expected a tensor (..., classes)")
    p = z.softmax(-1)
    labels = random.categorical(key, z.detach(), shape=(samples, *z.shape[:-1]))  # (samples, ...)
    labels = labels.flatten(1).movedim(0, -1)  # (N, samples)
    flat_p, flat_t = p.flatten(0, -2), tangent.flatten(0, -2)  # each (N, classes)
    # With e_y by gather and scatter nothing is (samples, N, classes).
    slopes = (flat_p * flat_t).sum(-1, keepdim=True) - flat_t.gather(-1, labels)  # (p - e_y)ᵀ J v, (N, samples)
    scattered = torch.zeros_like(flat_p).scatter_add(-1, labels, slopes)
    curved = slopes.sum(-1, keepdim=True) * flat_p - scattered  # sum_s (p - e_y) (p - e_y)ᵀ J v, (N, classes)
    return _transposed(logits, params, curved.reshape(z.shape) / (samples * len(flat_p)))
