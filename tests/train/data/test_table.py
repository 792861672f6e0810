"""Tables: separators, quotes, numbers and times as spreadsheets write them; what is refused."""

from datetime import datetime, timedelta

import pytest

from train.data import DataError, table


@pytest.fixture
def read(tmp_path):
    def read(content):
        path = tmp_path / "a.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return table.read(path)

    return read


@pytest.mark.parametrize(
    "content",
    [
        "day,load\nmo,1\ntu,2\n",
        "day;load\r\nmo;1\r\ntu;2\r\n",
        "day\tload\rmo\t1\rtu\t2\r",
        "day|load\nmo|1\n\ntu|2\n\n\n",
        b"\xef\xbb\xbf# exported\n\nday, load\n mo , 1\ntu,2",
        "sep=;\nday;load\nmo;1\ntu;2",
        'day,load,\n"mo",1,\n"tu",2,\n',
    ],
)
def test_forms(read, content):
    out = read(content)
    assert out.names[:2] == ["day", "load"] and out.columns[:2] == [["mo", "tu"], ["1", "2"]]


def test_cells_over_several_lines(read):
    out = read('note,load\n"one\ntwo, three",1\nfour,2\n')
    assert out.columns == [["one\ntwo, three", "four"], ["1", "2"]] and out.lines == [2, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('a,b\n1,2\n"3,4\n5,6\n', "row 3: a quotation mark is not closed"),
        ('a,b\n1,2\n"3,4\n' + "5,6\n" * 50_000, "row 3: a quotation mark is not closed"),
        ('a,b\n1,2\n"3,4\n' + 9 * (50_000 * "5" + "\n"), "row 3: a quotation mark is not closed"),
        ("a,b\n1,2\n3,4,5\n", "row 3 has 3 cells; expected 2, as in the header"),
        ("2020-01-01,1.5\n2020-01-02,2\n", "has no header: its first line is 2020-01-01, 1.5"),
        ("# nothing\n", "has no rows, expected a CSV with a header"),
        ("", "has no rows, expected a CSV with a header"),
    ],
)
def test_errors(read, content, message):
    with pytest.raises(DataError, match=message):
        read(content)


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1.5", "-2", "1e3", "x"], [1.5, -2.0, 1000.0, None]),
        (["1,5", "2", "1.234,25"], [1.5, 2.0, 1234.25]),
        (["1,234.5", "7", "1,234,567"], [1234.5, 7.0, 1234567.0]),
        (["1,234", "12.5"], [1234.0, 12.5]),
        (["1 234,5", "1\u202f234\u00a0567", "0,5"], [1234.5, 1234567.0, 0.5]),
        (["1'234.5", "inf", "nan", ""], [1234.5, None, None, None]),
        (["1,5", "2,5", "total"], [1.5, 2.5, None]),
    ],
)
def test_numbers(cells, values):
    assert table.numbers(cells) == values


def test_numbers_that_are_read_in_two_ways_are_refused():
    with pytest.raises(DataError, match="'1,234' may be 1234 or 1.234; expected a decimal point"):
        table.numbers(["7", "1,234"])


@pytest.mark.parametrize(
    "cells",
    [
        ["2020-01-31", "2020-02-01"],
        ["31.01.2020", "01.02.2020"],
        ["1/31/2020", "2/1/2020"],
        ["31/01/2020 00:00", "01/02/2020 00:00"],
        ["2020-01-31T00:00:00Z", "2020-02-01T01:00:00+01:00"],
        ["2020/01/31", "2020/02/01"],
    ],
)
def test_times(cells):
    assert table.times(cells) == [datetime(2020, 1, 31), datetime(2020, 2, 1)]


def test_day_and_month_are_told_apart_by_the_order():
    assert table.times(["1/2/2020", "1/3/2020"])[1] == datetime(2020, 1, 3)
    assert table.times(["5/1/2020", "4/2/2020"])[1] == datetime(2020, 2, 4)
    assert table.times(["a", "b"]) == table.times(["1", "2"]) == [None, None]


@pytest.mark.parametrize(
    ("stamps", "places", "step"),
    [
        ([datetime(2020, 1, day) for day in (*range(1, 16), *range(17, 30))], [*range(15), *range(16, 29)], 24),
        ([datetime(2020, month, 28) for month in range(1, 13)], list(range(12)), None),
        ([datetime(2020, 1, day) for day in (1, 2, 3, 6, 7, 8, 9, 10, 13)], list(range(9)), None),  # no weekends
        ([datetime(2020, 1, 1, hour, 3 * (hour == 4)) for hour in range(8)], list(range(8)), None),
    ],
)
def test_steps_of_times(stamps, places, step):
    numbers, times = table.grid(stamps)
    assert numbers == places and times.step == (step and timedelta(hours=step))
    assert times.even == (step is not None or len(stamps) == 12)
