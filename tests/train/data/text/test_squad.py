"""SQuAD files: forms, answers that are elsewhere or nowhere, articles held out; stories; answers without a net."""

import json
import os
from pathlib import Path

import pytest

from tests.registry.experiments import spans as rows
from train.data import DataError
from train.data.text import squad, stories
from train.metrics import answers


def write(path: Path, value) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def one(**fields):
    return {"id": "7", "question": "Where is it?", "answers": [{"text": "b", "answer_start": 2}], **fields}


def read(tmp_path, row, context="a b c"):
    return squad.read(
        write(tmp_path / "x.json", {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": [row]}]}]})
    )


def test_forms(tmp_path):
    expected = squad.Question("7", "t", "where", "Where is it?", "a b c", (("b", 2),))
    paragraph = {"context": "a b c", "qas": [one()], "title": "t"}
    flat = {**one(answers={"text": ["b"], "answer_start": [2]}), "context": "a b c", "title": "t"}
    lines = "\n".join([json.dumps(flat), "", json.dumps(flat)])
    for value in (
        {"data": [{"title": "t", "paragraphs": [paragraph]}]},
        [paragraph],
        [flat],
        flat,
        lines,
        "\ufeff" + lines,
    ):
        part = squad.read(write(tmp_path / "x.json", value))
        assert set(part.questions) == {expected} and not part.skipped, value
    part = squad.read(write(tmp_path / "x.json", "\n".join([json.dumps(flat)] * 20 + ["{oh"])))
    assert len(part.questions) == 20 and part.skipped[0][0] == "x.json line 21" and "is no JSON" in part.skipped[0][1]


def test_answers_are_where_their_text_is(tmp_path):
    part = read(tmp_path, one(answers=[{"text": "b", "answer_start": 1}]), "a b c b")
    assert part.questions[0].answers == (("b", 2),) and "1 answers moved" in part.form
    part = read(
        tmp_path, one(answers=[{"text": " b", "answer_start": 9}, {"text": "no", "answer_start": 0}]), "a b c b"
    )
    assert part.questions[0].answers == (("b", 6),)
    part = read(tmp_path, one(answers=[{"text": "b", "answer_start": 2}] * 3))
    assert part.questions[0].gold == ("b",) and "moved" not in part.form


@pytest.mark.parametrize(
    "row, problem",
    [
        (one(answers=[{"text": "lost", "answer_start": 0}]), "the answer 'lost' is not in its context"),
        (one(answers=[{"text": "", "answer_start": 0}]), "the answer '' is not in its context"),
        (one(answers=[], is_impossible=False), "there is no answer"),
        ({"id": 1, "question": "Where?"}, "there is no answer"),
        (one(question=" "), "has no text"),
        (7, "has no text"),
    ],
)
def test_bad_questions_are_named(tmp_path, row, problem):
    with pytest.raises(DataError, match=f"article 1 paragraph 1 question 1.*{problem}; more than a tenth"):
        read(tmp_path, row)
    rows = [one(id=str(i)) for i in range(20)] + [row]
    paragraphs = [{"context": "a b c", "qas": rows}]
    part = squad.read(write(tmp_path / "y.json", {"data": [{"title": "t", "paragraphs": paragraphs}]}))
    assert len(part.questions) == 20 and part.skipped[0][0] == "y.json article 1 paragraph 1 question 21"
    assert problem in part.skipped[0][1]


def test_questions_without_an_answer(tmp_path):
    for row in (one(answers=[], is_impossible=True), one(answers=[]), one(answers={"text": [], "answer_start": []})):
        part = read(tmp_path, row)
        assert part.questions[0].answers == () and part.impossible == 1


def test_halves_of_surrogate_pairs_keep_the_places(tmp_path):
    text = '{"context": "\\ud83d b \\ud83d\\ude00 c", "question": "?", "answers": [{"text": "c", "answer_start": 6}]}'
    (question,) = squad.read(write(tmp_path / "x.json", text)).questions
    assert question.context == "\ufffd b 😀 c" and question.answers == (("c", 6),)


def test_articles_are_held_out(tmp_path):
    rows.questions(tmp_path)
    data = squad.open_answered(str(tmp_path / "trips.json"))
    titles = {name: {q.title for q in part.questions} for name, part in data.parts.items()}
    assert titles["validation"] == {"article 8", "article 18", "article 28"} and len(titles["test"]) == 3
    assert not titles["train"] & (titles["validation"] | titles["test"]) and len(data.skipped) == 1
    assert "'Atlantis' is not in its context" in data.skipped[0][1]
    same = [{**rows.article(i), "title": "all"} for i in range(5)]
    data = squad.open_answered(str(write(tmp_path / "same.json", {"data": same})))
    assert "one of ten contexts each" in data.origin and len(data.test.questions) == 3
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes((tmp_path / "trips.json").read_bytes())
    data = squad.open_answered(str(tmp_path / "set"))
    assert data.origin == "test in dev-v1.1.json, validation held out, one of ten articles each"
    assert len(data.test.questions) == 89 and len(data.validation.questions) == 9
    hopeless = [{"context": f"a {i}", "qas": [one(answers=[])]} for i in range(5)]
    with pytest.raises(DataError, match="has no question with an answer"):
        squad.open_answered(str(write(tmp_path / "hopeless.json", hopeless)))


def test_stories_have_their_answers():
    parts = stories.parts(400, 50, 50)
    assert parts == stories.parts(400, 50, 50)
    questions = [squad.Question(*row) for part in parts.values() for row in part]
    assert len({question.context for question in questions}) == 500
    kinds = {question.kind for question in questions}
    assert len(kinds) == 8 and all(bool(q.answers) == (q.kind != "no answer") for q in questions)
    for question in questions:
        for text, start in question.answers:
            assert question.context[start : start + len(text)] == text
            sentence = question.context[question.context.rfind(".", 0, start) + 1 : question.context.index(".", start)]
            if question.kind in ("where", "when"):  # the person is in the sentence of the answer, and in no later move
                person = next(word for word in question.question[:-1].split() if word in stories.PEOPLE)
                assert person in sentence
                later = question.context[start:].split(". ")[1:]
                moves = [s for s in later if f"{person} " in s and any(f" {move} " in s for move in stories.MOVES)]
                assert question.kind == "when" or not moves, question


def test_answer_without_a_net():
    context = "The first bridge was built by Ann. In 1900 a second bridge was opened. It rained."
    question = squad.Question("", "", "", "Who built the first bridge?", context, (("Ann", 30),))
    assert squad.overlap_answer(question) == "by Ann."
    assert squad.overlap_answer(question._replace(context="the first bridge")) == "the first bridge"


@pytest.mark.skipif(not os.environ.get("FUNCTREE_DATA"), reason="FUNCTREE_DATA names no folder of public data")
def test_xquad():
    for name in ("en", "zh"):
        data = squad.open_answered(str(Path(os.environ["FUNCTREE_DATA"]) / "qa_xquad" / f"xquad.{name}.json"))
        assert sum(len(part.questions) for part in data.parts.values()) == 1190 and not data.skipped
        assert "moved" not in data.train.form
    questions = data.train.questions
    assert answers.figures([q.gold[0] for q in questions], [q.gold for q in questions])["f1"] == 1.0
