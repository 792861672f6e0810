"""Entity F1 beside a count of spans, and beside nervaluate."""

import random

import pytest

from train.data.text import conll
from train.metrics import entities

TAGS = ("O", "O", "O", "B-a", "I-a", "B-b-c", "I-b-c")


def rows(seed: int) -> list[list[str]]:
    draw = random.Random(seed)
    return [[draw.choice(TAGS) for _ in range(draw.randint(1, 12))] for _ in range(60)]


def noisy(gold: list[list[str]]) -> list[list[str]]:
    draw = random.Random(9)
    return [[draw.choice(TAGS) if draw.random() < 0.2 else tag for tag in row] for row in gold]


def spans(table: list[list[str]]) -> set[tuple]:
    return {(i, *span) for i, row in enumerate(table) for span in conll.entities(row)}


def whole(table: list[list[str]]) -> list[list[str]]:
    """IOB2 without an I- that begins an entity, which the two libraries count differently."""
    return [list(conll.iob2(conll.entities(row), len(row))) for row in table]


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_count_of_spans(seed):
    gold = rows(seed)
    predicted = noisy(gold)
    right, own = spans(gold), spans(predicted)
    figures = entities.figures(gold, predicted)
    assert figures["precision"] == pytest.approx(len(right & own) / len(own))
    assert figures["recall"] == pytest.approx(len(right & own) / len(right))
    assert figures["f1"] == pytest.approx(2 * len(right & own) / (len(right) + len(own)))
    for type_ in ("a", "b-c"):
        a, b = ({span for span in table if span[1] == type_} for table in (right, own))
        assert figures["f1_by_type"][type_] == pytest.approx(2 * len(a & b) / (len(a) + len(b)))


def test_equals_nervaluate():
    library = pytest.importorskip("nervaluate", reason="nervaluate is not installed")
    gold = whole(rows(3))
    predicted = whole(noisy(gold))
    results = library.Evaluator(gold, predicted, tags=["a", "b-c"], loader="list").evaluate()
    strict = results["overall"]["strict"]
    figures = entities.figures(gold, predicted)
    for name in ("precision", "recall", "f1"):
        assert figures[name] == pytest.approx(getattr(strict, name))
    for type_, value in figures["f1_by_type"].items():
        assert value == pytest.approx(results["entities"][type_]["strict"].f1)


def test_without_entities():
    empty = [["O", "O"]]
    assert entities.figures(empty, empty) == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "f1_by_type": {}}
    assert entities.figures([["B-a", "O"]], empty)["f1"] == 0.0
    assert entities.figures(empty, [["B-a", "O"]])["f1_by_type"] == {"a": 0.0}
    assert entities.figures([["B-a", "I-a"]], [["I-a", "I-a"]])["f1"] == 1.0  # the mode that is named
