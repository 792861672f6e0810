"""Questions about texts whose answers are passages of them: files of the SQuAD kind.

{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text", "answer_start"}],
"is_impossible"}]}]}]}; also a list of articles or of paragraphs, and rows with a context and a question each, in a list
or one per line, as `datasets` writes them.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.data import DataError
from train.data.text import stories
from train.data.text.files import unpacked
from train.data.text.labelled import Skipped
from train.data.text.parts import HELD, files_of, held_out
from train.files import shown
from train.metrics.answers import normal

KINDS = re.compile(r"\b(how many|how much|who|whom|whose|what|when|where|which|why|how)\b", re.IGNORECASE)


class Question(NamedTuple):
    """A question; `answers` are pairs (text, its first character in the context), none where the context has none."""

    id: str
    title: str
    kind: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]

    @property
    def gold(self) -> tuple[str, ...]:
        """Texts of the right answers."""
        return tuple(text for text, _ in self.answers)


class Answered(NamedTuple):
    """Questions, the form that they were in, and those that are not used."""

    questions: tuple[Question, ...]
    form: str = ""
    skipped: tuple[Skipped, ...] = ()

    def some(self, indices: Sequence[int]) -> "Answered":
        """The questions with these numbers."""
        return self._replace(questions=tuple(self.questions[i] for i in indices), skipped=())

    @property
    def impossible(self) -> int:
        """Number of questions that their context does not answer."""
        return sum(not question.answers for question in self.questions)


class AnsweredSet(NamedTuple):
    """Questions for training, validation and testing."""

    name: str
    train: Answered
    validation: Answered
    test: Answered
    origin: str
    skipped: tuple[Skipped, ...] = ()

    @property
    def parts(self) -> dict[str, Answered]:
        """The parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


# Files.


def read(path: Path) -> Answered:
    """The questions of a file; one without a text, or whose answers are not in its context, is left out.

    An answer that is not where `answer_start` says, but elsewhere in the context, is moved to the nearest place.

    Raises DataError: it cannot be read, is in no known form, or more than a tenth of the questions are unusable.
    """
    with unpacked(path, "a JSON file of the SQuAD kind") as file:
        content = file.read()
    values, skipped = _parsed(path, content)
    questions, moved = [], 0
    for where, title, context, row in _rows(values):
        question, problem, elsewhere = _question(title, context, row, f"{len(questions) + len(skipped) + 1}")
        moved += elsewhere
        if question is None:
            skipped.append((f"{shown(path.name)} {where}", problem))
        else:
            questions.append(question)
    if len(skipped) * HELD > len(questions) + len(skipped):
        (where, problem), more = skipped[0], len(skipped) - 1
        rest = f" (and {more} more questions)" if more else ""
        raise DataError(f"{where} {problem}{rest}; more than a tenth of the questions")
    if not questions:
        raise DataError(f"{path} has no question; expected data, paragraphs, qas, as SQuAD has them")
    form = f"{len({question.context for question in questions}):,} contexts"
    form += f"; {moved:,} answers moved to where their text is" if moved else ""
    return Answered(tuple(questions), form, tuple(skipped))


