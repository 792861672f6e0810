"""Series of real values: generated ones of known noise, columns of CSV files, windows to forecast from."""

import bisect
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random
from train.data import DataError, table
from train.files import shown

DAY, WEEK = 24, 168
GAPS = frozenset(("", "na", "n/a", "nan", "null", "none", "-", "?"))
HELD = {"validation": 0.1, "test": 0.2}
"""Shares of a series that come last: to be forecast, they must come after what was learned from."""


class Series(NamedTuple):
    """values (time,) float64, NaN where there is a gap; `sigma` of the noise and `decay` of its memory, if known.

    `first_gap` names its row in the file, from which `times` come too, if it has some.
    """

    name: str
    values: Tensor
    sigma: float | None = None
    decay: float | None = None
    first_gap: str = ""
    times: table.Times | None = None

    @property
    def gaps(self) -> int:
        """Number of missing values."""
        return int(self.values.isnan().sum())

    def label(self, step: int) -> str:
        """The time of a step, which may come after the end; its number where that is not known."""
        if self.times is None or self.times.step is None:
            return str(step)
        time = self.times.first + step * self.times.step
        return str(time).removesuffix(" 00:00:00") if self.times.step.seconds == 0 else str(time)


def seasons(key: Tensor, steps: int = 8736, sigma: float = 0.5, decay: float = 0.8) -> Series:
    """A trend, two seasons and autoregressive noise, as an hourly load might have: 52 weeks.

        y_t = 0.001 t + 3 sin(2 pi t / 24) + 2 sin(2 pi t / 168 + 1) + e_t,   e_t = decay e_(t-1) + sigma n_t

    Args:
        key: (2,).
        steps: hours.
        sigma: standard deviation of what is new in an hour; nobody can forecast it.
        decay: in [0, 1).
    """
    t, noise, last = torch.arange(steps, dtype=torch.float64), [], 0.0
    for n in random.normal(key, (steps,)).double().tolist():
        last = decay * last + sigma * n
        noise.append(last)
    daily, weekly = torch.sin(2 * math.pi * t / DAY), torch.sin(2 * math.pi * t / WEEK + 1.0)
    values = 0.001 * t + 3 * daily + 2 * weekly + torch.tensor(noise, dtype=torch.float64)  # (steps,)
    return Series("seasons", values, sigma, decay)


def error_ahead(series: Series, steps: int) -> float:
    """Root mean square error of the best forecast there is of `seasons`, a number of steps ahead.

    Of e_(t+h) the part decay^h e_t is known, and the rest has variance sigma^2 (1 - decay^(2 h)) / (1 - decay^2).
    """
    return series.sigma * math.sqrt((1 - series.decay ** (2 * steps)) / (1 - series.decay**2))


def least_error(series: Series, horizon: int) -> float:
    """`error_ahead` over all of 1 to `horizon` steps."""
    return math.sqrt(sum(error_ahead(series, h) ** 2 for h in range(1, horizon + 1)) / horizon)


def read_column(path: Path, column: str | None) -> Series:
    """A column of a CSV with a header (`table.read`). Its numbers may have a decimal comma.

    Where another column has times, they must ascend, and a row that is missing between equal distances is a gap.

    Args:
        column: its name; may be None if there is one column of numbers alone, not counting columns without a name.

    Raises DataError: no such column; a text among the numbers, or a time that does not come after that of the row
    before (its row is named); more than a tenth are gaps.
    """
    content = table.read(path)
    at = _column(path, content, column)
    name, cells = content.names[at], content.columns[at]
    try:
        numbers = table.numbers(cells)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    for line, cell, value in zip(content.lines, cells, numbers, strict=True):
        if value is None and cell.lower() not in GAPS:
            raise DataError(f"{path} row {line}: '{shown(cell)}' in column '{name}' is not a number")
    steps, times = _steps(path, content, at)
    values = torch.full((steps[-1] + 1,), math.nan, dtype=torch.float64)
    values[steps] = torch.tensor([math.nan if value is None else value for value in numbers], dtype=torch.float64)
    known = values.isfinite().nonzero()[:, 0]
    values = values[: int(known[-1]) + 1] if len(known) else values  # rows after the last value may be the future's
    series = Series(f"{shown(path.name)}, {shown(name)}", values, times=times)
    if series.gaps:
        gap = int(values.isnan().nonzero()[0])
        row = bisect.bisect_left(steps, gap)  # the first row that is not before the gap
        where = f"row {content.lines[row]}" if steps[row] == gap else f"the gap before row {content.lines[row]}"
        series = series._replace(first_gap=where)
    if series.gaps * 10 > len(values):
        problem = f"{series.gaps} of {len(values)} values of '{name}' are gaps, the first in {series.first_gap}"
        raise DataError(f"{path}: {problem}")
    return series


