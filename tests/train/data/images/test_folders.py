"""Folders of pictures: layouts that are understood, layouts that are refused, and what counts as a class."""

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from train.data import DataError
from train.data.file_tree import LINK
from train.data.images.folders import Layout, is_flat, layout, listing, picture_paths, same_names


def write(folder: Path, *names: str) -> Path:
    """Pictures of one pixel."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1, 1)).save(folder / name, format="PNG")
    return folder


def names_of(folder: Path, paths) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]


# Splits.


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING", "trainset"])
@pytest.mark.parametrize(
    "test", ["val", "valid", "Validation", "valset", "dev", "Eval", "evaluation", "Test", "TESTING", "testset"]
)
def test_the_names_of_a_split(train, test, tmp_path):
    write(tmp_path, f"{train}/a/1.png", f"{test}/a/1.png")
    assert layout(tmp_path) == Layout(tmp_path / train, tmp_path / test)


def test_of_several_folders_to_test_on_the_first_is_used_and_the_rest_are_said(tmp_path):
    write(tmp_path, "train/a/1.png", "test/a/1.png", "valid/a/1.png", "extra/1.png", "__MACOSX/1.png")
    parts = layout(tmp_path)
    assert parts[:2] == (tmp_path / "train", tmp_path / "valid")
    assert parts.skipped == (
        (tmp_path / "extra", "is no part of the split"),
        (tmp_path / "test", "is not used: valid is for testing"),
    )


def test_one_part_alone(tmp_path):
    write(tmp_path / "x", "train/a/1.png", "train/b/1.png")
    assert layout(tmp_path / "x") == Layout(tmp_path / "x" / "train", None)
    write(tmp_path / "x", "notes/1.png")
    assert layout(tmp_path / "x").skipped == ((tmp_path / "x" / "notes", "is no part of the split"),)
    write(tmp_path / "y", "test/a/1.png", "val/a/1.png")
    assert layout(tmp_path / "y")[:2] == (None, tmp_path / "y" / "val")


def test_train_may_be_a_class(tmp_path):
    write(tmp_path, "bus/1.png", "car/1.png", "train/1.png", "train/2.png")
    assert layout(tmp_path) == Layout(tmp_path, None)
    assert listing(tmp_path).classes == ("bus", "car", "train")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cats/1.png", "dogs/1.png", "test/1.png"], "has test beside cats and dogs, which looks like a split without"),
        (["a/1.png", "val/b/1.png"], "has val beside a, which looks like a split without train"),
        (["train/a/1.png", "Training/a/1.png", "val/a/1.png"], "train and Training, expected one folder to train on"),
        (
            ["train2017/1.png", "val2017/1.png"],
            "looks like a split, by its folders train2017 and val2017: expected one",
        ),
        (["seg_train/a/1.png", "seg_test/a/1.png", "seg_pred/1.png"], "by its folders seg_train and seg_test"),
        (["training_set/a/1.png", "test_set/a/1.png"], "by its folders training_set and test_set"),
        (
            ["cats/train/1.png", "cats/test/2.png", "dogs/train/1.png"],
            "cats looks like a split, by its folders train and",
        ),
        (
            ["archive/Train/a/1.png", "archive/Valid/a/1.png"],
            "archive looks like a split, .* name it if it is the data",
        ),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_folders_that_look_like_a_split(names, message, labelled, tmp_path):
    write(tmp_path, *names)
    with pytest.raises(DataError, match=message) as caught:
        listing(layout(tmp_path).train, labelled=labelled)
    assert "\n" not in str(caught.value)


def test_classes_with_such_words_in_their_names(tmp_path):
    write(tmp_path, "bullet_train/1.png", "test_tube/1.png", "cat/1.png")
    assert listing(layout(tmp_path).train).classes == ("bullet_train", "cat", "test_tube")


# Classes.


def test_what_is_no_class_is_said(tmp_path):
    write(tmp_path, "a/1.png", "b/deep/2.png", "3.png", "__MACOSX/a/._1.png", "@eaDir/1.png", ".git/1.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("")
    (tmp_path / "up").symlink_to("..")
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "a" / "loop").symlink_to("../..")
    (tmp_path / "a" / "beside").symlink_to("../b")
    (tmp_path / "b" / "same").symlink_to("deep")
    (tmp_path / "c").symlink_to("b")
    actual = listing(tmp_path)
    assert actual.classes == ("a", "b") and names_of(tmp_path, actual.paths) == ["a/1.png", "b/deep/2.png"]
    assert {str(path.relative_to(tmp_path)): reason for path, reason in actual.skipped} == {
        "empty": "has no picture",
        "notes": "has no picture",
        "3.png": "lies beside the class folders",
        **dict.fromkeys(["a/loop", "a/beside", "b/same", "c", "here", "up"], LINK),
    }


def test_files_that_pillow_only_writes_or_only_recognises_are_no_pictures(tmp_path):
    write(tmp_path, "a/1.png", "b/2.JPG")
    for name in ("a/paper.pdf", "b/features.h5", "b/labels.hdf", "c/grid.grib", "c/film.mpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n")
    files = listing(tmp_path)
    assert names_of(tmp_path, files.paths) == ["a/1.png", "b/2.JPG"] and files.classes == ("a", "b")
    assert files.skipped == ((tmp_path / "c", "has no picture"),)


def test_class_folders_that_are_links_to_elsewhere(tmp_path):
    write(tmp_path / "far", "x/1.png", "x/2.png")
    write(tmp_path / "data", "b/1.png")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "far" / "x")
    actual = listing(tmp_path / "data")
    assert actual.classes == ("a", "b") and actual.labels.tolist() == [0, 0, 1] and actual.skipped == ()


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path, f"{name}/{name}.png", "b/1.png")
    actual = listing(tmp_path)
    assert actual.classes == ("b", "caf\\xe9")
    assert actual.paths[1] == tmp_path / name / f"{name}.png" and actual.paths[1].is_file()
    again = listing(tmp_path, actual.classes)
    assert again.labels.tolist() == [0, 1] and again.paths == actual.paths
    with pytest.raises(DataError, match=r"caf\\xe9 is none of the 1 classes") as caught:
        listing(tmp_path, ["b"])
    str(caught.value).encode()


def test_one_name_with_several_suffixes(tmp_path):
    write(tmp_path, "a/x.png", "a/x.jpg", "a/y.png", "b/x.png")
    assert [names_of(tmp_path, group) for group in same_names(listing(tmp_path))] == [["a/x.jpg", "a/x.png"]]


# Without classes.


def test_a_flat_folder_is_one_class(tmp_path):
    write(tmp_path / "celeba", "2.png", "1.png", "3.png", ".4.png", "thumbs/1.png")
    actual = listing(tmp_path / "celeba", labelled=False)
    assert names_of(tmp_path / "celeba", actual.paths) == ["1.png", "2.png", "3.png"]
    assert actual.classes == ("pictures",) and actual.labels.tolist() == [0, 0, 0]
    assert actual.skipped == ((tmp_path / "celeba" / "thumbs", "lies beside the pictures"),)
    with pytest.raises(DataError, match="no picture in .*empty or the sub-folders of .*empty"):
        (tmp_path / "empty").mkdir()
        listing(tmp_path / "empty", labelled=False)


def test_class_folders_without_need_for_classes(tmp_path):
    write(tmp_path, "a/1.png", "a/2.png", "b/3.png", "preview.png")
    actual = listing(tmp_path, labelled=False)
    assert actual.classes == ("a", "b") and actual.labels.tolist() == [0, 0, 1]
    assert actual.skipped == ((tmp_path / "preview.png", "lies beside the class folders"),)
    assert not is_flat(tmp_path) and is_flat(tmp_path / "a")


# Arguments of a command.


def test_picture_paths(tmp_path, monkeypatch):
    write(tmp_path, "f/2.png", "f/deep/1.png", "x.png", "odd")
    (tmp_path / "f" / "loop").symlink_to("..")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/x.png\n\n{tmp_path}/f/2.png\n")
    paths, skipped = picture_paths(
        [tmp_path / "f", str(tmp_path / "odd"), tmp_path / "list.txt", tmp_path / "gone.png"]
    )
    assert names_of(tmp_path, paths) == ["f/2.png", "f/deep/1.png", "odd", "x.png", "f/2.png", "gone.png"]
    assert skipped == ((tmp_path / "f" / "loop", LINK),)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("x.png\nb c.png\n"))
    assert picture_paths(["-"])[0] == (Path("x.png"), Path("b c.png"))
    with pytest.raises(DataError, match="a.png does not exist, nor does any of 2"):
        picture_paths(["a.png", "b.png"])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no picture in .*none"):
        picture_paths([tmp_path / "none"])
    with pytest.raises(DataError, match="no picture is named; expected files, folders"):
        picture_paths([])
