"""Scheduled sampling: in training, a net reads some of its own tokens in place of the target's.

    y'_t = y_t with probability rate, else argmax p(. | y'_1 ... y'_{t-1})

Bengio et al. 2015, "Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks" (arXiv:1506.03099); a
schedule lowers the rate from 1 as training goes on. No derivative passes through the choice of a token, so it is enough
to find the tokens first, one after the other, and to train on them as on any target.
"""

import torch
from torch import Tensor

from core import random
from core.tree import Tree
from nets.language.decoding import Step, call


def teacher_forcing(key: Tensor, batch: int, time: int, rate: float | Tensor) -> Tensor:
    """Draw which tokens are the target's: (batch, time) boolean, each True with probability rate.

    Args:
        key: (2,) or one per example (batch, 2).
        rate: a number, or a tensor () or (batch,).
    """
    values = random.uniform(key, (batch, time) if key.ndim == 1 else (time,))  # (batch, time)
    return values < torch.as_tensor(rate, dtype=values.dtype, device=values.device).reshape(-1, 1)


@torch.no_grad()
def mixed_target(step: Step, cache: Tree, target: Tensor, forced: Tensor, shared: Tree = None) -> Tensor:
    """The target with the net's most probable tokens in place of some.

    Args:
        step, cache, shared: as in `nets.language.decoding.greedy`. The net chooses as in evaluation, without dropout.
        target: (batch, time) integers; its first tokens stay.
        forced: (batch, time) boolean, True where the target's token stays; see `teacher_forcing`.

    Returns:
        (batch, time) integers.

    Raises:
        ValueError: `forced` of another shape or dtype.
    """
    if forced.dtype != torch.bool or forced.shape != target.shape:
        expected = f"expected forced of shape {tuple(target.shape)} of torch.bool"
        raise ValueError(f"scheduled_sampling: {expected}, found {tuple(forced.shape)} of {forced.dtype}")
    tokens = [target[:, 0]]
    for t in range(1, target.shape[1]):
        logits, cache = call(step, cache, tokens[-1], torch.tensor(t - 1, device=target.device), shared)
        tokens.append(torch.where(forced[:, t], target[:, t], logits.argmax(-1)))  # (batch,)
    return torch.stack(tokens, 1)
