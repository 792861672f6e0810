"""The description of their data that scripts print at the start."""

import os
from pathlib import Path

import pytest

from train.data.understood import line_of, understood


def test_facts_are_lines_in_two_columns():
    lines = []
    facts = {"text": "input.txt", "characters": 1_115_394, "left out": None, "skipped": [], "classes": {"a": 1200}}
    understood(lines.append, facts)
    assert lines == ["text        input.txt", "characters  1,115,394", "classes     1: a (1,200)"]
    understood(lines.append, {})
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (True, "yes"),
        (0.123456, "0.1235"),
        ({"cat": 3, "dog": 12345}, "2: cat (3), dog (12,345)"),
        ([(Path("a/x.png"), "is empty"), (Path("y"), "is a link")], "2: a/x.png is empty; y is a link"),
        (["a", Path("b")], "2: a, b"),
        (list(range(1000)), "1,000: 0, 1, 2, 3, 4, 5, 6, 7 and 992 more"),
        ({str(i): i for i in range(9)}, "9: 0 (0), 1 (1), 2 (2), 3 (3), 4 (4), 5 (5), 6 (6), 7 (7) and 1 more"),
        (Path(os.fsdecode(b"caf\xe9\n")), "caf\\xe9\\n"),
        ([Path(os.fsdecode(b"\xff"))], "1: \\xff"),
        ({os.fsdecode(b"\xff"): 1}, "1: \\xff (1)"),
        ("", ""),
    ],
)
def test_a_value_on_one_line(value, expected):
    assert line_of(value) == expected
    line_of(value).encode()
