"""What the `--data` of an experiment names: every kind of it, its batches, and names and folders that are none."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core import random
from train.data import DataError
from train.data.images import arrays, cifar
from train.data.images import sets as image_sets
from train.data.images.arrays import Labelled
from train.data.images.files import Decoder, Files

KEY = random.key(5)


def save(path: Path, seed: int, height: int = 40, width: int = 50) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


def write_pictures(folder: Path, classes: str = "ab", count: int = 6) -> Path:
    for label, name in enumerate(classes):
        for number in range(count):
            save(folder / name / f"{number}.png", 100 * label + number)
    return folder


def write_idx(path: Path, array: np.ndarray, code: int = 0x08) -> None:
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_mnist(folder: Path, labels: tuple = (0, 1, 2, 1, 0), tests: tuple = (2, 0), code: int = 0x08) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part, numbers in (("train", labels), ("t10k", tests)):
        pixels = np.random.default_rng(len(numbers)).integers(0, 256, (len(numbers), 6, 4), np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", np.array(numbers, np.int8), code)
    return folder


def write_cifar(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, labels in (("data_batch_1", [3, 9, 0]), ("test_batch", [5])):
        pixels = np.random.default_rng(len(labels)).integers(0, 256, (len(labels), 3072), np.uint8)
        rows = np.column_stack([np.array(labels, np.uint8), pixels])
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three classes of six pictures, undivided."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), "abc")


@pytest.fixture
def decoder():
    with Decoder(0) as decoder:
        yield decoder


# What is opened.


def test_digits():
    found = image_sets.open_images("digits")
    assert found.kind == "digits" and found.in_memory and found.channels == 1
    assert found.classes == tuple("0123456789")
    expected = arrays.digits()
    assert all(torch.equal(a, b) for a, b in zip(found.train + found.test, expected[0] + expected[1], strict=True))


def test_a_folder_in_mnists_format(tmp_path):
    found = image_sets.open_images(str(write_mnist(tmp_path)))
    assert found.kind == "mnist" and found.in_memory and found.channels == 1
    assert found.classes == ("0", "1", "2")
    assert found.train.images.shape == (5, 1, 6, 4) and found.train.labels.tolist() == [0, 1, 2, 1, 0]
    assert found.test.labels.tolist() == [2, 0]


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin"])
def test_a_folder_with_cifars_batches(inner, tmp_path):
    write_cifar(tmp_path / inner)
    found = image_sets.open_images(str(tmp_path))
    assert found.kind == "cifar10" and found.channels == 3 and found.classes == cifar.CLASSES
    assert found.train.images.shape == (3, 3, 32, 32) and found.train.labels.tolist() == [3, 9, 0]
    assert found.test.labels.tolist() == [5]


@pytest.mark.parametrize("test", ["val", "validation", "test"])
def test_class_folders_in_two_parts(test, tmp_path):
    write_pictures(tmp_path / "train", "abc", 2)
    save(tmp_path / test / "c" / "0.png", 0)
    found = image_sets.open_images(str(tmp_path))
    assert found.kind == "folder" and not found.in_memory and found.channels == 3
    assert found.classes == found.test.classes == ("a", "b", "c")
    assert found.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.test.labels.tolist() == [2]
    assert {path.parts[-3] for path in found.train.paths} == {"train"}
    assert found.test.paths == (tmp_path / test / "c" / "0.png",)


def test_val_goes_before_test(tmp_path):
    for part in ("train", "test", "val"):
        write_pictures(tmp_path / part, "ab", 1)
    found = image_sets.open_images(str(tmp_path))
    assert {path.parts[-3] for path in found.test.paths} == {"val"}


def test_an_undivided_folder_gives_a_fifth_for_testing(pictures):
    found = image_sets.open_images(str(pictures))
    assert len(found.train.paths) == 15 and len(found.test.paths) == 3  # of 18
    together = found.train.paths + found.test.paths
    assert set(together) == {p for p in pictures.rglob("*.png")} and len(set(together)) == 18
    for part in (found.train, found.test):
        assert [found.classes[label] for label in part.labels.tolist()] == [path.parent.name for path in part.paths]
        assert list(part.paths) == sorted(part.paths) and part.classes == ("a", "b", "c")
    assert len(set(found.train.labels.tolist())) == 3
    again = image_sets.open_images(str(pictures))
    assert again.train.paths == found.train.paths and again.test.paths == found.test.paths


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "--data '.*' does not exist; expected a folder of images, or one of digits, cifar10"),
        (lambda d: d.write_text(""), "--data '.*' is a file; expected a folder of images, or one of digits"),
        (lambda d: d.mkdir(), "has no sub-folders, expected one a class"),
        (lambda d: (d / "a").mkdir(parents=True), "no picture in the sub-folders of"),
        (lambda d: write_pictures(d, "a"), "has the one class 'a'; expected at least two"),
        (lambda d: write_pictures(d / "train"), "has the one class 'train'; expected at least two"),
        (lambda d: write_pictures(d, count=2), "has 4 pictures; expected at least 5, of which one is for testing"),
        (
            lambda d: [write_pictures(d / "train", count=1), write_pictures(d / "val", "x", 1)],
            "val/x is none of the 2 classes of the training split",
        ),
        (lambda d: [write_pictures(d / "train", count=1), (d / "val").mkdir()], "val has no sub-folders"),
        (lambda d: write_mnist(d, (0, 0), (0,)), "has the one class '0'; expected at least two"),
        (lambda d: write_mnist(d, (0, -1), (1,), 0x09), "has the label -1; expected 0 or more"),
        (lambda d: write_mnist(d, (0, 1), ()), "has no images for testing"),
        (lambda d: write_mnist(d, (), (0, 1)), "has no images to learn from"),
        (lambda d: (write_mnist(d) / "t10k-images-idx3-ubyte.gz").unlink(), "no t10k-images-idx3-ubyte or"),
        (lambda d: (write_cifar(d) / "test_batch.bin").unlink(), "no CIFAR-10 in"),
    ],
    ids=(
        "missing file empty no-picture one-class train-alone few unknown-class empty-val "
        "one-digit negative no-test no-train mnist-part cifar-part"
    ).split(),
)
def test_what_is_no_image_set(prepare, message, tmp_path):
    prepare(tmp_path / "data")
    with pytest.raises(DataError, match=message) as caught:
        image_sets.open_images(str(tmp_path / "data"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "write", "kind", "classes"),
    [
        ("mnist", write_mnist, "mnist", ("0", "1", "2")),
        ("fashion-mnist", lambda d: write_mnist(d, tuple(range(10))), "mnist", image_sets.FASHION),
        ("cifar10", write_cifar, "cifar10", cifar.CLASSES),
    ],
)
def test_known_names_are_downloaded(name, write, kind, classes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def download(wanted):
        asked.append(wanted)
        return write(tmp_path / "cache")

    monkeypatch.setattr(arrays, "download", download)
    found = image_sets.open_images(name)
    assert asked == [name] and found.kind == kind and found.classes == classes
    write_pictures(tmp_path / name)  # a folder of this name goes first
    assert image_sets.open_images(name).kind == "folder" and asked == [name]


def test_in_memory(tmp_path, pictures):
    assert image_sets.in_memory("digits").kind == "digits"
    assert image_sets.in_memory(str(write_mnist(tmp_path))).kind == "mnist"
    with pytest.raises(DataError, match="is a folder of pictures; expected digits, or the files of MNIST or CIFAR-10"):
        image_sets.in_memory(str(pictures))


# Their images.


def test_all_of_them_as_numbers(pictures):
    digits = image_sets.read_all("digits", 16)
    assert digits.train.images.shape[2:] == (16, 16) and 0 <= digits.train.images.min() < digits.train.images.max() <= 1
    folder = image_sets.read_all(str(pictures), 12)
    assert folder.in_memory and folder.train.images.dtype == torch.float32 and folder.train.images.max() <= 1
    assert folder.train.images.shape[1:] == (3, 12, 12)
    files = image_sets.open_images(str(pictures))
    assert len(folder.train.labels) == len(files.train.labels) and len(folder.test.labels) == len(files.test.labels)
    first = image_sets.image(files.train.paths[0], 12, 12)
    torch.testing.assert_close(folder.train.images[0], first / 255)


def test_resized(tmp_path, pictures):
    data = image_sets.open_images(str(write_mnist(tmp_path)))
    before = data.train.images.clone()
    found = image_sets.resized(data, 3)
    assert found.train.images.shape == (5, 1, 3, 3) and found.test.images.shape == (2, 1, 3, 3)
    # Pillow smooths in the same way where it scales down.
    grey = Image.fromarray((before[0, 0] * 255).round().to(torch.uint8).numpy())
    expected = torch.from_numpy(np.asarray(grey.resize((3, 3), Image.Resampling.BILINEAR), np.float32) / 255)
    torch.testing.assert_close(found.train.images[0, 0], expected, rtol=0, atol=1.01 / 255)
    assert torch.equal(data.train.images, before) and torch.equal(found.train.labels, data.train.labels)
    assert image_sets.resized(found, 3).train.images is found.train.images
    files = image_sets.open_images(str(pictures))
    assert image_sets.resized(files, 3) == files


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_batches_to_learn_from_are_functions_of_key_and_step(kind, pictures, decoder):
    data = image_sets.open_images("digits" if kind == "digits" else str(pictures)).train
    size = 8 if kind == "digits" else 16

    def batches(key, steps):
        return list(image_sets.train_batches(data, key, steps, 7, size, decoder))

    found = batches(KEY, range(5))
    assert len(found) == 5
    for pixels, labels in found:
        assert pixels.shape == (7, data.images.shape[1] if kind == "digits" else 3, size, size)
        assert pixels.dtype == (torch.float32 if kind == "digits" else torch.uint8)
        assert labels.shape == (7,) and labels.dtype == torch.int64
    for (pixels, labels), (wanted, targets) in zip(batches(KEY, range(3, 5)), found[3:], strict=True):
        assert torch.equal(pixels, wanted) and torch.equal(labels, targets)
    assert not torch.equal(batches(random.key(6), range(1))[0][0], found[0][0])


def test_images_in_memory_come_with_their_labels():
    ramp = Labelled(torch.arange(600.0).reshape(600, 1, 1, 1), torch.arange(600))
    for pixels, labels in image_sets.train_batches(ramp, KEY, range(2), 300, 1, None):
        assert torch.equal(pixels.flatten(), labels.float())
    batches = list(image_sets.test_batches(ramp, 1, 1))
    assert [len(labels) for _, labels in batches] == [256, 256, 88]
    assert torch.equal(torch.cat([labels for _, labels in batches]), ramp.labels)
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), ramp.images)
    chosen = torch.tensor([599, 0, 300])
    assert torch.equal(image_sets.some(ramp, chosen, 1, 1), ramp.images[chosen])


def test_files_to_test_on(tmp_path, decoder):
    """Those that cannot be read are left out, and `some` and `image` give what `test_batches` gave."""
    write_pictures(tmp_path, "ab", 5)
    for path in (tmp_path / "a" / "0.png", tmp_path / "b" / "1.png"):
        path.write_bytes(b"no picture")
    paths = tuple(sorted(tmp_path.rglob("*.png")))
    files = Files(paths, torch.tensor([0] * 5 + [1] * 5), ("a", "b"))
    batches = list(image_sets.test_batches(files, 12, 16, decoder))
    pixels, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    assert pixels.shape == (8, 3, 12, 12) and pixels.dtype == torch.uint8
    assert labels.tolist() == [0] * 4 + [1] * 4
    chosen = torch.tensor([7, 0, 3, 4])
    assert torch.equal(image_sets.some(files, chosen, 12, 16, decoder), pixels[chosen])
    readable = [path for number, path in enumerate(paths) if number not in (0, 6)]
    for number in (0, 4, 5, 7):
        assert torch.equal(image_sets.image(readable[number], 12, 16), pixels[number])
    with pytest.raises(DataError, match="0.png cannot be read as a picture"):
        image_sets.image(paths[0], 12, 16)


def test_an_image_in_grey_and_its_middle(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = (0, 255, 0)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found = image_sets.image(tmp_path / "wide.png", 10, 20)
    assert torch.equal(found, torch.tensor([0, 255, 0], dtype=torch.uint8)[:, None, None].expand(3, 10, 10))
    grey = image_sets.image(tmp_path / "wide.png", 20, 20, channels=1)
    assert grey.shape == (1, 20, 20) and (grey == 150).all()  # 0.587 * 255, rounded
