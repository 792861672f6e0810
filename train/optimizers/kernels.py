"""Donated steps: the same mathematics as the chains in `rules`, by torch's fused and foreach kernels, in place.

Every function here takes the pure chain and returns its donated form. The fused kernels walk the buffers of a leaf, its
gradient and its moments side by side and ignore strides and dtypes, and they have no tracing rule. So where those
differ, in half precision, or while compiling, the pure update is used instead.

In the equations g is the gradient with its weight decay, θ the parameters, η the learning rate and λ the weight decay.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from core import tree
from core.tree import Tree
from train.optimizers import protocol
from train.optimizers.protocol import Optimizer, Predicate, Schedule, update_and_overwrite
from train.optimizers.transforms import decays

Donated = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


_FUSABLE = (torch.float32, torch.float64)


def _fusable(columns: list[list[Tensor]]) -> bool:
    """True if the fused kernels apply to (parameters, gradients, *moments); makes the gradients contiguous."""
    if torch.compiler.is_compiling():
        return False
    params, grads, *moments = columns
    for i, p in enumerate(params):
        if not isinstance(p, Tensor) or type(grads[i]) is not Tensor or p.device.type not in ("cpu", "cuda"):
            return False
        if not p.is_contiguous() or p.dtype not in _FUSABLE or grads[i].dtype != p.dtype:
            return False
        if any(column[i].dtype != p.dtype or not column[i].is_contiguous() for column in moments):
            return False
    columns[1] = [g if g.is_contiguous() else g.contiguous() for g in grads]
    return True


def _groups(columns: list[list[Tensor]], decay: list[float]) -> list[tuple[float, list[list[Tensor]]]]:
    """(weight decay, columns) for each set of leaves that one kernel call can take."""
    groups: dict[tuple, list[int]] = {}
    for i, p in enumerate(columns[0]):
        groups.setdefault((p.device, p.dtype, decay[i]), []).append(i)
    return [(key[2], [[column[i] for i in rows] for column in columns]) for key, rows in groups.items()]


def _rate(learning_rate: float | Schedule, state: Tree) -> float | Tensor:
    """This step's learning rate; counts the step in the state of `scale_by_learning_rate`."""
    if not callable(learning_rate):
        return learning_rate
    rate = learning_rate(state.count)
    state.count.add_(1)
    return rate


def _beside(p: Tensor, value: float | Tensor) -> float | Tensor:
    """`value` on the device of `p`; the parameters may lie on several devices."""
    return value.to(p.device) if isinstance(value, Tensor) else value


