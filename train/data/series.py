"""Series of real values: generated ones of known noise, columns of CSV files, windows to forecast from."""

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random
from train.data import DataError
from train.data.text.files import unpacked
from train.files import shown

DAY, WEEK = 24, 168
GAPS = frozenset(("", "na", "n/a", "nan", "null", "none", "-", "?"))
HELD = {"validation": 0.1, "test": 0.2}
"""Shares of a series that come last: to be forecast, they must come after what was learned from."""


class Series(NamedTuple):
    """values (time,) float64, NaN where there is a gap; `sigma` of the noise and `decay` of its memory, if known."""

    name: str
    values: Tensor
    sigma: float | None = None
    decay: float | None = None
    first_gap: str = ""

    @property
    def gaps(self) -> int:
        return int(self.values.isnan().sum())


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
    """A column of a CSV with a header, separated by commas, semicolons or tabs.

    Args:
        column: its name; may be None if there is one column of numbers alone.

    Raises DataError: no such column; a text among the numbers (its row is named); more than a tenth are gaps.
    """
    with unpacked(path, "a CSV file") as file:
        lines = file.read().decode("utf-8-sig", "replace").strip("\r\n").splitlines()
    separator = max(",;\t", key=lambda mark: lines[0].count(mark)) if lines else ","
    rows = [(reader.line_num, row) for reader in [csv.reader(lines, delimiter=separator)] for row in reader]
    if len(rows) < 2:
        raise DataError(f"{path} has no rows, expected a CSV with a header")
    names = [name.strip() for name in rows[0][1]]
    if column is None:
        numeric = [
            name
            for i, name in enumerate(names)
            if any(_number(row[i]) is not None for _, row in rows[1:3] if i < len(row))
        ]
        if len(numeric) != 1:
            there = f"{len(numeric)} columns of numbers" + (f": {', '.join(map(shown, numeric))}" if numeric else "")
            raise DataError(f"{path} has {there}; name one with --column")
        (column,) = numeric
    if column not in names:
        raise DataError(f"{path} has no column '{column}'; there are {', '.join(map(shown, names))}")
    at, values, first_gap = names.index(column), [], ""
    for line, row in rows[1:]:
        if not row and len(names) > 1:
            continue  # in one column alone, an empty line is a gap
        cell = row[at].strip() if at < len(row) else ""
        value = _number(cell)
        if value is None and cell.lower() not in GAPS:
            raise DataError(f"{path} row {line}: '{shown(cell)}' in column '{column}' is not a number")
        if value is None and not first_gap:
            first_gap = f"row {line}"
        values.append(math.nan if value is None else value)
    series = Series(
        f"{shown(path.name)}, {shown(column)}", torch.tensor(values, dtype=torch.float64), None, None, first_gap
    )
    if series.gaps * 10 > len(values):
        raise DataError(
            f"{path}: {series.gaps} of {len(values)} values of '{column}' are gaps, the first in {first_gap}"
        )
    return series


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class Windows(NamedTuple):
    """Numbers of the first values to forecast, per part: an origin t has its window before t, its targets from t on."""

    train: Tensor
    validation: Tensor
    test: Tensor


def windows(series: Series, window: int, horizon: int) -> Windows:
    """The origins of three parts, one after the other in time, whose windows and targets have no gap.

    Targets of one part are in no other one; windows may reach back into the part before.

    Raises DataError: a part has no origin.
    """
    time = len(series.values)
    test = time - int(HELD["test"] * time)
    validation = test - int(HELD["validation"] * time)
    missing = torch.cat([torch.zeros(1), series.values.isnan().cumsum(0)])  # gaps before t
    parts = []
    for name, first, end in (("training", window, validation), ("validation", validation, test), ("test", test, time)):
        origins = torch.arange(max(first, window), max(end - horizon + 1, first, window))
        whole = missing[origins + horizon] == missing[origins - window]
        parts.append(origins[whole])
        if not len(parts[-1]):
            raise DataError(
                f"{series.name}: {time} values have no {name} window of {window} and a horizon of {horizon} without gap"
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
    return {"data": series.name, "values": time, "parts": last, "windows": windows, "gaps": whole}
