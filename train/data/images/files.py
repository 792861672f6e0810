"""Batches of image files, decoded by worker processes.

One decoder serves training and evaluation:

    train = listing("photographs/train")
    test = listing("photographs/val", train.classes)
    with Decoder(workers=4) as decoder:
        for images, labels in decoder.train_batches(train, key, range(first, steps), 256, 224):
            ...
        for images, labels in decoder.evaluation_batches(test, 256, 224, resize=256):
            ...
    decoder.skipped  # (file, reason) of those that could not be read
"""

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core import random
from train.data import DataError
from train.data.batching import epoch_batch, evaluation_batches
from train.data.images import augment
from train.data.images.folders import Files, listing
from train.data.images.picture import Cut, Member, decode
from train.data.images.workers import Pool, Task

__all__ = ["Decoder", "Files", "listing"]

log = logging.getLogger(__name__)

BLOCK = 16
"""Steps whose random rectangles are computed in one call, which is faster."""


class Request(NamedTuple):
    """A batch to come: the indices of its examples, and for each the random numbers for `picture.decode`."""

    indices: list[int]
    draws: Sequence[np.ndarray | None]


class Decoder:
    """Worker processes that read files a few batches ahead. Close it, or use it in a `with` statement.

    The batches and their pixels do not depend on the number of workers. A file that cannot be read is logged once and
    skipped: in training the next readable one of the listing takes its place, with its own label; in evaluation it is
    left out. Several iterations may run at once, such as an evaluation during training. Needs a system with `fork` and
    `exec`: Linux or macOS.

    Args:
        workers: number of processes; 0 decodes in this one.
        ahead: number of batches that are decoded in advance.
        reduce: in training, decode a JPEG at a half, a fourth or an eighth of its size where that is still twice as
            large as needed: much faster with large photographs, and a pixel differs by less than 1/255 on average.
    """

    def __init__(self, workers: int = 2, ahead: int = 2, reduce: bool = True):
        if workers < 0 or ahead < 0:
            raise DataError(f"a decoder has {workers} workers, {ahead} batches ahead; expected 0 or more of both")
        self._ahead, self._reduce = ahead if workers else 0, reduce
        self._bad: dict[Path | Member, str] = {}
        self._pool = Pool(workers)

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    @property
    def skipped(self) -> tuple[tuple[Path | Member, str], ...]:
        """(file, reason) of every file that could not be read, in the order of their first use."""
        return tuple(self._bad.items())

    def train_batches(
        self,
        files: Files,
        key: Tensor,
        steps: range,
        batch: int,
        size: int,
        channels: int = 3,
        scale: tuple[float, float] | None = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        rows: slice = slice(None),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Random resized crops, a function of key and step: images (batch, channels, size, size) uint8, labels
        (batch,) int64, one pair per step.

        With `order, site = random.sites(key, 2)`, the examples of a step are `epoch_batch(order, step, ...)`, and their
        rectangles the `augment.boxes` for the keys `random.sites(random.fold_in(site, step), batch)`.

        Args:
            key: (2,).
            scale, ratio: ranges of the rectangles' area and width / height, see `augment.boxes`. With `scale` None the
                picture is scaled to cover the square instead, and its middle cut out.
            rows: the rows of each batch that are decoded and given, for a process that trains on a part of it.

        Raises DataError: nothing can be read, too few files, a worker died.
        """
        cut = _cut(size, channels, None if scale else size, ratio=ratio if scale else None, reduce=self._reduce)
        requests = _requests(len(files.paths), key, steps, batch, scale, ratio)
        parts = (Request(indices[rows], draws[rows]) for indices, draws in requests)
        return self._batches(files, parts, cut, training=True)

    def evaluation_batches(
        self,
        files: Files,
        batch: int,
        size: int,
        channels: int = 3,
        resize: int | None = None,
        interpolation: str = "bilinear",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All pictures once, in order, in the form of `train_batches`: scaled so that the shorter side has `resize`
        pixels (`size` if None), the middle cut out. Batches with unreadable files, and the last one, are shorter.

        Raises DataError: nothing can be read, a worker died.
        """
        parts = (range(s.start, s.stop) for s in evaluation_batches(len(files.paths), batch))
        requests = (Request(list(indices), [None] * len(indices)) for indices in parts)
        cut = _cut(size, channels, resize or size, interpolation=interpolation)
        return self._batches(files, requests, cut, training=False)

    def _batches(
        self, files: Files, requests: Iterable[Request], cut: Cut, training: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        requests, waiting, any_read = iter(requests), deque(), False
        try:
            while True:
                for request in itertools.islice(requests, 1 + self._ahead - len(waiting)):
                    waiting.append(self._start(files, request, cut, training))
                if not waiting:
                    break
                images, labels = self._finish(files, *waiting.popleft(), training)
                if len(labels):
                    any_read = True
                    yield images, labels
        finally:
            for _, task in waiting:
                self._pool.drop(task)
        if not any_read:
            self._readable(files, 0)

    def _start(self, files: Files, request: Request, cut: Cut, training: bool) -> tuple[Request, Task]:
        """Start decoding a batch, without the files that are known to be unreadable."""
        indices, draws = request
        if training:
            indices = [self._readable(files, index) for index in indices]
        paths = [files.paths[index] for index in indices]
        rows = [
            (row, path if isinstance(path, Member) else str(path), draws[row])
            for row, path in enumerate(paths)
            if path not in self._bad
        ]
        return Request(indices, draws), self._pool.start(cut, rows, len(indices))

    def _finish(self, files: Files, request: Request, task: Task, training: bool) -> tuple[Tensor, Tensor]:
        indices, draws = request
        pixels, unreadable = self._pool.finish(task)
        for row, reason in unreadable:
            self._skip(files.paths[indices[row]], reason)
            if training:
                indices[row], pixels[row] = self._other(files, indices[row], task.cut, draws[row])
        if not training:
            rows = [row for row, index in enumerate(indices) if files.paths[index] not in self._bad]
            if len(rows) < len(indices):
                indices, pixels = [indices[row] for row in rows], pixels[rows]
        return torch.from_numpy(pixels), files.labels[indices]

    def _skip(self, path: Path | Member, reason: str) -> None:
        if path not in self._bad:
            log.warning("skipped: %s", reason)
            self._bad[path] = reason

    def _readable(self, files: Files, index: int) -> int:
        """The first example from `index` on that is not known to be unreadable."""
        count = len(files.paths)
        for other in range(index, index + count):
            if files.paths[other % count] not in self._bad:
                return other % count
        raise DataError(f"none of the {count} pictures can be read; {self._bad[files.paths[0]]}")

    def _other(self, files: Files, index: int, cut: Cut, draws: np.ndarray | None) -> tuple[int, np.ndarray]:
        while True:
            index = self._readable(files, index)
            try:
                return index, decode(files.paths[index], cut, draws)
            except DataError as error:
                self._skip(files.paths[index], str(error))


def _cut(size: int, channels: int, resize: int | None, **options) -> Cut:
    if channels not in (1, 3):
        raise DataError(f"channels is {channels}, expected 1 or 3")
    if size < 1 or (resize is not None and resize < size):
        raise DataError(f"cannot cut {size} pixels out of pictures scaled to {resize}")
    return Cut(size, channels, resize, **options)


def _requests(
    count: int, key: Tensor, steps: range, batch: int, scale: tuple[float, float] | None, ratio: tuple[float, float]
) -> Iterator[Request]:
    order, site = random.sites(key.cpu(), 2)
    for block in (steps[first : first + BLOCK] for first in range(0, len(steps), BLOCK)):
        if scale:
            keys = random.sites(random.fold_in(site, torch.tensor(block)), batch).transpose(0, 1)  # (steps, batch, 2)
            several = torch.cat(augment.rectangle_draws(keys, scale, ratio), -1).numpy()  # (steps, batch, numbers)
        for i, step in enumerate(block):
            yield Request(epoch_batch(order, step, count, batch).tolist(), several[i] if scale else [None] * batch)
