"""Law of critics: the gradient of a gradient penalty exists, equals torch.autograd's and compiles."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from core import tree

Critic = Callable[[tree.Tree, Tensor], Tensor]
"""(params, x) -> scores with the batch leading; each score from its own example."""


def penalties(critic: Critic, params: tree.Tree, x: Tensor) -> Tensor:
    """Gradient penalty at x, (|∇_x critic(x)| - 1)^2 per example, (batch,)."""
    slopes = grad(lambda x: critic(params, x).sum())(x)
    return (slopes.flatten(1).norm(dim=1) - 1).square()


def check_penalty(critic: Critic, params: tree.Tree, x: Tensor, compile: bool = True) -> None:
    """Check values and gradient against torch.autograd and one example at a time; compiled, in one graph."""
    step = grad(lambda params: penalties(critic, params, x).mean())
    values, gradient = penalties(critic, params, x), step(params)

    leaves = [leaf.clone().requires_grad_() for leaf in tree.leaves(params)]
    inputs = x.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(critic(tree.unflatten(params, leaves), inputs).sum(), inputs, create_graph=True)
    expected = (slopes.flatten(1).norm(dim=1) - 1).square()
    torch.testing.assert_close(values, expected.detach())
    gradients = torch.autograd.grad(expected.mean(), leaves, allow_unused=True)
    for (name, actual), g in zip(tree.items(gradient), gradients, strict=True):
        torch.testing.assert_close(
            actual, torch.zeros_like(actual) if g is None else g, msg=lambda m, n=name: f"{n}: {m}"
        )

    one_by_one = torch.cat([penalties(critic, params, x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(values, one_by_one)
    each = vmap(grad(lambda p, x: penalties(critic, p, x[None]).sum()), (None, 0))(params, x)
    for (name, actual), g in zip(tree.items(each), tree.leaves(gradient), strict=True):
        torch.testing.assert_close(actual.mean(0), g, msg=lambda m, n=name: f"{n}: {m}")

    if compile:
        torch._dynamo.reset()
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)(params)
        for (name, actual), g in zip(tree.items(compiled), tree.leaves(gradient), strict=True):
            torch.testing.assert_close(actual, g, msg=lambda m, n=name: f"{n}: {m}")
        torch._dynamo.reset()
