"""Products of a vector with the curvature matrices of a loss; that with its Hessian is `core.transforms.hvp`.

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
    _, pull_back = torch.func.vjp(f, tree.sort(params))
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
    z, tangent = jvp(outputs, (params,), (direction,))
    _, curved = hvp(loss_of_outputs, z, tangent)
    # hvp sorts the keys; torch's vjp wants the outputs' own order.
    return _transposed(outputs, params, tree.map(lambda _, c: c, z, curved))


def fisher_vp(losses: Callable, params: Tree, direction: Tree, *args) -> Tree:
    """Empirical Fisher matrix, that of the given labels, times direction: 1/N sum_i g_i (g_iᵀ v).

    g_i is the gradient of example i's loss. It is no estimate of the Fisher matrix, which takes its labels from the
    model (Kunstner et al. 2019, arXiv:1905.12558): see `sampled_fisher_vp`.

    Args:
        losses: `losses(params, *args) -> (N,)`, one an example, not divided by N.
        direction: as `params`.

    Raises:
        TypeError, ValueError: as `core.transforms.jvp`; losses that are no vector.
    """

    def each(p: Tree) -> Tensor:
        return losses(p, *args)

    values, slopes = jvp(each, (params,), (direction,))
    if not isinstance(values, Tensor) or values.ndim != 1:
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"fisher_vp: the losses have {found}; expected one an example, (N,)")
    return _transposed(each, params, slopes / len(values))


def sampled_fisher_vp(logits: Callable, params: Tree, direction: Tree, key: Tensor, samples: int = 1) -> Tree:
    """Fisher matrix of a classifier times direction, with labels drawn from its own predictions p = softmax(z):

    F v = 1/N sum_i Jᵢᵀ (1/S sum_s (p - e_y)(p - e_y)ᵀ) Jᵢ v,   y ~ p(· | x_i)

    Its expectation is the exact Fisher matrix, and that the GGN of the mean cross entropy. The same key draws the same
    labels, so that products with one key are products with one matrix.

    Args:
        logits: `logits(params) -> (..., classes)`; every row is a prediction of its own, N rows in all.
        key: (2,).
        samples: labels a row; they cost next to nothing.
    """
    check_count("sampled_fisher_vp", samples=samples)
    z, tangent = jvp(logits, (params,), (direction,))
    if not isinstance(z, Tensor) or z.ndim < 1:
        raise ValueError(f"sampled_fisher_vp: the logits are {type(z).__name__}; expected a tensor (..., classes)")
    p = z.softmax(-1)
    labels = random.categorical(key, z.detach(), shape=(samples, *z.shape[:-1]))
    # sum_c (p - e_y)_c t_c, and Σ_s (p - e_y) w_s with e_y as a scatter: nothing is (samples, ..., classes).
    rows = labels.flatten(1).movedim(0, -1)  # (rows, samples)
    flat_p, flat_t = p.flatten(0, -2), tangent.flatten(0, -2)
    slopes = (flat_p * flat_t).sum(-1, keepdim=True) - flat_t.gather(-1, rows)
    curved = slopes.sum(-1, keepdim=True) * flat_p - torch.zeros_like(flat_p).scatter_add(-1, rows, slopes)
    return _transposed(logits, params, curved.reshape(z.shape) / (samples * len(flat_p)))
