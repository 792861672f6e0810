import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from train.files import plain, read_json, replacing, write_json


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
