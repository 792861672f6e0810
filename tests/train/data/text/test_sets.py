"""Texts by name: fetched once, read as files are."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from tests.local_server import serve
from train.data import DataError
from train.data.text import sets
from train.data.text.text import open_text

DATA = os.environ.get("FUNCTREE_DATA")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder that is served, with what "shakespeare" and "wikitext-2" should be; the cache is in `tmp_path` too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "input.txt").write_text("To be, or not to be")
    with zipfile.ZipFile(folder / "wikitext-2-raw-v1.zip", "w") as archive:
        for part in ("train", "valid", "test"):
            archive.writestr(f"wikitext-2-raw/wiki.{part}.raw", f"= {part} =")
    with serve(folder) as url:
        for name, text in sets.TEXTS.items():
            path = folder / text.download.address.rpartition("/")[2]
            checksum = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
            download = text.download._replace(address=f"{url}/{path.name}", checksum=checksum)
            monkeypatch.setitem(sets.TEXTS, name, text._replace(download=download))
        yield folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shakespeare", "To be, or not to be"),
        ("wikitext-2", "= train ="),
        ("wikitext-2-valid", "= valid ="),
        ("wikitext-2-test", "= test ="),
    ],
)
def test_known_names_are_downloaded(name, expected, published, tmp_path):
    for _ in range(2):
        text = open_text(Path(name), None, tmp_path / "tokens")
        assert text.tokenizer.decode(text.tokens) == expected and text.name.startswith(f"{name} (")
        for path in published.iterdir():  # the second time there is nothing to fetch
            path.unlink()
    Path(name).write_text("a file of this name goes first")
    assert open_text(name, None, tmp_path / "tokens").name == name


def test_what_is_not_there_is_one_line(published, tmp_path):
    known = "expected a text file, a folder of them, or one of docstrings, shakespeare, wikitext-2, wikitext-2-valid"
    with pytest.raises(DataError, match=f"shakespear does not exist, {known}"):
        open_text("shakespear", None, tmp_path)
    (published / "input.txt").unlink()
    with pytest.raises(DataError, match="cannot fetch .*; without a connection, put input.txt into .*/shakespeare$"):
        open_text("shakespeare", None, tmp_path)


@pytest.mark.skipif(not DATA, reason="FUNCTREE_DATA does not name a folder with real data sets")
def test_the_checksum_of_shakespeare():
    content = (Path(DATA) / "tinyshakespeare" / "input.txt").read_bytes()
    assert sets.TEXTS["shakespeare"].download.checksum == f"sha256:{hashlib.sha256(content).hexdigest()}"
