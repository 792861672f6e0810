"""Ranges of numeric flags."""

from dataclasses import dataclass

import pytest

from train.run import Common, Count, Fraction, Natural, NonNegative, Positive, Rate, Share, Shared, flags


@dataclass(frozen=True)
class Args:
    batch: Count = 4
    size: Count | None = None
    widths: tuple[Count, ...] = (2, 3)
    strength: Natural = 0
    learning_rate: Positive = 0.1
    weight: NonNegative = 0.0
    flip: Share = 1.0
    dropout: Rate = 0.0
    part: Fraction = 0.5
    word: str = "x"
    common: Shared = Common()


def test_values_in_range():
    flags.check(Args())
    flags.check(Args(10**400, 1, (), 5, 1e-300, 1e300, 0.0, 0.999, 0.999, "0", Common(-3)))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (Args(batch=0), "--batch is 0; expected at least 1"),
        (Args(size=-3), "--size is -3; expected at least 1"),
        (Args(widths=(2, 0)), "--widths is 0; expected at least 1"),
        (Args(strength=-1), "--strength is -1; expected at least 0"),
        (Args(learning_rate=0.0), "--learning-rate is 0.0; expected a number above 0"),
        (Args(learning_rate=float("inf")), "--learning-rate is inf; expected a number above 0"),
        (Args(weight=float("nan")), "--weight is nan; expected at least 0"),
        (Args(weight=-1e-9), "--weight is -1e-09; expected at least 0"),
        (Args(flip=1.5), r"--flip is 1.5; expected a number in \[0, 1\]"),
        (Args(dropout=1.0), r"--dropout is 1.0; expected a number in \[0, 1\)"),
        (Args(part=0.0), r"--part is 0.0; expected a number in \(0, 1\)"),
        (Args(part=1.0), r"--part is 1.0; expected a number in \(0, 1\)"),
        (Args(common=Common(save_every=0)), "--save-every is 0; expected at least 1"),
    ],
)
def test_values_out_of_range(args, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        flags.check(args)


def test_values_of_nested_arguments():
    names = flags.values(Args())
    assert names["batch"] == 4 and names["common.save_every"] == 500 and "common" not in names
    assert flags.flag("common.save_every") == "--save-every"
