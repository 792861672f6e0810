"""qa.py: windows and their labels, valid passages, probabilities, predictions; the default's figures."""

import functools
import io
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from core import random
from experiments.parts import answerer
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Tuning
from tests.experiments import runs
from tests.experiments.test_encoder import minilm
from tests.registry.experiments import spans as rows
from train.data.text.squad import Question

call = functools.partial(runs.call, "qa")
RUN = Path("runs/qa/a")
TEXT = "Anna went to Rome. Bert went to Oslo. Clara sold nine old lamps in New York and then went back home again."


def question(answer: str = "nine old lamps", context: str = TEXT, text: str = "What did Clara sell?") -> Question:
    return Question("1", "t", "what", text, context, ((answer, context.index(answer)),) if answer else ())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run called `a`."""
    folder = tmp_path_factory.mktemp("qa")
    rows.questions(folder)
    flags = ("--data", "trips.json", *rows.TINY, "--batch", "16", "--longest", "32", "--stride", "4", "--no-compile")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*flags, "--name", "a") == 0
    return folder


@pytest.fixture(scope="module")
def encoder():
    args = Tuning(layers=1, width=32, vocabulary=200, dropout=0.0)
    return encoders.load(args, [TEXT, "What did Clara sell?"], "spans", key=random.key(0))


def test_windows_cover_the_context_and_labels_are_the_answer(encoder):
    asked = question()
    data, windows = answerer.encoded(encoder, [asked], 20, 4)
    assert len(windows) > 2 and int(data.lengths.max()) <= 20
    spots = [spot for window in windows for spot in window.spots]
    assert set(range(len(TEXT))) - {i for a, b in spots for i in range(a, b)} <= {
        i for i, c in enumerate(TEXT) if c == " "
    }
    for before, after in zip(windows, windows[1:], strict=False):
        assert before.spots[-4:] == after.spots[:4]
    labels = list(zip(data.start.tolist(), data.end.tolist(), windows, strict=True))
    texts = [TEXT[w.spots[i - w.first][0] : w.spots[j - w.first][1]] if i else "" for i, j, w in labels]
    assert "nine old lamps" in texts and set(texts) == {"nine old lamps", ""}  # the others point at [CLS]
    assert (data.tokens[data.start == 0][:, 0] == encoder.tokenizer.token_id("[CLS]")).all()


def test_answers_that_no_window_holds_are_not_learned_as_none(encoder):
    asked = [question(), question(TEXT), question("\ufe0f", "a \ufe0f b"), question("")]
    data, windows = answerer.encoded(encoder, asked, 20, 4)
    assert answerer.unheld(data, windows, asked) == [1, 2]


def test_long_questions_leave_room_for_the_context(encoder):
    data, windows = answerer.encoded(encoder, [question(text="What did Clara sell? " * 30)], 32, 11)
    assert int(data.lengths.max()) <= 32 and all(window.spots for window in windows)
    answerer.check_stride(32, 11)
    with pytest.raises(ValueError, match="--stride is 12; expected up to 11 for windows of --longest 32 tokens"):
        answerer.check_stride(32, 12)


def test_scores_are_of_valid_passages_alone():
    start, end = random.normal(random.key(0), (2, 3, 50)).unbind(0)
    first, last = torch.tensor([3, 10, 49]), torch.tensor([50, 12, 49])
    table = answerer.scores(start, end, first, last)
    for w in range(3):
        for i in range(50):
            for j in range(50):
                valid = first[w] <= i <= j < last[w] and j < i + answerer.TOKENS
                expected = start[w, i] + end[w, j] if valid else torch.tensor(-torch.inf)
                assert table[w, i, j] == expected, (w, i, j)


@pytest.mark.parametrize("refuses", [False, True])
def test_answers_are_passages_with_probabilities(encoder, refuses):
    model = answerer.Answerer(encoder, 20, 4, refuses)
    asked = [question(), question("Anna", "Anna sang.", "Who sang?"), question("", "\ufe0f", "Who?")]
    for q, candidates in zip(asked, answerer.answer(model, asked), strict=True):
        assert all(c.text == q.context[c.start : c.end] for c in candidates)
        assert sum(c.probability for c in candidates) == pytest.approx(1.0)
        assert [c.score for c in candidates] == sorted((c.score for c in candidates), reverse=True)
        assert len({(c.start, c.end) for c in candidates}) == len(candidates)
        assert ("" in [c.text for c in candidates]) == (refuses or q.context == "\ufe0f")


def test_answers_do_not_depend_on_the_batch(encoder):
    model = answerer.Answerer(encoder, 24, 4, True)
    asked = [question(), question("Anna", "Anna sang.", "Who sang?"), question(text="Who?")]
    for q, together in zip(asked, answerer.answer(model, asked), strict=True):
        (alone,) = answerer.answer(model, [q])
        torch.testing.assert_close(torch.tensor([c.score for c in together]), torch.tensor([c.score for c in alone]))
        assert together[0][:3] == alone[0][:3]


def test_run_counts_what_it_skips(here):
    result = runs.result(RUN)
    assert result["skipped"] == 1 and {"exact_match", "f1", "overlap_f1", "no_answer_recall"} <= result.keys()
    answers = json.loads((RUN / "predictions.json").read_text(encoding="utf-8"))
    assert len(answers) == 9 and set(answers) >= {"9a", "9b", "9c"}


def test_predict_reads_questions_and_gives_characters(here, monkeypatch, capsys):
    text = Path("story.txt").read_text(encoding="utf-8")
    capsys.readouterr()
    options = ("predict", "--run", RUN, "--text", "story.txt", "--n-best", "3")
    assert call(*options, "--question", "Where is Anna?", "Who?", "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["question"] == "Where is Anna?" and second["question"] == "Who?"
    for row in first["answers"]:
        assert row["text"] == text[row["start"] : row["end"]] and 0 <= row["probability"] <= 1
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"Where is Anna?\n\nWho?\n")))
    assert call(*options) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["Where is Anna?"] * 3 + ["Who?"] * 3
    Path("blank.txt").write_text(" \n", encoding="utf-8")
    assert call("predict", "--run", RUN, "--text", "blank.txt", "--question", "Who?") == 2
    assert "blank.txt is empty; expected a text" in capsys.readouterr().err
    assert call("predict", "--run", RUN, "--question", "Who?") == 2
    assert "expected --text FILE" in capsys.readouterr().err


@pytest.mark.slow
def test_published_weights_with_adapters(here):
    flags = ("--data", "trips.json", "--weights", minilm(), "--lora", "4", "--epochs", "1", "--no-compile")
    assert call(*flags, "--longest", "48", "--stride", "8", "--name", "m") == 0
    assert Path("runs/qa/m/adapter/adapter_config.json").exists()
    assert call("evaluate", "--run", "runs/qa/m", "--out", "new") == 0
    figures = json.loads(Path("new/result.json").read_text(encoding="utf-8"))
    assert figures["f1"] == pytest.approx(runs.result(Path("runs/qa/m"))["f1"])
