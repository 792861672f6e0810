"""The optimizers: each is a short chain of transformations, and most have a donated form.

`learning_rate` is a number or a schedule. Defaults and conventions are torch.optim's; where optax differs, the argument
that gives optax's is named. `mask(name, leaf)` limits weight decay to some leaves, usually
`lambda name, leaf: leaf.ndim >= 2`. `moment_dtype` is the dtype of the moments, by default the parameter's but float32
at least.

In the equations g is the gradient, θ the parameters, η the learning rate and λ the weight decay.
"""

import torch

from train.optimizers import kernels
from train.optimizers.protocol import Optimizer, Predicate, Schedule, chain, identity
from train.optimizers.transforms import (
    add_decayed_weights,
    scale_by_adagrad,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_lion,
    scale_by_muon,
    scale_by_rms,
    trace,
)
from train.optimizers.wrappers import by_path


def sgd(
    learning_rate: float | Schedule,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mask: Predicate | None = None,
    moment_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Stochastic gradient descent, with momentum as in torch; the weight decay is added to the gradient.

    g ← g + λ θ,   b ← momentum b + (1 - dampening) g,   θ ← θ - η b   (Nesterov: θ - η (g + momentum b))
    """
    if not momentum and (nesterov or dampening):
        raise ValueError(f"nesterov and dampening need a momentum, got {momentum=}")
    heavy = trace(momentum, nesterov=nesterov, dampening=dampening, moment_dtype=moment_dtype)
    pure = chain(
        add_decayed_weights(weight_decay, mask),
        heavy if momentum else identity(),
        scale_by_learning_rate(learning_rate),
    )
    if dampening:  # torch's kernel needs to know the first step, which only the count tells
        return pure
    donated = kernels.sgd(
        pure, learning_rate, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, mask=mask
    )
    return pure._replace(donated=donated)


def rmsprop(
    learning_rate: float | Schedule,
    *,
    decay: float = 0.99,
    eps: float = 1e-8,
    centered: bool = False,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    mask: Predicate | None = None,
    eps_in_sqrt: bool = False,
    moment_dtype: torch.dtype | None = None,
) -> Optimizer:
    """RMSProp (Hinton's lecture 6e), see `scale_by_rms`; the weight decay is added to the gradient.

    g ← g + λ θ,   v ← ρ v + (1 - ρ) g²,   b ← momentum b + g / (sqrt(v) + ε),   θ ← θ - η b

    optax: `decay=0.9, eps_in_sqrt=True`.
    """
    pure = chain(
        add_decayed_weights(weight_decay, mask),
        scale_by_rms(decay, eps, centered=centered, eps_in_sqrt=eps_in_sqrt, moment_dtype=moment_dtype),
        trace(momentum, moment_dtype=moment_dtype) if momentum else identity(),
        scale_by_learning_rate(learning_rate),
    )
    donated = kernels.rmsprop(
        pure,
        learning_rate,
        decay=decay,
        eps=eps,
        centered=centered,
        eps_in_sqrt=eps_in_sqrt,
        momentum=momentum,
        weight_decay=weight_decay,
        mask=mask,
    )
    return pure._replace(donated=donated)


def adagrad(
    learning_rate: float | Schedule,
    *,
    eps: float = 1e-10,
    initial_accumulator: float = 0.0,
    weight_decay: float = 0.0,
    mask: Predicate | None = None,
    eps_in_sqrt: bool = False,
    moment_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Adagrad (Duchi et al. 2011), see `scale_by_adagrad`; the weight decay is added to the gradient.

    g ← g + λ θ,   s ← s + g²,   θ ← θ - η g / (sqrt(s) + ε)

    torch's `lr_decay` is a schedule here. optax: `eps=1e-7, initial_accumulator=0.1, eps_in_sqrt=True`.
    """
    pure = chain(
        add_decayed_weights(weight_decay, mask),
        scale_by_adagrad(eps, initial_accumulator, eps_in_sqrt=eps_in_sqrt, moment_dtype=moment_dtype),
        scale_by_learning_rate(learning_rate),
    )
    if eps_in_sqrt:  # torch's kernel knows only the other form
        return pure
    donated = kernels.adagrad(pure, learning_rate, eps=eps, weight_decay=weight_decay, mask=mask)
    return pure._replace(donated=donated)


def adam(
    learning_rate: float | Schedule,
    beta1: float = 0.9,
    beta2: float = 0.999,
    *,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Predicate | None = None,
    moment_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980), see `scale_by_adam`; the weight decay is added to the gradient.

    g ← g + λ θ,   θ ← θ - η m̂ / (sqrt(v̂) + ε)
    """
    pure = chain(
        add_decayed_weights(weight_decay, mask),
        scale_by_adam(beta1, beta2, eps, moment_dtype),
        scale_by_learning_rate(learning_rate),
    )
    donated = kernels.adam(
        pure,
        learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
        decoupled=False,
    )
    return pure._replace(donated=donated)


def adamw(
    learning_rate: float | Schedule,
    beta1: float = 0.9,
    beta2: float = 0.999,
    *,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Predicate | None = None,
    moment_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).

    θ ← θ - η (m̂ / (sqrt(v̂) + ε) + λ θ)
    """
    pure = chain(
        scale_by_adam(beta1, beta2, eps, moment_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
    donated = kernels.adam(
        pure,
        learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
        decoupled=True,
    )
    return pure._replace(donated=donated)


def lion(
    learning_rate: float | Schedule,
    beta1: float = 0.9,
    beta2: float = 0.99,
    *,
    weight_decay: float = 0.0,
    mask: Predicate | None = None,
    moment_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Lion (Chen et al. 2023, arXiv:2302.06675), with decoupled weight decay.

    θ ← θ - η (sign(β₁ m + (1 - β₁) g) + λ θ),   m ← β₂ m + (1 - β₂) g

    The paper advises a third to a tenth of AdamW's learning rate, and three to ten times its weight decay.
    """
    pure = chain(
        scale_by_lion(beta1, beta2, moment_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
    donated = kernels.lion(pure, learning_rate, beta1=beta1, beta2=beta2, weight_decay=weight_decay, mask=mask)
    return pure._replace(donated=donated)


def muon(
    learning_rate: float | Schedule,
    fallback: Optimizer,
    *,
    matrices: Predicate = lambda name, leaf: leaf.ndim == 2,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    mask: Predicate | None = None,
    steps: int = 5,
    adjust: str = "original",
    flatten: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    moment_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Muon for the hidden matrices, `fallback` (usually `adamw(3e-4)`) for every other leaf; see `scale_by_muon`.

    m ← μ m + (1 - μ) g,   θ ← θ - η (NewtonSchulz(μ m + (1 - μ) g) + λ θ)

    Muon is made for hidden layers, so exclude the embeddings and the output layer in `matrices`:
    `lambda name, leaf: leaf.ndim == 2 and not name.startswith(("wte", "wpe", "head"))`.

    Args:
        matrices: (name, leaf) -> whether the leaf is Muon's; by default all with two dimensions.
        weight_decay: decoupled, of Muon's leaves only, and of these only where `mask(name, leaf)` if there is a mask.
        flatten: Muon's leaves are (rows, ...), such as convolutions, and their other axes together are the columns.
        dtype: that of the Newton-Schulz iteration; bfloat16 as published.
    """
    orthogonal = chain(
        scale_by_muon(
            momentum,
            nesterov=nesterov,
            steps=steps,
            adjust=adjust,
            flatten=flatten,
            dtype=dtype,
            moment_dtype=moment_dtype,
        ),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
    return by_path(
        {"fallback": fallback, "muon": orthogonal},
        lambda name, leaf: "muon" if matrices(name, leaf) else "fallback",
    )