def adam(
    pure: Optimizer,
    learning_rate: float | Schedule,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    mask: Predicate | None,
    decoupled: bool,
) -> Donated:
    """Adam, or AdamW if `decoupled`."""
    plain = update_and_overwrite(pure)
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_

    def donated(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        moments = state[0 if decoupled else 1]
        columns = protocol.columns(params, grads, moments.mean, moments.square)
        if not _fusable(columns):
            return plain(grads, state, params)
        with torch.no_grad():
            rate = _rate(learning_rate, state[2])
            step = moments.count.add_(1).to(torch.float32)  # the kernels only read it: one tensor serves all leaves
            for decay, (p, g, m, v) in _groups(columns, decays(params, weight_decay, mask)):
                kernel(  # m = β₁ m + (1 - β₁) g,  v = β₂ v + (1 - β₂) g²,  θ = θ - η m̂ / (sqrt(v̂) + ε)
                    p,
                    g,
                    m,
                    v,
                    [],
                    [_beside(p[0], step)] * len(p),
                    lr=_beside(p[0], rate),
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=decay,
                    eps=eps,
                    amsgrad=False,
                    maximize=False,
                )
        return params, state

    return donated


def sgd(
    pure: Optimizer,
    learning_rate: float | Schedule,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    mask: Predicate | None,
) -> Donated:
    """SGD without dampening."""
    plain = update_and_overwrite(pure)

    def donated(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        columns = protocol.columns(params, grads, *([state[1].trace] if momentum else []))
        if not _fusable(columns):
            return plain(grads, state, params)
        with torch.no_grad():
            rate = _rate(learning_rate, state[2])
            for decay, (p, g, *buffers) in _groups(columns, decays(params, weight_decay, mask)):
                torch._fused_sgd_(  # b = momentum b + g,  θ = θ - η b
                    p,
                    g,
                    buffers[0] if momentum else [],
                    weight_decay=decay,
                    momentum=momentum,
                    lr=_beside(p[0], rate),
                    dampening=0.0,
                    nesterov=nesterov,
                    maximize=False,
                    is_first_step=False,  # the buffers start at zero, which gives the same first step
                )
            if momentum:
                state[1].count.add_(1)
        return params, state

    return donated


def adagrad(
    pure: Optimizer,
    learning_rate: float | Schedule,
    *,
    eps: float,
    weight_decay: float,
    mask: Predicate | None,
) -> Donated:
    """Adagrad with eps outside the root."""
    plain = update_and_overwrite(pure)

    def donated(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        columns = protocol.columns(params, grads, state[1].total)
        if not _fusable(columns):
            return plain(grads, state, params)
        with torch.no_grad():
            rate = _rate(learning_rate, state[2])
            for decay, (p, g, total) in _groups(columns, decays(params, weight_decay, mask)):
                step = torch.ones((), device=p[0].device)  # matters only together with lr_decay
                steps = [step] * len(p)
                torch._fused_adagrad_(  # s = s + g²,  θ = θ - η g / (sqrt(s) + ε)
                    p,
                    g,
                    total,
                    steps,
                    lr=_beside(p[0], rate),
                    lr_decay=0.0,
                    weight_decay=decay,
                    eps=eps,
                    maximize=False,
                )
        return params, state

    return donated


def _decayed(updates: list[Tensor], params: list[Tensor], decay: list[float]) -> list[Tensor]:
    """u + λ θ as new tensors; u itself where its decay is zero."""
    return [torch.add(u, p, alpha=d) if d else u for u, p, d in zip(updates, params, decay, strict=True)]


def _descend(params: list[Tensor], updates: list[Tensor], rate: float | Tensor) -> None:
    torch._foreach_add_(params, torch._foreach_mul(updates, -rate))  # θ = θ - η u


def rmsprop(
    pure: Optimizer,
    learning_rate: float | Schedule,
    *,
    decay: float,
    eps: float,
    centered: bool,
    eps_in_sqrt: bool,
    momentum: float,
    weight_decay: float,
    mask: Predicate | None,
) -> Donated:
    """RMSProp."""
    plain = update_and_overwrite(pure)

    def donated(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        _, moments, heavy, rate_state = state
        columns = protocol.columns(params, grads, moments.square, *([moments.mean] if centered else []))
        if not _fusable(columns) or not columns[0]:
            return plain(grads, state, params)
        p, g, v, *m = columns
        with torch.no_grad():
            rate = _rate(learning_rate, rate_state)
            g = _decayed(g, p, decays(params, weight_decay, mask))
            torch._foreach_mul_(v, decay)
            torch._foreach_addcmul_(v, g, g, 1 - decay)  # v = ρ v + (1 - ρ) g²
            scale = v
            if centered:
                torch._foreach_lerp_(m[0], g, 1 - decay)  # m = ρ m + (1 - ρ) g
                scale = torch._foreach_addcmul(v, m[0], m[0], -1.0)  # v - m²
                torch._foreach_clamp_min_(scale, 0.0)
            scale = torch._foreach_sqrt(torch._foreach_add(scale, eps) if eps_in_sqrt else scale)
            if not eps_in_sqrt:
                torch._foreach_add_(scale, eps)
            updates = torch._foreach_div(g, scale)  # g / (sqrt(v) + ε)
            if momentum:
                buffers = tree.leaves(heavy.trace)
                torch._foreach_mul_(buffers, momentum)
                torch._foreach_add_(buffers, updates)  # b = momentum b + g / (sqrt(v) + ε)
                heavy.count.add_(1)
                updates = buffers
            _descend(p, updates, rate)
        return params, state

    return donated


def lion(
    pure: Optimizer,
    learning_rate: float | Schedule,
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
    mask: Predicate | None,
) -> Donated:
    """Lion."""
    plain = update_and_overwrite(pure)

    def donated(grads: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        columns = protocol.columns(params, grads, state[0].momentum)
        if not _fusable(columns) or not columns[0]:
            return plain(grads, state, params)
        p, g, m = columns
        with torch.no_grad():
            rate = _rate(learning_rate, state[2])
            signs = torch._foreach_lerp(m, g, 1 - beta1)
            torch._foreach_sign_(signs)  # sign(β₁ m + (1 - β₁) g)
            torch._foreach_lerp_(m, g, 1 - beta2)  # m = β₂ m + (1 - β₂) g
            _descend(p, _decayed(signs, p, decays(params, weight_decay, mask)), rate)
        return params, state

    return donated
