"""The transformations that optimizers are chained from. Each keeps its state in a NamedTuple, or `()` if it has none.

In the equations g is the gradient (or the update of the link before), θ the parameters and t = count + 1 the number of
the step. Moments are kept in `moment_dtype`, by default the parameter's dtype but float32 at least; the arithmetic is
in float32 or wider, and so are the updates.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import tree
from core.tree import Tree
from train.optimizers.protocol import (
    Optimizer,
    Predicate,
    Schedule,
    check_predicate,
    require,
    require_number,
    widened,
    zero_count,
    zero_moment,
)


class CountState(NamedTuple):
    """Number of steps."""

    count: Tensor


class TraceState(NamedTuple):
    """Number of steps, and the decaying sum of the gradients."""

    count: Tensor
    trace: Tree


class AdamState(NamedTuple):
    """Number of steps, and the decaying means of gradient and square."""

    count: Tensor
    mean: Tree
    square: Tree


class RmsState(NamedTuple):
    """Decaying means of the square and, if centered, of the gradient."""

    square: Tree
    mean: Tree


class SumState(NamedTuple):
    """Sum of the squares."""

    total: Tree


class MomentumState(NamedTuple):
    """Decaying mean of the gradients."""

    momentum: Tree


def _require_beta(name: str, value: float) -> None:
    require_number(name, value)
    require(0.0 <= value < 1.0, name, value, "in [0, 1)")


def _stored(moments: Tree, dtype: torch.dtype | None) -> Tree:
    """Moments as the state keeps them, in `dtype` if one was asked for."""
    return moments if dtype is None else tree.cast(moments, dtype)


def _mean(m: Tensor, g: Tensor, beta: float) -> Tensor:
    """Exponential moving average beta m + (1 - beta) g, in float32 or wider."""
    m = widened(m)
    return torch.lerp(m, g.to(m.dtype), 1 - beta)


def _mean_square(v: Tensor, g: Tensor, beta: float) -> Tensor:
    """Exponential moving average beta v + (1 - beta) g², in float32 or wider."""
    v = widened(v)
    return beta * v + (1 - beta) * g.to(v.dtype).square()


def scale_by_learning_rate(learning_rate: float | Schedule) -> Optimizer:
    """-learning_rate * g. A schedule is called with the count of finished steps, so with 0 at first."""
    if callable(learning_rate):

        def update(updates: Tree, state: CountState, params: Tree) -> tuple[Tree, CountState]:
            rate = learning_rate(state.count)

            def scaled(u: Tensor) -> Tensor:
                u = widened(u)
                return (u * -rate).to(u.dtype)

            return tree.map(scaled, updates), CountState(state.count + 1)

        return Optimizer(lambda params: CountState(zero_count(params)), update)

    require_number("learning_rate", learning_rate)
    require(learning_rate >= 0, "learning_rate", learning_rate, "at least 0")
    return Optimizer(
        lambda params: (), lambda updates, state, _: (tree.map(lambda u: widened(u) * -learning_rate, updates), ())
    )


def decays(params: Tree, weight_decay: float, mask: Predicate | None) -> list[float]:
    """The weight decay of each leaf, in the order of `tree.leaves`."""
    return [weight_decay if mask is None or mask(name, leaf) else 0.0 for name, leaf in tree.items(params)]


def add_decayed_weights(weight_decay: float, mask: Predicate | None = None) -> Optimizer:
    """g + weight_decay * θ, only where `mask(name, leaf)` if there is a mask."""
    check_predicate("mask", mask)
    require(weight_decay >= 0, "weight_decay", weight_decay, "at least 0")

    def update(updates: Tree, state: tuple, params: Tree) -> tuple[Tree, tuple]:
        if weight_decay == 0:
            return updates, state

        def decayed(name: str, p: Tensor, u: Tensor) -> Tensor:
            return widened(u) + weight_decay * widened(p) if mask is None or mask(name, p) else u

        return tree.map_with_names(decayed, params, updates), state

    return Optimizer(lambda params: (), update)


def set_to_zero() -> Optimizer:
    """Zero updates; the donated form does nothing at all."""
    return Optimizer(
        lambda params: (),
        lambda updates, state, params: (tree.map(torch.zeros_like, updates), state),
        lambda updates, state, params: (params, state),
    )


def trace(
    momentum: float, *, nesterov: bool = False, dampening: float = 0.0, moment_dtype: torch.dtype | None = None
) -> Optimizer:
    """Momentum as in torch: b_t = momentum b_{t-1} + (1 - dampening) g; the update is b_t, or g + momentum b_t with
    Nesterov (Sutskever et al. 2013). The first b is g itself, undampened.
    """
    require(momentum >= 0, "momentum", momentum, "at least 0")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(f"nesterov needs a momentum and no dampening, got {momentum=}, {dampening=}")

    def init(params: Tree) -> TraceState:
        return TraceState(zero_count(params), zero_moment(params, moment_dtype))

    def update(updates: Tree, state: TraceState, params: Tree) -> tuple[Tree, TraceState]:
        def buffer(u: Tensor, b: Tensor) -> Tensor:
            b = widened(b)
            u = u.to(b.dtype)
            # b_t = momentum b_{t-1} + (1 - dampening) g
            return momentum * b + (torch.where(state.count == 0, u, (1 - dampening) * u) if dampening else u)

        buffers = tree.map(buffer, updates, state.trace)
        directions = tree.map(lambda u, b: u.to(b.dtype) + momentum * b, updates, buffers) if nesterov else buffers
        return directions, TraceState(state.count + 1, _stored(buffers, moment_dtype))

    return Optimizer(init, update)


def bias_correction(beta: float, count: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - beta^count, 0-D.

    By expm1, because in float32 the plain difference is wrong in its fifth digit for beta = 0.999 and small counts.
    """
    return -torch.expm1(count.to(dtype) * (math.log(beta) if beta > 0 else -math.inf))


