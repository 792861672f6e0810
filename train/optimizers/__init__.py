"""Optimizers as pure functions over trees, in optax's protocol: small transformations that chain.

    optimizer = optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.adamw(schedules.cosine(3e-4, 1000)))
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)
    params = optimizers.apply_updates(params, updates)

or, where the old params and state are not needed any more, with their buffers overwritten by torch's fused kernels:

    params, state = optimizers.donated_update(optimizer)(grads, state, params)

`params` are floating-point tensors alone: `spec.split(model, values)` takes the running statistics (Stats) away.

    protocol    what an optimizer is; chain, apply_updates, donated_update
    rules       sgd, rmsprop, adagrad, adam, adamw, lion, muon
    transforms  the links they are chained from, with the papers' equations
    clipping    by value, by global norm, by a quantile of past norms
    wrappers    by_path, freeze, masked, accumulate, ema
    schedules   learning rates: warmup_cosine, noam, one_cycle, warmup_stable_decay, ...   (train.optimizers.schedules)
    recipes     optimizers and schedules by name, for the flags of experiments             (train.optimizers.recipes)
    kernels     the donated forms, by torch's fused kernels
"""

from train.optimizers.clipping import clip_by_global_norm, clip_by_norm_quantile, clip_by_value
from train.optimizers.protocol import (
    Optimizer,
    Predicate,
    Schedule,
    apply_updates,
    chain,
    donated_update,
    identity,
)
from train.optimizers.rules import adagrad, adam, adamw, lion, muon, rmsprop, sgd
from train.optimizers.transforms import (
    add_decayed_weights,
    newton_schulz,
    scale_by_adagrad,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_lion,
    scale_by_muon,
    scale_by_rms,
    set_to_zero,
    trace,
)
from train.optimizers.wrappers import accumulate, averaged, by_path, ema, freeze, masked

__all__ = [
    "Optimizer",
    "Predicate",
    "Schedule",
    "accumulate",
    "adagrad",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_updates",
    "averaged",
    "by_path",
    "chain",
    "clip_by_global_norm",
    "clip_by_norm_quantile",
    "clip_by_value",
    "donated_update",
    "ema",
    "freeze",
    "identity",
    "lion",
    "masked",
    "muon",
    "newton_schulz",
    "rmsprop",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_muon",
    "scale_by_rms",
    "set_to_zero",
    "sgd",
    "trace",
]
