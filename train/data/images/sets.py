"""The images that the `--data` of an experiment names: one entrance, whatever files they come from."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core import random
from train.data import DataError, batching
from train.data.file_tree import Skipped, files_below
from train.data.images import arrays, cifar, picture, shards
from train.data.images.arrays import Labelled
from train.data.images.files import Decoder
from train.data.images.folders import Files, is_flat, layout, listing, same_names
from train.data.images.picture import Cut
from train.files import shown

FASHION = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


class ImageSet(NamedTuple):
    """Images to train on and to test on: all of them in memory, or files that are decoded when they are needed.

    `kind` is digits, mnist (one channel), cifar10 or folder; `classes[label]` is the name of a class. `name` is the
    value of `--data`; `origin` names the parts of it that the training and test images come from; `skipped` lists
    files and folders that are not used, with the reason. `facts` makes these printable.
    """

    kind: str
    train: Labelled | Files
    test: Labelled | Files
    classes: tuple[str, ...]
    name: str = ""
    origin: tuple[str, str] = ("", "")
    skipped: tuple[Skipped, ...] = ()

    @property
    def in_memory(self) -> bool:
        """True if the images are arrays, not files."""
        return isinstance(self.train, Labelled)

    @property
    def channels(self) -> int:
        """Channels of the images; files are read in colour."""
        return self.train.images.shape[1] if self.in_memory else 3


def open_images(
    data: str, part: str = "split", classes: Sequence[str] | None = None, labelled: bool = True
) -> ImageSet:
    """The images that `data` names.

    - "digits": scikit-learn's, in every installation.
    - "mnist", "fashion-mnist", "cifar10": downloaded once, checked, kept in the user's cache.
    - a folder with the four files of MNIST, or of a set in its format;
    - a folder with the binary or pickled batches of CIFAR-10;
    - a folder of pictures, one sub-folder per class, or of two such folders, one to train on and one to test on
      (`folders.layout` has their names). Without this division every fifth picture, in a fixed random order, is for
      testing; pictures of one name (x.png, x.jpg) stay together.
    - a folder of tars with an index of the pictures in them (`shards.write_index`).

    Args:
        part: "split"; or "all": nothing is held out of a folder without division, so that both parts are all of its
            pictures. Sets with a test part of their own keep it.
        classes: those of a trained net, which keep their labels here. Some may have no images, and none may be new.
        labelled: False where classes do not matter (generative models): one class will do, and pictures may lie in the
            folder itself, without sub-folders.

    Raises:
        DataError: nothing of this is there, a file is damaged, a part is empty, a label is negative, a class is
            unknown; or there are fewer than two classes, if `labelled` and `classes` is None.
    """
    if part not in ("split", "all"):
        raise DataError(f"part is '{part}', expected split or all")
    opened = _open(data, part, classes, labelled)
    for images, purpose in ((opened.train, "to train on"), (opened.test, "to test on")):
        if not len(images.labels):
            raise DataError(f"'{data}' has no images {purpose}")
        if int(images.labels.min()) < 0:
            raise DataError(f"'{data}' has the label {int(images.labels.min())}; expected 0 or more")
    if classes is not None and opened.classes != tuple(classes):
        opened = _relabelled(opened, tuple(classes), data)
    if labelled and classes is None and len(opened.classes) < 2:
        raise DataError(f"'{data}' has the one class '{opened.classes[0]}'; expected at least two")
    return opened._replace(name=data)


def digits(test: int = 297) -> ImageSet:
    """scikit-learn's 1797 digits, of which `test` are for testing."""
    return ImageSet("digits", *arrays.digits(test), _numbers(10), "digits")


def kind_of(data: str) -> str:
    """digits, mnist, cifar10 or folder: the `kind` that `open_images` will find, without opening anything large."""
    path = Path(data)
    if not path.is_dir():
        return "mnist" if data in ("mnist", "fashion-mnist") else data if data in ("digits", "cifar10") else "folder"
    names = {child.name for child in path.iterdir()}
    if any(name.startswith(("train-images", "t10k-images")) for name in names):
        return "mnist"
    return "cifar10" if any(name.startswith(("data_batch", "cifar-10-batches")) for name in names) else "folder"


