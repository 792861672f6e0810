"""Numbers, ordinals, years and times of day in German and English words."""

GERMAN = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
).split()
GERMAN_TENS = "_ zehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
ENGLISH_TENS = "_ ten twenty thirty forty fifty sixty seventy eighty ninety".split()
ENGLISH_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}


def german(number: int) -> str:
    """0 to 9999, one word: 4237 is "viertausendzweihundertsiebenunddreißig"."""
    _check(number, 0, 9999)
    if number < 20:
        return GERMAN[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return (_german_ones(ones) + "und" if ones else "") + GERMAN_TENS[tens]
    unit, name = (1000, "tausend") if number >= 1000 else (100, "hundert")
    count, rest = divmod(number, unit)
    return _german_ones(count) + name + (german(rest) if rest else "")


def _german_ones(digit: int) -> str:
    """Before another word "eins" loses its s."""
    return "ein" if digit == 1 else GERMAN[digit]


def english(number: int) -> str:
    """0 to 9999, American, without "and": 4237 is "four thousand two hundred thirty-seven"."""
    _check(number, 0, 9999)
    if number < 20:
        return ENGLISH[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return ENGLISH_TENS[tens] + ("-" + ENGLISH[ones] if ones else "")
    unit, name = (1000, " thousand") if number >= 1000 else (100, " hundred")
    count, rest = divmod(number, unit)
    return ENGLISH[count] + name + (" " + english(rest) if rest else "")


def german_ordinal(number: int, ending: str) -> str:
    """1 to 99; the ending is "e" (der dritte), "er" (dritter) or "en" (am dritten)."""
    _check(number, 1, 99)
    stem = {1: "erst", 3: "dritt", 7: "siebt", 8: "acht"}.get(number)
    return (stem or german(number) + ("t" if number < 20 else "st")) + ending


def english_ordinal(number: int) -> str:
    """1 to 99: "twenty-third"."""
    _check(number, 1, 99)
    head, hyphen, last = english(number).rpartition("-")
    if last.endswith("y"):
        return last[:-1] + "ieth"
    return head + hyphen + ENGLISH_ORDINALS.get(last, last + "th")


def german_year(year: int) -> str:
    """1100 to 2099: 1987 is "neunzehnhundertsiebenundachtzig", 2009 "zweitausendneun"."""
    _check(year, 1100, 2099)
    if year >= 2000:
        return german(year)
    return GERMAN[year // 100] + "hundert" + (german(year % 100) if year % 100 else "")


def english_year(year: int) -> str:
    """1100 to 2099: "nineteen eighty-seven", "nineteen oh five", "nineteen hundred", "two thousand nine"."""
    _check(year, 1100, 2099)
    century, rest = divmod(year, 100)
    if 2000 <= year < 2010:
        return english(year)
    if rest == 0:
        return f"{english(century)} hundred"
    return f"{english(century)} {'oh ' if rest < 10 else ''}{english(rest)}"


def german_time(hour: int, minute: int) -> str:
    """Hours 1 to 12, minutes in fives: 3:30 is "halb vier", 3:25 "fünf vor halb vier", 1:00 "ein Uhr"."""
    _check_time(hour, minute)
    this, following = GERMAN[hour], GERMAN[hour % 12 + 1]
    if minute == 0:
        return f"{_german_ones(hour)} Uhr"
    if minute in (25, 30, 35):
        return {25: "fünf vor ", 30: "", 35: "fünf nach "}[minute] + f"halb {following}"
    if minute < 25:
        return f"{'Viertel' if minute == 15 else GERMAN[minute] if minute < 20 else 'zwanzig'} nach {this}"
    rest = 60 - minute
    return f"{'Viertel' if rest == 15 else GERMAN[rest] if rest < 20 else 'zwanzig'} vor {following}"


def english_time(hour: int, minute: int) -> str:
    """Hours 1 to 12, minutes in fives: "half past three", "a quarter to one", "twenty-five past three"."""
    _check_time(hour, minute)
    if minute == 0:
        return f"{ENGLISH[hour]} o'clock"
    past, shown = (True, ENGLISH[hour]) if minute <= 30 else (False, ENGLISH[hour % 12 + 1])
    distance = minute if past else 60 - minute
    words = {15: "a quarter", 30: "half"}.get(distance) or english(distance)
    return f"{words} {'past' if past else 'to'} {shown}"


def _check(number: int, least: int, most: int) -> None:
    if not least <= number <= most:
        raise ValueError(f"{number} is outside the numbers from {least} to {most}")


def _check_time(hour: int, minute: int) -> None:
    if not 1 <= hour <= 12 or minute not in range(0, 60, 5):
        raise ValueError(f"{hour}:{minute:02d} is no time on a dial of 12 hours in steps of five minutes")
