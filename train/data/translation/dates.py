"""The embedded translation problem: dates, times, prices and numbers written out in German and English sentences.

Each German sentence has one right translation. The order of words differs: German puts the verb second or last, with
one part of the sentence before it, and the ones of a number before its tens.
"""

import calendar
import datetime
import itertools
from collections.abc import Callable

from torch import Tensor

from core import random
from train.data import DataError
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

MONTHS = (
    ("Januar", "January"),
    ("Februar", "February"),
    ("März", "March"),
    ("April", "April"),
    ("Mai", "May"),
    ("Juni", "June"),
    ("Juli", "July"),
    ("August", "August"),
    ("September", "September"),
    ("Oktober", "October"),
    ("November", "November"),
    ("Dezember", "December"),
)
WEEKDAYS = (
    ("Montag", "Monday"),
    ("Dienstag", "Tuesday"),
    ("Mittwoch", "Wednesday"),
    ("Donnerstag", "Thursday"),
    ("Freitag", "Friday"),
    ("Samstag", "Saturday"),
    ("Sonntag", "Sunday"),
)
CITIES = (("Köln", "Cologne"), ("München", "Munich"), ("Wien", "Vienna"), ("Berlin", "Berlin"), ("Genf", "Geneva"))
VEHICLES = (("der Zug", "the train"), ("der Bus", "the bus"), ("die Fähre", "the ferry"))
EVENTS = (
    ("das Konzert", "the concert"),
    ("der Film", "the film"),
    ("die Sitzung", "the meeting"),
    ("das Spiel", "the game"),
    ("der Kurs", "the course"),
)
BUILDINGS = (
    ("die Brücke", "the bridge"),
    ("das Museum", "the museum"),
    ("der Bahnhof", "the station"),
    ("die Schule", "the school"),
    ("das Theater", "the theater"),
)
THINGS = (
    ("das Buch", "the book"),
    ("der Tisch", "the table"),
    ("die Lampe", "the lamp"),
    ("das Fahrrad", "the bicycle"),
    ("der Mantel", "the coat"),
    ("die Uhr", "the watch"),
)
BILLS = (("die Rechnung", "the bill"), ("die Miete", "the rent"), ("der Kredit", "the loan"))
PEOPLE = (
    ("Anna", "Anna"),
    ("Paul", "Paul"),
    ("mein Vater", "my father"),
    ("meine Schwester", "my sister"),
    ("unser Nachbar", "our neighbor"),
    ("der Lehrer", "the teacher"),
)
MANY = (
    ("Bücher", "books"),
    ("Äpfel", "apples"),
    ("Briefe", "letters"),
    ("Karten", "tickets"),
    ("Stühle", "chairs"),
    ("Flaschen", "bottles"),
)
DEEDS = (("gekauft", "bought"), ("verkauft", "sold"), ("bestellt", "ordered"), ("gezählt", "counted"))
ONCE = (("gestern", "yesterday"), ("letzte Woche", "last week"), ("vor einem Monat", "a month ago"))
PARTS_OF_DAY = (("morgens", "in the morning"), ("nachmittags", "in the afternoon"), ("abends", "in the evening"))
FIRST_HOURS = (5, 1, 6)  # first hours of these parts, each of which lasts five hours

Pair = tuple[str, str]
Draw = Callable[[int], int]  # draw(n) is one of 0 ... n - 1


def pairs(
    train: int = 10_000, validation: int = 500, test: int = 500, key: Tensor | None = None
) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """(train, validation, test): pairs (German, English); no sentence of either language comes twice, anywhere.

    Args:
        key: (2,), from which the sentences follow; `random.key(0)` if None, so that they are always the same. They come
            in random order, so that the parts are alike.

    Raises DataError for more than a million.
    """
    key = random.key(0) if key is None else key.cpu()
    count, english_of = train + validation + test, {}
    if not 0 <= count <= 10**6:
        raise DataError(f"cannot make {count} pairs of sentences, expected 0 to 1000000")
    for block in itertools.count():
        if len(english_of) >= count:
            break
        # A row has more numbers than any sentence needs.
        table = random.randint(random.fold_in(key, block), (1024, 12), 0, 2**30)
        english_of |= dict(_sentence(numbers) for numbers in table.tolist())
    sentences = list(english_of.items())[:count]
    return sentences[:train], sentences[train : train + validation], sentences[train + validation :]


def _sentence(numbers: list[int]) -> Pair:
    remaining = iter(numbers)

    def draw(n: int) -> int:
        return next(remaining) % n

    return FRAMES[draw(len(FRAMES))](draw)


def _of(draw: Draw, table: tuple[Pair, ...]) -> Pair:
    return table[draw(len(table))]


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _day(draw: Draw) -> datetime.date:
    year, month = 1900 + draw(130), 1 + draw(12)
    return datetime.date(year, month, 1 + draw(calendar.monthrange(year, month)[1]))


def _date(day: datetime.date, ending: str, with_year: bool = True) -> Pair:
    """("dritten Mai neunzehnhundertfünf", "May third, nineteen oh five"), the ordinal with the ending."""
    month = MONTHS[day.month - 1]
    words = f"{german_ordinal(day.day, ending)} {month[0]}", f"{month[1]} {english_ordinal(day.day)}"
    if not with_year:
        return words
    return f"{words[0]} {german_year(day.year)}", f"{words[1]}, {english_year(day.year)}"


def _number(draw: Draw) -> Pair:
    """2 to 9999, each number of digits equally often, without ...01, whose German form before a noun is disputed."""
    least, most = ((2, 99), (100, 999), (1000, 9999))[draw(3)]
    number = least + draw(most - least + 1)
    number += number % 100 == 1
    return german(number), english(number)


