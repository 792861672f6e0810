"""Optimizers as pure functions over trees, in optax's protocol: small transformations that chain.

    optimizer = optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.adamw(schedules.cosine(3e-4, 1000)))
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)
    params = optimizers.apply_updates(params, updates)

or, where the old params and state are not needed any more, with their buffers overwritten by torch's fused kernels:

    params, state = optimizers.donated_update(optimizer)(grads, state, params)
"""

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
    clip_by_global_norm,
    clip_by_value,
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
