"""Docstrings of the standard library."""

import inspect
import json
import logging

import pytest

from train.data import DataError
from train.data.text import docstrings, labelled


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A user's cache of its own, and a library of a few files."""
    library = tmp_path / "lib"
    (library / "shop").mkdir(parents=True)
    (library / "test").mkdir()
    (library / "test" / "left_out.py").write_text('"""A module of tests that is left out."""')
    (library / "bad.py").write_text("this is no Python")
    (library / "shop" / "__init__.py").write_text(
        '"""Shops.\n\n=====\nA shop sells things to all the people who come.\n"""'
    )
    source = (
        '"""Tills of a shop."""\nclass Till:\n    def open(self):\n        """Open the till of a shop at once."""\n'
    )
    (library / "shop" / "tills.py").write_text(source + "def again():\n    '''Open the till of a shop at once.'''\n")
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setattr(docstrings, "folder_of", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "docstrings"


def test_reading(cache):
    entries = docstrings.docstrings()
    assert [entry.name for entry in entries] == ["shop", "shop.tills", "shop.tills.Till.open"]  # each text once
    assert entries[0].text == "Shops.\n\nA shop sells things to all the people who come."  # without the rule
    assert {entry.package for entry in entries} == {"shop"}
    (file,) = cache.iterdir()
    file.write_text(file.read_text().replace("sells", "buys"))
    assert "buys" in docstrings.docstrings()[0].text  # from the cache
    file.write_text("garbled")
    assert docstrings.docstrings() == entries and json.loads(file.read_text())["docstrings"]


def test_a_cache_that_cannot_be_written(cache):
    cache.parent.write_text("a file in its place")
    assert len(docstrings.docstrings()) == 3


def test_no_sources(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no docstrings below"):
        docstrings.docstrings()


def test_names_are_blanked(cache):
    assert docstrings._blanked("Open the Till of shop.tills, not of stills.", {"shop", "tills", "Till"}) == (
        "Open the _ of _._, not of stills."
    )
    records, blocks = docstrings.by_package()
    assert records == [("_ of a _.", "shop"), ("_ the _ of a _ at once.", "shop")] and blocks == [0, 0]


def test_the_real_library():
    entries = {entry.name: entry for entry in docstrings.docstrings()}
    first = inspect.cleandoc(logging.Logger.setLevel.__doc__)
    assert entries["logging.Logger.setLevel"] == ("logging", "logging.Logger.setLevel", first)
    pairs = dict(docstrings.title_and_body())
    assert len(pairs) > 1000 and all(pairs.values())
    assert len(docstrings.corpus()) > 1_000_000

    data = labelled.open_labelled("docstrings")
    assert len(data.classes) == docstrings.CLASSES
    texts = [set(part.texts) for part in data.parts.values()]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    sizes = [len(part.texts) for part in data.parts.values()]
    assert sizes[0] > 7 * sizes[1] and abs(sizes[1] - sizes[2]) <= docstrings.BLOCK
