"""Regularisers of critics: penalties on the gradient of the score with respect to the input, and weight clipping.

    penalty = REGULARISERS["gradient-penalty"](lambda x: critic(params, x, cfg), real, fake, key)

Each is `f(critic, real, fake, key, *, weight=..., reduction="mean") -> scalar`, to be added to the critic's loss, or
with `reduction="none"` (batch,), one value per example. `critic(x)` maps (batch, ...) to scores (batch,) or, of a patch
critic, (batch, 1, height, width), the score of an example then being the mean of its patches.

The inner gradient is `torch.func`'s, of the sum of the scores: one backward pass, right as long as the critic does not
mix the examples of a batch (batch norm does; so do minibatch statistics, and the papers that use them accept that).
Differentiating the penalty once more and compiling the whole step are `torch.func.grad` and `torch.compile` around it.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from core import random, tree
from core.tree import Tree

Critic = Callable[[Tensor], Tensor]


def input_gradient(critic: Critic, x: Tensor) -> tuple[Tensor, Tensor]:
    """(scores (batch,), gradients of each with respect to its example, like x)."""

    def scores(x: Tensor) -> Tensor:
        out = critic(x)
        if out.ndim == 0 or out.shape[0] != x.shape[0]:
            count, shape = x.shape[0], tuple(out.shape)
            raise ValueError(f"the critic's scores of {count} examples have shape {shape}; expected one per example")
        return out.flatten(1).mean(1) if out.ndim > 1 else out  # (batch,)

    values, pull_back = torch.func.vjp(scores, x)
    return values, pull_back(torch.ones_like(values))[0]


def interpolate(key: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """u x + (1 - u) y with one u per example, uniform in [0, 1)."""
    if real.shape != fake.shape:
        raise ValueError(f"real and fake examples must have one shape, got {tuple(real.shape)} and {tuple(fake.shape)}")
    u = random.uniform(key, (len(real),) + (1,) * (real.ndim - 1), dtype=real.dtype)
    return fake + u * (real - fake)  # u x + (1 - u) y


def _rows(gradients: Tensor) -> Tensor:
    return gradients.flatten(1).to(torch.promote_types(gradients.dtype, torch.float32))  # (batch, dimensions)


def _norms(gradients: Tensor) -> Tensor:
    # Its derivative at a gradient of exactly 0 (a dead critic) is 0, where that of sqrt(sum of squares) is nan.
    return torch.linalg.vector_norm(_rows(gradients), dim=1)


def _squares(gradients: Tensor) -> Tensor:
    return _rows(gradients).square().sum(1)


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    return values.mean() if reduction == "mean" else values


def gradient_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    key: Tensor,
    *,
    weight: float = 10.0,
    target: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """lambda (|grad C(z)| - 1)^2 at z between real and fake (Gulrajani et al. 2017, arXiv:1704.00028, eq. 3).

    Args:
        weight: lambda.
        target: norm that costs nothing; 0 is that of Thanh-Tung et al. 2019 (arXiv:1902.03984).
    """
    gradients = input_gradient(critic, interpolate(key, real, fake))[1]
    return _reduce(weight * (_norms(gradients) - target).square(), reduction)  # lambda (|grad C(z)| - 1)^2


def dragan(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    key: Tensor,
    *,
    weight: float = 10.0,
    target: float = 1.0,
    spread: float = 0.5,
    reduction: str = "mean",
) -> Tensor:
    """lambda (|grad C(x + d)| - 1)^2 near the real examples alone (Kodali et al. 2017, arXiv:1705.07215).

    The noise is that of the authors' program, not the paper's Gaussian: d = u spread std(real) v, with v uniform in
    [0, 1) for each number and u for each example. `fake` is not used.
    """
    keys = random.sites(key, 2)
    v = random.uniform(keys[0], real.shape, dtype=real.dtype)
    near = interpolate(keys[1], real + spread * real.std() * v, real)  # x + u spread std(x) v
    gradients = input_gradient(critic, near)[1]
    return _reduce(weight * (_norms(gradients) - target).square(), reduction)  # lambda (|grad C(x + d)| - 1)^2


def r1(
    critic: Critic, real: Tensor, fake: Tensor, key: Tensor, *, weight: float = 10.0, reduction: str = "mean"
) -> Tensor:
    """gamma / 2 |grad C(x)|^2 at the real examples (Mescheder et al. 2018, arXiv:1801.04406, eq. 9).

    Args:
        weight: gamma. `fake` and `key` are not used.
    """
    return _reduce(0.5 * weight * _squares(input_gradient(critic, real)[1]), reduction)  # gamma / 2 |grad C(x)|^2


def r2(
    critic: Critic, real: Tensor, fake: Tensor, key: Tensor, *, weight: float = 10.0, reduction: str = "mean"
) -> Tensor:
    """gamma / 2 |grad C(y)|^2 at the generated examples (eq. 10 there). `real` and `key` are not used."""
    return _reduce(0.5 * weight * _squares(input_gradient(critic, fake)[1]), reduction)  # gamma / 2 |grad C(y)|^2


def wgan_div(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    key: Tensor,
    *,
    weight: float = 2.0,
    power: float = 6.0,
    reduction: str = "mean",
) -> Tensor:
    """k |grad C(z)|^p at z between real and fake (Wu et al. 2018, arXiv:1712.01026), k = 2 and p = 6."""
    gradients = input_gradient(critic, interpolate(key, real, fake))[1]
    return _reduce(weight * _squares(gradients) ** (power / 2), reduction)  # k |grad C(z)|^p


REGULARISERS = {
    "gradient-penalty": gradient_penalty,
    "dragan": dragan,
    "r1": r1,
    "r2": r2,
    "wgan-div": wgan_div,
}


def weight_of(name: str) -> float:
    """The weight that a regulariser has by default, which is its paper's."""
    return inspect.signature(REGULARISERS[name]).parameters["weight"].default


def clip(params: Tree, limit: float = 0.01) -> Tree:
    """Every parameter clamped to [-limit, limit], after each step of the critic.

    WGAN's (Arjovsky et al. 2017, arXiv:1701.07875, alg. 1).
    """
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    return tree.map(lambda x: x.clamp(-limit, limit), params)
