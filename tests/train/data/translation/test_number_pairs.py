"""Numbers, dates and prices in words and in digits."""

import pytest

from train.data import DataError
from train.data.translation import number_pairs
from train.data.translation.number_pairs import TO_DIGITS, TO_WORDS


def test_pairs_go_both_ways_and_no_value_is_in_two_parts():
    parts = number_pairs.pairs(400, 40, 60)
    assert [len(part) for part in parts] == [400, 40, 60]
    values = []
    for part in parts:
        ways = [{(s.removeprefix(p), t) for s, t in part if s.startswith(p)} for p in (TO_DIGITS, TO_WORDS)]
        assert ways[0] == {(words, digits) for digits, words in ways[1]}
        values += [digits for _, digits in ways[0]]
    assert len(set(values)) == 250
    kinds = [sum("-" in v for v in values), sum("." in v for v in values), sum(v.isdigit() for v in values)]
    assert sum(kinds) == 250 and min(kinds) > 50


def test_pairs_are_always_the_same():
    (first, second, *_), *_ = number_pairs.pairs(4, 0, 0)
    assert first == ("digits: August nineteenth, nineteen seventy-three", "1973-08-19")
    assert second == ("words: 1973-08-19", "August nineteenth, nineteen seventy-three")
    with pytest.raises(DataError, match="cannot make 100002 pairs"):
        number_pairs.pairs(100_002, 0, 0)
