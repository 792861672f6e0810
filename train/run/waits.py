"""Time that a loop waits for its batches."""

import time
from collections.abc import Iterable, Iterator
from typing import Any


class Waits:
    """Clock of the batches of a loop."""

    def __init__(self):
        self._seconds, self._batches = 0.0, 0

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Iterate over the batches, and count the seconds that each takes to come."""
        remaining = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(remaining)
            except StopIteration:
                return
            self._seconds += time.perf_counter() - asked
            self._batches += 1
            yield batch

    def mean(self) -> float:
        """Seconds per batch since the last call."""
        seconds, self._seconds, batches, self._batches = self._seconds, 0.0, self._batches, 0
        return seconds / max(1, batches)
