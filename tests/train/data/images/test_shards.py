"""Tars of pictures: read as class folders are, whatever form they have, and refused by name where they are wrong."""

import gzip
import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core import random
from tests.train.data.images.image_files import write_pictures
from train.data import DataError
from train.data.fingerprint import fingerprint
from train.data.images import picture, sets, shards
from train.data.images.files import Decoder

KEY = random.key(5)


def encoded(seed: int = 0, kind: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def pack(source: Path, path: Path) -> Path:
    """The files of a folder, in sorted order, as a tar."""
    files = sorted(file for file in source.rglob("*") if file.is_file())
    return write_tar(path, {file.relative_to(source).as_posix(): file.read_bytes() for file in files})


def split(folder: Path, classes: str = "ab", count: int = 3) -> Path:
    """Two tars to train on and one to test on, without an index; every picture is different."""
    for part, tars in (("train", 2), ("val", 1)):
        for tar in range(tars):
            seed = 100 * tar + (500 if part == "val" else 0)
            names = [
                (f"{name}/{tar}{i}.png", seed + 10 * k + i) for k, name in enumerate(classes) for i in range(count)
            ]
            write_tar(folder / part / f"{tar}.tar", {name: encoded(seed) for name, seed in names})
    return folder


def indexed(folder: Path, **options) -> Path:
    shards.write_index(folder, **options)
    return folder


def test_batches_are_those_of_class_folders(tmp_path, decoder):
    for part, count in (("train", 5), ("val", 2)):
        write_pictures(tmp_path / "folders" / part, "abc", count)
        pack(tmp_path / "folders" / part, tmp_path / "tars" / part / "0.tar")
    indexed(tmp_path / "tars")
    folders, tars = (sets.open_images(str(tmp_path / name)) for name in ("folders", "tars"))
    assert (folders.classes, folders.train.labels.tolist()) == (tars.classes, tars.train.labels.tolist())

    def batches(data: sets.ImageSet, reader: Decoder) -> list[torch.Tensor]:
        learn = reader.train_batches(data.train, KEY, range(2, 5), 4, 16)
        return [x for pair in (*learn, *reader.evaluation_batches(data.test, 4, 16)) for x in pair]

    expected = batches(folders, decoder)
    with Decoder(1) as worker:
        for reader in (decoder, worker):
            assert len(expected) == 10
            assert all(torch.equal(x, y) for x, y in zip(batches(tars, reader), expected, strict=True))


def test_a_process_reads_its_rows_alone(pictures, decoder, monkeypatch):
    data, paths, decode = sets.open_images(str(pictures)).train, [], picture.decode
    whole = list(decoder.train_batches(data, KEY, range(3), 6, 16))
    monkeypatch.setattr(
        "train.data.images.workers.decode", lambda path, *rest: paths.append(path) or decode(path, *rest)
    )
    part = list(decoder.train_batches(data, KEY, range(3), 6, 16, rows=slice(2, 4)))
    assert len(paths) == 6
    for (pixels, labels), (whole_pixels, whole_labels) in zip(part, whole, strict=True):
        assert torch.equal(pixels, whole_pixels[2:4]) and torch.equal(labels, whole_labels[2:4])


def test_classes_of_each_form_of_tar(tmp_path):
    """Folders; files beside the pictures, as WebDataset has them; names of tars, also of those inside another, as
    ILSVRC is published; and a table, as its validation part needs."""
    long = "deep/" + "x" * 120 + "/n3"
    write_tar(
        tmp_path / "a" / "train.tar",
        {"n1/x.png": encoded(1), f"{long}/x.jpg": encoded(2, "JPEG"), "n1/notes.txt": b"-"},
    )
    write_tar(
        tmp_path / "b" / "train-0.tar", {"0.png": encoded(1), "0.cls": b"7\n", "1.png": encoded(2), "1.cls": b"12"}
    )
    write_tar(tmp_path / "c" / "train" / "n2.tar", {"x.png": encoded(1)})
    inner = {
        f"{name}.tar": write_tar(tmp_path / "inner.tar", {f"{name}_1.png": encoded(3)}).read_bytes()
        for name in ("n1", "n2")
    }
    write_tar(tmp_path / "d" / "ILSVRC_img_train.tar", inner)
    write_tar(tmp_path / "d" / "ILSVRC_img_val.tar", {"v_1.png": encoded(4), "v_2.png": encoded(5)})
    (tmp_path / "val.csv").write_text("ImageId,PredictionString\nv_1,n2 1 2 3 4\nv_2,n1 0 0 1 1\n")
    classes = {}
    for name in "abcd":
        head = shards.write_index(tmp_path / name, shards.read_labels(tmp_path / "val.csv"))
        assert head["skipped"] == []
        classes[name] = head["classes"]
    assert classes == {"a": ["n1", "n3"], "b": ["12", "7"], "c": ["n2"], "d": ["n1", "n2"]}
    data = sets.open_images(str(tmp_path / "d"))
    assert data.test.labels.tolist() == [1, 0] and [path.name for path in data.train.paths] == [
        "n1.tar/n1_1.png",
        "n2.tar/n2_1.png",
    ]
    assert [path.read() for path in data.train.paths] == [encoded(3)] * 2


def test_tars_without_a_split(tmp_path):
    write_tar(tmp_path / "0.tar", {f"{name}/{i}.png": encoded(i) for name in "ab" for i in range(10)})
    data = sets.open_images(str(indexed(tmp_path)))
    assert (len(data.train.labels), len(data.test.labels)) == (16, 4)
    whole = sets.open_images(str(tmp_path), "all")
    assert whole.train is whole.test and len(whole.test.labels) == 20
    write_tar(tmp_path / "val.tar", {"a/v.png": encoded(0)})
    with pytest.raises(DataError, match="has tars to test on alone; expected others with train in their names"):
        sets.open_images(str(indexed(tmp_path)))
    write_tar(tmp_path / "train.tar", {"a/v.png": encoded(0), "b/v.png": encoded(0)})
    data = sets.open_images(str(indexed(tmp_path)))
    assert len(data.train.labels) == 2 and data.skipped == ((tmp_path / "0.tar", "is no part of the split"),)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_member_is_named_skipped_and_counted(workers, tmp_path, caplog):
    write_tar(
        tmp_path / "train" / "0.tar",
        {
            "a/0.png": encoded(0),
            "a/1.png": b"no picture",
            "b/2.png": encoded(2),
            "b/3.png": b"",
            "b/4.png": encoded(4)[:90],
        },
    )
    write_tar(tmp_path / "val" / "0.tar", {"a/5.png": encoded(5), "b/6.jpg": b"bad"})
    data = sets.open_images(str(indexed(tmp_path)))
    with Decoder(workers) as decoder:
        batches = list(decoder.train_batches(data.train, KEY, range(2), 5, 16))
        ((_, labels),) = decoder.evaluation_batches(data.test, 4, 16)
    assert all(pixels.any(3).any(2).all() and len(targets) == 5 for pixels, targets in batches) and labels.tolist() == [
        0
    ]
    reasons = {str(path).removeprefix(f"{tmp_path}/"): reason for path, reason in decoder.skipped}
    assert sorted(reasons) == ["train/0.tar/a/1.png", "train/0.tar/b/3.png", "train/0.tar/b/4.png", "val/0.tar/b/6.jpg"]
    assert reasons["train/0.tar/b/3.png"].endswith("train/0.tar/b/3.png cannot be read as a picture: it is empty")
    assert sum("cannot be read as a picture" in line for line in caplog.messages) == 4


def test_cmyk_and_16_bits(tmp_path, decoder):
    deep = io.BytesIO()
    Image.fromarray(np.full((20, 20), 32896, np.uint16)).save(deep, "PNG")
    write_tar(tmp_path / "0.tar", {"a/cmyk.jpg": encoded(1, "JPEG", "CMYK"), "a/deep.png": deep.getvalue()})
    (path_cmyk, path_deep) = shards.listings(indexed(tmp_path)).train.paths
    cmyk, grey = (picture.decode(path, picture.Cut(16, resize=16)) for path in (path_cmyk, path_deep))
    with Image.open(io.BytesIO(path_cmyk.read())) as image:
        expected = np.asarray(image.convert("RGB").resize((24, 16), Image.Resampling.BILINEAR))[:, 4:20].transpose(
            2, 0, 1
        )
    assert image.mode == "CMYK" and np.array_equal(cmyk, expected)
    assert np.unique(grey).tolist() == [128] and grey.shape == (3, 16, 16)


def damaged(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "left", "reason"),
    [
        (lambda content: content[:4000], 1, "a/1.png is cut off"),
        (lambda content: content[: 2 * 2560 + 300], 2, "has no header at byte 5120"),
        (lambda content: content[:2560] + b"x" * 512 + content[3072:], 1, "has no header at byte 2560"),
        (lambda content: content[: 3 * 2560], 3, "has no end mark"),
    ],
    ids=["member", "header", "garbled", "end"],
)
def test_a_truncated_tar_gives_its_whole_pictures(damage, left, reason, tmp_path):
    size = len(encoded())
    assert 512 * 3 < size <= 512 * 4  # each picture takes 2560 bytes, with its header
    path = write_tar(tmp_path / "train" / "0.tar", {f"a/{i}.png": encoded(i) for i in range(3)})
    write_tar(tmp_path / "train" / "1.tar", {"b/0.png": encoded()})
    path.write_bytes(damage(path.read_bytes()))
    head = shards.write_index(tmp_path)
    assert head["pictures"] == left + 1
    ((name, line),) = head["skipped"]
    assert name == "train/0.tar" and reason in line and line.startswith(f"is truncated or damaged after {left} files")
    facts = sets.facts(sets.open_images(str(tmp_path), "all"))
    assert facts["skipped"] == [(tmp_path / "train/0.tar", line)]


