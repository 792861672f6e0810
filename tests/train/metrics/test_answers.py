"""Exact match and F1 of answers, beside torchmetrics."""

import pytest

from train.metrics import answers

PAIRS = [
    ("the Kitchen!", ("kitchen", "the garden")),
    ("in the kitchen of Mary", ("the kitchen", "Mary's kitchen")),
    ("", ("kitchen",)),
    ("a", ("an",)),
    ("theatre and anthem", ("theatre", "and anthem")),
    ("U.S.", ("US",)),
    ("half-past three", ("half past three",)),
    ("three three four", ("three four four",)),
    ("Ünïcode “quoted”", ("ünïcode quoted",)),
    ("   many\n spaces ", ("many spaces",)),
    ("12 %", ("12%", "12 percent")),
]


def test_equals_torchmetrics():
    library = pytest.importorskip("torchmetrics.functional.text.squad", reason="torchmetrics is not installed")
    for i, (answer, gold) in enumerate(PAIRS):
        prediction = [{"prediction_text": answer, "id": str(i)}]
        target = [{"answers": {"answer_start": [0] * len(gold), "text": list(gold)}, "id": str(i)}]
        expected = library.squad(prediction, target)
        assert 100 * answers.exact_match(answer, gold) == pytest.approx(float(expected["exact_match"])), answer
        assert 100 * answers.f1(answer, gold) == pytest.approx(float(expected["f1"]), rel=1e-6), answer


def test_figures_and_questions_without_an_answer():
    assert answers.f1("", ()) == answers.exact_match("", ()) == 1.0
    assert answers.f1("kitchen", ()) == answers.exact_match("kitchen", ()) == 0.0
    figures = answers.figures(["kitchen", "red apple", "x"], [("the kitchen",), ("apple",), ()])
    assert figures == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 2 / 3) / 3})
