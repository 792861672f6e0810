"""CIFAR-10 from its original files: the binary batches, or the pickled ones of the Python version.

A pickle can run any code when it is opened. The one read here may hold numbers, strings, lists, dicts and numpy arrays;
anything else is refused before it is made.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.data import DataError
from train.data.images.arrays import Labelled

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE, PIXELS = 32, 3 * 32 * 32
BATCHES = {
    "binary": ([f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"),
    "pickled": ([f"data_batch_{i}" for i in range(1, 6)], "test_batch"),
}


def cifar10(directory: str | Path) -> tuple[Labelled, Labelled]:
    """(train, test): 50,000 and 10,000 colour photographs of 32x32, ten classes (Krizhevsky 2009).

    Args:
        directory: folder with the files of either version, or with the folder that the published archive unpacks to
            (cifar-10-batches-bin, cifar-10-batches-py). Fewer than five training batches will do.

    Raises DataError naming the file that is missing or malformed.
    """
    directory = Path(directory)
    folders = [directory, directory / "cifar-10-batches-bin", directory / "cifar-10-batches-py"]
    for folder in folders:
        for kind, (train, test) in BATCHES.items():
            batches = [folder / name for name in train if (folder / name).is_file()]
            if batches and (folder / test).is_file():
                read = read_binary if kind == "binary" else read_pickled
                parts = [read(path) for path in batches]
                joined = Labelled(*(torch.cat(column) for column in zip(*parts, strict=True)))
                return joined, read(folder / test)
    raise DataError(f"no CIFAR-10 in {directory}: expected data_batch_1.bin and test_batch.bin, or the pickled batches")


def read_binary(path: Path) -> Labelled:
    """One batch: per image a byte for its label, then its red, green and blue pixels row by row."""
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if not len(content) or len(content) % (1 + PIXELS):
        raise DataError(
            f"{path} has {len(content)} bytes; expected a multiple of {1 + PIXELS}, a label and {PIXELS} pixels"
        )
    rows = content.reshape(-1, 1 + PIXELS)
    return _labelled(path, rows[:, 1:], rows[:, 0])


def read_pickled(path: Path) -> Labelled:
    """One batch of the Python version: a dict with `data` (N, 3072) of bytes and `labels`, a list."""
    try:
        with open(path, "rb") as file:
            content = _Plain(file, encoding="bytes").load()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # a garbled pickle raises anything
        raise DataError(f"{path} is no batch of CIFAR-10: {error}") from None
    if not isinstance(content, dict) or not {b"data", b"labels"} <= set(content):
        raise DataError(f"{path} is no batch of CIFAR-10: expected a dict with 'data' and 'labels'")
    data, labels = content[b"data"], np.asarray(content[b"labels"])
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        shape = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{path}: its data are {shape}; expected bytes (images, {PIXELS})")
    if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
        raise DataError(f"{path} has labels {labels.dtype} {labels.shape} for {len(data)} images")
    return _labelled(path, data, labels)


def _labelled(path: Path, pixels: np.ndarray, labels: np.ndarray) -> Labelled:
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise DataError(f"{path} has the label {labels.max()}; expected 0 to {len(CLASSES) - 1}")
    images = torch.from_numpy(pixels.astype(np.float32)).div_(255).reshape(-1, 3, SIDE, SIDE)
    return Labelled(images, torch.from_numpy(labels.astype(np.int64)))


class _Plain(pickle.Unpickler):
    """An unpickler of numpy arrays that refuses every other object."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
            ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")
        return allowed[module, name]
