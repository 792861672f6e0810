"""Tables in text files: lines, separators and quotes; columns of numbers and of times, as spreadsheets write them."""

import csv
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from train.data import DataError
from train.data.text.files import byte_lines, unpacked
from train.files import shown

SEPARATORS = ",;\t|"
LOOKED_AT = 20
"""First rows, by which the separator is chosen."""

Row = tuple[int, list[str]]
"""The number of the line in which a row begins, and its cells."""
END = "the end"

SPACES = re.compile(r"(?<=\d)[\s']+(?=\d{3})")
GROUPED = {
    ".": re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?"),
    ",": re.compile(r"[+-]?(\d{1,3}(\.\d{3})+|\d+)?(,\d*)?(e[+-]?\d+)?", re.IGNORECASE),
}
"""Numbers that `float` does not read as they are meant, by their decimal mark: 1,234.5 and 1.234,5."""
DATES = ("%Y/%m/%d", "%Y.%m.%d", "%d.%m.%Y", "%d.%m.%y", "%m/%d/%Y", "%d/%m/%Y", "%m/%d/%y", "%d/%m/%y", "%Y-%m")
CLOCKS = ("", " %H:%M", " %H:%M:%S")


class Table(NamedTuple):
    """A table with a header: the names of its columns, their cells without white space around them, and the number of
    the line in which each row begins."""

    names: list[str]
    columns: list[list[str]]
    lines: list[int]


def read(path: Path) -> Table:
    """The table of a CSV with a header. Lines before it that begin with "#" or "sep=" are ignored, and so are empty
    lines, unless there is one column alone, and empty rows at the end.

    Raises DataError: there is no row, or no header; a row is longer than the header; a quotation mark is not closed.
    """
    with unpacked(path, "a CSV file") as file:
        lines = [line.decode("utf-8", "replace") for line in byte_lines(file.read())]
    while lines and not lines[-1]:
        lines.pop()
    start = next((i for i, line in enumerate(lines) if line and not line.startswith(("#", "sep="))), len(lines))
    (_, header), *rows = rows_of(lines[start:], separator_of(lines[start:]), str(path)) or [(1, [])]
    names, width = [name.strip() for name in header], len(header)
    rows = [(line, cells) for line, cells in rows if cells or width == 1]
    while rows and not any(rows[-1][1]):
        rows.pop()
    if not rows:
        raise DataError(f"{path} has no rows, expected a CSV with a header")
    if all(number(name) is not None or time_of(name, "iso") for name in names if name):
        raise DataError(f"{path} has no header: its first line is {', '.join(map(shown, names))}")
    for line, cells in rows:
        if any(cells[width:]):
            raise DataError(f"{path} row {line + start} has {len(cells)} cells; expected {width}, as in the header")
    cells = [[*(cell.strip() for cell in cells), *[""] * (width - len(cells))] for _, cells in rows]
    columns = [[row[i] for row in cells] for i in range(width)]
    return Table(names, columns, [line + start for line, _ in rows])


def separator_of(lines: Sequence[str]) -> str:
    """The mark that divides the most of the first rows into as many cells as the first one; a tab if none does."""
    scores = {}
    for mark in SEPARATORS:
        first, *others = [len(cells) for _, cells in _records(lines[:LOOKED_AT], mark)] or [0]
        scores[mark] = (1 + others.count(first), first) if first > 1 else (0, 0)
    best = max(SEPARATORS, key=scores.__getitem__)
    return best if any(scores[best]) else "\t"


def rows_of(lines: Sequence[str], separator: str, name: str) -> list[Row]:
    """The rows of a table, whose cells in quotation marks may go over several lines.

    Args:
        name: that of the file, for errors.

    Raises DataError: a quotation mark is not closed.
    """
    *rows, (begin, last) = _records([*lines, END], separator)
    if last != [END]:  # an open quotation mark takes all that follows it as one cell
        raise DataError(f"{name} row {begin}: a quotation mark is not closed")
    return rows


def _records(lines: Iterable[str], separator: str) -> Iterator[Row]:
    reader, begin = csv.reader((line.replace("\r", " ") + "\n" for line in lines), delimiter=separator), 1
    try:
        for cells in reader:
            yield begin, cells
            begin = reader.line_num + 1
    except csv.Error:  # a cell is longer than the reader takes
        yield begin, []