def _parsed(path: Path, content: bytes) -> tuple[list[Any], list[Skipped]]:
    """The articles, paragraphs or rows of a file, and the lines of one with a row per line that are no JSON."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte 0x{content[error.start]:02x} at {error.start}") from None
    try:
        whole = json.loads(text)
    except RecursionError:
        raise DataError(f"{path} is nested too deeply") from None
    except ValueError as error:
        values, skipped = [], []
        for i, line in enumerate(text.split("\n"), 1):
            try:
                values += [json.loads(line)] if line.strip() else []
            except ValueError as problem:
                skipped.append((f"{shown(path.name)} line {i}", f"is no JSON: {problem}"))
        if len(values) > len(skipped):
            return values, skipped
        raise DataError(f"{path} is no JSON: {error}") from None
    if isinstance(whole, dict) and "context" not in whole:
        if not isinstance(whole.get("data"), list):
            raise DataError(
                f"{path} has the keys {', '.join(map(shown, whole)) or 'of nothing'}; expected data, a list"
            )
        whole = whole["data"]
    return whole if isinstance(whole, list) else [whole], []


def _rows(values: list[Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """(where, title, context, question) of each question, whatever these are."""
    for i, article in enumerate(values, 1):
        entry = article if isinstance(article, dict) else {}
        for j, paragraph in enumerate(_list(entry.get("paragraphs", article)), 1):
            inner = paragraph if isinstance(paragraph, dict) else {}
            title = entry.get("title", inner.get("title"))
            for k, row in enumerate(_list(inner.get("qas", paragraph)), 1):
                where = (
                    f"article {i} paragraph {j} question {k}" if "paragraphs" in entry else f"entry {i} question {k}"
                )
                yield where, str(title), inner.get("context"), row


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _question(title: str, context: Any, row: Any, number: str) -> tuple[Question | None, str, int]:
    """(question, problem, answers that were moved)."""
    text = row.get("question") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        return None, "has no text", 0
    if not isinstance(context, str) or not context.strip():
        return None, f"'{shown(text[:60])}' has no context", 0
    context, text = _whole(context), _whole(text).strip()
    answers = row.get("answers", [])
    if isinstance(answers, dict):  # two lists, as `datasets` has them
        pairs = zip(_list(answers.get("text", [])), _list(answers.get("answer_start", [])), strict=False)
        answers = [{"text": a, "answer_start": b} for a, b in pairs]
    answers = [answer for answer in _list(answers) if isinstance(answer, dict)]
    kind = match[0].lower() if (match := KINDS.search(text)) else "other"
    fields = str(row.get("id", number)), title if title != "None" else context[:80], kind, text, context
    if row.get("is_impossible") or ("is_impossible" not in row and not answers and "answers" in row):
        return Question(*fields, ()), "", 0
    spots = {(_whole(str(answer.get("text", ""))).strip(), answer.get("answer_start")): None for answer in answers}
    places = [(words, _place(context, words, start), start) for words, start in spots]
    usable = [(words, place) for words, place, _ in places if place is not None]
    if not usable:
        example = f"the answer '{shown(places[0][0][:60])}' is not in its context" if places else "there is no answer"
        return None, f"'{shown(text[:60])}': {example}", 0
    moved = sum(
        place is not None and context[start : start + len(words)] != words
        for words, place, start in places
        if isinstance(start, int)
    )
    return Question(*fields, tuple(dict.fromkeys(usable))), "", moved


def _place(context: str, words: str, start: Any) -> int | None:
    """Where an answer is in its context, as near to `start` as possible."""
    if not words or words not in context:
        return None
    start = start if isinstance(start, int) else 0
    return min(
        (match.start() for match in re.finditer(f"(?={re.escape(words)})", context)), key=lambda i: abs(i - start)
    )


def _whole(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which JSON can spell."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def open_answered(data: str, validation: str | None = None, test: str | None = None) -> AnsweredSet:
    """The questions of `--data`: "stories" (generated), a file, or a folder with one training file.

    Files for validation and testing are those of `parts.files_of`; where a set has a dev file alone, as SQuAD has, it
    is for testing. For a part that has none, one of ten articles is held out, or contexts where titles are too few.

    Raises DataError: as `read`; too few contexts to hold some out; no question with an answer.
    """
    if data == "stories" and not Path(data).exists():
        parts = {name: Answered(tuple(Question(*row) for row in rows)) for name, rows in stories.parts().items()}
        return AnsweredSet("stories", **parts, origin="other stories")
    files = files_of(data, validation, test)
    if "validation" in files and "test" not in files and validation is None:
        files["test"] = files.pop("validation")
    parts = {name: read(path) for name, path in files.items()}
    skipped = tuple(entry for part in parts.values() for entry in part.skipped)
    missing = [name for name in ("validation", "test") if name not in parts]
    origins = [f"{name} in {shown(path.name)}" for name, path in files.items() if name != "train"]
    if missing:
        everything = parts["train"]
        titles = [question.title for question in everything.questions]
        kind = "articles" if len(set(titles)) > len(missing) else "contexts"
        groups = titles if kind == "articles" else [question.context for question in everything.questions]
        parts |= {name: everything.some(rows) for name, rows in held_out(groups, missing).items()}
        origins.append(f"{' and '.join(missing)} held out, one of ten {kind} each")
    if parts["train"].impossible == len(parts["train"].questions):
        raise DataError(f"'{shown(data)}' has no question with an answer; expected some to learn from")
    parts = {name: parts[name]._replace(skipped=()) for name in ("train", "validation", "test")}
    return AnsweredSet(shown(data), **parts, origin=", ".join(origins), skipped=skipped)


def facts(data: AnsweredSet) -> dict[str, Any]:
    """Names and values of a set, for `train.data.understood`."""
    return {
        "data": data.name,
        "form": data.train.form,
        "questions": {name: len(part.questions) for name, part in data.parts.items()},
        "without an answer": {name: part.impossible for name, part in data.parts.items() if part.impossible},
        "other parts": data.origin,
        "skipped": list(data.skipped),
    }


# An answer without a net.


def overlap_answer(question: Question) -> str:
    """The longest run of words that are not in the question, in the sentence that shares most words with it.

    Of several such sentences the last.
    """
    asked = set(normal(question.question).split())
    sentences = SENTENCE.findall(question.context)
    best = max(enumerate(sentences), key=lambda pair: (len(asked & set(normal(pair[1]).split())), pair[0]))[1]
    runs: list[list[str]] = [[]]
    for word in best.split():
        if set(normal(word).split()) & asked:
            runs.append([])
        else:
            runs[-1].append(word)
    longest = max((" ".join(run) for run in runs), key=lambda run: len(normal(run).split()))
    return longest if normal(longest) else best.strip()


SENTENCE = re.compile(r"\S[^.!?。！？]*[.!?。！？]*")
