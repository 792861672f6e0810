"""Pictures to learn super-resolution from: embedded, downloaded, in folders; bad files are named."""

import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.local_server import serve
from tests.real_pictures import needs_pictures, unpacked
from train.data import DataError
from train.data.images import originals, resize
from train.data.images.originals import open_originals


def save(path, height=20, width=30, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((width, height), 60).convert(mode).save(path)
    return path


def test_embedded_pictures():
    photographs, portrait = open_originals("photographs", 3, 50), open_originals("portrait", 1, 50)
    assert [tuple(x.shape) for x in photographs.pictures] == [(3, 427, 640)] * 2
    assert [tuple(x.shape) for x in portrait.pictures] == [(1, 600, 512)] and portrait.pictures[0].dtype == torch.uint8
    (fact, *_) = originals.facts("to learn from", photographs).values()
    assert fact.startswith("2 of 273,280 to 273,280 pixels, 0.5 million in all, in ")


def test_colour_and_luminance_of_a_folder(tmp_path):
    paths = [
        save(tmp_path / "b" / "1.png"),
        save(tmp_path / "a.jpg", 24, 18, "L"),
        save(tmp_path / "c.png", mode="RGBA"),
    ]
    colour, grey = (open_originals(str(tmp_path), channels, 8) for channels in (3, 1))
    assert colour.paths == grey.paths == (paths[1], paths[0], paths[2]) and not colour.skipped
    pixels = torch.tensor(np.asarray(Image.open(paths[0]))).permute(2, 0, 1)
    assert torch.equal(colour.pictures[1], pixels)
    expected = (255 * resize.luminance(pixels[None] / 255)).round().byte()[0]
    assert torch.equal(grey.pictures[1], expected) and grey.pictures[0].shape == (1, 24, 18)


@pytest.mark.parametrize("name", ["HR", "GTmod12"])
def test_originals_beside_small_pictures(tmp_path, name):
    high = save(tmp_path / name / "1.png")
    save(tmp_path / "LR_bicubic" / "X2" / "1x2.png", 10, 15)
    assert open_originals(str(tmp_path), 1, 8).paths == (high,)


def test_bad_files_are_skipped_and_named(tmp_path, caplog):
    good, small = save(tmp_path / "good.png"), save(tmp_path / "small.png", 7, 30)
    (tmp_path / "bad.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "notes.txt").touch()
    with caplog.at_level(logging.WARNING):
        out = open_originals(str(tmp_path), 1, 8)
    assert out.paths == (good,) and [path.name for path, _ in out.skipped] == ["bad.png", "small.png"]
    assert out.skipped[1] == (small, "has 7 x 30 pixels; expected at least 8 a side")
    assert f"skipped: {small} has 7 x 30 pixels" in caplog.text
    with pytest.raises(DataError, match=r"none of the 3 pictures of '.*' can be used; .*bad.png cannot be read"):
        open_originals(str(tmp_path), 1, 40)


def test_wrong_names(tmp_path):
    with pytest.raises(
        DataError, match="'nowhere' does not exist; expected a folder of pictures, or one of photographs"
    ):
        open_originals("nowhere", 1, 8)
    with pytest.raises(DataError, match=f"no picture in {re.escape(str(tmp_path))}"):
        open_originals(str(tmp_path), 1, 8)
    (tmp_path / "t91.zip").touch()
    with pytest.raises(
        DataError, match=r"t91.zip' is a file, but no picture; expected a folder .* \(unpack an archive\)"
    ):
        open_originals(str(tmp_path / "t91.zip"), 1, 8)


@needs_pictures
@pytest.mark.parametrize(("name", "folder", "count"), [("set5", "set5", 5), ("t91", "yang91", 91)])
def test_downloads(tmp_path, name, folder, count, monkeypatch):
    source = unpacked(tmp_path, folder)
    with serve(source) as url:
        files = [d._replace(address=f"{url}/{d.address.rpartition('/')[2]}") for d in originals.DOWNLOADS[name]]
        monkeypatch.setitem(originals.DOWNLOADS, name, files)
        assert len(open_originals(name, 1, 8, tmp_path / "cache").pictures) == count
    again = open_originals(name, 1, 8, tmp_path / "cache")  # without a connection
    assert len(again.pictures) == count
    path = again.paths[0]
    save(path)
    path.with_name(f"{path.name}.sha256").unlink()  # as if the address had given another file
    with pytest.raises(DataError, match=f"are not those of {name}; remove them to fetch them again"):
        open_originals(name, 1, 8, tmp_path / "cache")
