"""Generated stories with a question each, whose answer is a passage of the story, after the idea of bAbI.

Weston et al. 2015, "Towards AI-Complete Question Answering" (arXiv:1502.05698); the sentences are our own. Some
questions need the last of several sentences, some two of them, and some have no answer.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from core import random
from train.data.translation.dates import MANY
from train.data.translation.number_words import english, english_time

PEOPLE = "Mary Paul Anna Fred Julie Bill".split()
PLACES = "kitchen garden office cellar school library".split()
OBJECTS = "apple ball lamp book coat key".split()
MOVES = ("went to", "ran to", "walked to")
TAKES = ("took", "found", "grabbed")
LONGEST = 5  # sentences

Row = tuple[str, str, str, str, str, tuple[tuple[str, int], ...]]
"""The fields of `train.data.text.squad.Question`."""
Draw = Callable[[int], int]  # draw(n) is one of 0 ... n - 1


class Fact(NamedTuple):
    """An answer, and the number of the sentence that has it."""

    answer: str
    sentence: int


def parts(train: int = 16_000, validation: int = 500, test: int = 1000) -> dict[str, list[Row]]:
    """Questions of each part, always the same; no story comes twice, anywhere."""
    taken: set[str] = set()
    out: dict[str, list[Row]] = {}
    for number, (name, count) in enumerate({"train": train, "validation": validation, "test": test}.items()):
        rows, block = [], 0
        while len(rows) < count:
            key = random.fold_in(random.fold_in(random.key(1), number), block)
            # A row has more numbers than any story needs.
            for numbers in random.randint(key, (512, 128), 0, 2**30).tolist():
                kind, question, context, answers = _story(iter(numbers))
                if context not in taken and len(rows) < count:
                    taken.add(context)
                    rows.append((f"{name}-{len(rows)}", f"{name}-{len(rows)}", kind, question, context, answers))
            block += 1
        out[name] = rows
    return out


def _story(numbers: Iterator[int]) -> tuple[str, str, str, tuple[tuple[str, int], ...]]:
    """(kind of the question, question, story, answers)."""

    def draw(n: int) -> int:
        return next(numbers) % n

    def of(table: Any) -> Any:
        return table[draw(len(table))]

    people = [PEOPLE[i] for i in _some(draw, len(PEOPLE), 2 + draw(2))]
    visits: dict[str, list[Fact]] = {}  # by person
    times: dict[tuple[str, str], Fact] = {}  # by person and place, of those who came once
    owners: dict[str, Fact] = {}  # by object
    gifts: dict[tuple[str, str], Fact] = {}  # who gave, by object and receiver
    sums: dict[tuple[str, str], Fact] = {}  # how many, by person and things
    sentences: list[str] = []
    for number in range(3 + draw(LONGEST - 2)):
        person, event = of(people), draw(10)
        mine = [thing for thing, owner in owners.items() if owner.answer == person]
        free = [thing for thing in OBJECTS if thing not in owners]
        if event < 2 and free:
            thing = of(free)
            sentences.append(f"{person} {of(TAKES)} the {thing}.")
            owners[thing] = Fact(person, number)
        elif event < 5 and mine:
            thing, other = of(mine), of([other for other in people if other != person])
            sentences.append(f"{person} gave the {thing} to {other}.")
            owners[thing], gifts[thing, other] = Fact(other, number), Fact(person, number)
        elif event == 5:
            things, count = MANY[draw(len(MANY))][1], english(2 + draw(98))
            if (person, things) not in sums:
                sentences.append(f"{person} bought {count} {things}.")
                sums[person, things] = Fact(count, number)
                continue
            sentences.append(f"{person} sat down.")
        else:
            before = visits.setdefault(person, [])
            place = of([place for place in PLACES if place not in [fact.answer for fact in before]])
            time = english_time(1 + draw(12), 5 * draw(12)) if draw(3) == 0 else ""
            sentences.append(f"{person} {of(MOVES)} the {place}{f' at {time}' * bool(time)}.")
            before.append(Fact(place, number))
            if time:
                times[person, place] = Fact(time, number)
    questions: dict[str, list[tuple[str, Fact | None]]] = {
        "where": [(f"Where is {p}?", facts[-1]) for p, facts in visits.items()],
        "where before": [
            (f"Where was {p} before the {b.answer}?", a)
            for p, facts in visits.items()
            for a, b in zip(facts, facts[1:], strict=False)
        ],
        "where, of a thing": [
            (f"Where is the {thing}?", visits[owner.answer][-1])
            for thing, owner in owners.items()
            if visits.get(owner.answer)
        ],
        "who has": [(f"Who has the {thing}?", owner) for thing, owner in owners.items()],
        "who gave": [(f"Who gave the {thing} to {other}?", giver) for (thing, other), giver in gifts.items()],
        "when": [(f"When did {p} go to the {place}?", time) for (p, place), time in times.items()],
        "how many": [(f"How many {things} did {p} buy?", count) for (p, things), count in sums.items()],
        "no answer": [
            (f"Where is {of([p for p in PEOPLE if p not in people])}?", None),
            (f"Who has the {of([thing for thing in OBJECTS if thing not in owners])}?", None),
        ],
    }
    answered = [kind for kind, rows in questions.items() if rows and kind != "no answer"]
    kind = of(answered) if answered and draw(10) else "no answer"
    question, fact = of(questions[kind])
    context = " ".join(sentences)
    if fact is None:
        return kind, question, context, ()
    first = sum(len(sentence) + 1 for sentence in sentences[: fact.sentence])
    return kind, question, context, ((fact.answer, first + _find(sentences[fact.sentence], fact.answer)),)


def _some(draw: Draw, n: int, count: int) -> list[int]:
    """Different numbers below n."""
    rest = list(range(n))
    return [rest.pop(draw(len(rest))) for _ in range(count)]


def _find(sentence: str, answer: str) -> int:
    return f" {sentence}".index(f" {answer}")
