"""Error, agreement, size and time of several forms of one function, beside the function itself."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import tree
from core.tree import Tree


class Row(NamedTuple):
    """A form beside the eager function in float32.

    error: the largest difference of an output, relative to the largest output.
    agreement: the share of positions with the same argmax; None of outputs that are no logits.
    bytes: of the package, or of the parameters of the function.
    milliseconds: of a call, the median; `ratio` is that over the function's, of neighbouring calls.
    build: seconds that it took to make.
    integers: products with 8-bit integers, of how many.
    """

    form: str
    error: float
    agreement: float | None
    bytes: int
    milliseconds: float | None
    ratio: float | None
    build: float
    integers: str = ""


def difference(ours: Tree, theirs: Tree) -> float:
    """The largest difference of the floating-point leaves, relative to the largest value of each."""
    worst = 0.0
    for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
        if a.is_floating_point() and a.numel():
            scale = float(a[a.isfinite()].abs().max()) if a.isfinite().any() else 1.0
            away = torch.where(a == b, 0.0, (a - b).abs())  # an infinity on both sides is no difference
            worst = max(worst, float(away.max()) / max(scale, 1e-12))
    return worst


def agreement(ours: Tensor, theirs: Tensor, axis: int) -> float:
    """Share of positions whose largest value along an axis is at the same index."""
    return float((ours.argmax(axis) == theirs.argmax(axis)).float().mean())


@torch.no_grad()
def timed(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, taken in turns so that a busy machine slows all of them; two rounds before do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if i >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """The median of the ratios of neighbouring calls."""
    return statistics.median(a / b for a, b in zip(seconds, reference, strict=True))


HEAD = ("form", "error", "same argmax", "MB", "ms", "/ eager", "built in", "8-bit products")


def table(rows: Sequence[Row]) -> str:
    """The rows as text, in columns."""
    lines = [HEAD]
    for row in rows:
        lines.append(
            (
                row.form,
                f"{row.error:.1e}" if row.error else "0",
                "" if row.agreement is None else f"{row.agreement:.2%}",
                f"{row.bytes / 1e6:.2f}",
                "" if row.milliseconds is None else f"{row.milliseconds:.2f}",
                "" if row.ratio is None else f"{row.ratio:.2f}",
                f"{row.build:.1f} s" if row.build else "",
                row.integers,
            )
        )
    used = [i for i in range(len(HEAD)) if any(line[i] for line in lines[1:])]
    widths = [max(len(line[i]) for line in lines) for i in used]
    return "\n".join(
        "  ".join(
            line[i].ljust(w) if i in (0, 7) else line[i].rjust(w) for i, w in zip(used, widths, strict=True)
        ).rstrip()
        for line in lines
    )