def _open(data: str, part: str, classes: Sequence[str] | None, labelled: bool) -> ImageSet:
    path = Path(data)
    own = ("its own training part", "its own test part")
    if data == "digits":
        return digits()
    if data in arrays.DOWNLOADS and not path.exists():
        path = arrays.download(data)
    if not data or not path.is_dir():  # Path("") is the current folder
        problem = "is a file" if data and path.exists() else "does not exist"
        known = ", ".join(["digits", *sorted(arrays.DOWNLOADS)])
        raise DataError(f"--data '{data}' {problem}; expected a folder of images, or one of {known}")
    kind = kind_of(str(path))
    if kind == "mnist":
        train, test = arrays.mnist(path)
        count = max(torch.cat([train.labels, test.labels]).tolist(), default=-1) + 1
        named = FASHION if data == "fashion-mnist" else _numbers(count)
        if classes is not None and tuple(classes) == FASHION:  # the files hold numbers, not names
            named = FASHION
        return ImageSet("mnist", train, test, named, origin=own)
    if kind == "cifar10":
        return ImageSet("cifar10", *cifar.cifar10(path), cifar.CLASSES, origin=own)
    return _open_folder(path, part, classes, labelled)


def _open_folder(path: Path, part: str, classes: Sequence[str] | None, labelled: bool) -> ImageSet:
    if (path / shards.INDEX).is_file():
        return _open_shards(path, part)
    if shards.tars_of(path) and not any(picture.is_picture(file.name) for file in files_below(path).paths):
        raise DataError(f"{path} has tars and no index of their pictures; {shards.MAKE} {path}")
    train_folder, test_folder, skipped = layout(path)
    if test_folder is not None and train_folder is None:
        if part == "split":
            name = test_folder.name
            raise DataError(f"{path} looks like a split, by its folder {name}, but has no folder train to train on")
        train_folder = test_folder
    elif test_folder is not None and labelled and is_flat(test_folder):
        skipped += ((test_folder, "is not used: its pictures have no classes"),)
        test_folder = None
    train = listing(train_folder, classes, labelled)
    origin = shown(train_folder.name) if train_folder != path else "the folder"
    skipped += train.skipped
    if test_folder in (None, train_folder):
        parts, origins = (train, train), (origin, origin)
        if part == "split":
            parts, origins = _divided(train), (f"four fifths of {origin}", f"one fifth of {origin}")
    else:
        test = listing(test_folder, train.classes, labelled)
        parts, origins, skipped = (train, test), (origin, shown(test_folder.name)), skipped + test.skipped
    return ImageSet("folder", *parts, train.classes, "", origins, skipped)


def _open_shards(path: Path, part: str) -> ImageSet:
    """The pictures in the tars of a folder, by its index. Those of one part alone are divided, or used whole."""
    train, test, skipped = shards.listings(path)
    origins = ("the tars to train on", "the tars to test on")
    if train is None and part == "split":
        raise DataError(f"{path} has tars to test on alone; expected others with train in their names or folder")
    if test is None and part == "split":
        (train, test), origins = _divided(train), ("four fifths of the tars", "one fifth of the tars")
    elif train is None or test is None:
        train, origins = test if train is None else train, ("all tars", "all tars")
        test = train
    return ImageSet("folder", train, test, train.classes, "", origins, skipped)


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(i) for i in range(count))


def _divided(files: Files) -> tuple[Files, Files]:
    """Four fifths to train on, one fifth to test on, always the same; pictures of one name together."""
    names = [os.path.splitext(path)[0] for path in files.paths]
    group_of = {name: i for i, name in enumerate(dict.fromkeys(names))}
    groups = torch.tensor([group_of[name] for name in names])  # (count,)
    shuffled = random.permutation(random.key(0), len(group_of))
    cut = len(shuffled) // 5
    if cut == 0:
        raise DataError(f"the folder has {len(shuffled)} pictures; expected at least 5, of which one is for testing")
    held_out = torch.isin(groups, shuffled[:cut])
    return _part(files, (~held_out).nonzero()[:, 0]), _part(files, held_out.nonzero()[:, 0])


