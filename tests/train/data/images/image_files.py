"""Writers of small image sets: folders of pictures, the files of MNIST and of CIFAR-10."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image


def save(path: Path, seed: int, height: int = 40, width: int = 50) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(path)


def write_pictures(folder: Path, classes: str = "ab", count: int = 6) -> Path:
    for label, name in enumerate(classes):
        for number in range(count):
            save(folder / name / f"{number}.png", 100 * label + number)
    return folder


def write_idx(path: Path, array: np.ndarray, code: int = 0x08) -> Path:
    """The array in MNIST's format, compressed if the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


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