def scale_by_adam(
    beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8, moment_dtype: torch.dtype | None = None
) -> Optimizer:
    """Adam's direction m̂ / (sqrt(v̂) + eps), algorithm 1 of Kingma & Ba 2015 (arXiv:1412.6980)."""
    _require_beta("beta1", beta1)
    _require_beta("beta2", beta2)
    require(eps >= 0, "eps", eps, "at least 0")

    def init(params: Tree) -> AdamState:
        return AdamState(zero_count(params), zero_moment(params, moment_dtype), zero_moment(params, moment_dtype))

    def update(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        t = state.count + 1
        mean = tree.map(lambda m, g: _mean(m, g, beta1), state.mean, grads)  # m_t = β₁ m_{t-1} + (1 - β₁) g
        square = tree.map(lambda v, g: _mean_square(v, g, beta2), state.square, grads)  # v_t = β₂ v_{t-1} + (1 - β₂) g²
        dtypes = dict.fromkeys(v.dtype for v in tree.leaves(square))
        corrections = {d: (bias_correction(beta1, t, d), bias_correction(beta2, t, d)) for d in dtypes}

        def direction(m: Tensor, v: Tensor) -> Tensor:
            first, second = corrections[v.dtype]
            # m̂ = m_t / (1 - β₁^t),  v̂ = v_t / (1 - β₂^t)
            return (m / first) / ((v / second).sqrt() + eps)

        directions = tree.map(direction, mean, square)
        return directions, AdamState(t, _stored(mean, moment_dtype), _stored(square, moment_dtype))

    return Optimizer(init, update)


def scale_by_rms(
    decay: float = 0.99,
    eps: float = 1e-8,
    *,
    centered: bool = False,
    eps_in_sqrt: bool = False,
    moment_dtype: torch.dtype | None = None,
) -> Optimizer:
    """RMSProp's direction g / (sqrt(v) + eps), v the running mean of g² (Hinton's lecture 6e); centered: of g less its
    running mean (Graves 2013, arXiv:1308.0850, eq. 38 to 41).

    torch adds eps outside of the root; `eps_in_sqrt=True`, sqrt(v + eps), is optax's way. The centered variance is
    kept from falling below zero by rounding, where torch would give nan.
    """
    _require_beta("decay", decay)
    require(eps >= 0, "eps", eps, "at least 0")

    def init(params: Tree) -> RmsState:
        return RmsState(zero_moment(params, moment_dtype), zero_moment(params, moment_dtype) if centered else ())

    def update(grads: Tree, state: RmsState, params: Tree) -> tuple[Tree, RmsState]:
        square = tree.map(lambda v, g: _mean_square(v, g, decay), state.square, grads)  # v_t = ρ v_{t-1} + (1 - ρ) g²
        mean, variance = (), square
        if centered:
            mean = tree.map(lambda m, g: _mean(m, g, decay), state.mean, grads)  # m_t = ρ m_{t-1} + (1 - ρ) g
            variance = tree.map(lambda v, m: (v - m.square()).clamp(min=0), square, mean)

        def direction(g: Tensor, v: Tensor) -> Tensor:
            return g.to(v.dtype) / ((v + eps).sqrt() if eps_in_sqrt else v.sqrt() + eps)

        directions = tree.map(direction, grads, variance)
        return directions, RmsState(_stored(square, moment_dtype), _stored(mean, moment_dtype))

    return Optimizer(init, update)


def scale_by_adagrad(
    eps: float = 1e-10,
    initial_accumulator: float = 0.0,
    *,
    eps_in_sqrt: bool = False,
    moment_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Adagrad's direction g / (sqrt(sum of g²) + eps) (Duchi et al. 2011).

    Defaults as in torch; optax is `eps=1e-7, initial_accumulator=0.1, eps_in_sqrt=True`.
    """
    require(initial_accumulator >= 0, "initial_accumulator", initial_accumulator, "at least 0")
    require(eps >= 0, "eps", eps, "at least 0")

    def init(params: Tree) -> SumState:
        return SumState(tree.map(lambda z: z + initial_accumulator, zero_moment(params, moment_dtype)))

    def update(grads: Tree, state: SumState, params: Tree) -> tuple[Tree, SumState]:
        def added(s: Tensor, g: Tensor) -> Tensor:
            s = widened(s)
            return s + g.to(s.dtype).square()  # s_t = s_{t-1} + g²

        total = tree.map(added, state.total, grads)

        def direction(g: Tensor, s: Tensor) -> Tensor:
            return g.to(s.dtype) / ((s + eps).sqrt() if eps_in_sqrt else s.sqrt() + eps)

        return tree.map(direction, grads, total), SumState(_stored(total, moment_dtype))

    return Optimizer(init, update)


def scale_by_lion(beta1: float = 0.9, beta2: float = 0.99, moment_dtype: torch.dtype | None = None) -> Optimizer:
    """Lion's direction sign(β₁ m + (1 - β₁) g), where m is the running mean of g with β₂ (Chen et al. 2023,
    arXiv:2302.06675, algorithm 2)."""
    _require_beta("beta1", beta1)
    _require_beta("beta2", beta2)

    def update(grads: Tree, state: MomentumState, params: Tree) -> tuple[Tree, MomentumState]:
        signs = tree.map(lambda m, g: _mean(m, g, beta1).sign(), state.momentum, grads)
        momentum = tree.map(lambda m, g: _mean(m, g, beta2), state.momentum, grads)  # m_t = β₂ m_{t-1} + (1 - β₂) g
        return signs, MomentumState(_stored(momentum, moment_dtype))

    return Optimizer(lambda params: MomentumState(zero_moment(params, moment_dtype)), update)


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
    """Nearly the orthogonal factor U Vᵀ of `matrix` = U S Vᵀ: singular values end between about 0.7 and 1.2.

    X ← a X + (b A + c A²) X,   A = X Xᵀ

    Args:
        matrix: (..., rows, columns).
        dtype: that of the iteration and the result.
    """
    a, b, c = coefficients
    x = matrix.to(dtype)
    tall = x.shape[-2] > x.shape[-1]  # A is the smaller of the two Gram matrices
    x = x.mT if tall else x  # (..., short, long)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT  # A, (..., short, short)
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
    over: Any = None,
) -> Optimizer:
    """Orthogonalised momentum (Jordan 2024, kellerjordan.github.io/posts/muon) for leaves (..., rows, columns).

    Args:
        flatten: leaves are (rows, ...) instead, their other axes together the columns: convolutions, as in the post.
        adjust: "original" scales by sqrt(max(1, rows / columns)); "match_rms_adamw" by 0.2 sqrt(max(rows, columns)),
            so that AdamW's learning rate and weight decay fit (Liu et al. 2025, arXiv:2502.16982, eq. 4).
        dtype: that of the Newton-Schulz iteration.
        over: the `train.scale.distributed.Distributed` of leaves of which this process has its pieces: the iteration
            is of whole matrices, on every process alike.

    Raises:
        ValueError: from `init`, at a leaf with fewer than two dimensions.
    """
    _require_beta("momentum", momentum)
    require(adjust in ("original", "match_rms_adamw"), "adjust", repr(adjust), "'original' or 'match_rms_adamw'")
    require(len(coefficients) == 3, "coefficients", coefficients, "three numbers")

    def init(params: Tree) -> MomentumState:
        for name, p in tree.items(params):
            require(p.ndim >= 2, f"muon: '{name}'", tuple(p.shape), "a matrix")
        return MomentumState(zero_moment(params, moment_dtype))

    def update(grads: Tree, state: MomentumState, params: Tree) -> tuple[Tree, MomentumState]:
        momenta = tree.map(lambda m, g: _mean(m, g, momentum), state.momentum, grads)  # m_t = μ m_{t-1} + (1 - μ) g

        def ahead_of(m: Tensor, g: Tensor) -> Tensor:
            return torch.lerp(g.to(m.dtype), m, momentum) if nesterov else m  # μ m_t + (1 - μ) g

        def direction(ahead: Tensor) -> Tensor:
            matrix = ahead.flatten(1) if flatten else ahead  # (..., rows, columns)
            rows, columns = matrix.shape[-2:]
            ratio = max(1.0, rows / columns) ** 0.5 if adjust == "original" else 0.2 * max(rows, columns) ** 0.5
            orthogonal = newton_schulz(matrix, steps, coefficients, dtype=dtype, eps=eps)
            return orthogonal.to(ahead.dtype).reshape(ahead.shape) * ratio

        ahead = tree.map(ahead_of, momenta, grads)
        directions = tree.map(direction, ahead if over is None else over.whole(ahead))
        directions = directions if over is None else over.cut(directions)
        return directions, MomentumState(_stored(momenta, moment_dtype))

    options = {"nesterov": nesterov, "steps": steps, "coefficients": coefficients, "adjust": adjust}
    options |= {"flatten": flatten, "dtype": dtype, "eps": eps, "moment_dtype": moment_dtype}
    return Optimizer(init, update, sharded=lambda over: scale_by_muon(momentum, **options, over=over))