def _part(files: Files, indices: Tensor) -> Files:
    return files._replace(paths=tuple(files.paths[i] for i in indices.tolist()), labels=files.labels[indices])


def _relabelled(data: ImageSet, classes: tuple[str, ...], name: str) -> ImageSet:
    """The same images with the labels that their classes have among `classes`."""
    unknown = [c for c in data.classes if c not in classes]
    if unknown:
        first = ", ".join(classes[:9])
        raise DataError(f"'{name}' has the class '{unknown[0]}', which is none of the {len(classes)} known: {first}")
    table = torch.tensor([classes.index(c) for c in data.classes])
    train, test = (part._replace(labels=table[part.labels]) for part in (data.train, data.test))
    return data._replace(train=train, test=test, classes=classes)


def facts(data: ImageSet, skipped: Sequence[Skipped] = ()) -> dict[str, Any]:
    """Names and values of a set, for `train.data.understood`.

    Args:
        skipped: further files that could not be read, such as `Decoder.skipped`.
    """
    parts = (data.train, data.test)
    counts = [part.labels.bincount(minlength=len(data.classes)).tolist() for part in parts]
    missing = [[c for c, n in zip(data.classes, column, strict=True) if n == 0] for column in counts]
    sizes = [f"{sum(column):,}" for column in counts]
    out: dict[str, Any] = {"images": data.name or data.kind}
    out["classes"] = dict(zip(data.classes, counts[0], strict=True))
    if data.train is data.test:
        out["images to test on"] = f"{sizes[1]} (all of {data.origin[1]})"
        parts = parts[1:]
    else:
        for size, purpose, origin in zip(sizes, ("train", "test"), data.origin, strict=True):
            out[f"images to {purpose} on"] = f"{size} ({origin})" if origin else size
        out["classes without training images"] = missing[0]
    out["classes without test images"] = missing[1]
    if not data.in_memory:
        doubles = [group for part in parts for group in same_names(part)]
        out["pictures of one name"] = [" and ".join(shown(path) for path in group) for group in doubles]
    return out | {"skipped": list(dict.fromkeys((*data.skipped, *skipped)))}


def baselines(data: ImageSet) -> dict[str, float]:
    """Accuracies without a net: of always the commonest class and, of images in memory, of the nearest class mean.

    argmin_k |x - c_k|², c_k the mean of the training images of class k
    """
    train, test = data.train, data.test
    figures = {"commonest_class_accuracy": float((test.labels == train.labels.mode().values).float().mean())}
    if data.in_memory:
        classes = [c for c in range(len(data.classes)) if (train.labels == c).any()]
        means = torch.stack([train.images[train.labels == c].flatten(1).mean(0) for c in classes])  # (classes, pixels)
        nearest = torch.tensor(classes)[torch.cdist(test.images.flatten(1), means).argmin(1)]  # (images,)
        figures["nearest_mean_accuracy"] = float((nearest == test.labels).float().mean())
    return figures


def resized(data: ImageSet, size: int) -> ImageSet:
    """Images in memory scaled to `size` pixels per side (bilinear, smoothed where they shrink); files as they are."""

    def scaled(part: Labelled | Files) -> Labelled | Files:
        if isinstance(part, Files) or tuple(part.images.shape[2:]) == (size, size):
            return part
        options = {"mode": "bilinear", "antialias": True, "align_corners": False}
        return part._replace(images=F.interpolate(part.images, (size, size), **options))

    train = scaled(data.train)
    return data._replace(train=train, test=train if data.test is data.train else scaled(data.test))


EVALUATED = 256
"""Batch size for testing; the last batch may be smaller."""


