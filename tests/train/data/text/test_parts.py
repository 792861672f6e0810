"""Parts of data sets: their files by name, and groups that are held out."""

import pytest

from train.data import DataError
from train.data.text import parts


def test_files_of_a_folder_and_beside_a_file(tmp_path):
    for name in ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated", "README.md", "testing.txt"):
        (tmp_path / name).touch()
    files = parts.files_of(str(tmp_path))
    names = {part: path.name for part, path in files.items()}
    assert names == {
        "train": "wnut17train.conll",
        "validation": "emerging.dev.conll",
        "test": "emerging.test.annotated",
    }
    assert parts.files_of(str(tmp_path / "wnut17train.conll")) == {"train": tmp_path / "wnut17train.conll"}
    (tmp_path / "wnut17testb.conll").touch()
    (tmp_path / "wnut17testa.conll").touch()
    beside = parts.files_of(str(tmp_path / "wnut17train.conll"))
    assert [path.name for path in beside.values()] == ["wnut17train.conll", "wnut17testa.conll", "wnut17testb.conll"]
    with pytest.raises(DataError, match="2 files for validation: emerging.dev.conll, wnut17testa.conll; name one with"):
        parts.files_of(str(tmp_path))
    assert parts.files_of(str(tmp_path), "x", "y")["validation"].name == "x"
    (tmp_path / "train.json").touch()
    with pytest.raises(DataError, match="2 files with 'train' in their names: train.json, wnut17train.conll"):
        parts.files_of(str(tmp_path))


def test_groups_are_held_out_whole():
    groups = [i // 3 for i in range(75)]
    rows = parts.held_out(groups, ["validation", "test"])
    assert sorted(i for part in rows.values() for i in part) == list(range(75))
    of = {name: {groups[i] for i in part} for name, part in rows.items()}
    assert of["validation"] == {8, 18} and of["test"] == {9, 19} and len(of["train"]) == 21
    few = parts.held_out("aabbc", ["validation", "test"])
    assert few == {"train": [0, 1], "validation": [2, 3], "test": [4]}
    assert parts.held_out("aabbc", ["test"]) == {"train": [0, 1, 2, 3], "test": [4]}
    assert parts.held_out("ab", []) == {"train": [0, 1]}
    with pytest.raises(DataError, match="there are 2 groups of records; expected one each for train, validation, test"):
        parts.held_out("ab", ["validation", "test"])
