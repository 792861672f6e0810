"""Pictures for translation: the three layouts, their errors by name, and batches as functions of key and step."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core import random
from train.data import DataError
from train.data.batching import epoch_batch
from train.data.images.pairs import (
    batch_at,
    facts,
    folder,
    paired,
    photographs,
    picture,
    pictures,
    side_by_side,
    signed,
    unpaired,
    window,
)

KEY = random.key(7)


def save(path: Path, height: int, width: int, mode: str = "RGB", seed: int = 0) -> torch.Tensor:
    """A picture of noise, and its pixels (channels, height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *(3,) * (mode == "RGB")), np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1)


# The layouts.


def test_side_by_side(tmp_path):
    expected = [save(tmp_path / "train" / f"{i}.png", 6, 10, seed=i) for i in (2, 1)][::-1]
    save(tmp_path / "val" / "9.png", 6, 10)
    (tmp_path / "train" / "notes.txt").write_text("")
    pairs = side_by_side(tmp_path, "train")
    assert [path.name for path in pairs.paths] == ["1.png", "2.png"]
    for i, pixels in enumerate(expected):
        assert torch.equal(torch.cat([pairs.sources[i], pairs.targets[i]], 2), pixels)
    turned = side_by_side(tmp_path / "train", source="right")
    assert torch.equal(turned.sources, pairs.targets) and torch.equal(turned.targets, pairs.sources)
    assert side_by_side(tmp_path, "train", size=4, channels=1).targets.shape == (2, 1, 4, 4)


def test_halves_do_not_mix_where_they_are_scaled(tmp_path):
    both = np.concatenate([np.zeros((8, 8), np.uint8), np.full((8, 8), 255, np.uint8)], 1)
    Image.fromarray(both).save(tmp_path / "1.png")
    pairs = side_by_side(tmp_path, size=13)
    assert pairs.sources.shape == (1, 1, 13, 13) and not pairs.sources.any() and (pairs.targets == 255).all()


def test_paired_folders(tmp_path):
    expected = [[save(tmp_path / part / f"{n}.{end}", 5, 7, mode, n) for n in (1, 2)] for part, end, mode in SIDES]
    pairs = paired(tmp_path / "grey", tmp_path / "colour")
    assert torch.equal(pairs.sources, torch.stack(expected[0])) and torch.equal(pairs.targets, torch.stack(expected[1]))
    assert pairs.paths == (tmp_path / "grey" / "1.png", tmp_path / "grey" / "2.png")
    assert paired(tmp_path / "grey", tmp_path / "colour", channels=3).sources.shape == (2, 3, 5, 7)


SIDES = [("grey", "png", "L"), ("colour", "bmp", "RGB")]


def test_unpaired_folders(tmp_path):
    expected = [torch.stack([save(tmp_path / s / f"{n}.png", 4, 5, seed=n) for n in range(c)]) for s, c in COUNTS]
    actual = unpaired(tmp_path / "a", tmp_path / "b")
    for side, pixels, (name, count) in zip(actual, expected, COUNTS, strict=True):
        assert torch.equal(side.images, pixels)
        assert side.paths == tuple(tmp_path / name / f"{n}.png" for n in range(count))
    assert torch.equal(folder(tmp_path / "b").images, expected[1])


COUNTS = [("a", 3), ("b", 2)]


# Faults.


def two(d: Path, first: tuple, second: tuple, places: tuple[str, str] = ("a/1.png", "b/1.png")) -> None:
    save(d / places[0], *first)
    save(d / places[1], *second)


HALVES = ("train/1.png", "train/2.png")


