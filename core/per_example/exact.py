"""Every example's gradient itself, by vmap(grad), and `reports` held against plain gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from core import tree
from core.per_example import plan as planning
from core.per_example.errors import PerExampleError
from core.per_example.plan import check_losses, check_params
from core.per_example.reports import reports
from core.tree import Tree


def alone(loss: Callable, params: Tree, example: Tree) -> Tensor:
    """The loss of one example without its batch axis, as a batch of one; 0-D."""
    losses = loss(params, tree.map(lambda x: x.unsqueeze(0), example))
    check_losses(losses, 1)
    return losses[0]


def each(loss: Callable[[Tree, Tree], Tensor], params: Tree, batch: Tree, *, chunk: int | None = None) -> Tree:
    """Every example's gradient, like the parameters with a leading axis N: vmap(grad) over batches of one.

    For any loss that vmaps, also one with a gradient inside, a lifted module, or weights without a rule.

    Args:
        loss, params, batch: as in `reports`.
        chunk: how many examples at a time; bounds what the passes hold, not the result.

    Raises:
        PerExampleError: the loss of a batch of one is not (1,); or the leaves of the batch disagree.
    """
    params, batch = tree.sort(params), tree.sort(batch)
    check_params(params)
    planning.examples(batch)
    gradient = torch.func.grad(lambda params, example: alone(loss, params, example))
    return torch.func.vmap(gradient, (None, 0), chunk_size=chunk)(params, batch)


def verify(
    loss: Callable[[Tree, Tree], Tensor],
    params: Tree,
    batch: Tree,
    *,
    tolerance: float | None = None,
    examples: int | None = None,
) -> float:
    """Hold `reports` against plain gradients of batches of one: the only way to see a loss that mixes its examples.

    Args:
        loss, params, batch: as in `reports`.
        tolerance: of errors relative to the example's total norm; by default 1e-10 in float64 and 1e-3 in float32.
        examples: only look at the first so many; they still come in one batch.

    Returns:
        the largest error of a parameter's norm, relative to the example's total norm.

    Raises:
        PerExampleError: the error is above the tolerance, or an example's loss differs; it names the parameter.
    """
    params, batch = tree.sort(params), tree.sort(batch)
    found = reports(loss, params, batch)
    count = planning.examples(batch)
    if tolerance is None:
        tolerance = 1e-10 if all(x.dtype == torch.float64 for x in tree.leaves(params)) else 1e-3
    losses = loss(params, batch)
    worst = 0.0
    for i in range(count if examples is None else min(examples, count)):
        example = tree.map(lambda x, i=i: x[i], batch)
        gradient, value = torch.func.grad_and_value(lambda p, x: alone(loss, p, x))(params, example)
        for together in (found.losses[i], losses[i]):
            if not torch.allclose(value, together, rtol=max(tolerance, 1e-9), atol=tolerance):
                raise PerExampleError(
                    f"the loss mixes its examples: that of example {i} is {float(together):g} in the batch, "
                    f"{float(value):g} alone"
                )
        total = tree.norm(gradient)
        if not torch.isfinite(total):
            raise PerExampleError(f"the gradient of example {i} is not finite")
        for (name, g), norm in zip(tree.items(gradient), tree.leaves(found.norm), strict=True):
            error = float((torch.linalg.vector_norm(g) - norm[i]).abs() / total) if total > 0 else float(norm[i])
            worst = max(worst, error)
            if not error <= tolerance:
                raise PerExampleError(
                    f"'{name}': the norm of example {i} is off by {error:.1e} of its total norm; the loss mixes its "
                    "examples, or takes the parameter past its rule"
                )
    return worst
