"""Differences, agreement and the table."""

import math

import pytest
import torch

from train.ship import compare
from train.ship.compare import Row


def test_differences_are_relative_to_the_largest_value():
    ours, theirs = [torch.tensor([1.0, -4.0]), torch.tensor([1, 2])], [torch.tensor([1.0, -3.0]), torch.tensor([1, 2])]
    assert compare.difference(ours, theirs) == 0.25
    infinite = torch.tensor([-math.inf, 2.0])
    assert compare.difference(infinite, infinite.clone()) == 0.0
    assert compare.difference(infinite, torch.tensor([0.0, 2.0])) == math.inf


def test_agreement_and_ratio():
    logits = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]])
    assert compare.agreement(logits, logits + 1, -1) == 1.0
    assert compare.agreement(logits, logits.flip(1), -1) == 0.0
    assert compare.agreement(logits, logits.flip(1), 1) == 0.0
    assert compare.ratio([2.0, 4.0, 90.0], [1.0, 4.0, 3.0]) == 2.0
    seconds = compare.timed({"a": lambda: None, "b": lambda: None}, 3)
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_table_has_the_columns_that_are_used():
    rows = [
        Row("eager", 0.0, None, 1_500_000, 2.0, 1.0, 0.0),
        Row("onnx-int8", 0.01, None, 400_000, 1.0, 0.5, 3.2, "4 of 5"),
    ]
    assert compare.table(rows).splitlines() == [
        "form         error    MB    ms  / eager  built in  8-bit products",
        "eager            0  1.50  2.00     1.00",
        "onnx-int8  1.0e-02  0.40  1.00     0.50     3.2 s  4 of 5",
    ]
    with pytest.raises(ValueError):
        compare.difference([torch.ones(1)], [])
