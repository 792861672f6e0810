import datetime

import pytest

from core import random
from train.data import DataError
from train.data.translation import dates
from train.data.translation.number_words import (
    english,
    english_ordinal,
    english_time,
    english_year,
    german,
    german_ordinal,
    german_time,
    german_year,
)


@pytest.mark.parametrize(
    ("number", "in_german", "in_english"),
    [
        (0, "null", "zero"),
        (1, "eins", "one"),
        (7, "sieben", "seven"),
        (12, "zwölf", "twelve"),
        (16, "sechzehn", "sixteen"),
        (17, "siebzehn", "seventeen"),
        (20, "zwanzig", "twenty"),
        (21, "einundzwanzig", "twenty-one"),
        (30, "dreißig", "thirty"),
        (66, "sechsundsechzig", "sixty-six"),
        (70, "siebzig", "seventy"),
        (100, "einhundert", "one hundred"),
        (101, "einhunderteins", "one hundred one"),
        (121, "einhunderteinundzwanzig", "one hundred twenty-one"),
        (900, "neunhundert", "nine hundred"),
        (1000, "eintausend", "one thousand"),
        (1001, "eintausendeins", "one thousand one"),
        (1100, "eintausendeinhundert", "one thousand one hundred"),
        (4237, "viertausendzweihundertsiebenunddreißig", "four thousand two hundred thirty-seven"),
        (9999, "neuntausendneunhundertneunundneunzig", "nine thousand nine hundred ninety-nine"),
    ],
)
def test_numbers(number, in_german, in_english):
    assert (german(number), english(number)) == (in_german, in_english)


def test_every_number_has_its_own_words():
    assert len({german(n) for n in range(10_000)}) == len({english(n) for n in range(10_000)}) == 10_000


@pytest.mark.parametrize(
    ("day", "in_german", "in_english"),
    [
        (1, "ersten", "first"),
        (2, "zweiten", "second"),
        (3, "dritten", "third"),
        (4, "vierten", "fourth"),
        (5, "fünften", "fifth"),
        (7, "siebten", "seventh"),
        (8, "achten", "eighth"),
        (9, "neunten", "ninth"),
        (12, "zwölften", "twelfth"),
        (19, "neunzehnten", "nineteenth"),
        (20, "zwanzigsten", "twentieth"),
        (21, "einundzwanzigsten", "twenty-first"),
        (23, "dreiundzwanzigsten", "twenty-third"),
        (30, "dreißigsten", "thirtieth"),
        (31, "einunddreißigsten", "thirty-first"),
    ],
)
def test_ordinals(day, in_german, in_english):
    assert (german_ordinal(day, "en"), english_ordinal(day)) == (in_german, in_english)
    assert german_ordinal(day, "er") == in_german[:-1] + "r"


@pytest.mark.parametrize(
    ("year", "in_german", "in_english"),
    [
        (1100, "elfhundert", "eleven hundred"),
        (1789, "siebzehnhundertneunundachtzig", "seventeen eighty-nine"),
        (1900, "neunzehnhundert", "nineteen hundred"),
        (1905, "neunzehnhundertfünf", "nineteen oh five"),
        (1987, "neunzehnhundertsiebenundachtzig", "nineteen eighty-seven"),
        (2000, "zweitausend", "two thousand"),
        (2009, "zweitausendneun", "two thousand nine"),
        (2010, "zweitausendzehn", "twenty ten"),
        (2024, "zweitausendvierundzwanzig", "twenty twenty-four"),
    ],
)
def test_years(year, in_german, in_english):
    assert (german_year(year), english_year(year)) == (in_german, in_english)


