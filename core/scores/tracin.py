"""TracIn: the influence of training steps on one example on the loss of another.

Pruthi et al. 2020, "Estimating Training Data Influence by Tracing Gradient Descent", arXiv:2002.08484. To first order a
step of gradient descent on example z lowers the loss of z' by η <g_z, g_z'>. The sum over the steps is replaced by one
over checkpoints (TracInCP):

TracIn(z, z') = sum_i η_i <g_z(θ_i), g_z'(θ_i)>

Positive: z helped (a proponent), negative: it harmed (an opponent). In all functions here,

- loss is `loss(params, batch) -> (N,)`, batches are trees with leading axis N, as in `core.per_example.reports`;
- checkpoints is a sequence of parameters θ_i, learning_rates one η_i for each: the learning rate at that checkpoint,
  times the steps that the checkpoint stands for and divided by the batch size to have the scale of the loss.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from core import tree
from core.per_example import each, plan, reports
from core.transforms import grad
from core.tree import Tree

Loss = Callable[[Tree, Tree], Tensor]


def _check(name: str, checkpoints: Sequence[Tree], learning_rates: Sequence[float]) -> None:
    if not len(checkpoints) or len(checkpoints) != len(learning_rates):
        raise ValueError(
            f"{name}: {len(checkpoints)} checkpoints and {len(learning_rates)} learning rates; expected one for each"
        )


def tracin(
    loss: Loss,
    checkpoints: Sequence[Tree],
    learning_rates: Sequence[float],
    train: Tree,
    test: Tree,
    *,
    chunk: int | None = None,
) -> Tensor:
    """TracIn(z, z') of every training example with every test example.

    The gradients of the test examples and of `chunk` training examples are formed at once. `tracin_on_mean`, the
    influence on a mean over test examples, forms none.

    Args:
        chunk: training examples at a time; all if None.

    Returns:
        (training examples, test examples).

    Raises:
        ValueError: not one learning rate for each checkpoint.
        PerExampleError: as in `core.per_example.each`.
    """
    _check("tracin", checkpoints, learning_rates)
    total: Any = 0.0
    for params, rate in zip(checkpoints, learning_rates, strict=True):
        total = total + rate * gradient_products(loss, params, train, test, chunk=chunk)
    return total


def gradient_products(loss: Loss, params: Tree, left: Tree, right: Tree, *, chunk: int | None = None) -> Tensor:
    """<g_n, g_m> for n of one batch and m of another, from gradients that are formed: (left, right).

    Within one batch the Gram matrix of `core.per_example.reports` is cheaper.
    """
    ours = tree.leaves(each(loss, params, right))
    count = tree.leaves(left)[0].shape[0]
    rows = []
    for start in range(0, count, chunk or count):
        part = tree.map(lambda x, start=start: x[start : start + (chunk or count)], left)
        theirs = tree.leaves(each(loss, params, part))
        rows.append(sum(a.flatten(1) @ b.flatten(1).T for a, b in zip(theirs, ours, strict=True)))  # (chunk, N)
    return torch.cat(rows)


def tracin_on_mean(
    loss: Loss, checkpoints: Sequence[Tree], learning_rates: Sequence[float], train: Tree, test: Tree
) -> Tensor:
    """Each training example's TracIn with the mean loss of the test examples (one or many): no gradient is formed.

    Returns:
        (training examples,).

    Raises: as `tracin`, and PerExampleError as in `core.per_example.reports`.
    """
    _check("tracin_on_mean", checkpoints, learning_rates)
    recipe = plan(loss, checkpoints[0], train, ("dot",))
    total: Any = 0.0
    for params, rate in zip(checkpoints, learning_rates, strict=True):
        direction = grad(lambda p: loss(p, test).mean())(params)
        total = total + rate * reports(loss, params, train, ("dot",), direction=direction, plan=recipe).total_dot
    return total


def tracin_self(loss: Loss, checkpoints: Sequence[Tree], learning_rates: Sequence[float], batch: Tree) -> Tensor:
    """Self-influence, TracIn(z, z) = sum_i η_i |g_z(θ_i)|²; mislabelled examples have much (section 4.1 of the paper).

    Returns:
        (N,).

    Raises: as `tracin`, and PerExampleError as in `core.per_example.reports`.
    """
    _check("tracin_self", checkpoints, learning_rates)
    recipe = plan(loss, checkpoints[0], batch)
    total: Any = 0.0
    for params, rate in zip(checkpoints, learning_rates, strict=True):
        total = total + rate * reports(loss, params, batch, plan=recipe).total_norm.square()
    return total
