"""Losses: classification and regression here; `variational`, and what other fields need, in modules of their own."""

from train.losses.basic import (
    accuracy,
    binary_cross_entropy_with_logits,
    cosine_distance,
    cross_entropy,
    gaussian_kl,
    hinge,
    huber,
    kl_divergence,
    l1,
    mse,
    multiclass_hinge,
    nll,
    smooth_l1,
)

__all__ = [
    "accuracy",
    "binary_cross_entropy_with_logits",
    "cosine_distance",
    "cross_entropy",
    "gaussian_kl",
    "hinge",
    "huber",
    "kl_divergence",
    "l1",
    "mse",
    "multiclass_hinge",
    "nll",
    "smooth_l1",
]