def _small(draw: Draw) -> Pair:
    number = 2 + draw(98)
    return german(number), english(number)


def _time(draw: Draw) -> Pair:
    hour, minute = 1 + draw(12), 5 * draw(12)
    return german_time(hour, minute), english_time(hour, minute)


def _bare_date(draw: Draw) -> Pair:
    return _date(_day(draw), "er")


def _bare_number(draw: Draw) -> Pair:
    number = draw(10_000)
    return german(number), english(number)


def _today(draw: Draw) -> Pair:
    day = _day(draw)
    weekday, date = WEEKDAYS[day.weekday()], _date(day, "e")
    return f"Heute ist {weekday[0]}, der {date[0]}.", f"Today is {weekday[1]}, {date[1]}."


def _opened(draw: Draw) -> Pair:
    building, date = _of(draw, BUILDINGS), _date(_day(draw), "en")
    return f"Am {date[0]} wurde {building[0]} eröffnet.", f"{_capital(building[1])} was opened on {date[1]}."


def _born(draw: Draw) -> Pair:
    person, date = _of(draw, PEOPLE), _date(_day(draw), "en")
    return f"{_capital(person[0])} wurde am {date[0]} geboren.", f"{_capital(person[1])} was born on {date[1]}."


def _due(draw: Draw) -> Pair:
    bill, date = _of(draw, BILLS), _date(_day(draw), "en")
    return f"Bis zum {date[0]} muss {bill[0]} bezahlt werden.", f"{_capital(bill[1])} must be paid by {date[1]}."


def _began(draw: Draw) -> Pair:
    event, date = _of(draw, EVENTS), _date(_day(draw), "en", with_year=False)
    return f"Wann hat {event[0]} am {date[0]} begonnen?", f"When did {event[1]} begin on {date[1]}?"


def _deed(draw: Draw) -> Pair:
    person, number, things = _of(draw, PEOPLE), _number(draw), _of(draw, MANY)
    deed, once = _of(draw, DEEDS), _of(draw, ONCE)
    return (
        f"{_capital(once[0])} hat {person[0]} {number[0]} {things[0]} {deed[0]}.",
        f"{_capital(person[1])} {deed[1]} {number[1]} {things[1]} {once[1]}.",
    )


def _price(draw: Draw) -> Pair:
    thing, euros, cents = _of(draw, THINGS), _number(draw), _small(draw)
    return (
        f"{_capital(thing[0])} kostet {euros[0]} Euro und {cents[0]} Cent.",
        f"{_capital(thing[1])} costs {euros[1]} euros and {cents[1]} cents.",
    )


def _quote(draw: Draw) -> Pair:
    person, thing, euros = _of(draw, PEOPLE), _of(draw, THINGS), _number(draw)
    return (
        f"{_capital(person[0])} sagt, dass {thing[0]} {euros[0]} Euro kostet.",
        f"{_capital(person[1])} says that {thing[1]} costs {euros[1]} euros.",
    )


def _question(draw: Draw) -> Pair:
    thing, euros = _of(draw, THINGS), _number(draw)
    return f"Kostet {thing[0]} wirklich {euros[0]} Euro?", f"Does {thing[1]} really cost {euros[1]} euros?"


def _departure(draw: Draw) -> Pair:
    vehicle, city, weekday, time = _of(draw, VEHICLES), _of(draw, CITIES), _of(draw, WEEKDAYS), _time(draw)
    return (
        f"Am {weekday[0]} um {time[0]} fährt {vehicle[0]} nach {city[0]} ab.",
        f"{_capital(vehicle[1])} to {city[1]} leaves on {weekday[1]} at {time[1]}.",
    )


def _arrival(draw: Draw) -> Pair:
    person, vehicle, time = _of(draw, PEOPLE), _of(draw, VEHICLES), _time(draw)
    return (
        f"{_capital(person[0])} weiß, dass {vehicle[0]} um {time[0]} ankommt.",
        f"{_capital(person[1])} knows that {vehicle[1]} arrives at {time[1]}.",
    )


def _beginning(draw: Draw) -> Pair:
    event, part = _of(draw, EVENTS), draw(3)
    hour, minute = FIRST_HOURS[part] + draw(5), 5 * draw(12)
    when = PARTS_OF_DAY[part]
    return (
        f"{_capital(when[0])} um {german_time(hour, minute)} beginnt {event[0]}.",
        f"{_capital(event[1])} begins at {english_time(hour, minute)} {when[1]}.",
    )


def _open(draw: Draw) -> Pair:
    building, first, last = _of(draw, BUILDINGS), _time(draw), _time(draw)
    return (
        f"{_capital(building[0])} ist von {first[0]} bis {last[0]} geöffnet.",
        f"{_capital(building[1])} is open from {first[1]} until {last[1]}.",
    )


def _birthday(draw: Draw) -> Pair:
    person, days, age = _of(draw, PEOPLE), _small(draw), _small(draw)
    return (
        f"In {days[0]} Tagen wird {person[0]} {age[0]} Jahre alt.",
        f"{_capital(person[1])} will be {age[1]} years old in {days[1]} days.",
    )


def _houses(draw: Draw) -> Pair:
    year, number = 1900 + draw(130), _number(draw)
    return (
        f"Im Jahr {german_year(year)} gab es hier {number[0]} Häuser.",
        f"There were {number[1]} houses here in {english_year(year)}.",
    )


FRAMES = (
    _bare_date,
    _bare_number,
    _today,
    _opened,
    _born,
    _due,
    _began,
    _deed,
    _price,
    _quote,
    _question,
    _departure,
    _arrival,
    _beginning,
    _open,
    _birthday,
    _houses,
)
