import gzip
import hashlib
import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core import random
from tests.local_server import serve
from tests.train.data.images.image_files import write_idx
from train.data import DataError
from train.data.images import arrays, cifar

DATA = os.environ.get("FUNCTREE_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="FUNCTREE_DATA does not name a folder with real data sets")


def write_mnist(folder: Path, suffix: str = "", train: int = 6, test: int = 3) -> None:
    for part, count in (("train", train), ("t10k", test)):
        pixels = np.arange(count * 4 * 5, dtype=np.uint8).reshape(count, 4, 5)
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", pixels)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8))


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    train, test = arrays.digits()
    assert train.images.shape == (1500, 1, 8, 8) and test.images.shape == (297, 1, 8, 8)
    assert train.images.dtype == torch.float32 and train.labels.dtype == torch.int64
    expected = load_digits()
    order = random.permutation(random.key(0), 1797).numpy()
    together = torch.cat([train.images, test.images]).reshape(-1, 64).numpy()
    np.testing.assert_array_equal(together, expected.data[order] / 16)
    np.testing.assert_array_equal(torch.cat([train.labels, test.labels]), expected.target[order])
    assert not torch.equal(arrays.digits(key=random.key(1))[0].labels, train.labels)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_layout(suffix, tmp_path):
    write_mnist(tmp_path, suffix)
    train, test = arrays.mnist(tmp_path)
    assert train.images.shape == (6, 1, 4, 5) and len(test.labels) == 3
    torch.testing.assert_close(train.images.flatten(), torch.arange(120) / 255)
    assert train.labels.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("code", "dtype"), [(0x08, "u1"), (0x09, "i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")]
)
def test_idx_of_every_type(code, dtype, tmp_path):
    array = np.array([[1, -2, 3], [4, 5, 100]]).astype(dtype)
    actual = arrays.read_idx(write_idx(tmp_path / "a.idx", array, code))
    np.testing.assert_array_equal(actual, array)
    assert actual.dtype.isnative and actual.dtype.itemsize == array.dtype.itemsize


def idx(shape: tuple[int, ...], size: int, code: int = 8) -> bytes:
    return bytes([0, 0, code, len(shape)]) + np.array(shape, ">u4").tobytes() + bytes(size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist, expected an IDX file"),
        (b"", "is not an IDX file: it begins with nothing"),
        (b"\x89PNG\r\n", "is not an IDX file: it begins with 89504e47"),
        (idx((2, 3), 6, code=7), "is not an IDX file"),
        (idx((2, 3), 5), r"is truncated: 5 bytes of data, expected 6 for \(2, 3\) uint8"),
        (idx((2, 3), 7), "is too long: 7 bytes of data, expected 6"),
        (idx((2, 3), 0)[:7], "is truncated: it ends inside its header"),
        (idx((2**32 - 1, 2**32 - 1, 2**32 - 1), 9), "is truncated: 9 bytes"),
        (gzip.compress(idx((200,), 200), mtime=0)[:-9], "is truncated or garbled"),
        (gzip.compress(idx((200,), 200), mtime=0)[:20] + b"\xff" * 30, "is truncated or garbled"),
    ],
)
def test_bad_idx_is_one_line(content, message, tmp_path):
    path = tmp_path / "images.idx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        arrays.read_idx(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_idx_files_that_do_not_belong_together(tmp_path):
    write_mnist(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(5, np.uint8))
    with pytest.raises(DataError, match=r"holds labels \(5,\), expected \(6,\)"):
        arrays.mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="no train-labels-idx1-ubyte or train-labels-idx1-ubyte.gz in"):
        arrays.mnist(tmp_path)
    with pytest.raises(DataError, match=r"holds uint8 \(3,\), expected bytes"):
        arrays.read_idx_pair(tmp_path / "t10k-labels-idx1-ubyte", tmp_path / "t10k-labels-idx1-ubyte")


@needs_data
def test_the_real_mnist():
    test = arrays.read_idx_pair(*(Path(DATA) / "mnist" / f"t10k-{n}-ubyte.gz" for n in ("images-idx3", "labels-idx1")))
    assert test.images.shape == (10_000, 1, 28, 28) and test.labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    # The published mean of MNIST's test images.
    assert abs(test.images.mean().item() - 0.1325) < 1e-3 and test.images.max() == 1


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """A folder that is served, and whose files are what "mnist" should be."""
    folder = tmp_path / "published"
    folder.mkdir()
    write_mnist(folder, ".gz")
    sums = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}
    monkeypatch.setitem(arrays.DOWNLOADS, "mnist", ("http://127.0.0.1:9/", sums))
    return folder


def test_download_once(published, tmp_path):
    with serve(published) as url:
        folder = arrays.download("mnist", tmp_path / "cache", base_url=f"{url}/")
    assert len(arrays.mnist(folder)[0].labels) == 6
    assert arrays.download("mnist", tmp_path / "cache", base_url="http://127.0.0.1:9/") == folder  # nothing to fetch


