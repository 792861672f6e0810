"""The files below a folder: hidden ones, left-overs of other programs, and links that lead in circles."""

import os
from pathlib import Path

import pytest

from train.data import DataError, file_tree
from train.data.file_tree import LINK, files_below, inode, subfolders


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names_of(folder: Path, **options) -> list[str]:
    return [str(path.relative_to(folder)) for path in files_below(folder, **options).paths]


def test_sorted_without_hidden_files_and_left_overs(tmp_path):
    names = ["b/2", "b/1", "a", "b/deep/er/3"]
    left_over = [".git/4", "b/.5", "__MACOSX/b/._1", "b/@eaDir/1", "b/Thumbs.db", "DESKTOP.INI", "$RECYCLE.BIN/6"]
    write(tmp_path, *names, *left_over)
    assert names_of(tmp_path) == ["a", "b/1", "b/2", "b/deep/er/3"]
    assert subfolders(tmp_path) == ["b"] and files_below(tmp_path).skipped == ()


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_links_to_folders_above_are_not_followed(target, tmp_path):
    write(tmp_path / "out" / "top", "x/1", "x/y/2")
    (tmp_path / "out" / "top" / "x" / "y" / "loop").symlink_to(target)
    below = files_below(tmp_path / "out" / "top")
    assert [path.name for path in below.paths] == ["1", "2"]
    assert below.skipped == ((tmp_path / "out/top/x/y/loop", LINK),)


def test_each_folder_is_read_once(tmp_path):
    write(tmp_path, "top/a/1", "far/2", "other/3")
    (tmp_path / "top" / "b").symlink_to(tmp_path / "far")  # elsewhere: part of the data
    (tmp_path / "top" / "c").symlink_to("a")
    below = files_below(tmp_path / "top")
    assert names_of(tmp_path / "top") == ["a/1", "b/2"]
    assert below.skipped == ((tmp_path / "top" / "c", LINK),)
    assert names_of(tmp_path / "top", apart={inode(tmp_path / "far")}) == ["a/1"]
    (tmp_path / "top" / "2").symlink_to(tmp_path / "far" / "2")  # a link to a file is a file
    assert names_of(tmp_path / "top") == ["2", "a/1", "b/2"]


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    write(tmp_path, "a/1", "file")
    with pytest.raises(DataError, match="gone does not exist, expected a folder"):
        files_below(tmp_path / "gone")
    with pytest.raises(DataError, match="file is a file, expected a folder of x"):
        subfolders(tmp_path / "file", "a folder of x")
    real = os.scandir

    def scandir(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(file_tree.os, "scandir", scandir)
    assert files_below(tmp_path).skipped == ((tmp_path / "a", "cannot be read: Permission denied"),)
    with pytest.raises(DataError, match="cannot read .*/a: Permission denied"):
        subfolders(tmp_path / "a")