def number(cell: str, mark: str = ".") -> float | None:
    """The finite number of a cell with this decimal mark; thousands may be apart: 1,234.5, 1.234,5, 1 234.5."""
    cell = SPACES.sub("", cell.strip())
    if GROUPED[mark].fullmatch(cell):
        cell = cell.replace(",", "") if mark == "." else cell.replace(".", "").replace(",", ".")
    elif mark == ",":
        return None
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def is_number(cell: str) -> bool:
    """True if a cell is a number, with a decimal point or comma."""
    return any(number(cell, mark) is not None for mark in GROUPED)


def numbers(cells: Sequence[str]) -> list[float | None]:
    """The numbers of a column, whose decimal mark is that by which more cells are numbers; None for other cells.

    Raises DataError: both marks read all cells, as others.
    """
    point = [number(cell) for cell in cells]
    if not any("," in cell for cell in cells):
        return point
    comma = [number(cell, ",") for cell in cells]
    bad = point.count(None), comma.count(None)
    if bad[0] == bad[1] and point != comma:
        cell = next(cell for cell, a, b in zip(cells, point, comma, strict=True) if a != b)
        raise DataError(f"'{shown(cell)}' may be {number(cell):g} or {number(cell, ','):g}; expected a decimal point")
    return point if bad[0] < bad[1] else comma


class Times(NamedTuple):
    """The times of rows: the first and the last; `step` between two of them, None for months and unequal distances;
    `even` is False for the latter."""

    first: datetime
    last: datetime
    step: timedelta | None
    even: bool


def time_of(cell: str, form: str) -> datetime | None:
    """The time of a cell in this form, "iso" or one of `strptime`, in UTC if it names a zone."""
    try:
        time = datetime.fromisoformat(cell) if form == "iso" else datetime.strptime(cell, form)
    except ValueError:
        return None
    return time.astimezone(UTC).replace(tzinfo=None) if time.tzinfo else time


def times(cells: Sequence[str]) -> list[datetime | None]:
    """The times of a column; None for cells that are none, and for all if more than a tenth are none.

    Of several forms, such as day before month, that of the most cells is taken, then one in which they ascend.
    """
    cells = [cell.strip() for cell in cells]
    forms = ["iso", *(date + clock for date in DATES for clock in CLOCKS)]
    columns = [
        [time_of(cell, form) for cell in cells]
        for form in forms
        if number(cells[0]) is None and time_of(cells[0], form)
    ]
    nothing = [None] * len(cells)
    best = min(columns, key=lambda column: (column.count(None), not _ascend(column)), default=nothing)
    return best if best.count(None) * 10 <= len(cells) else nothing


def _ascend(column: Iterable[datetime | None]) -> bool:
    return all(a < b for a, b in itertools.pairwise(time for time in column if time))


def grid(stamps: Sequence[datetime]) -> tuple[list[int], Times]:
    """The number of the step of each row, (rows,) from 0 on, by its time, and the times.

    Where distances are multiples of the commonest one, or of a number of months, a row that is missing has a step too;
    where they are not, or more than a tenth of the steps had no row (as on weekends), each row is a step.

    Args:
        stamps: ascending, at least two.
    """
    step = _commonest(stamps)
    monthly = step >= timedelta(days=28)
    values = [12 * time.year + time.month for time in stamps] if monthly else stamps
    unit, distances = _commonest(values), [b - a for a, b in itertools.pairwise(values)]
    if unit and not any(distance % unit for distance in distances):
        places = [0, *itertools.accumulate(distance // unit for distance in distances)]
        if len(stamps) * 10 >= 9 * (places[-1] + 1):
            return places, Times(stamps[0], stamps[-1], None if monthly else step, True)
    return list(range(len(stamps))), Times(stamps[0], stamps[-1], None, False)


def _commonest(values: Sequence[Any]) -> Any:
    """The commonest distance between neighbours."""
    return Counter(b - a for a, b in itertools.pairwise(values)).most_common(1)[0][0]
