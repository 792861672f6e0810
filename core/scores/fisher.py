"""The diagonal of the Fisher information matrix, from squares of per-example gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from core import random, tree
from core.per_example import plan, reports
from core.scores.checks import check_logits
from core.tree import Tree


def empirical_fisher_diagonal(loss: Callable[[Tree, Tree], Tensor], params: Tree, batch: Tree) -> Tree:
    """1/N sum_n g_n², entry by entry: that of the given labels, `Reports.second_moment`.

    It is no estimate of the Fisher matrix, which takes its labels from the model (Kunstner et al. 2019,
    arXiv:1905.12558): see `fisher_diagonal`.

    Args:
        loss, params, batch: as in `core.per_example.reports`.

    Returns:
        like the parameters.

    Raises:
        PerExampleError: as in `reports`.
    """
    return reports(loss, params, batch, ("square",)).second_moment


def fisher_diagonal(
    logits: Callable[[Tree, Tree], Tensor], params: Tree, x: Tree, key: Tensor | None = None, samples: int = 1
) -> Tree:
    """The diagonal of a classifier's Fisher matrix, entry by entry:

    F_ii = 1/N sum_n E_y (d log p(y | x_n) / dθ_i)²,   y ~ p(· | x_n) = softmax(z_n)

    The weights of elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796).

    Args:
        logits: `logits(params, x) -> (N, classes)`; no example may change another's.
        x: a tensor or a tree of them with leading axis N.
        key: (2,), to sample `samples` labels per example, one pass each. None takes the expectation over all
            classes exactly, one pass per class.

    Returns:
        like the parameters.

    Raises:
        ValueError: logits of another shape, fewer than one sample.
        PerExampleError: as in `core.per_example.reports`.
    """
    if samples < 1:
        raise ValueError(f"fisher_diagonal: samples is {samples}; expected at least 1")
    z = logits(params, x)
    check_logits("fisher_diagonal", z)
    z = z.detach()
    if key is None:
        labels = torch.arange(z.shape[1], device=z.device)[:, None].expand(-1, len(z))
        scales = z.softmax(1).sqrt().T  # (sqrt(p) g)² = p g²
    else:
        labels = random.categorical(key, z, shape=(samples, len(z)))
        scales = torch.full_like(z[:, 0], samples**-0.5).expand(samples, -1)

    def scaled(p: Tree, batch: tuple) -> Tensor:
        inputs, label, scale = batch
        return -scale * logits(p, inputs).log_softmax(1).gather(1, label[:, None])[:, 0]

    recipe, total = plan(scaled, params, (x, labels[0], scales[0]), ("square",)), None
    for label, scale in zip(labels, scales, strict=True):
        moment = reports(scaled, params, (x, label, scale), ("square",), plan=recipe).second_moment
        total = moment if total is None else tree.map(torch.add, total, moment)
    return total
