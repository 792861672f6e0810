"""Optimizers, learning-rate schedules and sets of leaves by name, for the flags of experiments."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from core import tree
from core.tree import Tree
from train import optimizers
from train.optimizers import schedules
from train.optimizers.protocol import Optimizer, Predicate, Schedule

OPTIMIZERS = ("sgd", "adamw", "muon")
SCHEDULES = ("cosine", "step", "constant")


def rate(name: str, peak: float, steps: int, warmup: int) -> Schedule:
    """Learning rate: linear warm-up to `peak` over the first `warmup` of `steps`, then one of `SCHEDULES`.

    "cosine" ends at 0; "step" is divided by ten after half of the remaining steps, and again after three quarters.

    Raises:
        ValueError: an unknown schedule, or a warm-up longer than `steps`.
    """
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup must be in [0, steps], steps is {steps}, got {warmup}")
    left = steps - warmup
    if name == "cosine":
        after = schedules.cosine(peak, left)
    elif name == "step":
        after = schedules.milestones(peak, (left // 2, 3 * left // 4))
    elif name == "constant":
        after = schedules.constant(peak)
    else:
        raise ValueError(f"schedule '{name}' is unknown; expected one of {', '.join(SCHEDULES)}")
    return schedules.warmup(after, warmup, peak=peak)


def optimizer(
    name: str,
    rate: Schedule,
    weight_decay: float,
    decayed: Predicate,
    hidden: Predicate,
    dtype: torch.dtype = torch.bfloat16,
) -> Optimizer:
    """One of `OPTIMIZERS`: SGD with Nesterov's momentum 0.9; AdamW; or Muon, and AdamW for all but hidden matrices.

    Muon's updates are scaled so that AdamW's learning rate and weight decay fit them.

    Args:
        decayed: (name, leaf) -> whether the leaf has weight decay.
        hidden: (name, leaf) -> whether the leaf is a hidden layer's matrix or convolution, for Muon.
        dtype: that of Muon's iteration. Processors without bfloat16 arithmetic take thirty times as long for it as
            for float32.

    Raises:
        ValueError: an unknown optimizer.
    """
    decay = {"weight_decay": weight_decay, "mask": decayed}
    if name == "sgd":
        return optimizers.sgd(rate, momentum=0.9, nesterov=True, **decay)
    adamw = optimizers.adamw(rate, **decay)
    if name == "adamw":
        return adamw
    if name == "muon":
        options = {"flatten": True, "adjust": "match_rms_adamw", "dtype": dtype}
        return optimizers.muon(rate, adamw, matrices=hidden, **decay, **options)
    raise ValueError(f"optimizer '{name}' is unknown; expected one of {', '.join(OPTIMIZERS)}")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """True if a leaf's name matches one of the shell patterns: "stem*", "*.bias"."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(model: Tree, patterns: Sequence[str]) -> None:
    """Raise ValueError if one of the patterns matches no leaf of the spec: a misspelt one would do nothing."""
    names = tree.names(model)
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            some = ", ".join(names[:: max(1, len(names) // 5)])
            raise ValueError(f"the pattern '{pattern}' fits no leaf; there are {some} ...")
