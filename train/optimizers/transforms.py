"""The pieces that optimizers are chained from. Each keeps its state in a NamedTuple, or `()` if it has none.

Moments are kept in the parameter's dtype, as optax does, or in `moment_dtype`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import tree
from core.tree import Tree
from train.optimizers.protocol import Optimizer, Predicate, Schedule, require, zero_count, zeros_like


class CountState(NamedTuple):
    count: Tensor


class TraceState(NamedTuple):
    count: Tensor
    trace: Tree


class AdamState(NamedTuple):
    count: Tensor
    mean: Tree
    square: Tree


class RmsState(NamedTuple):
    square: Tree
    mean: Tree


class SumState(NamedTuple):
    total: Tree


class MomentumState(NamedTuple):
    momentum: Tree


def _beta(name: str, value: float) -> None:
    require(0.0 <= value < 1.0, name, value, "in [0, 1)")


def scale_by_learning_rate(learning_rate: float | Schedule) -> Optimizer:
    """`-learning_rate * updates`; a schedule is asked with the count of finished steps, so first with 0."""
    if callable(learning_rate):

        def update(updates: Tree, state: CountState, params: Tree) -> tuple[Tree, CountState]:
            rate = learning_rate(state.count)
            return tree.map(lambda u: (u * -rate).to(u.dtype), updates), CountState(state.count + 1)

        return Optimizer(lambda params: CountState(zero_count(params)), update)

    require(learning_rate >= 0, "learning_rate", learning_rate, "at least 0")
    return Optimizer(lambda params: (), lambda updates, state, _: (tree.map(lambda u: u * -learning_rate, updates), ()))


def decays(params: Tree, weight_decay: float, mask: Predicate | None) -> list[float]:
    """The weight decay of each leaf, in the order of `tree.leaves`."""
    return [weight_decay if mask is None or mask(name, leaf) else 0.0 for name, leaf in tree.items(params)]


def add_decayed_weights(weight_decay: float, mask: Predicate | None = None) -> Optimizer:
    """`updates + weight_decay * params`, only where `mask(name, leaf)` if there is a mask."""
    require(weight_decay >= 0, "weight_decay", weight_decay, "at least 0")

    def update(updates: Tree, state: tuple, params: Tree) -> tuple[Tree, tuple]:
        if weight_decay == 0:
            return updates, state

        def decayed(name: str, p: Tensor, u: Tensor) -> Tensor:
            return u + weight_decay * p if mask is None or mask(name, p) else u

        return tree.map_with_names(decayed, params, updates), state

    return Optimizer(lambda params: (), update)


def clip_by_value(limit: float) -> Optimizer:
    """Clamp every number to [-limit, limit]."""
    require(limit > 0, "limit", limit, "positive")
    return Optimizer(
        lambda _: (), lambda updates, state, _: (tree.map(lambda u: u.clamp(-limit, limit), updates), state)
    )


def clip_by_global_norm(limit: float, eps: float = 1e-6) -> Optimizer:
    """Scale all gradients by min(1, limit / (norm + eps)), norm being that of the whole tree.

    `eps` is that of torch's `clip_grad_norm_`; with `eps=0` it is optax's clip_by_global_norm.
    """
    require(limit > 0, "limit", limit, "positive")

    def update(updates: Tree, state: tuple, params: Tree) -> tuple[Tree, tuple]:
        scale = (limit / (tree.norm(updates) + eps)).clamp(max=1.0)
        return tree.map(lambda u: (u * scale).to(u.dtype), updates), state

    return Optimizer(lambda params: (), update)


def set_to_zero() -> Optimizer:
    """Zero updates; the donated form does nothing at all."""
    return Optimizer(
        lambda params: (),
        lambda updates, state, params: (zeros_like(updates), state),
        lambda updates, state, params: (params, state),
    )


def trace(
    momentum: float, *, nesterov: bool = False, dampening: float = 0.0, moment_dtype: torch.dtype | None = None
) -> Optimizer:
    """Momentum: b = momentum * b + (1 - dampening) * u; the update is b, or u + momentum * b with Nesterov.

    As in torch, the first b is u itself, undampened.
    """
    require(momentum >= 0, "momentum", momentum, "at least 0")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(f"nesterov needs a momentum and no dampening, got {momentum=}, {dampening=}")

    def init(params: Tree) -> TraceState:
        return TraceState(zero_count(params), zeros_like(params, moment_dtype))

    def update(updates: Tree, state: TraceState, params: Tree) -> tuple[Tree, TraceState]:
        def step(u: Tensor, b: Tensor) -> Tensor:
            u = u.to(b.dtype)
            return momentum * b + (torch.where(state.count == 0, u, (1 - dampening) * u) if dampening else u)

        buffers = tree.map(step, updates, state.trace)
        directions = tree.map(lambda u, b: u + momentum * b, updates, buffers) if nesterov else buffers
        return directions, TraceState(state.count + 1, buffers)

    return Optimizer(init, update)


def bias_correction(beta: float, count: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - beta^count, 0-D.

    By expm1, because in float32 the plain difference is wrong in its fifth digit for beta = 0.999 and small counts.
    """
    return -torch.expm1(count.to(dtype) * (math.log(beta) if beta > 0 else -math.inf))


