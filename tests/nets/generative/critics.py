"""What every critic must allow: a gradient inside a gradient."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from core import tree

Critic = Callable[[tree.Tree, Tensor], Tensor]
"""(params, x) -> scores with the batch leading; each score from its own example."""


def penalties(critic: Critic, params: tree.Tree, x: Tensor) -> Tensor:
    """(|∇_x critic(x)| - 1)^2 of each example, (batch,): the gradient penalty at x."""
    slopes = grad(lambda x: critic(params, x).sum())(x)
    return (slopes.flatten(1).norm(dim=1) - 1).square()


def check_penalty(critic: Critic, params: tree.Tree, x: Tensor, compile: bool = True) -> None:
    """Values and gradient equal those of torch.autograd, and of one example at a time; compiled, in one graph."""
    step = grad(lambda params: penalties(critic, params, x).mean())
    values, gradient = penalties(critic, params, x), step(params)

    leaves = [leaf.clone().requires_grad_() for leaf in tree.leaves(params)]
    inputs = x.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(critic(tree.unflatten(params, leaves), inputs).sum(), inputs, create_graph=True)
    expected = (slopes.flatten(1).norm(dim=1) - 1).square()
    torch.testing.assert_close(values, expected.detach())
    wanted = torch.autograd.grad(expected.mean(), leaves, allow_unused=True)
    for (name, found), g in zip(tree.items(gradient), wanted, strict=True):
        torch.testing.assert_close(
            found, torch.zeros_like(found) if g is None else g, msg=lambda m, n=name: f"{n}: {m}"
        )

    one_by_one = torch.cat([penalties(critic, params, x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(values, one_by_one)
    each = vmap(grad(lambda p, x: penalties(critic, p, x[None]).sum()), (None, 0))(params, x)
    for (name, found), g in zip(tree.items(each), tree.leaves(gradient), strict=True):
        torch.testing.assert_close(found.mean(0), g, msg=lambda m, n=name: f"{n}: {m}")

    if compile:
        torch._dynamo.reset()
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)(params)
        for (name, found), g in zip(tree.items(compiled), tree.leaves(gradient), strict=True):
            torch.testing.assert_close(found, g, msg=lambda m, n=name: f"{n}: {m}")
        torch._dynamo.reset()