def _column(path: Path, content: table.Table, column: str | None) -> int:
    """The number of the column with this name, or of that with numbers."""
    names = content.names
    if column is None:
        first = [next((cell for cell in cells if cell.lower() not in GAPS), "") for cells in content.columns]
        numeric = [name for name, cell in zip(names, first, strict=True) if name and table.is_number(cell)]
        if len(numeric) != 1:
            there = f"{len(numeric)} columns of numbers: {', '.join(map(shown, numeric))}"
            there = there if numeric else f"no column of numbers among {', '.join(map(shown, names))}"
            raise DataError(f"{path} has {there}; name one with --column")
        (column,) = numeric
    if names.count(column) != 1:
        problem = f"no column '{column}'" if column not in names else f"{names.count(column)} columns '{column}'"
        raise DataError(f"{path} has {problem}; there are {', '.join(map(shown, names))}")
    return names.index(column)


def _steps(path: Path, content: table.Table, at: int) -> tuple[list[int], table.Times | None]:
    """The step of each row, and the times of the first column that has times, if there is one."""
    rows = range(len(content.lines))
    for i, cells in enumerate(content.columns):
        stamps = [None] if i == at else table.times(cells)
        if len(rows) < 2 or not any(stamps):
            continue
        for line, cell, before, time in zip(content.lines[1:], cells[1:], stamps, stamps[1:], strict=False):
            if time is None:
                raise DataError(f"{path} row {line}: '{shown(cell)}' in column '{content.names[i]}' is no time")
            if time <= before:
                problem = (
                    f"'{shown(cell)}' in column '{content.names[i]}' does not come after the time of the row before"
                )
                raise DataError(f"{path} row {line}: {problem}; expected one series, in order of time")
        return table.grid(stamps)
    return list(rows), None


class Windows(NamedTuple):
    """Numbers of the first values to forecast, per part: an origin t has its window before t, its targets from t on."""

    train: Tensor
    validation: Tensor
    test: Tensor


def windows(series: Series, window: int, horizon: int, season: int = 1) -> Windows:
    """The origins of three parts, one after the other in time, whose windows and targets have no gap.

    Targets of one part are in no other one; windows may reach back into the part before.

    Args:
        season: values before the origin without a gap that are needed too, if these are more than those of a window.

    Raises DataError: a part has no origin.
    """
    reach, before = max(window, season), f"window of {window}" if window >= season else f"season of {season}"
    time = len(series.values)
    test = time - int(HELD["test"] * time)
    validation = test - int(HELD["validation"] * time)
    missing = torch.cat([torch.zeros(1), series.values.isnan().cumsum(0)])  # gaps before t
    parts = []
    for name, first, end in (("training", reach, validation), ("validation", validation, test), ("test", test, time)):
        origins = torch.arange(max(first, reach), max(end - horizon + 1, first, reach))
        whole = missing[origins + horizon] == missing[origins - reach]
        parts.append(origins[whole])
        if not len(parts[-1]):
            raise DataError(
                f"{series.name}: {time} values have no {name} {before} and a horizon of {horizon} without gap"
            )
    return Windows(*parts)


def cut(values: Tensor, origins: Tensor, window: int, horizon: int) -> tuple[Tensor, Tensor]:
    """(windows (..., window), targets (..., horizon)) at origins (...)."""
    steps = torch.arange(-window, horizon, device=values.device)
    both = values[origins[..., None] + steps]  # (..., window + horizon)
    return both[..., :window], both[..., window:]


def seasonal_naive(values: Tensor, origins: Tensor, horizon: int, season: int) -> Tensor:
    """The last values of the same phase: y_(t+h) = y_(t+h-season), a multiple of it if h is beyond. (..., horizon)."""
    steps = torch.arange(horizon)
    return values[origins[..., None] + steps - season * (steps // season + 1)]


def facts(series: Series, origins: Windows) -> dict[str, Any]:
    """Names and values of a series, for `train.data.understood`."""
    time = len(series.values)
    last = f"the last {HELD['test']:.0%} of the series for testing, {HELD['validation']:.0%} before it for validation"
    whole = None if not series.gaps else f"{series.gaps} values, the first in {series.first_gap}; no window has one"
    windows = {name: len(part) for name, part in origins._asdict().items()}
    return {
        "data": series.name,
        "values": time,
        "times": _span(series.times),
        "parts": last,
        "windows": windows,
        "gaps": whole,
    }


def _span(times: table.Times | None) -> str | None:
    if times is None:
        return None
    span = " to ".join(str(time).removesuffix(" 00:00:00") for time in (times.first, times.last))
    return span if times.even else f"{span}, at unequal distances: each row counts as a step"
