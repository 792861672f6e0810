"""The identity of data: equal for equal content wherever it lies, different for any other."""

import gzip
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from train.data import DataError
from train.data import fingerprint as identity
from train.data.fingerprint import fingerprint
from train.data.images.arrays import Labelled
from train.data.images.files import listing
from train.data.text.text import open_text, split
from train.data.text.token_files import TokenFile, open_tokens, write_tokens
from train.data.text.tokenizers import CharTokenizer, train_byte_pairs
from train.data.translation.files import PairFiles


class Named(NamedTuple):
    name: str
    x: torch.Tensor | None = None
    skipped: tuple = ()


@dataclass(frozen=True)
class Fields:
    a: int
    b: tuple


def test_equal_content_is_equal():
    x = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert fingerprint(x) == fingerprint(x.clone()) == fingerprint(x.T.contiguous().T) == fingerprint(x.numpy())
    read_only = np.frombuffer(x.numpy().tobytes(), np.float32).reshape(2, 3)
    assert fingerprint(x) == fingerprint(read_only) == fingerprint(read_only.astype(">f4"))
    assert fingerprint(Labelled(x, x)) == fingerprint(Labelled(x.clone(), x))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(Named("here", x, ((Path("a"), "is bad"),))) == fingerprint(Named("there", x))
    assert fingerprint([("eins", "one")]) == fingerprint((("eins", "one"),))
    assert len(fingerprint(x)) == 32


VALUES = [
    None,
    0,
    0.0,
    False,
    "",
    "0",
    b"0",
    [],
    [[]],
    {},
    ["ab", "c"],
    ["a", "bc"],
    [["a"], "b"],
    ["a", ["b"]],
    {"a": "b"},
    Fields(1, (2,)),
    Fields(1, (2, 3)),
    torch.zeros(2, 3),
    torch.zeros(3, 2),
    torch.zeros(2, 3, dtype=torch.int32),
    torch.zeros(2, 3, dtype=torch.bfloat16),
    torch.zeros(2, 3, dtype=torch.float16),
    torch.tensor(0.0),
    torch.zeros(0),
    CharTokenizer(("a",)),
    CharTokenizer(("b",)),
]


def test_different_content_is_different():
    assert len({fingerprint(value) for value in VALUES} | {fingerprint(*VALUES), fingerprint()}) == len(VALUES) + 2
    with pytest.raises(TypeError, match="no fingerprint of a object"):
        fingerprint([object()])


def test_one_changed_value_of_many_is_seen():
    x = torch.zeros(10**6)
    before = fingerprint(x)
    x[765_432] = 1
    assert fingerprint(x) != before


def write_folder(folder: Path) -> Path:
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 20)
    return folder


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "sampled"])
def test_a_folder_of_pictures_can_move(whole, tmp_path, monkeypatch):
    if not whole:
        monkeypatch.setattr(identity, "WHOLE", 10)
    before = write_folder(tmp_path / "here")
    shutil.copytree(before, tmp_path / "far" / "there")
    first, second = listing(before), listing(tmp_path / "far" / "there")
    assert first.paths != second.paths and fingerprint(first) == fingerprint(second)
    assert fingerprint(before) == fingerprint(tmp_path / "far" / "there")
    assert fingerprint(first) != fingerprint(listing(before, ["a", "aa", "b"]))  # other labels
    (second.paths[1]).write_bytes(b"a/3.png" * 20)  # of the same size
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(before) != fingerprint(tmp_path / "far" / "there")


def test_a_large_listing_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", 10)
    monkeypatch.setattr(identity, "SAMPLED", 2)
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for path in paths:
        path.write_bytes(b"12345")
    before = fingerprint(paths)
    paths[1].write_bytes(b"54321")  # not among those that are read
    assert fingerprint(paths) == before
    paths[1].write_bytes(b"123456")
    assert fingerprint(paths) != before
    paths[1].write_bytes(b"12345")
    paths[4].write_bytes(b"54321")
    assert fingerprint(paths) != before


def test_files_of_sentences_may_be_renamed_and_packed(tmp_path):
    for name, text in (("a.de", "eins\nzwei\n"), ("a.en", "one\ntwo\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / f"other.{name}.gz").write_bytes(gzip.compress(text.encode()))
    plain = PairFiles((tmp_path / "a.de",), (tmp_path / "a.en",))
    packed = PairFiles((tmp_path / "other.a.de.gz",), (tmp_path / "other.a.en.gz",))
    assert fingerprint(plain) == fingerprint(packed)
    flipped = PairFiles(plain.targets, plain.sources)
    held = PairFiles(plain.sources, plain.targets, every=2, held=True)
    assert len({fingerprint(files) for files in (plain, flipped, held)}) == 3


def test_tokens_on_disk_carry_their_hash(tmp_path, monkeypatch):
    tokenizer = train_byte_pairs(["a text of some words"], 260)
    for name, ids in (("a", [1, 2, 3]), ("b", [1, 2, 4]), ("copy", [1, 2, 3])):
        write_tokens(tmp_path / name, [ids], tokenizer)
    a, b, copy = (open_tokens(tmp_path / name) for name in ("a", "b", "copy"))
    assert fingerprint(a) == fingerprint(copy) != fingerprint(b)
    assert a.digest and fingerprint(TokenFile(a.ids, a.tokenizer)) == fingerprint(a[:]) == fingerprint(a)
    train, validation = split(write_tokens(tmp_path / "long", [range(200)] * 100, tokenizer))
    assert fingerprint(train) == fingerprint(train) != fingerprint(validation)


def test_text_of_another_content_with_as_many_tokens(tmp_path):
    for name, text in (("a", "some text or other"), ("b", "some text of others"[:18])):
        (tmp_path / name).write_text(text)
    vocabulary = CharTokenizer(tuple("abcdefghijklmnopqrstuvwxyz "))
    a, b = (open_text(tmp_path / name, vocabulary, tmp_path).tokens for name in "ab")
    assert len(a) == len(b) and fingerprint(a) != fingerprint(b)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="gone does not exist"):
        fingerprint(tmp_path / "gone")
    (tmp_path / "half.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    with pytest.raises(DataError, match="half.gz is truncated or garbled"):
        fingerprint([tmp_path / "half.gz"])
    (tmp_path / "link.png").symlink_to("nowhere")
    assert fingerprint([tmp_path / "link.png"])
