"""The labelled images that the `--data` of an experiment names: one place, whatever files they come from."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import random
from train.data import DataError, batching
from train.data.images import arrays, cifar, picture
from train.data.images import files as image_files
from train.data.images.arrays import Labelled
from train.data.images.files import Decoder, Files
from train.data.images.picture import Cut

FASHION = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
TESTS = ("val", "validation", "test")
"""The folders that may lie beside `train`; the first that is there is for testing."""


class ImageSet(NamedTuple):
    """Images to learn from and to test on: all of them in memory, or files that are decoded when they are needed.

    `kind` is digits, mnist (one channel), cifar10 or folder; `classes[label]` is a class's name.
    """

    kind: str
    train: Labelled | Files
    test: Labelled | Files
    classes: tuple[str, ...]

    @property
    def in_memory(self) -> bool:
        return isinstance(self.train, Labelled)

    @property
    def channels(self) -> int:
        return self.train.images.shape[1] if self.in_memory else 3


def open_images(data: str) -> ImageSet:
    """The images that `data` names.

    - "digits": scikit-learn's, in every installation.
    - "mnist", "fashion-mnist", "cifar10": downloaded once, checked, kept in the user's cache.
    - a folder with the four files of MNIST, or of a set in its format;
    - a folder with the binary or pickled batches of CIFAR-10;
    - a folder of pictures, one sub-folder a class, or of two such folders, `train` and `val`, `validation` or `test`.
      Without this division every fifth picture, in a fixed random order, is for testing.

    Raises:
        DataError: nothing of this is there, a file is damaged, a part is empty, a label is negative, or there are fewer
            than two classes.
    """
    found = _open(data)
    for part, purpose in ((found.train, "to learn from"), (found.test, "for testing")):
        if not len(part.labels):
            raise DataError(f"'{data}' has no images {purpose}")
        if int(part.labels.min()) < 0:
            raise DataError(f"'{data}' has the label {int(part.labels.min())}; expected 0 or more")
    if len(found.classes) < 2:
        raise DataError(f"'{data}' has the one class '{found.classes[0]}'; expected at least two")
    return found


def _open(data: str) -> ImageSet:
    path = Path(data)
    if data == "digits":
        return ImageSet("digits", *arrays.digits(), _numbers(10))
    if data in arrays.DOWNLOADS and not path.exists():
        path = arrays.download(data)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        known = ", ".join(["digits", *sorted(arrays.DOWNLOADS)])
        raise DataError(f"--data '{data}' {problem}; expected a folder of images, or one of {known}")
    names = {child.name for child in path.iterdir()}
    if any(name.startswith(("train-images", "t10k-images")) for name in names):
        train, test = arrays.mnist(path)
        count = max(torch.cat([train.labels, test.labels]).tolist(), default=-1) + 1
        return ImageSet("mnist", train, test, FASHION if data == "fashion-mnist" else _numbers(count))
    if any(name.startswith(("data_batch", "cifar-10-batches")) for name in names):
        return ImageSet("cifar10", *cifar.cifar10(path), cifar.CLASSES)
    tests = [name for name in TESTS if name in names]
    if "train" in names and tests:
        train = image_files.listing(path / "train")
        return ImageSet("folder", train, image_files.listing(path / tests[0], train.classes), train.classes)
    return _divided(image_files.listing(path))


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(count))


def _divided(files: Files) -> ImageSet:
    """Four fifths to learn from, one fifth for testing, always the same."""
    shuffled = random.permutation(random.key(0), len(files.labels))
    cut = len(shuffled) // 5
    if cut == 0:
        raise DataError(f"the folder has {len(shuffled)} pictures; expected at least 5, of which one is for testing")
    train, test = (_part(files, chosen.sort().values) for chosen in (shuffled[cut:], shuffled[:cut]))
    return ImageSet("folder", train, test, files.classes)


def _part(files: Files, chosen: Tensor) -> Files:
    return files._replace(paths=tuple(files.paths[i] for i in chosen.tolist()), labels=files.labels[chosen])


def resized(data: ImageSet, size: int) -> ImageSet:
    """Images in memory scaled to `size` pixels a side (bilinear, smoothed where they shrink); files as they are."""

    def scaled(part: Labelled | Files) -> Labelled | Files:
        if isinstance(part, Files) or tuple(part.images.shape[2:]) == (size, size):
            return part
        options = {"mode": "bilinear", "antialias": True, "align_corners": False}
        return part._replace(images=F.interpolate(part.images, (size, size), **options))

    return data._replace(train=scaled(data.train), test=scaled(data.test))


EVALUATED = 256
"""Images in a batch for testing, unless fewer are left."""


def train_batches(
    data: Labelled | Files, key: Tensor, steps: range, batch: int, size: int, decoder: Decoder
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images (batch, channels, size, size), labels (batch,)) of each step, a function of key and step.

    Files are cropped at random while they are decoded, and come as bytes; images in memory come as they are.

    Args:
        key: (2,).
    """
    if isinstance(data, Files):
        yield from decoder.train_batches(data, key, steps, batch, size)
        return
    for step in steps:
        chosen = batching.epoch_batch(key, step, len(data.labels), batch)
        yield data.images[chosen], data.labels[chosen]


def test_batches(
    data: Labelled | Files, size: int, resize: int, decoder: Decoder | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same of all images, in order. Of files the middle, after scaling the shorter side to `resize`; those that
    cannot be read are left out."""
    if isinstance(data, Files):
        yield from decoder.evaluation_batches(data, EVALUATED, size, resize=resize)
        return
    for part in batching.evaluation_batches(len(data.labels), EVALUATED):
        yield data.images[part], data.labels[part]


def some(data: Labelled | Files, chosen: Tensor, size: int, resize: int, decoder: Decoder | None = None) -> Tensor:
    """(count, channels, size, size): the images of `test_batches` with these numbers."""
    if isinstance(data, Labelled):
        return data.images[chosen]
    bad = {path for path, _ in decoder.skipped}
    readable = [path for path in data.paths if path not in bad]
    return torch.stack([image(readable[i], size, resize) for i in chosen.tolist()])


def image(path: Path, size: int, resize: int, channels: int = 3) -> Tensor:
    """(channels, size, size) bytes: a file as `test_batches` gives it. Raises DataError if it cannot be read."""
    return torch.from_numpy(picture.decode(path, Cut(size, channels, resize)))


def in_memory(data: str) -> ImageSet:
    """`open_images`, for experiments that need all images in memory at once.

    Raises DataError for folders of pictures, too.
    """
    found = open_images(data)
    if not found.in_memory:
        raise DataError(f"'{data}' is a folder of pictures; expected digits, or the files of MNIST or CIFAR-10")
    return found


def read_all(data: str, size: int | None = None) -> ImageSet:
    """`open_images`, all of them in memory as numbers in [0, 1], for experiments that keep them there.

    Args:
        size: pixels a side. Pictures are scaled by their shorter side and their middle is taken, 64 pixels if None;
            images that are in memory anyway stay as they are if None.

    Raises DataError as `open_images`, or for a picture that cannot be read.
    """
    found = open_images(data)
    if found.in_memory:
        found = found if size is None else resized(found, size)
        return found._replace(train=_unit(found.train), test=_unit(found.test))

    def decoded(files: Files) -> Labelled:
        images = torch.stack([image(path, size or 64, size or 64) for path in files.paths])
        return _unit(Labelled(images, files.labels))

    return found._replace(train=decoded(found.train), test=decoded(found.test))


def _unit(part: Labelled) -> Labelled:
    return part if part.images.is_floating_point() else part._replace(images=part.images / 255)
