"""Series: the generated one and its noise, columns of CSV files, windows, forecasts without a net."""

import math

import pytest
import torch

from core import random
from train.data import DataError
from train.data import series as data


def test_best_forecast_of_the_generated_series_has_the_error_that_is_said():
    """The noise alone: what remains when trend and seasons are known, forecast by decay^h e_t."""
    series = data.seasons(random.key(0), 20_000)
    t = torch.arange(20_000, dtype=torch.float64)
    known = 0.001 * t + 3 * torch.sin(2 * math.pi * t / 24) + 2 * torch.sin(2 * math.pi * t / 168 + 1.0)
    noise, horizon = series.values - known, 24
    origins = torch.arange(1, 20_000 - horizon)
    errors = noise[origins[:, None] + torch.arange(horizon)] - noise[origins - 1, None] * 0.8 ** torch.arange(1, 25)
    assert float(errors.square().mean().sqrt()) == pytest.approx(data.least_error(series, horizon), rel=0.03)
    assert float(errors[:, 0].square().mean().sqrt()) == pytest.approx(0.5, rel=0.02)
    assert data.error_ahead(series, 1) == pytest.approx(0.5)


def test_windows_and_targets_of_the_parts():
    series = data.Series("s", torch.arange(100, dtype=torch.float64))
    parts = data.windows(series, 10, 5)
    assert parts.train.tolist() == list(range(10, 66)) and parts.validation.tolist() == list(range(70, 76))
    assert parts.test.tolist() == list(range(80, 96))  # no target of one part is in another
    x, y = data.cut(series.values, parts.test[:2], 10, 5)
    assert x.tolist() == [list(range(70, 80)), list(range(71, 81))] and y[0].tolist() == list(range(80, 85))
    with pytest.raises(DataError, match="100 values have no training window of 90 and a horizon of 5"):
        data.windows(series, 90, 5)
    with pytest.raises(DataError, match="no training season of 80 and a horizon of 5"):
        data.windows(series, 10, 5, 80)


def test_no_window_has_a_gap():
    values = torch.arange(100, dtype=torch.float64)
    values[40] = math.nan
    parts = data.windows(data.Series("s", values), 10, 5)
    assert set(range(10, 66)) - set(parts.train.tolist()) == set(range(36, 51))
    assert all(part.isfinite().all() for part in data.cut(values, parts.train, 10, 5))


def test_seasonal_naive_repeats_the_last_season():
    values = torch.arange(12, dtype=torch.float64)
    assert data.seasonal_naive(values, torch.tensor([9]), 5, 3).tolist() == [[6, 7, 8, 6, 7]]


@pytest.mark.parametrize(("separator", "header"), [(",", "day,load"), (";", "day;load"), ("\t", "day\tload")])
def test_columns(tmp_path, separator, header):
    path = tmp_path / "a.csv"
    cells = ["1.5", "2", "NA", "4", *["5"] * 20]
    path.write_text("\n".join([header, *(f"d{i}{separator}{cell}" for i, cell in enumerate(cells))]), encoding="utf-8")
    series = data.read_column(path, None)  # the only column of numbers
    assert series.values[:2].tolist() == [1.5, 2.0] and series.gaps == 1 and series.first_gap == "row 4"
    facts = data.facts(series, data.windows(series._replace(values=torch.ones(100)), 10, 5))
    assert facts["gaps"] == "1 values, the first in row 4; no window has one"


def dated(days, values="12345"):
    return "date,load\n" + "".join(f"2020-01-{day:02d},{values[day % len(values)]}\n" for day in days)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dated([2, 1]), "row 3: '2020-01-01' in column 'date' does not come after the time of the row before"),
        (dated([1, 2, 2, 3]), "row 4: '2020-01-02' in column 'date' does not come after"),
        (dated(range(1, 20)) + "Total,90\n", "row 21: 'Total' in column 'date' is no time"),
        ("load,load\n1,2\n", "2 columns of numbers: load, load"),
        ("day,load\nmo,5%\n", "no column of numbers among day, load; name one with --column"),
        ('day,load\nmo,"1,234"\n', "'1,234' may be 1234 or 1.234"),
    ],
)
def test_tables_that_are_refused(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        data.read_column(path, None)


def test_missing_row_is_a_gap(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(dated([*range(1, 10), *range(11, 20)]), encoding="utf-8")
    series = data.read_column(path, None)
    assert series.values.isnan().nonzero().tolist() == [[9]] and series.first_gap == "the gap before row 11"
    assert series.label(19) == "2020-01-20" and data.Series("s", series.values).label(19) == "19"
    span = data.facts(series, data.windows(series._replace(values=torch.ones(100)), 10, 5))["times"]
    assert span == "2020-01-01 to 2020-01-19"


def test_rows_after_the_last_value_are_not_of_the_series(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(dated(range(1, 11)) + "2020-01-11,\n2020-01-12,NA\n,\n,\n", encoding="utf-8")
    series = data.read_column(path, None)
    assert len(series.values) == 10 and not series.gaps and series.label(10) == "2020-01-11"


def test_column_without_a_name_is_an_index(tmp_path):
    """As pandas writes one."""
    path = tmp_path / "a.csv"
    path.write_text(
        ",date,load\n0,2020-01-01,\n1,2020-01-02,5\n" + "".join(f"{i},2020-01-{i + 1:02d},5\n" for i in range(2, 20)),
        encoding="utf-8",
    )
    assert data.read_column(path, None).values[1:].tolist() == [5.0] * 19


def test_empty_line_of_one_column_is_a_gap(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("load\n" + "1\n" * 15 + "\n" + "2\n" * 15, encoding="utf-8")
    assert data.read_column(path, "load").first_gap == "row 17"
