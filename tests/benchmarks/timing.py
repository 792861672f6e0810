"""Times measured side by side: every round runs each contestant once, so that drift of the machine meets all alike."""

import random
import statistics
import time
from collections.abc import Callable


def interleaved(
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of one call of each contestant, over `rounds` rounds that alternate between them.

    Each round has another order, since whoever ran before may leave threads spinning or caches filled.

    clock: `time.process_time` counts the time of this process alone, where other work runs beside it.
    """
    for run in contestants.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(contestants), len(contestants)):
            run = contestants[name]
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def report(title: str, medians: dict[str, float], ours: str, targets: dict[str, float]) -> None:
    """Print the medians and, for each target, the ratio ours / other beside the ratio that is asked for."""
    print(title)
    for name, value in medians.items():
        print(f"  {name:<36} {value * 1e3:10.3f} ms")
    for other, target in targets.items():
        ratio = medians[ours] / medians[other]
        verdict = "reached" if ratio <= target else "missed"
        print(f"  {ours} / {other}: {ratio:.3f} (target at most {target}: {verdict})")