def test_a_downloaded_archive_is_unpacked(tmp_path, monkeypatch):
    served = tmp_path / "published"
    served.mkdir()
    rows = np.zeros((2, 3073), np.uint8)
    rows[:, 0], rows[:, 1:] = (7, 2), 51
    with tarfile.open(served / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name in ("data_batch_1.bin", "test_batch.bin"):
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = rows.nbytes
            archive.addfile(entry, io.BytesIO(rows.tobytes()))
    sums = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in served.iterdir()}
    monkeypatch.setitem(arrays.DOWNLOADS, "cifar10", ("http://127.0.0.1:9/", sums))
    with serve(served) as url:
        folder = arrays.download("cifar10", tmp_path / "cache", base_url=f"{url}/")
    assert folder == tmp_path / "cache"
    (folder / "cifar-10-batches-bin" / "test_batch.bin").unlink()
    assert arrays.download("cifar10", folder) == folder  # nothing to fetch, but to unpack
    train, test = cifar.cifar10(folder)
    assert train.labels.tolist() == test.labels.tolist() == [7, 2]
    torch.testing.assert_close(train.images, torch.full((2, 3, 32, 32), 0.2))


def test_download_failures_are_one_line(published, tmp_path):
    with pytest.raises(DataError, match="cannot fetch http://127.0.0.1:9/t10k-images-idx3-ubyte.gz"):
        arrays.download("mnist", tmp_path / "cache")
    (published / "t10k-images-idx3-ubyte.gz").write_bytes(b"an error page")
    with serve(published) as url:
        with pytest.raises(DataError, match="is not the published file: its MD5 sum differs"):
            arrays.download("mnist", tmp_path / "cache", base_url=f"{url}/")
        (published / "t10k-images-idx3-ubyte.gz").unlink()
        with pytest.raises(DataError, match="cannot fetch .*404"):
            arrays.download("mnist", tmp_path / "cache", base_url=f"{url}/")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    with pytest.raises(DataError, match="unknown data set 'imagenet', expected one of cifar10, fashion-mnist, mnist"):
        arrays.download("imagenet")


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def test_folder_of_pictures(tmp_path, caplog):
    grey = np.full((6, 8), 51, np.uint8)
    save(tmp_path / "b_cat" / "2.png", np.full((6, 8, 3), (255, 0, 51), np.uint8))
    save(tmp_path / "b_cat" / "1.PNG", np.full((6, 8, 4), (0, 0, 0, 0), np.uint8))
    save(tmp_path / "a_dog" / "deep" / "16bit.png", np.full((6, 8), 257 * 51, np.uint16))
    save(tmp_path / "a_dog" / "grey.png", grey)
    (tmp_path / "a_dog" / "broken.jpg").write_bytes(b"no picture")
    save(tmp_path / "a_dog" / "half.png", np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))
    os.truncate(tmp_path / "a_dog" / "half.png", 2000)
    (tmp_path / "a_dog" / "notes.txt").write_text("ignored")
    (tmp_path / ".hidden").mkdir()
    actual = arrays.image_folder(tmp_path)
    assert actual.classes == ("a_dog", "b_cat") and actual.labels.tolist() == [0, 0, 1, 1]
    assert [p.name for p in actual.paths] == ["16bit.png", "grey.png", "1.PNG", "2.png"]
    assert actual.images.shape == (4, 3, 6, 8)
    expected = torch.tensor([[0.2, 0.2, 0.2], [0.2, 0.2, 0.2], [1.0, 1.0, 1.0], [1.0, 0.0, 0.2]])
    torch.testing.assert_close(actual.images, expected[:, :, None, None].expand(4, 3, 6, 8))
    assert [path.name for path, _ in actual.skipped] == ["broken.jpg", "half.png"]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert arrays.image_folder(tmp_path, size=(4, 3), channels=1).images.shape == (4, 1, 4, 3)


def test_pictures_are_scaled_to_cover_and_cut(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    save(tmp_path / "wide.png", pixels)
    torch.testing.assert_close(arrays.read_image(tmp_path / "wide.png", 10), torch.ones(3, 10, 10))
    rotated = Image.fromarray(pixels)
    exif = rotated.getexif()
    exif[0x0112] = 6  # the camera was held upright
    rotated.save(tmp_path / "upright.png", exif=exif)
    assert arrays.read_image(tmp_path / "upright.png").shape == (3, 30, 10)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "does not exist, expected a folder with one sub-folder per class"),
        (lambda d: d.write_text(""), "is a file, expected a folder"),
        (lambda d: save(d / "1.png", np.zeros((2, 2), np.uint8)), "has no sub-folders, expected one per class"),
        (lambda d: (d / "cat").mkdir(parents=True), "no picture in the sub-folders of"),
        (
            lambda d: [save(d / "cat" / f"{n}.png", np.zeros((n, 2), np.uint8)) for n in (2, 3)],
            "differ in size: .*2.png is 2x2 and .*3.png is 3x2; give a size",
        ),
    ],
    ids=["missing", "file", "flat", "empty", "sizes"],
)
def test_folders_that_cannot_be_used(prepare, message, tmp_path):
    prepare(tmp_path / "pictures")
    with pytest.raises(DataError, match=message):
        arrays.image_folder(tmp_path / "pictures")


@needs_data
def test_real_photographs(tmp_path):
    with zipfile.ZipFile(Path(DATA) / "clothing_small" / "clothing_small_val_test.zip") as archive:
        members = [m for m in archive.namelist() if "/test/" in f"/{m}" and m.endswith(".jpg")]
        two = [m for m in members if sum(n.split("/")[-2] == m.split("/")[-2] for n in members[: members.index(m)]) < 2]
        archive.extractall(tmp_path, two)
    folder = (tmp_path / two[0]).parent.parent
    actual = arrays.image_folder(folder, size=32)
    assert len(actual.classes) == 10 and actual.images.shape == (20, 3, 32, 32) and not actual.skipped
    assert 0.3 < actual.images.mean() < 0.9 and actual.images.std() > 0.1
