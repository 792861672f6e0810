"""Labelled images: scikit-learn's digits (embedded), MNIST-style IDX files, folders of pictures, known downloads."""

import gzip
import importlib.util
import logging
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core import random
from train.data import DataError
from train.data.downloads import fetch, folder_of
from train.data.file_tree import Skipped

log = logging.getLogger(__name__)


class Labelled(NamedTuple):
    """images (count, channels, height, width) float32 in [0, 1]; labels (count,) int64."""

    images: Tensor
    labels: Tensor


class Folder(NamedTuple):
    """The pictures of a folder: images and labels as in `Labelled`; `classes[label]` is the name of the sub-folder,
    `paths[i]` the file of image i; `skipped` are (file or folder, reason) of all that is not used."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    paths: tuple[Path, ...]
    skipped: tuple[Skipped, ...]


def digits(test: int = 297, key: Tensor | None = None) -> tuple[Labelled, Labelled]:
    """(train, test): 1797 handwritten digits, 8x8, one channel, ten classes (UCI, Alpaydin and Kaynak 1998).

    Args:
        test: number of digits to test on.
        key: gives the order before the split, `random.key(0)` if None, so that the split is always the same.
    """
    table = _digits_table()
    order = random.permutation(random.key(0) if key is None else key, len(table)).cpu()
    if not 0 < test < len(table):
        raise DataError(f"cannot hold out {test} of {len(table)} digits for testing")
    images = torch.from_numpy(table[:, :64].astype(np.float32) / 16).reshape(-1, 1, 8, 8)[order]
    labels = torch.from_numpy(table[:, 64].astype(np.int64))[order]
    return Labelled(images[:-test], labels[:-test]), Labelled(images[-test:], labels[-test:])


def _digits_table() -> np.ndarray:
    """(1797, 65): 64 pixels 0 to 16, and the label."""
    # Importing sklearn.datasets takes two seconds; its data file can be found without.
    package = importlib.util.find_spec("sklearn")
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz" if package and package.origin else Path()
    if path.is_file():
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return np.column_stack([loaded.data, loaded.target])


IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """The array in an IDX file (the format of MNIST), gzipped or plain, in the machine's byte order.

    Raises DataError: missing, not IDX, truncated, or longer than its header says.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist, expected an IDX file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or garbled: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_DTYPES or not content[3]:
        raise DataError(f"{path} is not an IDX file: it begins with {content[:4].hex() or 'nothing'}")
    dtype, rank = np.dtype(IDX_DTYPES[content[2]]), content[3]
    start = 4 + 4 * rank
    if len(content) < start:
        raise DataError(f"{path} is truncated: it ends inside its header")
    shape = tuple(np.frombuffer(content, ">u4", rank, 4).tolist())
    size, expected = len(content) - start, math.prod(shape) * dtype.itemsize
    if size != expected:
        kind = "is truncated" if size < expected else "is too long"
        raise DataError(f"{path} {kind}: {size} bytes of data, expected {expected} for {shape} {dtype.name}")
    return np.frombuffer(content, dtype, offset=start).astype(dtype.newbyteorder("=")).reshape(shape)


def read_idx_pair(images: str | os.PathLike, labels: str | os.PathLike) -> Labelled:
    """Images (count, height, width) of bytes and their labels (count,) from two IDX files."""
    pixels, targets = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise DataError(f"{images} holds {pixels.dtype} {pixels.shape}, expected bytes (count, height, width)")
    if targets.shape != pixels.shape[:1]:
        raise DataError(f"{labels} holds labels {targets.shape}, expected ({len(pixels)},) for the images of {images}")
    scaled = torch.from_numpy(pixels).to(torch.float32).div_(255)
    return Labelled(scaled[:, None], torch.from_numpy(targets.astype(np.int64)))


