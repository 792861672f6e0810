"""Generated sentences with names, dates, times, numbers and sums of money, whose types the words around them tell.

Half of the names are made up of syllables, the same for people, places and companies, and none in validation or test
occurs in training. Others mean several things: Jordan, Paris and Lincoln are people, places or companies, May and Mark
are names, months, coins and verbs.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from core import random
from train.data.translation.dates import EVENTS, MANY, MONTHS, THINGS, WEEKDAYS
from train.data.translation.number_words import english, english_ordinal, english_time, english_year

AMBIGUOUS = "Jordan Paris Lincoln Charlotte Georgia Florence Sydney Austin Chelsea Washington Morgan Hamilton".split()
"""People, places and companies."""
PEOPLE = "April May June August Mark Bill Rose Will Hope Grace Frank Penny Anna Paul Maria Tom Laura Peter".split()
PLACES = "Berlin Vienna Rome Lagos Lima Cairo Oslo Kyoto Delhi Madrid Dublin Prague".split()
COMPANIES = "Apple Shell Target Orange Oracle Gap Ford Visa Sharp Siemens Nokia Bosch".split()
FIRST = "b br d dr f g gl k kl l m n p r s sh st t tr v z".split()
VOWELS = "a e i o u".split()
LAST = "l n r s ck nd rt m x".split()

CLAUSES = (
    "[person] met [person] in [place]",
    "[person] met the new boss of [company]",
    "[person] and [person] flew to [place]",
    "[person] left [company] and moved to [place]",
    "[person] works for [company]",
    "[person] may visit [place]",
    "[person] will march to the station",
    "[person] was born in [place]",
    "[person] was born on [date]",
    "[person] sold [number] [things]",
    "[person] paid [money] for the [thing]",
    "[person] said that [place] is too cold",
    "[person] said that [person] is too old",
    "[person] said that [company] is too small",
    "the river in [place] rose by [number] meters",
    "the shares of [company] rose by [money]",
    "[company] has bought [company]",
    "[company] has opened a shop in [place]",
    "[company] paid a bill of [money]",
    "[company] has sued [person]",
    "the mark of [company] is an apple",
    "the train to [place] leaves at [time]",
    "the train for [person] leaves at [time]",
    "the [event] in [place] began at [time]",
    "the [event] will begin on [date]",
    "[number] people live in [place]",
    "[number] people work for [company]",
    "one of the [things] was from [place]",
    "one of the [things] was for [person]",
    "one of the [things] was made by [company]",
    "[place] is cold in [month]",
    "[place] may be the best place for the [event]",
    "we will hope for a second [event] in [month]",
    "[person] was late by a second or two",
)
ENDINGS = ("", "", "", " on [date]", " in [month]", " at [time]", " on [weekday]", " last year", " one day", " again")
CONNECTIONS = (", and ", ", but ", " when ", " because ")
TYPES = {"month": "date", "weekday": "date"}
"""Types of the slots that are not called like them."""

Row = tuple[list[str], list[tuple[str, int, int]]]
"""Words, and the type, first and last + 1 word of each entity."""
Draw = Callable[[int], int]  # draw(n) is one of 0 ... n - 1


def parts(train: int = 8000, validation: int = 500, test: int = 1000) -> dict[str, list[Row]]:
    """Sentences of each part, always the same; no sentence comes twice, anywhere."""
    taken: set[tuple[str, ...]] = set()
    out: dict[str, list[Row]] = {}
    for number, (name, count) in enumerate({"train": train, "validation": validation, "test": test}.items()):
        rows, block = [], 0
        while len(rows) < count:
            key = random.fold_in(random.fold_in(random.key(0), number), block)
            for row in _rows(key, number):
                if tuple(row[0]) not in taken and len(rows) < count:
                    taken.add(tuple(row[0]))
                    rows.append(row)
            block += 1
        out[name] = rows
    return out


def _rows(key: Tensor, part: int) -> list[Row]:
    table = random.randint(key, (512, 96), 0, 2**30)  # a row has more numbers than any sentence needs
    return [_row(iter(numbers), part) for numbers in table.tolist()]


def _row(numbers: Iterator[int], part: int) -> Row:
    def draw(n: int) -> int:
        return next(numbers) % n

    text = _clause(draw)
    if draw(3) == 0:
        text += _of(draw, CONNECTIONS) + _clause(draw)
    words, spans = [], []
    for piece in text.replace(",", " ,").split():
        slot = piece.strip("[]")
        if slot == piece:
            words.append(piece)
            continue
        content = SLOTS[slot](draw, part).replace(",", " ,").split()
        if slot not in ("thing", "things", "event"):
            spans.append((TYPES.get(slot, slot), len(words), len(words) + len(content)))
        words += content
    words[0] = words[0][0].upper() + words[0][1:]
    return [*words, "."], spans


def _clause(draw: Draw) -> str:
    return _of(draw, CLAUSES) + _of(draw, ENDINGS)


def _of(draw: Draw, table: Sequence[str]) -> str:
    return table[draw(len(table))]


def _made_up(draw: Draw, part: int) -> str:
    """One to three syllables and an end. The numbers of these add up to `part` modulo three, so that no two parts of
    the data have a name in common."""
    count = 1 + draw(3)
    onsets, vowels = [draw(len(FIRST)) for _ in range(count)], [draw(len(VOWELS)) for _ in range(count)]
    end = 3 * draw(len(LAST) // 3) + (part - sum(onsets) - sum(vowels)) % 3
    syllables = [FIRST[onset] + VOWELS[vowel] for onset, vowel in zip(onsets, vowels, strict=True)]
    return ("".join(syllables) + LAST[end]).capitalize()


def _name(draw: Draw, part: int, known: Sequence[str]) -> str:
    return _made_up(draw, part) if draw(2) else _of(draw, (*AMBIGUOUS, *known))


def _person(draw: Draw, part: int) -> str:
    surname = " " + _name(draw, part, ()) if draw(2) else ""
    return _name(draw, part, PEOPLE) + surname


def _place(draw: Draw, part: int) -> str:
    return _of(draw, ("", "", "New ", "North ")) + _name(draw, part, PLACES)


def _company(draw: Draw, part: int) -> str:
    return _name(draw, part, COMPANIES) + _of(draw, ("", "", " Motors", " Bank", " & Sons"))


def _date(draw: Draw, part: int) -> str:
    day, month = english_ordinal(1 + draw(31)), MONTHS[draw(12)][1]
    year = f", {english_year(1900 + draw(130))}" if draw(3) == 0 else ""
    return f"{month} {day}{year}" if draw(2) else f"the {day} of {month}{year}"


def _number(draw: Draw, part: int = 0) -> str:
    least, most = ((2, 20), (21, 99), (100, 9999))[draw(3)]
    return english(least + draw(most - least + 1))


SLOTS: dict[str, Callable[[Draw, int], str]] = {
    "company": _company,
    "date": _date,
    "event": lambda draw, part: EVENTS[draw(len(EVENTS))][1].removeprefix("the "),
    "money": lambda draw, part: f"{_number(draw)} {_of(draw, ('euros', 'dollars', 'marks'))}",
    "month": lambda draw, part: MONTHS[draw(12)][1],
    "number": _number,
    "person": _person,
    "place": _place,
    "thing": lambda draw, part: THINGS[draw(len(THINGS))][1].removeprefix("the "),
    "things": lambda draw, part: MANY[draw(len(MANY))][1],
    "time": lambda draw, part: english_time(1 + draw(12), 5 * draw(12)),
    "weekday": lambda draw, part: WEEKDAYS[draw(len(WEEKDAYS))][1],
}
