"""What the flags of an experiment choose by name: the rule of the optimizer, the course of its learning rate, leaves by
patterns of their names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from core import tree
from core.tree import Tree
from train import optimizers
from train.optimizers import Optimizer, schedules
from train.optimizers.protocol import Predicate
from train.optimizers.schedules import Schedule

OPTIMIZERS = ("sgd", "adamw", "muon")
SCHEDULES = ("cosine", "step", "constant")


def rate(name: str, peak: float, steps: int, warmup: int) -> Schedule:
    """A learning rate that rises linearly to `peak` over `warmup` of all `steps`, and then goes one of `SCHEDULES`.

    "cosine" ends at 0; "step" falls to a tenth after a half of what is left, and again after three quarters.
    """
    left = steps - warmup
    if name == "cosine":
        after = schedules.cosine(peak, left)
    elif name == "step":
        after = schedules.milestones(peak, (left // 2, 3 * left // 4))
    elif name == "constant":
        after = schedules.constant(peak)
    else:
        raise ValueError(f"schedule '{name}' is unknown; expected one of {', '.join(SCHEDULES)}")
    return schedules.warmup(after, warmup)


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
        decayed: (name, leaf) -> whether the weight decays.
        hidden: (name, leaf) -> whether it is a hidden layer's matrix or convolution, for Muon.
        dtype: of Muon's iteration. Processors without arithmetic in bfloat16 take thirty times as long for it as for
            float32.
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
    """Whether a leaf's name fits one of the patterns, as in a shell: "stem*", "*.bias"."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(model: Tree, patterns: Sequence[str]) -> None:
    """Raise ValueError if no leaf of the spec fits one of the patterns: a misspelt one would be as good as none."""
    names = tree.names(model)
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            some = ", ".join(names[:: max(1, len(names) // 5)])
            raise ValueError(f"the pattern '{pattern}' fits no leaf; there are {some} ...")
