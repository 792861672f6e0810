"""Folders of pictures with masks: every layout, what is skipped and why, sizes, facts and baselines; real sets."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import DataError
from train.data.images import mask_baselines, mask_sets
from train.data.images.mask_sets import open_masks
from train.data.images.masks import VOID, Table
from train.data.understood import understood
from train.metrics import segmentation

SETS = Path(os.environ.get("FUNCTREE_DATA", ""))


def picture(path: Path, seed: int = 0, height: int = 12, width: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


def mask(path: Path, seed: int = 0, height: int = 12, width: int = 16, values: tuple = (0, 255)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).choice(np.array(values, np.uint8), (height, width))
    pixels.flat[: len(values)] = values  # each of them
    Image.fromarray(pixels).save(path)


def pairs(folder: Path, count: int = 6, images: str = "images", masks: str = "masks", ending: str = "", **how) -> Path:
    for i in range(count):
        picture(folder / images / f"{i}.png", i)
        mask(folder / masks / f"{i}{ending}.png", i, **how)
    return folder


def names(part: mask_sets.Segmented) -> list[str]:
    return [path.stem for path in part.paths]


# Layouts.


@pytest.mark.parametrize(
    ("images", "masks", "ending"),
    [
        ("images", "masks", ""),
        ("JPEGImages", "SegmentationClass", ""),
        ("imgs", "labels", "_mask"),
        ("img", "gt", "_L"),
    ],
)
def test_two_folders_undivided(tmp_path, images, masks, ending):
    data = open_masks(str(pairs(tmp_path, 6, images, masks, ending)))
    assert sorted(names(data.train) + names(data.test)) == list("012345") and len(data.test.paths) == 1
    assert data.table.classes == ("background", "object") and data.origin[1] == "one fifth of it"
    i = int(data.test.paths[0].stem)
    expected = np.array(Image.open(tmp_path / masks / f"{i}{ending}.png")) > 0
    assert torch.equal(data.test.masks[0].bool(), torch.from_numpy(expected))
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / images / f"{i}.png")))
    assert torch.equal(data.test.images[0], pixels.permute(2, 0, 1))


def test_parts_of_their_own(tmp_path):
    for part in ("train", "val", "test"):
        pairs(tmp_path / "a" / part, 3)
        pairs(tmp_path / "b", 3, f"images/{part}", f"masks/{part}")
        pairs(tmp_path / "c", 3, part, f"{part}annot", values=tuple(range(12)))
    for folder in "abc":
        data = open_masks(str(tmp_path / folder))
        assert names(data.train) == names(data.test) == list("012") and data.origin[1] == "its own test part"
        assert {path.parent.name if folder != "a" else path.parts[-3] for path in data.test.paths} == {"test"}
    assert data.table.classes[:2] == ("sky", "building") and int(data.train.masks[0].max()) == VOID
    (tmp_path / "c" / "classes.txt").write_text("".join(f"{i} kind {i}\n" for i in range(12)), encoding="utf-8")
    assert open_masks(str(tmp_path / "c")).table.classes[1] == "kind 1"


def test_masks_beside_pictures_and_two_paths(tmp_path):
    pairs(tmp_path / "beside", 5, "", "", "_mask")
    assert len(open_masks(str(tmp_path / "beside")).train.paths) == 4
    pairs(tmp_path / "two", 5, "x", "y")
    assert len(open_masks(f"{tmp_path / 'two/x'},{tmp_path / 'two/y'}").train.paths) == 4


def test_maps_of_objects_and_a_mask_for_each(tmp_path):
    pairs(tmp_path / "maps", 5, masks="instances", values=(0, 1, 2, 7))
    data = open_masks(str(tmp_path / "maps"))
    assert data.table.background and set(data.train.objects[0].unique().tolist()) == {0, 1, 2, 7}
    assert torch.equal(data.train.masks[0], (data.train.objects[0] > 0).byte())
    for i in range(5):
        picture(tmp_path / "bowl" / f"id{i}" / "images" / f"{i}.png", i)
        for k in range(3):
            mask(tmp_path / "bowl" / f"id{i}" / "masks" / f"{k}.png", 10 * i + k)
    data = open_masks(str(tmp_path / "bowl"))
    i = int(data.test.paths[0].stem)
    files = (tmp_path / "bowl" / f"id{i}" / "masks").iterdir()
    union = sum((np.asarray(Image.open(path)) > 0).astype(int) for path in files) > 0
    assert torch.equal(data.test.masks[0].bool(), torch.from_numpy(union)) and int(data.test.objects[0].max()) == 3


# Bad files.


def test_one_bad_pair_is_named_skipped_and_counted(tmp_path, caplog):
    pairs(tmp_path, 9, values=(0, 1, 2))
    picture(tmp_path / "images" / "alone.png")
    mask(tmp_path / "masks" / "single.png")
    mask(tmp_path / "masks" / "1.png", 1, height=11)
    (tmp_path / "images" / "2.png").write_bytes(b"no picture")
    Image.fromarray(np.full((12, 16), 3000, np.uint16)).save(tmp_path / "images" / "3.png")
    Image.fromarray(np.full((12, 16), 7.5, np.float32)).save(tmp_path / "images" / "5.tif")
    (tmp_path / "images" / "5.png").unlink()
    noise = np.random.default_rng(0).integers(0, 256, (12, 16), np.uint8)
    Image.fromarray(noise).save(tmp_path / "masks" / "4.png")
    data = open_masks(str(tmp_path))
    assert sorted(names(data.train) + names(data.test)) == list("0678") and data.table.classes == ("0", "1", "2")
    reasons = {path.name: reason for path, reason in data.skipped}
    assert reasons["alone.png"].startswith("has no mask in") and reasons["single.png"].startswith("has no picture in")
    assert reasons["1.png"] == "is 16 x 12 pixels, its mask 1.png 16 x 11"
    assert reasons["2.png"] == "cannot be read as a picture: its format is unknown"
    assert "its 16-bit values end at 3000" in reasons["3.png"]
    assert "its floating-point values go from 7.5 to 7.5, expected 0 to 1" in reasons["5.tif"]
    assert reasons["4.png"].startswith("has the unknown value") and len(data.skipped) == 7
    assert sum("skipped: " in record.getMessage() for record in caplog.records) == 5  # all but the lone ones
    lines = []
    understood(lines.append, mask_sets.facts(data, "folder"))
    assert any(line.startswith("skipped") and "7:" in line for line in lines), lines


def test_values_of_the_test_part_that_no_other_mask_has_are_unknown(tmp_path):
    pairs(tmp_path / "train", 4, values=(0, 1, 2))
    pairs(tmp_path / "val", 3, values=(0, 1))
    mask(tmp_path / "val" / "masks" / "1.png", values=(0, 9))
    data = open_masks(str(tmp_path))
    assert names(data.test) == ["0", "2"]
    ((path, reason),) = data.skipped
    assert path.name == "1.png" and reason.startswith("has the unknown value 9 in "), reason


def test_errors(tmp_path):
    with pytest.raises(DataError, match="--data 'nowhere' does not exist; expected scenes, a folder"):
        open_masks("nowhere")
    picture(tmp_path / "none" / "a.png")
    with pytest.raises(DataError, match="no pictures with masks in .*none; expected folders images and masks"):
        open_masks(str(tmp_path / "none"))
    with pytest.raises(DataError, match="is a file"):
        open_masks(str(tmp_path / "none" / "a.png"))
    picture(tmp_path / "apart" / "images" / "a.png")
    mask(tmp_path / "apart" / "masks" / "b.png")
    with pytest.raises(DataError, match="a.png has no mask of its name in .*masks, nor has any other"):
        open_masks(str(tmp_path / "apart"))
    (tmp_path / "empty" / "images").mkdir(parents=True)
    (tmp_path / "empty" / "masks").mkdir()
    with pytest.raises(DataError, match="no picture in .*images; expected folders"):
        open_masks(str(tmp_path / "empty"))
    pairs(tmp_path / "twice", 2)
    mask(tmp_path / "twice" / "masks" / "0.gif")
    with pytest.raises(DataError, match=r"0.gif and .*0.png have one name, expected one file per name"):
        open_masks(str(tmp_path / "twice"))
    pairs(tmp_path / "one", 1)
    with pytest.raises(DataError, match="has one pair; expected at least 2"):
        open_masks(str(tmp_path / "one"))
    pairs(tmp_path / "sizes", 3, height=11)
    with pytest.raises(
        DataError, match=r"none of the 3 pictures can be used; .*0.png is 16 x 12 pixels, its mask 0.png"
    ):
        open_masks(str(tmp_path / "sizes"), part="all")


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(mask_sets, "MEMORY", 1000)
    with pytest.raises(DataError, match="of memory; scale them down with --longest"):
        open_masks(str(pairs(tmp_path, 6)))


# What is read.


def test_larger_pictures_are_scaled_and_test_masks_are_not(tmp_path):
    data = open_masks(str(pairs(tmp_path, 6)), longest=8)
    assert data.train.images[0].shape == (3, 6, 8) and data.train.masks[0].shape == (6, 8)
    assert data.test.images[0].shape == (3, 6, 8) and data.test.masks[0].shape == (12, 16)
    assert open_masks(str(tmp_path), longest=16).train.images[0].shape == (3, 12, 16)


def test_all_pairs_and_a_trained_nets_table(tmp_path):
    pairs(tmp_path, 5, values=(0, 3))
    table = Table(("road", "car", "sky"), {0: 0, 3: 2, 5: 1}, False)
    data = open_masks(str(tmp_path), part="all", table=table)
    assert data.train is data.test and len(data.test.paths) == 5 and data.table is table
    assert set(data.test.masks[0].unique().tolist()) == {0, 2}


def test_grey_pictures_and_other_leftovers(tmp_path):
    pairs(tmp_path, 5)
    Image.fromarray(np.full((12, 16), 77, np.uint8)).save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "._1.png").write_bytes(b"of a file manager")
    (tmp_path / "masks" / "Thumbs.db").write_bytes(b"of another")
    (tmp_path / "masks" / "notes.txt").write_text("")
    data = open_masks(str(tmp_path), part="all")
    assert data.test.images[0].shape == (3, 12, 16) and (data.test.images[0] == 77).all() and not data.skipped


def test_median_weights_and_shares(tmp_path):
    """Class 2 is in one picture of two, and there in half of it: its frequency is 1/2."""
    first, second = torch.zeros(4, 4), torch.zeros(4, 4)
    first[0], second[:2], second[3] = 1, 2, VOID
    part = mask_sets.Segmented((), (first.byte(), second.byte()), ())
    assert mask_sets.class_counts(part)[[0, 1, 2, VOID]].tolist() == [16, 4, 8, 4]
    frequency = torch.tensor([16 / 28, 4 / 16, 8 / 12])
    torch.testing.assert_close(mask_sets.median_weights(part, 4), torch.tensor([*frequency.median() / frequency, 0.0]))


# Baselines.


def square(colour: tuple[int, int, int], ground: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.tensor(ground).byte()[:, None, None].expand(3, 20, 20).clone()
    image[:, 5:12, 5:12] = torch.tensor(colour).byte()[:, None, None]
    image = (image.int() + torch.randint(-8, 9, image.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    mask = torch.zeros(20, 20, dtype=torch.uint8)
    mask[5:12, 5:12] = 1
    return image.byte(), mask


def test_a_threshold_finds_objects_brighter_or_darker_than_their_ground():
    rows = [square((200, 180, 190), (30, 40, 30)), square((60, 40, 90), (220, 200, 230))]
    part = mask_sets.Segmented(*map(tuple, zip(*rows, strict=True)), ())
    table = Table(("background", "object"), {0: 0, 255: 1}, False)
    name, counts = mask_baselines.baseline(mask_sets.MaskSet(part, part, table, ("", "")))
    assert name == "threshold" and segmentation.figures(counts, True)["dice_per_image"] == 1.0


def test_colours_tell_classes_apart_that_differ_by_them():
    rows = [square((200, 20, 20), (30, 40, 200))] * 2
    part = mask_sets.Segmented(*map(tuple, zip(*rows, strict=True)), ())
    table = Table(("sea", "boat", "sky"), {0: 0, 1: 1, 2: 2}, False)  # no pixel is of the sky
    name, counts = mask_baselines.baseline(mask_sets.MaskSet(part, part, table, ("", "")))
    assert name == "colour" and segmentation.figures(counts, False)["mean_iou"] == 1.0


# Real sets.


@pytest.mark.skipif(not (SETS / "camvid_subset").is_dir(), reason="FUNCTREE_DATA has no camvid_subset")
def test_camvid(tmp_path):
    zipfile.ZipFile(next((SETS / "camvid_subset").glob("*.zip"))).extractall(tmp_path)
    data = open_masks(str(tmp_path / "CamVid"), longest=120)
    assert (len(data.train.images), len(data.test.images), data.skipped) == (40, 16, ())
    assert data.table.classes[3] == "road" and data.test.masks[0].shape == (360, 480)
    shares = mask_sets.class_counts(data.train)
    assert shares[VOID] > 0 and shares[:11].sum() + shares[VOID] == sum(m.numel() for m in data.train.masks)


@pytest.mark.skipif(not (SETS / "nuclei_dsb2018").is_dir(), reason="FUNCTREE_DATA has no nuclei_dsb2018")
def test_nuclei(tmp_path):
    with zipfile.ZipFile(next((SETS / "nuclei_dsb2018").glob("*.zip"))) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if Path(name).name < "2"])
    data = open_masks(str(tmp_path))
    assert data.table.classes == ("background", "object") and not data.skipped
    assert max(int(m.max()) for m in data.train.objects) > 20
    _, counts = mask_baselines.baseline(data)
    assert segmentation.figures(counts, True)["dice_per_image"] > 0.6