@pytest.mark.parametrize(
    ("prepare", "read", "message"),
    [
        (lambda d: None, lambda d: side_by_side(d / "no"), "/no does not exist, expected a folder of pictures"),
        (lambda d: (d / "f").touch(), lambda d: side_by_side(d / "f"), "/f is a file, expected a folder"),
        (lambda d: save(d / "val/1.png", 4, 8), lambda d: side_by_side(d, "train"), "sub-folder 'train', .*of: val$"),
        (lambda d: (d / "train").mkdir(), lambda d: side_by_side(d, "train"), "no picture in .*/train$"),
        (lambda d: save(d / "1.png", 4, 9), side_by_side, r"/1.png is 4x9, which has no two halves"),
        (lambda d: (d / "1.png").write_text("no"), side_by_side, "/1.png cannot be read as a picture"),
        (lambda d: save(d / "1.png", 4, 8), lambda d: side_by_side(d, source="top"), "source is 'top', expected left"),
        (lambda d: save(d / "1.png", 4, 8), lambda d: side_by_side(d, channels=4), "channels is 4, expected 1 or 3"),
        (
            lambda d: two(d, (4, 8), (6, 8), HALVES),
            lambda d: side_by_side(d, "train"),
            "/2.png has 6x4 pixels, those before it 4x4; give a size",
        ),
        (
            lambda d: two(d, (4, 4), (4, 6)),
            lambda d: paired(d / "a", d / "b", size=4),
            "a pair differs in size: .*/a/1.png is 4x4, .*/b/1.png is 4x6",
        ),
        (
            lambda d: two(d, (4, 4), (4, 4), ("a/1.png", "b/2.png")),
            lambda d: paired(d / "a", d / "b"),
            "/a/1.png has no pair in .*/b, nor has any other picture of .*/a$",
        ),
        (
            lambda d: (two(d, (4, 4), (4, 4)), save(d / "a/1.bmp", 4, 4)),
            lambda d: paired(d / "a", d / "b"),
            "/a/1.bmp and .*/a/1.png have one name",
        ),
        (lambda d: two(d, (4, 4), (5, 4)), lambda d: unpaired(d / "a", d / "b"), "/b/1.png has 5x4 pixels"),
    ],
)
def test_folders_that_cannot_be_used(prepare, read, message, tmp_path):
    prepare(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


# Records that cannot be used, one by one.


def test_unreadable_and_odd_files_are_skipped_and_said(tmp_path, caplog):
    for number in range(3):
        save(tmp_path / f"{number}.png", 4, 8, seed=number)
    save(tmp_path / "odd.png", 4, 9)
    (tmp_path / "text.png").write_text("no picture")
    pairs = side_by_side(tmp_path)
    assert [path.name for path in pairs.paths] == ["0.png", "1.png", "2.png"] and len(pairs.sources) == 3
    assert [path.name for path, _ in pairs.skipped] == ["odd.png", "text.png"]
    assert pairs.skipped[0][1].startswith("is 4x9, which has no two halves")
    assert len([record for record in caplog.records if "skipped" in record.getMessage()]) == 2
    (tmp_path / "0.png").write_text("no picture")
    (tmp_path / "1.png").write_text("no picture")
    (tmp_path / "2.png").write_text("no picture")
    with pytest.raises(DataError, match="none of the 5 pictures in .* can be used; .*/0.png cannot be read"):
        side_by_side(tmp_path)


def test_pairs_that_are_none_are_skipped_and_said(tmp_path):
    for number in range(3):
        two(tmp_path, (4, 4, "RGB", number), (4, 4, "L", number), (f"a/{number}.png", f"b/{number}.jpg"))
    two(tmp_path, (4, 4), (4, 6), ("a/size.png", "b/size.png"))
    two(tmp_path, (4, 4), (4, 4), ("a/lone.png", "b/other.png"))
    two(tmp_path, (4, 4), (4, 4), ("a/bad.png", "b/bad.png"))
    (tmp_path / "b" / "bad.png").write_text("no picture")
    pairs = paired(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in pairs.paths] == ["0.png", "1.png", "2.png"] and pairs.targets.shape == (3, 1, 4, 4)
    skipped = {path.name: reason for path, reason in pairs.skipped}
    assert set(skipped) == {"lone.png", "other.png", "size.png", "bad.png"}
    assert skipped["lone.png"].startswith("has no pair in") and "a/size.png is 4x4" in skipped["size.png"]
    assert facts("pairs", pairs) == {
        "pairs to train on": 3,
        "size of pairs": "3 x 4 x 4",
        "folders": [str(tmp_path / "a")],
        "made grey or coloured": [],
        "skipped": list(pairs.skipped),
    }


def test_names_that_differ_by_their_suffix_on_both_sides(tmp_path):
    for side in "ab":
        save(tmp_path / side / "1.png", 4, 4, seed=1)
        save(tmp_path / side / "1.bmp", 4, 4, seed=2)
    pairs = paired(tmp_path / "a", tmp_path / "b")
    assert len(pairs.paths) == 2 and torch.equal(pairs.sources, pairs.targets)


@pytest.mark.parametrize("most", ["L", "RGB"])
def test_pictures_become_grey_or_coloured_as_most_are(most, tmp_path, caplog):
    other = "RGB" if most == "L" else "L"
    for side in "ab":
        for number in range(3):
            save(tmp_path / side / f"{number}.png", 4, 4, most, number)
    pixels = save(tmp_path / "a" / "odd.png", 4, 4, other, 9)
    a, b = unpaired(tmp_path / "a", tmp_path / "b")
    assert a.images.shape == (4, 1 if most == "L" else 3, 4, 4) and b.images.shape[1] == a.images.shape[1]
    assert a.recoloured == (tmp_path / "a" / "odd.png",) and b.recoloured == ()
    kind = "grey" if most == "L" else "coloured"
    assert f"made {kind}, as most of the pictures are: {tmp_path / 'a' / 'odd.png'}" in caplog.text
    expected = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).convert(most)
    assert np.array_equal(a.images[3].permute(1, 2, 0).squeeze(-1), np.asarray(expected))
    assert facts("pictures", a, b)["made grey or coloured"] == list(a.recoloured)
    assert unpaired(tmp_path / "a", tmp_path / "b", channels=1)[0].recoloured == ()
    both = pictures([tmp_path / "a" / "odd.png", tmp_path / "gone.png"])
    assert both.paths == (tmp_path / "a" / "odd.png",) and both.skipped == (
        (tmp_path / "gone.png", "does not exist, expected a picture"),
    )


