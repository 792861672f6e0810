"""CIFAR-10's two formats, and pickles that are not what they should be."""

import os
import pickle

import numpy as np
import pytest
import torch

from train.data import DataError
from train.data.images.cifar import CLASSES, cifar10


def arrays(count, seed):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 3072), np.uint8), generator.integers(0, 10, count)


def write(folder, kind, batches=5):
    folder.mkdir(exist_ok=True)
    names = [f"data_batch_{i}" for i in range(1, batches + 1)] + ["test_batch"]
    for seed, name in enumerate(names):
        pixels, labels = arrays(4, seed)
        if kind == "binary":
            (folder / f"{name}.bin").write_bytes(np.column_stack([labels.astype(np.uint8), pixels]).tobytes())
        else:
            # Python 2 wrote the published files; its strings are read as bytes.
            batch = {b"batch_label": b"x", b"data": pixels, b"labels": labels.tolist(), b"filenames": [b"a.png"] * 4}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=3))


@pytest.mark.parametrize("kind", ["binary", "pickled"])
@pytest.mark.parametrize("inner", ["", "cifar-10-batches-bin", "cifar-10-batches-py"])
def test_both_formats(kind, inner, tmp_path):
    write(tmp_path / inner, kind)
    train, test = cifar10(tmp_path)
    pixels, labels = arrays(4, 5)
    assert train.images.shape == (20, 3, 32, 32) and len(CLASSES) == 10
    assert torch.equal((test.images * 255).round().to(torch.uint8).flatten(1), torch.from_numpy(pixels))
    assert test.labels.tolist() == labels.tolist() and test.labels.dtype == torch.int64
    assert torch.equal(train.labels[:4], torch.from_numpy(arrays(4, 0)[1]))


def test_a_part_of_the_batches(tmp_path):
    write(tmp_path, "binary", batches=2)
    assert len(cifar10(tmp_path)[0].labels) == 8


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made",)


def replaced(name, change):
    def prepare(folder):
        write(folder, "pickled")
        batch = pickle.loads((folder / name).read_bytes())
        (folder / name).write_bytes(pickle.dumps(change(batch), protocol=3))

    return prepare


def truncated(folder):
    write(folder, "binary")
    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])


def garbled(folder):
    write(folder, "pickled")
    (folder / "test_batch").write_bytes(b"hello")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no CIFAR-10 in .*: expected data_batch_1.bin and test_batch.bin, or the pickled"),
        (truncated, "data_batch_2.bin has 12291 bytes; expected a multiple of 3073"),
        (garbled, "test_batch is no batch of CIFAR-10"),
        (replaced("test_batch", lambda b: b | {b"x": Evil()}), "it asks for posix.mkdir, which is not plain data"),
        (replaced("data_batch_1", lambda b: [1]), "expected a dict with 'data' and 'labels'"),
        (replaced("data_batch_1", lambda b: b | {b"data": [1]}), "its data are list; expected bytes"),
        (replaced("data_batch_1", lambda b: b | {b"labels": [1]}), r"labels int64 \(1,\) for 4 images"),
        (replaced("data_batch_1", lambda b: b | {b"labels": [1, 2, 3, 10]}), "has the label 10; expected 0 to 9"),
    ],
    ids=["nothing", "truncated", "garbled", "code", "list", "data", "labels", "class"],
)
def test_what_cannot_be_used(prepare, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    with pytest.raises(DataError, match=message):
        cifar10(tmp_path)
    assert not (tmp_path / "made").exists()
