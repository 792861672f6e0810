"""Per-example gradients by vmap(grad), and the comparison of `reports` with plain gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from core import tree
from core.per_example.arguments import batch_size, check_losses, check_params, sort
from core.per_example.custom_functions import check_while_compiling
from core.per_example.errors import PerExampleError
from core.per_example.reports import reports
from core.tree import Tree


def alone(loss: Callable, params: Tree, example: Tree) -> Tensor:
    """The loss of one example without its batch axis, as a batch of one; 0-D."""
    losses = loss(params, tree.map(lambda x: x.unsqueeze(0), example))  # (1,)
    check_losses(losses, 1)
    return losses[0]


def each(loss: Callable[[Tree, Tree], Tensor], params: Tree, batch: Tree, *, chunk: int | None = None) -> Tree:
    """The gradient of every example, like the parameters with a leading axis N: vmap(grad) over batches of one.

    For any loss that vmaps, also one with a gradient inside, a lifted module, or weights without a rule.

    Args:
        loss, params, batch: as in `reports`.
        chunk: examples at a time; bounds the memory of the passes, not of the result.

    Raises:
        PerExampleError: the loss of a batch of one is not (1,); the leaves of the batch disagree; or while compiling,
            the loss calls a custom autograd.Function.
    """
    params, batch = sort("the parameters", params), sort("the batch", batch)
    check_params(params)
    batch_size(batch)
    check_while_compiling(loss, params, batch)

    # As lists: torch.func takes None for a leaf.
    def of_one(leaves: list[Tensor], example: list[Tensor]) -> Tensor:
        return alone(loss, tree.unflatten(params, leaves), tree.unflatten(batch, example))

    gradients = torch.func.vmap(torch.func.grad(of_one), (None, 0), chunk_size=chunk)
    return tree.unflatten(params, gradients(tree.leaves(params), tree.leaves(batch)))


def verify(
    loss: Callable[[Tree, Tree], Tensor],
    params: Tree,
    batch: Tree,
    *,
    tolerance: float | None = None,
    examples: int | None = None,
    compiled: bool = False,
) -> float:
    """Compare `reports` with plain gradients of batches of one: the only way to see a loss that mixes its examples.

    Args:
        loss, params, batch: as in `reports`.
        tolerance: of errors relative to the example's total norm; by default 1e-10 in float64 and 1e-3 in float32.
        examples: number of examples to compare, from the first; they still come in one batch.
        compiled: compile `reports` (backend "aot_eager": Dynamo's and AOTAutograd's graph, without code generation).

    Returns:
        the largest error of a parameter's norm, relative to the example's total norm.

    Raises:
        PerExampleError: the error is above the tolerance, an example's loss differs, or the sum of the gradients; it
            names the parameter.
    """
    params, batch = sort("the parameters", params), sort("the batch", batch)

    report = reports
    if compiled:
        report = torch.compile(reports, backend="aot_eager", fullgraph=True, dynamic=False)
    out, count = report(loss, params, batch), batch_size(batch)
    if tolerance is None:
        tolerance = 1e-10 if all(x.dtype == torch.float64 for x in tree.leaves(params)) else 1e-3
    causes = "takes the parameter past its rule, changes from call to call"
    causes += " or calls a custom autograd.Function, whose backward is dropped" if compiled else ""

    def gradient_and_loss(f: Callable[..., Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        leaves, value = torch.func.grad_and_value(lambda leaves: f(tree.unflatten(params, leaves)))(tree.leaves(params))
        return dict(zip(tree.names(params), leaves, strict=True)), value

    def differ(a: Tensor, b: Tensor) -> bool:
        return not torch.allclose(a, b, rtol=max(tolerance, 1e-9), atol=tolerance)

    losses = loss(params, batch).detach()
    worst = 0.0
    for i in range(count if examples is None else min(examples, count)):
        example = tree.map(lambda x, i=i: x[i], batch)
        gradients, value = gradient_and_loss(lambda p, x=example: alone(loss, p, x))
        if differ(value, losses[i]):
            raise PerExampleError(
                f"the loss mixes its examples: that of example {i} is {float(losses[i]):g} in the batch, "
                f"{float(value):g} alone (or it changes from call to call)"
            )
        if differ(losses[i], out.losses[i]):
            raise PerExampleError(
                f"the loss of example {i} is {float(losses[i]):g}, reported {float(out.losses[i]):g}: it asks for the "
                f"type of a parameter, {causes}"
            )
        total = tree.norm(gradients)
        if not torch.isfinite(total):
            raise PerExampleError(f"the gradient of example {i} is not finite")
        for (name, g), norm in zip(gradients.items(), tree.leaves(out.norm), strict=True):
            error = float((torch.linalg.vector_norm(g) - norm[i]).abs() / total) if total > 0 else float(norm[i])
            worst = max(worst, error)
            if not error <= tolerance:
                raise PerExampleError(
                    f"'{name}': the norm of example {i} is off by {error:.1e} of its total norm; the loss mixes its "
                    f"examples, {causes}"
                )
    gradients, _ = gradient_and_loss(lambda p: loss(p, batch).sum())
    scale = float(out.total_norm.sum())
    for (name, g), total in zip(gradients.items(), tree.leaves(out.sum), strict=True):
        error = (
            float(torch.linalg.vector_norm(g - total)) / scale if scale > 0 else float(torch.linalg.vector_norm(total))
        )
        if not error <= tolerance:
            raise PerExampleError(
                f"'{name}': the sum of the gradients is off by {error:.1e} of the sum of the norms; the loss {causes}"
            )
    return worst
