"""Spectral normalisation as a function from a parameter tree to a parameter tree.

    W / σ(W),   σ(W) = uᵀ W v                           Miyato et al. 2018, arXiv:1802.05957, eq. 8 and algorithm 1

u and v approach the first singular vectors of W by one step of power iteration per training step:

    u ← W v / |W v|,   v ← Wᵀ u / |Wᵀ u|

They are explicit state, a tree beside the parameters. A weight of more than two axes is read as the matrix (first axis,
all others); for a transposed convolution, whose first axis are its inputs, that is another matrix than torch's. The
scale of W does not matter, and W = 0, whose σ is 0, stays 0.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from core import random, tree
from core.spec import name_hash
from core.tree import Tree


def is_matrix(name: str, leaf: Any) -> bool:
    """True for a leaf of two axes or more: every weight of a linear layer, convolution or embedding."""
    return len(leaf.shape) >= 2


def spectral_vectors(
    key: Tensor, params: Tree, select: Callable[[str, Any], bool] = is_matrix, *, steps: int = 15
) -> Tree:
    """The initial state of `spectral_norm`.

    Args:
        key: (2,); each leaf draws from `fold_in(key, hash of its name)`.
        params: tensors.
        select: (name, leaf) -> whether to normalise that leaf.
        steps: steps of power iteration from random vectors.

    Returns:
        `{"u": (rows,), "v": (columns,)}` in place of each selected leaf, without the others (`tree.partition`).

    Raises:
        ValueError: a selected leaf has fewer than two axes, or none is selected.
    """
    weights, _ = tree.partition(params, select)
    if not tree.leaves(weights):
        raise ValueError("spectral_vectors: no leaf is selected")

    def start(name: str, weight: Tensor) -> dict[str, Tensor]:
        if weight.ndim < 2:
            raise ValueError(f"spectral_vectors: '{name}' has shape {tuple(weight.shape)}; expected two axes or more")
        matrix, own = weight.detach().flatten(1), random.fold_in(key, name_hash(name))  # (rows, columns)
        v = random.normal(own, matrix.shape[1:], matrix.dtype)
        # At least one step, for u; where W v is zero it is (1, ..., 1) / sqrt(rows).
        u = torch.ones_like(matrix[:, 0])
        return _iterate(matrix, _normalised(u, u), _normalised(v, v), max(steps, 1))

    return tree.sort(tree.map_with_names(start, weights))


def spectral_norm(params: Tree, vectors: Tree, *, steps: int = 1) -> tuple[Tree, Tree]:
    """(params with every weight that has vectors divided by its spectral norm, the vectors after `steps` steps).

    The vectors are constants of the gradient, which goes through W and σ alone.

    Args:
        steps: steps of power iteration before the division; 0 keeps the vectors, as for evaluation.

    Raises:
        ValueError: vectors for a leaf that the parameters lack, or that has another shape; it is named.
    """
    state = dict(tree.items(vectors))
    weights = dict(tree.items(params))
    updated: dict[str, Tensor] = {}
    for name in [name.removesuffix(".u") for name in state if name.endswith(".u")]:
        pair = {part: state[f"{name}.{part}"].detach() for part in ("u", "v")}
        if name not in weights:
            raise ValueError(f"spectral_norm: there are vectors for '{name}', which the parameters lack")
        matrix, shapes = weights[name].flatten(1), (pair["u"].shape[0], pair["v"].shape[0])  # (rows, columns)
        if tuple(matrix.shape) != shapes:
            shape = tuple(weights[name].shape)
            raise ValueError(f"spectral_norm: '{name}' has shape {shape}, its vectors are for {shapes}")
        # Under mixed precision the weights are in half, the vectors are not.
        matrix = matrix.to(torch.promote_types(matrix.dtype, pair["u"].dtype))
        pair = _iterate(matrix.detach(), **pair, steps=steps)
        updated |= {f"{name}.{part}": vector for part, vector in pair.items()}
        sigma = torch.dot(pair["u"], torch.mv(matrix, pair["v"]))  # σ = uᵀ W v
        weights[name] = weights[name] / torch.where(sigma == 0, 1, sigma)
    return tree.unflatten(params, list(weights.values())), tree.unflatten(vectors, [updated[name] for name in state])


def _iterate(matrix: Tensor, u: Tensor, v: Tensor, steps: int) -> dict[str, Tensor]:
    for _ in range(steps):
        u = _normalised(torch.mv(matrix, v), u)  # u ← W v / |W v|
        v = _normalised(torch.mv(matrix.mT, u), v)  # v ← Wᵀ u / |Wᵀ u|
    return {"u": u, "v": v}


def _normalised(x: Tensor, old: Tensor) -> Tensor:
    """x / |x|; `old` where x is zero, since a zero vector would stay zero for ever."""
    norm = tree.norm(x)
    return torch.where(norm == 0, old, x / torch.where(norm == 0, 1, norm)).to(x.dtype)