def scale_by_adam(
    beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, moment_dtype: torch.dtype | None = None
) -> Optimizer:
    """m_hat / (sqrt(v_hat) + eps), algorithm 1 of Adam (Kingma & Ba, arXiv:1412.6980)."""
    _beta("beta1", beta1)
    _beta("beta2", beta2)

    def init(params: Tree) -> AdamState:
        return AdamState(zero_count(params), zeros_like(params, moment_dtype), zeros_like(params, moment_dtype))

    def update(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        count = state.count + 1
        mean = tree.map(lambda m, g: torch.lerp(m, g.to(m.dtype), 1 - beta1), state.mean, grads)
        square = tree.map(lambda v, g: beta2 * v + (1 - beta2) * g.to(v.dtype).square(), state.square, grads)
        wide = dict.fromkeys(torch.promote_types(v.dtype, torch.float32) for v in tree.leaves(square))
        corrections = {d: (bias_correction(beta1, count, d), bias_correction(beta2, count, d)) for d in wide}

        def direction(m: Tensor, v: Tensor) -> Tensor:
            first, second = corrections[torch.promote_types(v.dtype, torch.float32)]
            return ((m / first) / ((v / second).sqrt() + eps)).to(v.dtype)

        return tree.map(direction, mean, square), AdamState(count, mean, square)

    return Optimizer(init, update)


def scale_by_rms(
    decay: float = 0.99,
    eps: float = 1e-8,
    *,
    centered: bool = False,
    eps_in_sqrt: bool = False,
    moment_dtype: torch.dtype | None = None,
) -> Optimizer:
    """g / (sqrt(v) + eps), v the running mean of g^2 (Hinton's lecture 6e); centered: v less the squared mean of g.

    torch adds eps outside of the root; `eps_in_sqrt=True`, sqrt(v + eps), is optax's way. The centered variance is
    kept from falling below zero by rounding, where torch would give nan.
    """
    _beta("decay", decay)

    def init(params: Tree) -> RmsState:
        return RmsState(zeros_like(params, moment_dtype), zeros_like(params, moment_dtype) if centered else ())

    def update(grads: Tree, state: RmsState, params: Tree) -> tuple[Tree, RmsState]:
        square = tree.map(lambda v, g: decay * v + (1 - decay) * g.to(v.dtype).square(), state.square, grads)
        mean, variance = (), square
        if centered:
            mean = tree.map(lambda m, g: torch.lerp(m, g.to(m.dtype), 1 - decay), state.mean, grads)
            variance = tree.map(lambda v, m: (v - m.square()).clamp(min=0), square, mean)

        def direction(g: Tensor, v: Tensor) -> Tensor:
            return g.to(v.dtype) / ((v + eps).sqrt() if eps_in_sqrt else v.sqrt() + eps)

        return tree.map(direction, grads, variance), RmsState(square, mean)

    return Optimizer(init, update)


def scale_by_adagrad(
    eps: float = 1e-10,
    initial_accumulator: float = 0.0,
    *,
    eps_in_sqrt: bool = False,
    moment_dtype: torch.dtype | None = None,
) -> Optimizer:
    """g / (sqrt(sum of g^2) + eps) (Duchi et al. 2011).

    Defaults as in torch; optax is `eps=1e-7, initial_accumulator=0.1, eps_in_sqrt=True`.
    """
    require(initial_accumulator >= 0, "initial_accumulator", initial_accumulator, "at least 0")

    def init(params: Tree) -> SumState:
        return SumState(tree.map(lambda z: z + initial_accumulator, zeros_like(params, moment_dtype)))

    def update(grads: Tree, state: SumState, params: Tree) -> tuple[Tree, SumState]:
        total = tree.map(lambda s, g: s + g.to(s.dtype).square(), state.total, grads)

        def direction(g: Tensor, s: Tensor) -> Tensor:
            return g.to(s.dtype) / ((s + eps).sqrt() if eps_in_sqrt else s.sqrt() + eps)

        return tree.map(direction, grads, total), SumState(total)

    return Optimizer(init, update)


def scale_by_lion(beta1: float = 0.9, beta2: float = 0.99, moment_dtype: torch.dtype | None = None) -> Optimizer:
    """sign(beta1 * m + (1 - beta1) * g), then m moves towards g with beta2 (Chen et al., arXiv:2302.06675)."""
    _beta("beta1", beta1)
    _beta("beta2", beta2)

    def update(grads: Tree, state: MomentumState, params: Tree) -> tuple[Tree, MomentumState]:
        signs = tree.map(lambda m, g: torch.lerp(m, g.to(m.dtype), 1 - beta1).sign(), state.momentum, grads)
        momentum = tree.map(lambda m, g: torch.lerp(m, g.to(m.dtype), 1 - beta2), state.momentum, grads)
        return signs, MomentumState(momentum)

    return Optimizer(lambda params: MomentumState(zeros_like(params, moment_dtype)), update)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""The quintic's coefficients from Keller Jordan's post on Muon: the steepest at zero that still stays bounded."""


def newton_schulz(
    matrix: Tensor,
    steps: int = 5,
    coefficients: Sequence[float] = NEWTON_SCHULZ,
    *,
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
) -> Tensor:
    """Nearly the orthogonal factor U V^T of `matrix` = U S V^T: singular values end between about 0.7 and 1.2.

    Each step is X <- a X + (b A + c A A) X with A = X X^T.

    Args:
        matrix: (..., rows, columns).
        dtype: what the iteration is computed in; the result has it too.
    """
    a, b, c = coefficients
    x = matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]  # A is the smaller of the two Gram matrices
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def scale_by_muon(
    momentum: float = 0.95,
    *,
    nesterov: bool = True,
    steps: int = 5,
    coefficients: Sequence[float] = NEWTON_SCHULZ,
    adjust: str = "original",
    flatten: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    eps: float = 1e-7,
    moment_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Orthogonalised momentum (Jordan 2024, kellerjordan.github.io/posts/muon) for leaves (..., rows, columns).

    Args:
        flatten: leaves are (rows, ...) instead, their other axes together the columns: convolutions, as in the post.
        adjust: "original" scales by sqrt(max(1, rows / columns)); "match_rms_adamw" by 0.2 sqrt(max(rows, columns)),
            so that AdamW's learning rate and weight decay fit (Liu et al., arXiv:2502.16982, eq. 4).
        dtype: what the Newton-Schulz iteration is computed in.

    Raises:
        ValueError: at a leaf with fewer than two dimensions.
    """
    _beta("momentum", momentum)
    require(adjust in ("original", "match_rms_adamw"), "adjust", repr(adjust), "'original' or 'match_rms_adamw'")
    require(len(coefficients) == 3, "coefficients", coefficients, "three numbers")

    def init(params: Tree) -> MomentumState:
        for name, p in tree.items(params):
            require(p.ndim >= 2, f"muon: '{name}'", tuple(p.shape), "a matrix")
        return MomentumState(zeros_like(params, moment_dtype))

    def update(grads: Tree, state: MomentumState, params: Tree) -> tuple[Tree, MomentumState]:
        momenta = tree.map(lambda m, g: torch.lerp(m, g.to(m.dtype), 1 - momentum), state.momentum, grads)

        def direction(m: Tensor, g: Tensor) -> Any:
            looked_ahead = torch.lerp(g.to(m.dtype), m, momentum) if nesterov else m
            matrix = looked_ahead.flatten(1) if flatten else looked_ahead
            rows, columns = matrix.shape[-2:]
            ratio = max(1.0, rows / columns) ** 0.5 if adjust == "original" else 0.2 * max(rows, columns) ** 0.5
            orthogonal = newton_schulz(matrix, steps, coefficients, dtype=dtype, eps=eps)
            return orthogonal.to(m.dtype).reshape(m.shape) * ratio

        return tree.map(direction, momenta, grads), MomentumState(momenta)

    return Optimizer(init, update)
