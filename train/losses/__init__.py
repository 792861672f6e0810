"""Losses of classification, regression and language models; those of other fields have modules of their own."""

from train.losses.basic import (
    binary_cross_entropy_with_logits,
    charbonnier,
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
    soft_targets,
)
from train.losses.weighted import WeightedLoss, token_cross_entropy

__all__ = [
    "WeightedLoss",
    "binary_cross_entropy_with_logits",
    "charbonnier",
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
    "soft_targets",
    "token_cross_entropy",
]