@pytest.mark.parametrize(
    ("time", "in_german", "in_english"),
    [
        ((1, 0), "ein Uhr", "one o'clock"),
        ((12, 0), "zwölf Uhr", "twelve o'clock"),
        ((1, 5), "fünf nach eins", "five past one"),
        ((3, 15), "Viertel nach drei", "a quarter past three"),
        ((3, 20), "zwanzig nach drei", "twenty past three"),
        ((3, 25), "fünf vor halb vier", "twenty-five past three"),
        ((3, 30), "halb vier", "half past three"),
        ((12, 30), "halb eins", "half past twelve"),
        ((3, 35), "fünf nach halb vier", "twenty-five to four"),
        ((7, 40), "zwanzig vor acht", "twenty to eight"),
        ((12, 45), "Viertel vor eins", "a quarter to one"),
        ((11, 55), "fünf vor zwölf", "five to twelve"),
    ],
)
def test_times(time, in_german, in_english):
    assert (german_time(*time), english_time(*time)) == (in_german, in_english)


def test_every_time_has_its_own_words():
    times = [(hour, minute) for hour in range(1, 13) for minute in range(0, 60, 5)]
    assert len({german_time(*time) for time in times}) == len({english_time(*time) for time in times}) == 144


@pytest.mark.parametrize(
    "call",
    [
        lambda: german(10_000),
        lambda: english(-1),
        lambda: german_ordinal(0, "en"),
        lambda: english_year(2100),
        lambda: german_time(13, 0),
        lambda: english_time(3, 7),
    ],
)
def test_outside_the_range(call):
    with pytest.raises(ValueError, match="outside the numbers|no time on a dial"):
        call()


def test_no_sentence_comes_twice_and_all_are_short():
    train, validation, test = dates.pairs()
    assert (len(train), len(validation), len(test)) == (10_000, 500, 500)
    everything = train + validation + test
    for side in (0, 1):
        sentences = [pair[side] for pair in everything]
        assert len(set(sentences)) == 11_000
        assert max(len(sentence.split()) for sentence in sentences) <= 14


def test_the_sentences_are_a_function_of_the_key():
    assert dates.pairs(50, 5, 5) == dates.pairs(50, 5, 5)
    assert dates.pairs(50, 5, 5, random.key(0)) == dates.pairs(50, 5, 5)
    assert dates.pairs(50, 5, 5, random.key(1)) != dates.pairs(50, 5, 5)
    assert dates.pairs(5, 5, 0)[0] + dates.pairs(5, 5, 0)[1] == dates.pairs(10, 0, 0)[0]
    with pytest.raises(DataError, match="cannot make 2000000 pairs"):
        dates.pairs(2_000_000, 0, 0)


def test_every_frame_is_common_and_looks_as_intended():
    train = dict(dates.pairs()[0])
    for german_words, english_words, least in (
        ("Heute ist ", "Today is ", 400),
        (" wurde am ", " was born on ", 400),
        (" bezahlt werden.", " must be paid by ", 400),
        (" Cent.", " cents.", 400),
        ("sagt, dass ", " says that ", 400),
        (" wirklich ", "Does ", 400),
        (" ab.", " leaves on ", 400),
        (" ankommt.", " arrives at ", 300),
        (" bis ", " until ", 400),
        ("Wann hat ", "When did ", 200),
        (" Jahre alt.", " years old in ", 400),
        ("Im Jahr ", "There were ", 400),
    ):
        actual = [(de, en) for de, en in train.items() if german_words in de]
        assert len(actual) >= least, german_words
        assert all(english_words in en for _, en in actual)
    assert sum(1 for de in train if " " not in de) > 200  # numbers alone
    assert any(de.startswith("dreiundzwanzigster ") for de in train)


def test_weekdays_are_those_of_the_calendar():
    days = {german_year(year): year for year in range(1900, 2030)}
    months = [month for month, _ in dates.MONTHS]
    checked = 0
    for sentence, _ in dates.pairs()[0]:
        if sentence.startswith("Heute ist"):
            weekday, _, ordinal, month, year = sentence.removeprefix("Heute ist ").rstrip(".").split()
            (day,) = [n for n in range(1, 32) if german_ordinal(n, "e") == ordinal]
            date = datetime.date(days[year], 1 + months.index(month), day)
            assert dates.WEEKDAYS[date.weekday()][0] == weekday.rstrip(",")
            checked += 1
    assert checked > 400