def test_split_names_in_any_case(tmp_path):
    save(tmp_path / "Train" / "1.png", 4, 8)
    assert len(side_by_side(tmp_path, "train").paths) == 1
    save(tmp_path / "train" / "1.png", 4, 8)
    save(tmp_path / "train" / "2.png", 4, 8)
    assert len(side_by_side(tmp_path, "train").paths) == 2


# Batches.


def numbered(count: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Images whose channels are: the example, the row, the column."""
    example = torch.arange(count)[:, None, None].expand(count, height, width)
    row = torch.arange(height)[:, None].expand(count, height, width)
    column = torch.arange(width).expand(count, height, width)
    return torch.stack([example, row, column], 1)[:, :channels].to(torch.uint8)


def test_windows_are_anywhere_and_whole():
    images = numbered(300, 3, 7, 9)
    actual = window(random.sites(KEY, 300), images, 5)
    assert actual.shape == (300, 3, 5, 5) and actual.dtype == torch.uint8
    top, left = actual[:, 1, 0, 0].int(), actual[:, 2, 0, 0].int()
    assert set(top.tolist()) == {0, 1, 2} and set(left.tolist()) == {0, 1, 2, 3, 4}
    for i in range(300):
        assert torch.equal(actual[i], images[i, :, top[i] : top[i] + 5, left[i] : left[i] + 5])


def test_batches_are_functions_of_key_and_step():
    images = numbered(11, 3, 8, 9)
    others = images.flip(1)
    batches = [batch_at(KEY, step, 4, 6, images, others) for step in range(6)]
    for step, (sources, targets) in enumerate(batches):
        again = batch_at(KEY, step, 4, 6, images)[0]
        assert torch.equal(sources, again) and torch.equal(targets, sources.flip(1))
        assert sources.shape == (4, 3, 6, 6) and sources.dtype == torch.float32
        pixels = ((sources + 1) * 127.5).round()
        assert pixels[:, 0, 0, 0].tolist() == epoch_batch(random.sites(KEY, 2)[0], step, 11, 4).tolist()
        assert (pixels[:, 2].diff(dim=-1).abs() == 1).all()
    mirrored = torch.cat([sources[:, 2, 0, 0] > sources[:, 2, 0, 1] for sources, _ in batches])
    assert 0 < mirrored.sum() < len(mirrored)
    plain = [batch_at(KEY, step, 4, 6, images, flip=False)[0] for step in range(6)]
    assert all((x[:, 2, 0, 0] < x[:, 2, 0, 1]).all() for x in plain)
    assert not torch.equal(batch_at(random.key(8), 0, 4, 6, images)[0], batches[0][0])


def test_an_example_is_changed_by_its_own_key_alone():
    images = numbered(8, 3, 8, 8)
    keys = random.sites(KEY, 8)
    assert torch.equal(window(keys, images, 4)[[5, 2]], window(keys[[5, 2]], images[[5, 2]], 4))


def test_test_tiles_of_the_photographs_are_like_the_rest():
    """By the error of leaving them grey; it was 0.65 of the training tiles' with those at the right end."""
    train, test = (float((pairs.sources.float() - pairs.targets.float()).abs().mean()) for pairs in photographs(96, 64))
    assert 0.75 < test / train < 1.25


@pytest.mark.parametrize("tiles", [(96, 64), (180, 160), (288, 64), (1, 1), (170, 65)])
def test_no_pixel_is_in_both_parts_of_the_photographs(tiles, monkeypatch):
    numbers = np.arange(427 * 640)
    unique = np.stack([numbers // 65536, numbers // 256 % 256, numbers % 256], 1).astype(np.uint8).reshape(427, 640, 3)
    monkeypatch.setattr("train.data.images.pairs._read", lambda path, channels: Image.fromarray(unique))
    train, test = (
        set(
            pairs.targets.int()
            .movedim(1, -1)
            .flatten(0, 2)
            .matmul(torch.tensor([65536, 256, 1], dtype=torch.int32))
            .tolist()
        )
        for pairs in photographs(*tiles)
    )
    assert train and test and not train & test


@pytest.mark.parametrize("tiles", [(300, 64), (0, 64), (96, 0), (96, 500), (428, 64)])
def test_photographs_are_too_small_for_these_tiles(tiles):
    with pytest.raises(DataError, match=f"cannot cut tiles of {tiles[0]} and {tiles[1]} pixels out of .*china.jpg"):
        photographs(*tiles)


def test_the_embedded_photographs():
    train, test = photographs(96, 64)
    assert train.sources.shape[1:] == (1, 96, 96) and train.targets.shape[1:] == (3, 96, 96)
    assert test.sources.shape == (24, 1, 64, 64) and test.targets.shape == (24, 3, 64, 64)
    # What Pillow calls grey: 0.299 red + 0.587 green + 0.114 blue.
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    for pairs in (train, test):
        grey = (pairs.targets.float() * weights).sum(1, keepdim=True)
        assert (grey - pairs.sources).abs().max() <= 1
    assert len(torch.unique(test.targets.flatten(1), dim=0)) == 24


def test_one_picture(tmp_path):
    Image.new("RGB", (30, 20), (10, 20, 30)).save(tmp_path / "a.png")
    assert picture(tmp_path / "a.png", size=8, channels=3).shape == (3, 8, 8)
    assert picture(tmp_path / "a.png", size=8, channels=1).shape == (1, 8, 8)
    with pytest.raises(DataError, match=r"none\.png"):
        picture(tmp_path / "none.png", size=8, channels=3)


def test_signed():
    assert signed(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([-1, -0.6, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, 6, numbered(11, 3, 8, 8)), "batches of 12 from 11"),
        ((4, 9, numbered(11, 3, 8, 10)), "cannot cut 9 pixels per side out of images of 8x10"),
        ((4, 4, numbered(11, 3, 8, 8), numbered(10, 3, 8, 8)), "are no pairs of images"),
    ],
)
def test_batches_that_cannot_be_cut(arguments, message):
    with pytest.raises(DataError, match=message):
        batch_at(KEY, 0, *arguments)


# Real pictures.


@pytest.mark.skipif("FUNCTREE_DATA" not in os.environ, reason="FUNCTREE_DATA does not name the folder of data sets")
def test_facades(tmp_path):
    with zipfile.ZipFile(Path(os.environ["FUNCTREE_DATA"]) / "facades_pairs" / "facades_train400_test106.zip") as file:
        names = [name for name in file.namelist() if name.endswith(".jpg")]
        assert len(names) == 506
        members = [*[n for n in names if "train/" in n][:5], *[n for n in names if "test/" in n][:3]]
        file.extractall(tmp_path, members)
    root = (tmp_path / members[0]).parents[1]
    train, test = (side_by_side(root, split, source="right", size=64) for split in ("train", "test"))
    assert train.sources.shape == train.targets.shape == (5, 3, 64, 64) and len(test.paths) == 3
    assert side_by_side(root, "test").sources.shape == (3, 3, 256, 256)

    def saturation(images):
        return (images.amax(1).int() - images.amin(1).int()).float().mean()

    # Labels are pure colours.
    assert saturation(train.sources) > 2 * saturation(train.targets)
    x, y = batch_at(KEY, 0, 5, 56, train.sources, train.targets)
    assert x.shape == y.shape == (5, 3, 56, 56) and x.min() >= -1 and x.max() <= 1
