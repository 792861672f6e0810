"""Downloads: whole files or none, checksums published or kept, archives, and what is said without a connection."""

import hashlib
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.local_server import serve
from train.data import DataError
from train.data.downloads import fetch

NOWHERE = "http://127.0.0.1:9"
NAMES = ("set/a.txt", "set/deep/b.txt", "set/deep/c.txt")


@pytest.fixture
def served(tmp_path) -> Path:
    """A folder with a text, and a tar and a zip of three files."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "text.txt").write_text("some text" * 1000)
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name * 100)
    with tarfile.open(folder / "set.tar.gz", "w:gz") as tar, zipfile.ZipFile(folder / "set.zip", "w") as archive:
        for name in NAMES:
            tar.add(tmp_path / name, name)
            archive.write(tmp_path / name, name)
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_first_checksum_is_kept_and_compared(served, tmp_path):
    cache, digest = tmp_path / "cache", hashlib.sha256((served / "text.txt").read_bytes()).hexdigest()
    with serve(served) as url:
        fetch(f"{url}/text.txt", None, cache)
    assert (cache / "text.txt.sha256").read_text() == f"{digest}  text.txt\n"
    fetch(f"{NOWHERE}/text.txt", None, cache)  # nothing to fetch
    (cache / "text.txt").unlink()
    (served / "text.txt").write_text("another text")
    with (
        serve(served) as url,
        pytest.raises(DataError, match=f"is not the file .*.sha256.* {digest}") as caught,
    ):
        fetch(f"{url}/text.txt", None, cache)
    assert "\n" not in str(caught.value) and files(cache) == {"text.txt.sha256"}


def test_a_file_put_there_by_hand(served, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=f"cannot fetch .*; without a connection, put text.txt into {cache}$") as caught:
        fetch(f"{NOWHERE}/text.txt", None, cache)
    assert "\n" not in str(caught.value) and files(cache) == set()
    (cache / "text.txt").write_bytes((served / "text.txt").read_bytes())
    fetch(f"{NOWHERE}/text.txt", None, cache)
    assert files(cache) == {"text.txt", "text.txt.sha256"}


def test_a_connection_that_breaks_leaves_nothing(served, tmp_path):
    for name, members in (("text.txt", ()), ("set.zip", None)):
        with serve(served, limit=100) as url, pytest.raises(DataError, match=f"cannot fetch http.*{name}"):
            fetch(f"{url}/{name}", None, tmp_path / "cache", members)
    assert files(tmp_path / "cache") == set()


@pytest.mark.parametrize("name", ["set.tar.gz", "set.zip"])
def test_archives_are_unpacked(name, served, tmp_path, monkeypatch):
    cache, replace, calls = tmp_path / "cache", os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with serve(served) as url:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("train.data.downloads.os.replace", interrupted)
            fetch(f"{url}/{name}", None, cache, None)
        assert files(cache) == {name, "set/a.txt"}
        fetch(f"{url}/{name}", None, cache, None)
    assert files(cache) == {name, f"{name}.sha256", *NAMES}
    assert all((cache / inner).read_text() == inner * 100 for inner in NAMES)
    (cache / NAMES[2]).unlink()
    fetch(f"{NOWHERE}/{name}", None, cache, NAMES[:2])  # nothing to fetch, nor to unpack
    assert not (cache / NAMES[2]).exists()
    with pytest.raises(DataError, match=f"{name} has no set/d.txt"):
        fetch(f"{NOWHERE}/{name}", None, cache, ("set/d.txt",))


@pytest.mark.parametrize("name", ["set.tar.gz", "set.zip"])
def test_a_damaged_archive_is_one_line(name, served, tmp_path):
    """Fetched, it is removed; put there by hand, it stays."""
    content, cache = (served / name).read_bytes(), tmp_path / "cache"
    (served / name).write_bytes(content[: len(content) // 2])
    with serve(served) as url, pytest.raises(DataError, match=f"cache/{name} is truncated or garbled: ") as caught:
        fetch(f"{url}/{name}", None, cache, None)
    assert "\n" not in str(caught.value) and files(cache) == set()
    (served / name).rename(cache / name)
    with pytest.raises(DataError, match=f"cache/{name} is truncated or garbled: .*; remove it to fetch it again"):
        fetch(f"{NOWHERE}/{name}", None, cache, None)
    assert files(cache) == {name}


def test_an_archive_writes_nothing_outside_of_its_folder(served, tmp_path):
    """By the check, not by tarfile's filter alone, which Python has from 3.11.4 on."""
    cache = tmp_path / "cache"
    with tarfile.open(served / "evil.tar.gz", "w:gz") as tar:
        tar.add(served / "text.txt", "set/../../evil.txt")
    with serve(served) as url, pytest.raises(DataError, match=r"has set/\.\./\.\./evil\.txt, outside of its folder"):
        fetch(f"{url}/evil.tar.gz", None, cache, members=("set/../../evil.txt",))
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.parametrize(("name", "members"), [("text.txt", ()), ("set.tar.gz", None)])
def test_a_page_in_place_of_the_file(name, members, served, tmp_path):
    """A network that wants a log-in answers 200 to everything."""
    cache = tmp_path / "cache"
    with serve(served, status=200) as url:
        with pytest.raises(DataError, match=f"{name} is a page of HTML; expected {name}"):
            fetch(f"{url}/{name}", None, cache, members)
        with pytest.raises(DataError, match=f"{name} is not the published file"):
            fetch(f"{url}/{name}", f"sha256:{'0' * 64}", cache, members)
    assert files(cache) == set()


@pytest.mark.parametrize("status", [403, 404, 407, 503])
def test_a_server_that_refuses(status, served, tmp_path):
    with serve(served, status=status) as url, pytest.raises(DataError, match=f"cannot fetch {url}/text.txt: {status} "):
        fetch(f"{url}/text.txt", None, tmp_path / "cache")
    assert files(tmp_path / "cache") == set()


def test_a_folder_that_cannot_be_written(served, tmp_path):
    with serve(served) as url:
        with pytest.raises(DataError, match="cannot write text.txt into .*: Not a directory; XDG_CACHE_HOME names "):
            fetch(f"{url}/text.txt", None, served / "text.txt")
