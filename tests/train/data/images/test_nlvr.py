"""NLVR's files: parts, permutations of a picture, bad records."""

import json

import pytest
from PIL import Image

from train.data import DataError
from train.data.images import nlvr


def write(folder, part, records, pictures):
    (folder / part / "images" / "0").mkdir(parents=True)
    for name in pictures:
        Image.new("RGBA", (40, 10), (200, 0, 0, 255)).save(folder / part / "images/0" / f"{part}-{name}.png")
    (folder / part / f"{part}.json").write_text("\n".join(records), encoding="utf-8")


def record(identifier, label="true", sentence="There is  a box."):
    return json.dumps({"sentence": sentence, "label": label, "identifier": identifier, "directory": "0"})


def test_statements(tmp_path):
    folder = tmp_path / "nlvr"
    write(folder, "train", [record("1-0"), "", record("2-0", "false", "No box")], ["1-0-0", "1-0-3", "2-0-0"])
    write(folder, "dev", [record("7-0")], ["7-0-0"])
    bad = [record("2-0", sentence="!"), record("3-0", "maybe"), record("4-0"), "[]", '{"sentence": "a b"']
    write(folder, "test", [record("1-1"), *bad], ["1-1-5", "2-0-0", "3-0-0"])
    data = nlvr.open_statements(str(tmp_path))
    assert [path.name for path in data.train.paths] == ["train-1-0-0.png", "train-1-0-3.png", "train-2-0-0.png"]
    assert data.train.sentences == ("There is a box.", "There is a box.", "No box")
    assert data.train.labels.tolist() == [1, 1, 0] and data.parts == ("train", "test")
    assert [reason.split("picture")[0] for _, reason in data.skipped] == [
        "line 2 has a sentence of no words",
        "line 3 has the label 'maybe', expected true or false",
        "line 4 has no ",
        "line 5 is no JSON object",
        "line 6 is no JSON object",
    ]
    facts = nlvr.facts(data)
    assert facts["statements"] == {"train": 3, "test": 1} and facts["true"]["train"] == pytest.approx(2 / 3)
    assert data.train.some([2]).sentences == ("No box",)


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="does not exist; expected one with NLVR's parts"):
        nlvr.open_statements(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="has no part of NLVR; expected two of train/train.json"):
        nlvr.open_statements(str(tmp_path))
    write(tmp_path, "dev", [record("1-0")], ["1-0-0"])
    with pytest.raises(DataError, match="has dev/dev.json alone"):
        nlvr.open_statements(str(tmp_path))
    write(tmp_path, "test", [record("9-0")], [])
    with pytest.raises(DataError, match="has no statement with a picture; line 1 has no picture"):
        nlvr.open_statements(str(tmp_path))
