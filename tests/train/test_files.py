import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from train.files import distinct_stems, plain, read_json, replacing, shown, write_json


class Point(NamedTuple):
    x: float
    y: tuple


def test_plain_values():
    value = {"a": Point(1.5, (2, True)), 3: Path("a/b"), "n": np.float32(0.5), "t": torch.tensor([1, 2]), "d": {4, 2}}
    assert plain(value) == {"a": {"x": 1.5, "y": [2, True]}, "3": "a/b", "n": 0.5, "t": [1, 2], "d": [2, 4]}
    assert plain([float("inf"), None, torch.bfloat16]) == ["Infinity", None, "torch.bfloat16"]
    with pytest.raises(TypeError, match="cannot write a object as JSON"):
        plain({"a": object()})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"v": 1})
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "a.json") == {"v": 1} and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write to")
def test_an_error_about_the_temporary_file_names_the_file_itself(tmp_path):
    with pytest.raises(OSError) as caught, replacing("/proc/result.json"):
        pass
    assert caught.value.filename == "/proc/result.json" and "'/proc/result.json'" in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "result.json") as temporary:
        temporary.unlink()
        open(temporary)
    assert caught.value.filename == str(tmp_path / "result.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught, replacing(tmp_path / "folder"):
        pass  # the file cannot take the folder's name
    assert str(caught.value).endswith(f"'{tmp_path / 'folder'}'") and os.listdir(tmp_path) == ["folder"]
    with pytest.raises(FileNotFoundError, match="other"), replacing(tmp_path / "result.json"):
        open(tmp_path / "other")


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("x" * 250 + ".json")
    write_json(path, 1)
    assert read_json(path) == 1


def test_permissions_are_those_of_a_new_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    (tmp_path / "b.json").write_text("1")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b.json").stat().st_mode


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), ("{", "is not valid JSON"), (b"\xff", "JSON")]
)
def test_bad_json_is_one_line(content, message, tmp_path):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value) and not isinstance(caught.value, json.JSONDecodeError)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain näme 你好.png", "plain näme 你好.png"),
        (os.fsdecode(b"caf\xe9.png"), "caf\\xe9.png"),
        (Path(os.fsdecode(b"a/\xff")), "a/\\xff"),
        ("two\nlines\x1b[31m\u2028", "two\\nlines\\x1b[31m\\u2028"),
        ("narrow\u202fspace, joined\u200demoji", "narrow\u202fspace, joined\u200demoji"),
        ("\ud800", "\\ud800"),
    ],
)
def test_names_that_can_be_printed(name, expected):
    assert shown(name) == expected
    shown(name).encode("utf-8")


def test_file_names_that_are_not_utf8_survive_json(tmp_path):
    name = os.fsdecode(b"caf\xe9\n.png")
    write_json(tmp_path / "a.json", {"path": Path(name)})
    assert read_json(tmp_path / "a.json") == {"path": name}


def test_names_of_results_are_distinct():
    paths = ["a/x.png", "b/x.jpg", Path("y.png"), "x_2.png", "c/X.png"]
    assert distinct_stems(paths) == ["x", "x_2", "y", "x_2_2", "X_3"]