def mnist(directory: str | os.PathLike) -> tuple[Labelled, Labelled]:
    """(train, test) from a folder with the four files of MNIST or of a set in its layout, gzipped or not.

    Raises DataError naming the file that is missing or cannot be read.
    """
    directory = Path(directory)

    def find(name: str) -> Path:
        # Some unpacked copies have a dot instead of the last hyphen but one.
        for path in (directory / name, directory / f"{name}.gz", directory / name.replace("-idx", ".idx")):
            if path.is_file():
                return path
        raise DataError(f"no {name} or {name}.gz in {directory}")

    parts = [(find(f"{part}-images-idx3-ubyte"), find(f"{part}-labels-idx1-ubyte")) for part in ("train", "t10k")]
    return read_idx_pair(*parts[0]), read_idx_pair(*parts[1])


# The address of the files, and their published MD5 sums.
DOWNLOADS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    ),
}


def download(name: str, directory: str | os.PathLike | None = None, base_url: str | None = None) -> Path:
    """Fetch a known data set and return its folder; files that are there already and whole are not fetched again.

    Args:
        name: "mnist" or "fashion-mnist", which `mnist(folder)` reads, or "cifar10", for `cifar.cifar10(folder)`.
        directory: folder to keep it in, one in the user's cache if None.
        base_url: another address of the same files (their checksums are compared).

    Raises DataError: unknown name, no connection, wrong checksum.
    """
    if name not in DOWNLOADS:
        raise DataError(f"unknown data set {name!r}, expected one of {', '.join(sorted(DOWNLOADS))}")
    address, files = DOWNLOADS[name]
    folder, address = folder_of(name, directory), (base_url or address).rstrip("/")
    for file, md5 in files.items():
        fetch(f"{address}/{file}", f"md5:{md5}", folder, None if file.endswith(".tar.gz") else ())
    return folder


def image_folder(directory: str | os.PathLike, size: int | tuple[int, int] | None = None, channels: int = 3) -> Folder:
    """All pictures of a folder with one sub-folder per class (`folders.listing`); classes and files in sorted order.

    Transparent parts become white, more than 8 bits become 8 by the rule of `picture.converted`, a camera's orientation
    is applied. Files that cannot be read as pictures are skipped, logged and listed.

    Args:
        size: (height, width), or one number for both: each picture is scaled to cover this size and its middle is cut
            out. None leaves them as they are; then all must have one size.
        channels: 3 for colour, 1 for grey.

    Raises DataError: no such folder, no sub-folder, no readable picture, different sizes.
    """
    from train.data.images.folders import listing

    if channels not in (1, 3):
        raise DataError(f"channels is {channels}, expected 1 or 3")
    files = listing(directory)
    images, indices, skipped = [], [], list(files.skipped)
    for number, path in enumerate(files.paths):
        try:
            image = read_image(path, size, channels)
        except DataError as error:
            log.warning("skipped: %s", error)
            skipped.append((path, str(error)))
            continue
        if images and image.shape != images[0].shape:
            first = (files.paths[indices[0]], images[0])
            sizes = [f"{p} is {x.shape[1]}x{x.shape[2]}" for p, x in (first, (path, image))]
            raise DataError(f"the pictures differ in size: {' and '.join(sizes)}; give a size to scale them to")
        images.append(image)
        indices.append(number)
    if not images:
        raise DataError(f"no readable picture in the sub-folders of {directory} ({len(skipped)} unreadable)")
    paths = tuple(files.paths[number] for number in indices)
    return Folder(torch.stack(images), files.labels[indices], files.classes, paths, tuple(skipped))


def read_image(path: str | os.PathLike, size: int | tuple[int, int] | None = None, channels: int = 3) -> Tensor:
    """One picture as (channels, height, width) float32 in [0, 1]; see `image_folder`. Raises DataError."""
    from PIL import Image, ImageOps

    from train.data.images.picture import converted, opened

    with opened(path) as image:
        image = converted(image, channels)
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(image, np.float32) / 255
    pixels = torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels))  # (height, width, channels)
    return pixels.permute(2, 0, 1).contiguous()  # (channels, height, width)