def train_batches(
    data: Labelled | Files,
    key: Tensor,
    steps: range,
    batch: int,
    size: int,
    decoder: Decoder,
    least_area: float = 0.08,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images (batch, channels, size, size), labels (batch,)) of each step, a function of key and step.

    Files are cropped at random while they are decoded, and come as bytes; images in memory come as they are.

    Args:
        key: (2,).
        least_area: the least part of a file's area that a crop has.
    """
    if isinstance(data, Files):
        yield from decoder.train_batches(data, key, steps, batch, size, scale=(least_area, 1.0))
        return
    for step in steps:
        indices = batching.epoch_batch(key, step, len(data.labels), batch)
        yield data.images[indices], data.labels[indices]


def test_batches(
    data: Labelled | Files, size: int, resize: int, decoder: Decoder | None = None, interpolation: str = "bilinear"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of all images in order, in the form of `train_batches`. Of files the middle, after scaling the shorter
    side to `resize` by `interpolation`; those that cannot be read are left out."""
    if isinstance(data, Files):
        yield from decoder.evaluation_batches(data, EVALUATED, size, resize=resize, interpolation=interpolation)
        return
    for part in batching.evaluation_batches(len(data.labels), EVALUATED):
        yield data.images[part], data.labels[part]


def some(data: Labelled | Files, indices: Tensor, size: int, resize: int, decoder: Decoder | None = None) -> Tensor:
    """(count, channels, size, size): the images of `test_batches` with these indices."""
    if isinstance(data, Labelled):
        return data.images[indices]
    unreadable = {path for path, _ in decoder.skipped}
    readable = [path for path in data.paths if path not in unreadable]
    return torch.stack([image(readable[i], size, resize) for i in indices.tolist()])


def image(path: Path, size: int, resize: int, channels: int = 3) -> Tensor:
    """(channels, size, size) bytes: a file as `test_batches` gives it. Raises DataError if it cannot be read."""
    return torch.from_numpy(picture.decode(path, Cut(size, channels, resize)))


class Pictures(NamedTuple):
    """images (count, channels, size, size) uint8; `paths[i]` is the file of image i; `skipped` could not be read."""

    images: Tensor
    paths: tuple[Path, ...]
    skipped: tuple[Skipped, ...] = ()


def pictures(
    paths: Sequence[Path], size: int, resize: int, channels: int = 3, workers: int = 0, interpolation: str = "bilinear"
) -> Pictures:
    """Files as `image` gives them, scaled by `interpolation`; those that cannot be read are skipped and logged.

    `folders.picture_paths` has the paths of a command's arguments. Raises DataError if none can be read.
    """
    files = Files(tuple(paths), torch.arange(len(paths)), ())
    with Decoder(workers) as decoder:
        batches = list(decoder.evaluation_batches(files, EVALUATED, size, channels, resize, interpolation))
    images, numbers = (torch.cat(column) for column in zip(*batches, strict=True))
    return Pictures(images, tuple(paths[i] for i in numbers.tolist()), decoder.skipped)


def read_all(data: str, size: int | None = None, labelled: bool = False, part: str = "split") -> ImageSet:
    """`open_images`, all of them in memory in [0, 1], for experiments that keep them there.

    A picture that cannot be read is skipped, logged, and listed in `skipped`.

    Args:
        size: pixels per side. Pictures are scaled by their shorter side and their middle is taken, 64 pixels if None;
            images that are in memory anyway stay as they are if None.
        labelled, part: as in `open_images`; without labels a flat folder or a single class will do.

    Raises DataError as `open_images`, or if no picture can be read.
    """
    opened = open_images(data, part, labelled=labelled)
    if opened.in_memory:
        opened = opened if size is None else resized(opened, size)
        return opened._replace(train=_unit(opened.train), test=_unit(opened.test))
    side, skipped = size or 64, opened.skipped

    def decoded(files: Files) -> Labelled:
        nonlocal skipped
        with Decoder(0) as decoder:
            batches = list(decoder.evaluation_batches(files, EVALUATED, side))
        skipped += decoder.skipped
        return _unit(Labelled(*(torch.cat(column) for column in zip(*batches, strict=True))))

    train = decoded(opened.train)
    test = train if opened.test is opened.train else decoded(opened.test)
    return opened._replace(train=train, test=test, skipped=skipped)


def _unit(part: Labelled) -> Labelled:
    return part if part.images.is_floating_point() else part._replace(images=part.images / 255)
