"""The order of the examples: the indices of each batch, a function of key and step."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from core import random, threefry
from train.data import DataError


def epoch_batch(key: Tensor, step: int | Tensor, count: int, batch: int) -> Tensor:
    """The indices (batch,) of the examples of one step; a pure function of key and step, so a resumed run repeats it.

    Each epoch has `count // batch` steps and goes through the examples in an order of its own, the permutation of the
    key `fold_in(key, epoch)`. The `count % batch` examples at the end of an epoch's order are left out of that epoch.

    Args:
        key: (2,).
        step: 0, 1, 2 ...
        count: number of examples.
    """
    threefry.check_key(key)
    if not 0 < batch <= count:
        raise DataError(f"cannot make batches of {batch} from {count} examples")
    epoch, position = divmod(int(step), count // batch)
    order = _order(tuple(key.tolist()), str(key.device), epoch, count)
    return order[position * batch : (position + 1) * batch].clone()


@functools.lru_cache(maxsize=4)
def _order(words: tuple[int, int], device: str, epoch: int, count: int) -> Tensor:
    """The order of an epoch; cached, because it costs as much as a small step (sorting `count` random numbers)."""
    key = torch.tensor(words, dtype=torch.int32, device=device)
    return random.permutation(random.fold_in(key, epoch), count)


def evaluation_batches(count: int, batch: int) -> Iterator[slice]:
    """Slices that go through all examples once, in order; the last may be shorter."""
    if batch < 1:
        raise DataError(f"cannot make batches of {batch}")
    for start in range(0, count, batch):
        yield slice(start, min(start + batch, count))
