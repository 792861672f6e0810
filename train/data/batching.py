"""The order of the examples: the indices of each batch, a function of key and step."""

import functools
from collections.abc import Iterator

import numpy as np
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


def bucket_batch(
    key: Tensor, step: int | Tensor, counts: tuple[int, ...], rows: tuple[int, ...]
) -> tuple[int, np.ndarray]:
    """(number of a bucket, positions (rows,) of its members): the batch of one step, a pure function of key and step.

    Every epoch goes through the batches of all buckets in an order of its own, and through the members of a bucket in
    an order of its own; those that fill no batch are left out of that epoch.

    Args:
        key: (2,).
        step: 0, 1, 2 ...
        counts: members of each bucket.
        rows: those of its batches.
    """
    batches = tuple(count // size for count, size in zip(counts, rows, strict=True))
    epoch, position = divmod(int(step), sum(batches))
    order, members = _bucket_orders(tuple(key.tolist()), epoch, batches, counts)
    batch = int(order[position])
    number = int(np.searchsorted(np.cumsum(batches), batch, side="right"))
    first = batch - sum(batches[:number])
    return number, members[number][first * rows[number] : (first + 1) * rows[number]]


@functools.lru_cache(maxsize=2)
def _bucket_orders(
    words: tuple[int, int], epoch: int, batches: tuple[int, ...], counts: tuple[int, ...]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The order of an epoch's batches and of the members of each bucket; cached, as it costs as much as many steps."""
    key = random.fold_in(torch.tensor(words, dtype=torch.int32), epoch)
    keys = random.split(key, 1 + len(counts))
    order = random.permutation(keys[0], sum(batches)).numpy()
    return order, [random.permutation(keys[1 + i], count).numpy() for i, count in enumerate(counts)]


def evaluation_batches(count: int, batch: int) -> Iterator[slice]:
    """Slices that go through all examples once, in order; the last may be shorter."""
    if batch < 1:
        raise DataError(f"cannot make batches of {batch}")
    for start in range(0, count, batch):
        yield slice(start, min(start + batch, count))
