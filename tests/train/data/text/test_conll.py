"""CoNLL files: the ways to write entities, bad lines, parts that are held out, words of plain text."""

import itertools
import os
from pathlib import Path

import pytest

from train.data import DataError
from train.data.text import conll, entities
from train.data.text.conll import Entity

SPANS = [Entity("a", 1, 2), Entity("a", 2, 5), Entity("b", 5, 6)]  # the second follows one of its type at once
WAYS = {
    "IOB2": "O B-a B-a I-a I-a B-b O",
    "IOB1": "O I-a B-a I-a I-a I-b O",
    "BIOES": "O S-a B-a I-a E-a S-b O",
    "BILOU": "O U-a B-a I-a L-a U-b O",
    "BMES": "O S-a B-a M-a E-a S-b O",
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_write_entities(name):
    tags = WAYS[name].split()
    assert conll.entities(tags) == SPANS and conll.scheme([tags]) == name
    assert conll.iob2(SPANS, 7) == tuple(WAYS["IOB2"].split())


def test_ways_are_told_from_each_other():
    assert conll.scheme([["O"], []]) == "IOB2" and conll.scheme([["I-a", "I-b", "O"]]) == "IOB1"
    assert conll.scheme([["O", "I-a", "O", "B-b"]]) == "IOB2, but 1 entities begin with I-"


def conlleval(tags):
    """Entities by a rule of its own: an entity begins where its predecessor cannot be continued."""
    out = []
    for i, tag in enumerate(tags):
        before = tags[i - 1] if i else "O"
        if tag == "O":
            continue
        new = tag[0] in "BS" or before == "O" or before[0] in "ES" or before[2:] != tag[2:]
        if new:
            out.append([tag[2:], i, i + 1])
        else:
            out[-1][2] = i + 1
    return [Entity(*row) for row in out]


def test_entities_of_all_short_rows_of_tags():
    tags = ["O", *(f"{prefix}-{type_}" for prefix in "BIES" for type_ in "ab")]
    for length in range(5):
        for row in itertools.product(tags, repeat=length):
            assert conll.entities(row) == conlleval(row), row


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_columns_comments_documents_and_ends_of_lines(tmp_path):
    text = "-DOCSTART- -X- O\r\n\r\nEU NNP I-NP I-ORG\r\nsays VBZ O O\r\n\r\n\r\n# id 3\r\nRome  NNP O   I-LOC  \r\n"
    part = conll.read(write(tmp_path / "a.txt", text))
    assert part.sentences == ((("EU", "says"), ("B-ORG", "O")), (("Rome",), ("B-LOC",)))
    assert part.form == "4 columns separated by a space, the last one tags in IOB1; 1 documents"
    tabs = "# id 7\tdomain=en\nNew York\tB-LOC\n#\tO\n \u00a0x\tO\n\t\nb\tO\n"
    part = conll.read(write(tmp_path / "b.txt", "\ufeff" + tabs))
    assert part.sentences == ((("New York", "#", "\u00a0x"), ("B-LOC", "O", "O")), (("b",), ("O",)))
    latin = conll.read(write(tmp_path / "c.txt", "caf\xe9 O\n".encode("latin-1")))
    assert latin.sentences[0].words == ("café",) and "1 lines are not UTF-8, read as Latin-1" in latin.form


def test_bad_lines_are_named_and_their_sentence_left_out(tmp_path):
    good = "a\tO\nb\tB-x\n\n" * 30
    bad = "a\tO\nlost\nb\tPERSON\n\n\tO\n\n"
    part = conll.read(write(tmp_path / "a.txt", good + bad + good))
    assert len(part.sentences) == 60 and len(part.skipped) == 2
    assert part.skipped[0] == ("a.txt line 92", "'lost' has no tag") and part.skipped[1] == (
        "a.txt line 95",
        "has no word",
    )
    with pytest.raises(DataError, match="line 1 'a' has no tag .and so in 9 more sentences.; more than a tenth"):
        conll.read(write(tmp_path / "b.txt", "a\n\n" * 10))
    with pytest.raises(DataError, match="has the tag 'PER', expected O, or B- or I-"):
        conll.read(write(tmp_path / "c.txt", "a PER\n\n"))


def test_parts_are_held_out_by_documents_or_blocks(tmp_path):
    rows = "".join(f"{'-DOCSTART- O' if i % 5 == 0 else ''}\nw{i} B-x\n\n" for i in range(100))
    data = conll.open_tagged(str(write(tmp_path / "a.txt", rows)))
    assert (
        "one of ten documents each" in data.origin and len(data.validation.sentences) == len(data.test.sentences) == 10
    )
    assert [s.words[0] for s in data.validation.sentences[:5]] == [f"w{i}" for i in range(40, 45)]
    data = conll.open_tagged(str(write(tmp_path / "b.txt", rows.replace("-DOCSTART- O", ""))))
    assert "blocks of 8 sentences" in data.origin and [s.words[0] for s in data.test.sentences] == [
        f"w{i}" for i in range(72, 80)
    ]
    short = conll.open_tagged(str(write(tmp_path / "c.txt", "a B-x\n\n" * 7)))
    assert [len(part.sentences) for part in short.parts.values()] == [5, 1, 1]


def test_types_that_are_not_in_training_are_said(tmp_path):
    write(tmp_path / "train.txt", "a B-x\n\n" * 20)
    write(tmp_path / "test.txt", "a B-y\n\nb B-x\n")
    data = conll.open_tagged(str(tmp_path))
    facts = conll.facts(data)
    assert data.types == ("x",) and facts["types not in training, always missed"] == ["y"]
    assert facts["sentences"]["test"] == 2 and "test in test.txt" in data.origin
    with pytest.raises(DataError, match="other.txt has z; expected entities such as x"):
        conll.open_test(str(write(tmp_path / "other.txt", "a B-z\n")), data.types)


def test_words_of_a_text():
    def words(text):
        return [text[a:b] for a, b in conll.words_of(text)]

    assert words("Mary's o'clock don't, 'so'.") == ["Mary", "'s", "o'clock", "don't", ",", "'", "so", "'", "."]
    assert words("May twenty-third, 1,000.5 at 10:30.") == ["May", "twenty-third", ",", "1,000.5", "at", "10:30", "."]
    assert words("@you (see https://a.b/c?d=1), #it") == ["@you", "(", "see", "https://a.b/c?d=1", ")", ",", "#it"]
    assert words("你好 world カナ 한국 naïve हिन्दी") == ["你", "好", "world", "カ", "ナ", "한국", "naïve", "हिन्दी"]
    assert words("❤\ufe0f\u200d") == ["❤", "\ufe0f", "\u200d"] and words(" \n") == []


def test_generated_sentences():
    parts = entities.parts(300, 60, 60)
    rows = [row for part in parts.values() for row in part]
    assert len({tuple(words) for words, _ in rows}) == 420
    assert parts == entities.parts(300, 60, 60)
    names = {"train": set(), "test": set()}
    for part, own in names.items():
        for words, spans in parts[part]:
            assert all(0 <= first < last <= len(words) for _, first, last in spans)
            own |= {word for type_, *span in spans if type_ == "person" for word in words[slice(*span)]}
    made_up = {name for name in names["test"] if name not in (*entities.AMBIGUOUS, *entities.PEOPLE)}
    assert len(made_up) > 20 and not made_up & names["train"]
    text = " ".join(rows[0][0])
    assert [text[a:b] for a, b in conll.words_of(text)] == rows[0][0]


@pytest.mark.skipif(not os.environ.get("FUNCTREE_DATA"), reason="FUNCTREE_DATA names no folder of public data")
def test_wnut17():
    data = conll.open_tagged(str(Path(os.environ["FUNCTREE_DATA"]) / "ner_wnut17"))
    assert [len(part.sentences) for part in data.parts.values()] == [3394, 1009, 1287] and not data.skipped
    entities_ = [sum(len(conll.entities(s.tags)) for s in part.sentences) for part in data.parts.values()]
    assert entities_ == [1975, 836, 1079] and "IOB2" in data.train.form and len(data.types) == 6
