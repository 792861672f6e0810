"""Numbers, dates and prices in English words and in digits, each way after the prefix of its direction, as T5 has it.

digits: May third, nineteen oh five       1905-05-03
words: 4237                               four thousand two hundred thirty-seven
digits: twelve euros and fifty cents      12.50 euros
"""

import calendar
import datetime
import itertools

from torch import Tensor

from core import random
from train.data import DataError
from train.data.translation.dates import MONTHS, Draw, Pair
from train.data.translation.number_words import english, english_ordinal, english_year

TO_DIGITS, TO_WORDS = PREFIXES = ("digits: ", "words: ")


def pairs(
    train: int = 12_000, validation: int = 500, test: int = 500, key: Tensor | None = None
) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """(train, validation, test): pairs of half as many values, no value in two of them, each both ways.

    Args:
        key: (2,), from which the values follow; `random.key(0)` if None, so that they are always the same.

    Raises DataError for more than 100,000.
    """
    key = random.key(0) if key is None else key.cpu()
    counts, digits_of = [count // 2 for count in (train, validation, test)], {}
    if not 0 <= sum(counts) <= 50_000:
        raise DataError(f"cannot make {2 * sum(counts)} pairs of numbers, expected 0 to 100000")
    for block in itertools.count():
        if len(digits_of) >= sum(counts):
            break
        table = random.randint(random.fold_in(key, block), (1024, 4), 0, 2**30)
        digits_of |= dict(_value(numbers) for numbers in table.tolist())
    values, parts = iter(digits_of.items()), []
    for count in counts:
        part = itertools.islice(values, count)
        parts.append([pair for words, digits in part for pair in both_ways(words, digits)])
    return tuple(parts)


def both_ways(words: str, digits: str) -> tuple[Pair, Pair]:
    """A pair in each direction, its source with the prefix of the task."""
    return (TO_DIGITS + words, digits), (TO_WORDS + digits, words)


def _value(numbers: list[int]) -> Pair:
    """(words, digits)."""
    remaining = iter(numbers)

    def draw(n: int) -> int:
        return next(remaining) % n

    return (_number, _date, _price)[draw(3)](draw)


def _number(draw: Draw) -> Pair:
    number = draw(10_000)
    return english(number), str(number)


def _date(draw: Draw) -> Pair:
    year, month = 1900 + draw(130), 1 + draw(12)
    day = datetime.date(year, month, 1 + draw(calendar.monthrange(year, month)[1]))
    return f"{MONTHS[month - 1][1]} {english_ordinal(day.day)}, {english_year(year)}", day.isoformat()


def _price(draw: Draw) -> Pair:
    euros, cents = 2 + draw(998), 2 + draw(98)
    return f"{english(euros)} euros and {english(cents)} cents", f"{euros}.{cents:02} euros"
