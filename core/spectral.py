"""Spectral normalisation as a function from a parameter tree to a parameter tree.

    W / sigma(W),   sigma(W) = u^T W v                  Miyato et al. 2018, arXiv:1802.05957, eq. 8 and algorithm 1

u and v approach the first singular vectors of W by one step of power iteration a training step:

    u <- W v / |W v|,   v <- W^T u / |W^T u|

They are explicit state, a tree beside the parameters. A weight of more than two axes is read as the matrix (first axis,
all others); for a transposed convolution, whose first axis are its inputs, that is another matrix than torch's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from core import random, tree
from core.spec import name_hash
from core.tree import Tree

EPS = 1e-12


def is_matrix(name: str, leaf: Any) -> bool:
    """Whether a leaf has two axes or more: every weight of a linear layer, convolution or embedding."""
    return len(leaf.shape) >= 2


def spectral_vectors(
    key: Tensor, params: Tree, select: Callable[[str, Any], bool] = is_matrix, *, steps: int = 15
) -> Tree:
    """The state that `spectral_norm` begins with.

    Args:
        key: (2,); each leaf draws from `fold_in(key, hash of its name)`.
        params: tensors.
        select: (name, leaf) -> whether to normalise that leaf.
        steps: of power iteration from random vectors.

    Returns:
        `{"u": (rows,), "v": (columns,)}` in the place of each selected leaf, without the others (`tree.partition`).

    Raises:
        ValueError: a selected leaf has fewer than two axes, or none is selected.
    """
    chosen, _ = tree.partition(params, select)
    if not tree.leaves(chosen):
        raise ValueError("spectral_vectors: no leaf is selected")

    def start(name: str, weight: Tensor) -> dict[str, Tensor]:
        if weight.ndim < 2:
            raise ValueError(f"spectral_vectors: '{name}' has shape {tuple(weight.shape)}; expected two axes or more")
        matrix, own = weight.detach().flatten(1), random.fold_in(key, name_hash(name))
        v = F.normalize(random.normal(own, matrix.shape[1:], matrix.dtype), dim=0, eps=EPS)
        # Without a step u would be missing.
        return _iterate(matrix, v, v, max(steps, 1))

    return tree.sort(tree.map_with_names(start, chosen))


def spectral_norm(params: Tree, vectors: Tree, *, steps: int = 1) -> tuple[Tree, Tree]:
    """(params with every weight that has vectors divided by its spectral norm, the vectors after `steps` steps).

    The vectors are constants to the gradient, which goes through W and sigma alone.

    Args:
        steps: of power iteration before the division; 0 keeps the vectors, as for evaluation.

    Raises:
        ValueError: vectors for a leaf that the parameters lack, or that has another shape; it is named.
    """
    state = dict(tree.items(vectors))
    weights = dict(tree.items(params))
    updated = {}
    for name in [name.removesuffix(".u") for name in state if name.endswith(".u")]:
        pair = {part: state[f"{name}.{part}"].detach() for part in ("u", "v")}
        if name not in weights:
            raise ValueError(f"spectral_norm: there are vectors for '{name}', which the parameters lack")
        matrix, shapes = weights[name].flatten(1), (pair["u"].shape[0], pair["v"].shape[0])
        if tuple(matrix.shape) != shapes:
            found = tuple(weights[name].shape)
            raise ValueError(f"spectral_norm: '{name}' has shape {found}, its vectors are for {shapes}")
        pair = _iterate(matrix.detach(), **pair, steps=steps)
        updated |= {f"{name}.{part}": vector for part, vector in pair.items()}
        # sigma = u^T W v
        sigma = torch.dot(pair["u"], torch.mv(matrix, pair["v"]))
        weights[name] = weights[name] / sigma
    return tree.unflatten(params, list(weights.values())), tree.unflatten(vectors, [updated[name] for name in state])


def _iterate(matrix: Tensor, u: Tensor, v: Tensor, steps: int) -> dict[str, Tensor]:
    for _ in range(steps):
        u = F.normalize(torch.mv(matrix, v), dim=0, eps=EPS)
        v = F.normalize(torch.mv(matrix.mT, u), dim=0, eps=EPS)
    return {"u": u, "v": v}