def test_an_index_older_than_its_tars(tmp_path):
    data = split(tmp_path / "one")
    identity = fingerprint(shards.listings(indexed(data)).train)
    moved = tmp_path / "two"
    shutil.copytree(data, moved)
    os.utime(moved / "train" / "1.tar", (1, 1))
    assert fingerprint(shards.listings(moved).train) == identity  # a copy with another time, at another place
    content = (moved / "train" / "1.tar").read_bytes()
    with tarfile.open(moved / "train" / "1.tar") as file:
        members = {item.name: file.extractfile(item).read() for item in file}
    write_tar(moved / "train" / "1.tar", {name.replace("11", "77"): each for name, each in members.items()})
    assert os.path.getsize(moved / "train" / "1.tar") == len(content)
    with pytest.raises(DataError, match=r"train/1.tar has changed since .*index.jsonl was made; make it with: python"):
        shards.listings(moved)
    (moved / "train" / "1.tar").write_bytes(content + b"\0" * 10240)
    with pytest.raises(DataError, match=r"train/1.tar has changed since"):
        shards.listings(moved)
    (moved / "train" / "1.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read .*train/1.tar, which .*index.jsonl names: No such file"):
        shards.listings(moved)
    write_tar(data / "train" / "1.tar", {"a/0.png": encoded(77), "b/0.png": encoded(78)})
    assert fingerprint(shards.listings(indexed(data)).train) != identity


