"""Rows of the experiments that find words and passages of texts: entities, answers."""

import json
from pathlib import Path

from tests.registry.experiments.experiment import Experiment
from train.run.ranks import BY_ROWS

NAMES = ("Anna", "Bert", "Clara", "David")
PLACES = ("Rome", "Oslo", "New York")


def sentences(folder: Path) -> None:
    """CoNLL files: with a line that has no tag, without entities, without tags, with other types, of no words."""
    rows = []
    for i in range(120):
        place = PLACES[i % 3].split()
        words = [NAMES[i % 4], "went", "to", *place, *["again"] * (i % 7), "."]
        tags = ["B-person", "O", "O", "B-place", *["I-place"] * (len(place) - 1)]
        rows.append("\n".join(f"{word}\t{tag}" for word, tag in zip(words, tags + ["O"] * 9, strict=False)))
    rows[5] += "\nbroken"
    (folder / "names.conll").write_text("\n\n".join(rows) + "\n", encoding="utf-8")
    (folder / "plain.conll").write_text("a O\nb O\n\n" * 40, encoding="utf-8")
    (folder / "words.conll").write_text("just\nwords\n\n" * 40, encoding="utf-8")
    (folder / "odd.conll").write_text("Anna PERSON\nsang O\n\n" * 40, encoding="utf-8")
    (folder / "other.conll").write_text("Anna B-animal\nsang O\n\n" * 40, encoding="utf-8")
    (folder / "empty.conll").write_text("\n\n", encoding="utf-8")
    (folder / "short.conll").write_text("Anna B-person\n\nBert B-person\n", encoding="utf-8")


def article(i: int, answered: bool = True) -> dict:
    """An article with one paragraph and three questions, the last without an answer."""
    name, place, other = NAMES[i % 4], PLACES[i % 3], PLACES[(i + 1) % 3]
    context = f"{name} went to {place}. {NAMES[(i + 1) % 4]} went to {other} number {i}." + " It rained." * (i % 5)
    qas = [
        {
            "id": f"{i}a",
            "question": f"Where is {name}?",
            "answers": [{"text": place, "answer_start": context.index(place) if answered else 0}],
        },
        {
            "id": f"{i}b",
            "question": f"Who went to {other}?",
            "answers": [{"text": NAMES[(i + 1) % 4], "answer_start": context.index(NAMES[(i + 1) % 4])}],
        },
        {"id": f"{i}c", "question": "When was that?", "answers": [], "is_impossible": True},
    ]
    return {"title": f"article {i}", "paragraphs": [{"context": context, "qas": qas}]}


def questions(folder: Path) -> None:
    """SQuAD files: whole, with an answer that is not in its context; of two contexts; without questions; no JSON."""
    articles = [article(i) for i in range(30)]
    articles[3]["paragraphs"][0]["qas"][0]["answers"] = [{"text": "Atlantis", "answer_start": 3}]
    files = {"trips": articles, "two": [article(0), article(1)], "none": [{"title": "a", "paragraphs": []}]}
    lost = [article(i) for i in range(9)]
    for each in lost:
        each["paragraphs"][0]["qas"][0]["answers"][0]["text"] = "Atlantis"
    for name, data in (files | {"lost": lost}).items():
        (folder / f"{name}.json").write_text(json.dumps({"version": "1.1", "data": data}), encoding="utf-8")
    (folder / "broken.json").write_text('{"data": [', encoding="utf-8")
    (folder / "table.json").write_text('{"rows": []}', encoding="utf-8")
    (folder / "story.txt").write_text("Anna went to Rome. Bert went to Oslo.", encoding="utf-8")


TINY = ("--layers", "1", "--width", "32", "--vocabulary", "120", "--epochs", "2", "--save-every", "3")

ROWS = [
    Experiment(
        "ner",
        ("--data", "names.conll", *TINY, "--batch", "16", "--longest", "12", "--shapes", "2"),
        12,
        pictures=("loss.png", "f1.png", "f1_by_type.png", "entities.png"),
        files=("entities.html", "predictions.tsv", "tokenizer.json"),
        inputs=sentences,
        baseline="commonest_tag_f1",
        shards=BY_ROWS,
        refusals=(
            (("--data", "nowhere"), "nowhere does not exist, expected a file with a word and its tag per line"),
            (("--data", "plain.conll"), "'plain.conll' has no entity to learn from; expected tags such as B-person"),
            (
                ("--data", "words.conll"),
                "words.conll line 1 'just' has no tag (and so in 39 more sentences); more than",
            ),
            (("--data", "odd.conll"), "odd.conll line 1 has the tag 'PERSON', expected O, or B- or I- (or E-"),
            (("--data", "empty.conll"), "empty.conll has no sentence, expected a word and its tag per line"),
            (("--data", "short.conll"), "there are 2 groups of records; expected one each for train, validation, test"),
            (("--data", "names.conll", "--batch", "200"), "a batch of 200 is more than the"),
            (("--width", "40"), "--width is 40; expected a multiple of 32"),
            (("--longest", "0"), "--longest is 0; expected at least 1"),
            (("--longest", "3"), "--longest is 3; expected at least 8, for some words"),
            (("--resume", "--name", "a", "--lora", "4"), "with --lora 4: it was started with 0"),
        ),
        commands=(
            (("predict", "Anna went to New York."), ()),
            (("predict", "Anna went to New York.", "--json", "--checkpoint", "latest"), ()),
            (("evaluate",), ("evaluations/test/f1_by_type.png", "evaluations/test/result.json")),
            (("evaluate", "--data", "names.conll"), ("evaluations/names.conll/entities.html",)),
        ),
    ),
    Experiment(
        "qa",
        ("--data", "trips.json", *TINY, "--batch", "16", "--longest", "32", "--stride", "4", "--shapes", "2"),
        8,
        pictures=("loss.png", "f1.png", "f1_by_kind.png", "answers.png", "scores.png"),
        files=("answers.html", "predictions.json", "tokenizer.json"),
        inputs=questions,
        baseline="overlap_f1",
        shards=BY_ROWS,
        refusals=(
            (("--data", "nowhere.json"), "nowhere.json does not exist, expected a JSON file of the SQuAD kind"),
            (("--data", "two.json"), "there are 2 groups of records; expected one each for train, validation, test"),
            (("--data", "none.json"), "none.json has no question; expected data, paragraphs, qas, as SQuAD has them"),
            (("--data", "broken.json"), "broken.json is no JSON: "),
            (("--data", "table.json"), "table.json has the keys rows; expected data, a list"),
            (
                ("--data", "lost.json"),
                "lost.json article 1 paragraph 1 question 1 'Where is Anna?': the answer 'Atlantis' is not in its "
                "context (and 8 more questions); more than a tenth",
            ),
            (("--longest", "64", "--stride", "40"), "--stride is 40; expected up to 27 for windows of --longest 64"),
            (("--longest", "4", "--stride", "0"), "--longest is 4; expected at least 16"),
            (("--data", "trips.json", "--batch", "100"), "a batch of 100 is more than the"),
            (("--width", "40"), "--width is 40; expected a multiple of 32"),
            (("--resume", "--name", "a", "--stride", "3"), "with --stride 3: it was started with 4"),
        ),
        commands=(
            (("predict", "--text", "story.txt", "--question", "Where is Anna?"), ()),
            (("predict", "--text", "story.txt", "--question", "Who?", "When?", "--n-best", "3", "--json"), ()),
            (("evaluate",), ("evaluations/test/f1_by_kind.png", "evaluations/test/result.json")),
            (("evaluate", "--data", "two.json"), ("evaluations/two.json/answers.html",)),
        ),
    ),
]
