"""The empirical neural tangent kernel: the effect of a step on one example on the outputs of another.

Jacot et al. 2018, "Neural Tangent Kernel: Convergence and Generalization in Neural Networks", arXiv:1806.07572:

K(x, y) = J(x) J(y)ᵀ,   J(x) = d f(x) / dθ of shape (C, parameters)

In all functions outputs is `outputs(params, x) -> (N, C)`, in which no example changes another's, and x is a tensor or
a tree of them with leading axis N.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from core import tree
from core.per_example import reports
from core.tree import Tree

Outputs = Callable[[Tree, Tree], Tensor]


def empirical_ntk(outputs: Outputs, params: Tree, x: Tree, y: Tree = None, *, chunk: int | None = None) -> Tensor:
    """K(x_n, y_m) of all pairs, (N, M, C, C), by contracting their Jacobians parameter by parameter.

    The Jacobians are formed, N x C x parameters numbers for x and M x C x parameters for y; of the ways of Novak et al.
    2022 (arXiv:2206.08720) this takes the fewest operations where layers are used once. `ntk_trace` forms nothing.

    Args:
        y: the other examples; x itself if None.
        chunk: examples whose backward passes run at once.

    Raises:
        ValueError: the outputs of an example are no vector.
    """

    def jacobian(batch: Tree) -> list[Tensor]:
        def one(p: Tree, example: Tree) -> Tensor:
            out = outputs(p, tree.map(lambda leaf: leaf.unsqueeze(0), example))
            _check("empirical_ntk", out, 1)
            return out[0]

        jacobians = torch.func.vmap(torch.func.jacrev(one), (None, 0), chunk_size=chunk)(tree.sort(params), batch)
        return [leaf.flatten(2) for leaf in tree.leaves(jacobians)]  # each (N, C, entries)

    left = jacobian(x)
    right = left if y is None else jacobian(y)
    products = [torch.einsum("ncp,mdp->nmcd", a, b) for a, b in zip(left, right, strict=True)]
    return sum(products)  # type: ignore[return-value]  # (N, M, C, C); not 0: there are leaves


def ntk_trace(outputs: Outputs, params: Tree, x: Tree) -> Tensor:
    """tr K(x_n, x_m) = sum_c <d f_c(x_n), d f_c(x_m)>, (N, N): one Gram matrix per output, no Jacobian is formed.

    Raises:
        ValueError: outputs that are not (N, C).
        PerExampleError: as in `core.per_example.reports`.
    """

    def gram(c: int) -> Tensor:
        return reports(lambda p, b: outputs(p, b)[:, c], params, x, ("gram",)).total_gram

    classes = _classes("ntk_trace", outputs, params, x)
    return sum(gram(c) for c in range(classes))  # type: ignore[return-value]  # not 0: there are classes


def pseudo_ntk(outputs: Outputs, params: Tree, x: Tree) -> Tensor:
    """The kernel of the summed outputs, sum_c,d K_cd(x_n, x_m) / C, (N, N): one Gram matrix.

    Mohamadi et al. 2023, "A Fast, Well-Founded Approximation to the Empirical Neural Tangent Kernel",
    arXiv:2206.12543: as layers get wider, K(x, y) approaches this number times the identity.

    Raises: as `ntk_trace`.
    """
    classes = _classes("pseudo_ntk", outputs, params, x)
    return reports(lambda p, b: outputs(p, b).sum(1), params, x, ("gram",)).total_gram / classes


def _check(name: str, out: Tensor, count: int) -> None:
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != count:
        kind = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{name}: the outputs have {kind}; expected ({count}, C)")


def _classes(name: str, outputs: Outputs, params: Tree, x: Tree) -> int:
    """The number of outputs, from one example."""
    out = outputs(params, tree.map(lambda leaf: leaf[:1], x))
    _check(name, out, 1)
    return out.shape[1]