def test_classes_that_differ_between_the_parts(tmp_path):
    data = split(tmp_path, "abc")
    write_tar(data / "val" / "0.tar", {"a/0.png": encoded()})
    assert sets.facts(sets.open_images(str(indexed(data))))["classes without test images"] == ["b", "c"]
    write_tar(data / "val" / "0.tar", {"a/0.png": encoded(), "d/0.png": encoded()})
    with pytest.raises(DataError, match=r"val/0.tar/d/0.png is of the class d, none of the 3 of the training part"):
        sets.open_images(str(indexed(data)))
    other = split(tmp_path / "other", "a")
    with pytest.raises(DataError, match="has the one class 'a'; expected at least two"):
        sets.open_images(str(indexed(other)))


def test_what_is_no_folder_of_tars(tmp_path):
    def refused(message, use=shards.write_index, folder=tmp_path):
        with pytest.raises(DataError, match=message):
            use(folder)

    refused("has no file NAME.tar, nor has a folder in it")
    refused("nowhere does not exist, expected a folder of tars", folder=tmp_path / "nowhere")
    path = write_tar(tmp_path / "train" / "0.tar", {"a.txt": b"-"})
    refused(r"no picture in the 1 tars of .*; train/0.tar has no picture")
    path.write_bytes(gzip.compress(path.read_bytes()))
    refused("0.tar is compressed by gzip; expected a plain tar")
    path.write_bytes(b"no tar at all")
    refused(r"0.tar is truncated or damaged after 0 files: truncated header")
    split(tmp_path)
    refused(
        r"has tars and no index of their pictures; make it with: python experiments/imagenet.py index",
        sets.open_images,
        str(tmp_path),
    )
    index = indexed(tmp_path) / shards.INDEX
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:-1]))
    refused("is cut off, or of another format", shards.listings)
    index.write_text("{}")
    refused("is no index of tars", shards.listings)
    table = tmp_path / "labels.txt"
    table.write_text("x n1\ny\n")
    refused("labels.txt, line 2 is 'y'; expected the name of a picture and its class", shards.read_labels, table)
    refused("--labels-from .*nowhere cannot be read: No such file", shards.read_labels, tmp_path / "nowhere")


def test_members_that_are_no_files_of_their_own(tmp_path):
    path = write_tar(tmp_path / "0.tar", {"a/0.png": encoded(), "a/._0.png": b"-", "b/0.png": encoded(1)})
    with tarfile.open(path, "a") as file:
        link = tarfile.TarInfo("b/1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        file.addfile(link)
    write_tar(tmp_path / "1.tar", {"0.png": encoded(), "0.cls": b"a", "1.png": encoded()})
    head = shards.write_index(tmp_path)
    assert head["pictures"] == 3
    assert head["skipped"] == [
        ("0.tar/b/1.png", "is a link"),
        ("1.tar/1.png", "has no class beside it in a file .cls, as others have"),
    ]
