"""Pictures with captions: tables in several forms, COCO's JSON, bad records, parts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import DataError
from train.data.images import captions


@pytest.fixture
def folder(tmp_path):
    """Eight pictures, of which the last is twice as wide as high, and its left half is white."""
    for i in range(7):
        Image.new("RGB", (20, 30), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    wide = np.zeros((10, 20, 3), np.uint8)
    wide[:, :10] = 255
    Image.fromarray(wide).save(tmp_path / "7.png")
    return tmp_path


def write(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def table_of(data):
    return {one.path.name: one.captions for one in sorted(data.train + data.test)}


EXPECTED = {"0.png": ("a, b", "c"), "1.png": ("d",)}
COCO = {
    "images": [{"id": 1, "file_name": "0.png"}, {"id": 5, "file_name": "1.png"}],
    "annotations": [{"image_id": k, "caption": text} for k, text in ((1, "a, b"), (5, "d"), (1, "c"), (9, "e"))],
}


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("x.tsv", ["caption\timage", "a, b\t0.png", "c\t0.png", "d\t1.png"]),
        ("x.csv", ["image,caption", '0.png,"a, b"', "0.png,c", "1.png,d"]),
        ("x.txt", ["image,caption", "0.png,a, b", "0.png,c", "1.png,d"]),
        ("flickr.token.txt", ["0.png#0\ta, b", "0.png#1\tc", "1.png#0\td"]),
        ("x.jsonl", ['{"file_name": "0.png", "text": ["a, b", "c"]}', '{"file_name": "1.png", "text": "d"}']),
        ("x.json", ['[{"image": "0.png", "captions": ["a, b", "c"]},', '{"image": "1.png", "captions": ["d"]}]']),
        ("captions_val.json", [json.dumps(COCO)]),
    ],
)
def test_forms(folder, name, lines):
    data = captions.open_captions(write(folder / name, *lines))
    assert table_of(data) == EXPECTED and len(data.test) == 1
    assert len(data.skipped) == ("val" in name)  # an annotation without its picture


def test_bad_records_are_named_and_counted(folder):
    (folder / "bad.png").write_text("no picture")
    lines = [f"{i}.png\tpicture {i}" for i in range(6)]
    lines += ["6.png\t...", f"{'x' * 300}\tnowhere", "lonely", "\tno name", "bad.png\tgarbled", ""]
    write(folder / "captions.tsv", "picture\tcaption", *lines)
    data = captions.open_captions(str(folder))
    reasons = sorted(reason for _, reason in data.skipped)
    assert reasons == [
        "is a picture without a caption",
        "line 10 has 1 column, expected at least 2",
        "line 11 names no picture",
        "line 8 has a caption of no words",
        f"line 9 names '{'x' * 300}', which is not there",
    ]
    paths = [one.path for one in sorted(data.train + data.test)]
    images, rows, skipped = captions.read_pictures(paths, 8)
    assert images.shape == (6, 3, 8, 8) and images.dtype == torch.uint8 and rows.tolist() == [*range(6)]
    assert [path.name for path, _ in skipped] == ["bad.png"]
    assert captions.facts(data)["captions"] == {"train": 6, "test": 1}


def test_parts_by_folders_and_files(folder):
    for part in ("train", "val"):
        (folder / part / "images").mkdir(parents=True)
        (folder / f"{len(part)}.png").rename(folder / part / "images" / "x.png")
        write(folder / part / "metadata.jsonl", json.dumps({"file_name": "x.png", "text": part}))
    for data in (str(folder), f"{folder / 'train/metadata.jsonl'},{folder / 'val'}"):
        out = captions.open_captions(data)
        assert out.train[0].captions == ("train",) and out.test[0].captions == ("val",)


def test_cut_and_squeezed_pictures(folder):
    cut, whole = (captions.read_pictures([folder / "7.png"], 10, whole)[0][0, 0] for whole in (False, True))
    for pixels in (cut, whole):
        assert pixels.shape == (10, 10) and pixels[:, :4].min() > 200 > 50 > pixels[:, 6:].max()
    assert captions.read_pictures([folder / "0.png"], 10)[0].shape == (1, 3, 10, 10)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (None, "does not exist; expected a folder with pictures and captions.tsv"),
        ([""], "is empty; expected a picture and a caption per line"),
        (["a\tb\tc"], "no columns of pictures and captions; there are a, b, c; expected picture<TAB>caption"),
        (["picture\tcaption", "0.png\t!"], "no picture with a caption can be used; "),
        (["0.png\ta cat"], "has 1 picture with captions; expected at least 2"),
    ],
)
def test_refusals(folder, lines, error):
    path = folder / "x.tsv"
    if lines is not None:
        write(path, *lines)
    with pytest.raises(DataError, match=error):
        captions.open_captions(str(path))
    with pytest.raises(DataError, match="no picture can be read; .*nowhere.png does not exist"):
        captions.read_pictures([folder / "nowhere.png"], 8)
