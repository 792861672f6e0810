"""Folders of pictures: which pictures there are, their classes, and the parts to train and to test on."""

import itertools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from train.data import DataError
from train.data.file_tree import LINK, Skipped, files_below, inode, is_ignored, subfolders
from train.data.images.picture import Member, is_picture
from train.files import shown

TRAIN = ("train", "training", "trainset")
TEST = ("val", "valid", "validation", "valset", "dev", "eval", "evaluation", "test", "testing", "testset")
"""Names of the folders of a split, in any case; of several for testing the first of this list that is there is used."""

CLASS_FOLDERS = "a folder with one sub-folder per class"


class Files(NamedTuple):
    """Pictures that are not read yet: labels (count,) int64; `classes[label]` is the name of the sub-folder; `skipped`
    lists files and folders that are not used, with the reason."""

    paths: tuple[Path | Member, ...]
    labels: Tensor
    classes: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()


class Layout(NamedTuple):
    """The folder to train on and the one to test on; None for one that is not there. `skipped` as in `Files`."""

    train: Path | None
    test: Path | None
    skipped: tuple[Skipped, ...] = ()


def listing(directory: str | os.PathLike, classes: Sequence[str] | None = None, labelled: bool = True) -> Files:
    """The pictures of a folder with one sub-folder per class; classes and files in sorted order.

    Files whose suffix is no picture's, hidden ones, and those that file managers leave (`__MACOSX`, `@eaDir`)
    are ignored. A sub-folder without a picture is no class. A link to a folder above or beside it is not followed.

    Args:
        classes: those of the training part, which keep their labels here; some may be missing.
        labelled: False where classes do not matter: then the pictures may lie in the folder itself, as the one class
            "pictures".

    Raises DataError: no such folder, no picture in sub-folders, a sub-folder that is none of `classes`, or sub-folders
    that look like a split into training and testing.
    """
    directory = Path(directory)
    names = subfolders(directory, CLASS_FOLDERS if labelled else "a folder of pictures")
    loose = _loose(directory)
    if classes is None:
        _check_no_split(directory, names)
    inside, skipped = _pictures_of(directory, names)
    if not labelled and len(loose) > sum(map(len, inside.values())):
        skipped += [(directory / name, "lies beside the pictures") for name in inside]
        return Files(loose, torch.zeros(len(loose), dtype=torch.int64), tuple(classes or ("pictures",)), tuple(skipped))
    if not inside and not names and labelled:
        raise DataError(f"{directory} has no sub-folders, expected one per class")
    if not inside:
        raise DataError(f"no picture in {'' if labelled else f'{directory} or '}the sub-folders of {directory}")
    skipped += [(path, "lies beside the class folders") for path in loose]
    own = [shown(name) for name in inside]
    classes = tuple(own if classes is None else classes)
    label_of = {name: label for label, name in enumerate(classes)}
    for name in own:
        if name not in label_of:
            raise DataError(f"{directory / name} is none of the {len(classes)} classes of the training part")
    counts = torch.tensor([len(paths) for paths in inside.values()])
    labels = torch.tensor([label_of[name] for name in own]).repeat_interleave(counts)  # (count,)
    return Files(tuple(itertools.chain.from_iterable(inside.values())), labels, classes, tuple(skipped))


def _pictures_of(directory: Path, names: Sequence[str]) -> tuple[dict[str, list[Path]], list[Skipped]]:
    """The pictures below each sub-folder that has any."""
    inside: dict[str, list[Path]] = {}
    skipped: list[Skipped] = []
    real = directory.resolve()
    above = {inode(path) for path in (real, *real.parents)}
    own = {name: inode(directory / name) for name in names}
    apart, visited = set(own.values()), set()
    for name in names:
        folder = directory / name
        if own[name] in above or own[name] in visited:
            skipped.append((folder, LINK))
            continue
        visited.add(own[name])
        below = files_below(folder, apart)
        skipped += below.skipped
        pictures = [path for path in below.paths if is_picture(path.name)]
        if not pictures:
            skipped.append((folder, "has no picture"))
            continue
        parts = {path.relative_to(folder).parts[0] for path in pictures if path.parent != folder}
        if _of(parts, TRAIN) and _of(parts, TEST):
            folders = _and(_of(parts, TRAIN) + _of(parts, TEST))
            hint = "name it if it is the data set, or put the classes into train and val"
            raise DataError(f"{folder} looks like a split, by its folders {folders}: {hint}")
        inside[name] = pictures
    return inside, skipped


def layout(directory: str | os.PathLike) -> Layout:
    """The parts of a folder: one of the names `TRAIN` and one of `TEST`, in any case; or the folder itself, undivided,
    as the one to train on.

    `train` is a class if its pictures lie in it directly, beside other classes and without a folder to test on.

    Raises DataError: no such folder; one to test on beside others that are none to train on.
    """
    directory = Path(directory)
    names = subfolders(directory, "a folder of pictures")
    trains, tests = _of(names, TRAIN), _of(names, TEST)
    others = [name for name in names if name not in (*trains, *tests)]
    if len(trains) > 1:
        raise DataError(f"{directory} has {_and(trains)}, expected one folder to train on")
    if tests and others and not trains:
        raise DataError(f"{directory} has {_and(tests)} beside {_and(others)}, which looks like a split without train")
    if not tests and not (trains and (not others or _has_classes(directory / trains[0]))):
        return Layout(directory, None)
    skipped = [(directory / name, "is no part of the split") for name in others]
    skipped += [(directory / name, f"is not used: {tests[0]} is for testing") for name in tests[1:]]
    train, test = (directory / part[0] if part else None for part in (trains, tests))
    return Layout(train, test, tuple(skipped))


def picture_paths(inputs: Iterable[str | os.PathLike]) -> tuple[tuple[Path, ...], tuple[Skipped, ...]]:
    """(pictures, skipped) that the arguments of a command name: files, folders (all pictures below, in sorted order),
    a .txt file with a name per line, or "-" for names on standard input.

    Raises DataError if there is none, or none of them exists.
    """
    inputs, paths, skipped = list(inputs), [], []
    for item in map(Path, inputs):
        if str(item) == "-":
            paths += [Path(line.rstrip("\n")) for line in sys.stdin if line.strip()]
        elif item.is_dir():
            below = files_below(item)
            skipped += below.skipped
            paths += [path for path in below.paths if is_picture(path.name)]
        elif item.suffix == ".txt" and item.is_file():
            paths += [Path(os.fsdecode(line.strip())) for line in item.read_bytes().splitlines() if line.strip()]
        else:
            paths.append(item)
    if not inputs:
        raise DataError("no picture is named; expected files, folders, a .txt file of names, or -")
    if not paths:
        raise DataError(f"no picture in {', '.join(map(str, inputs))}")
    if not any(path.exists() for path in paths):  # said before any weights are fetched for them
        raise DataError(f"{paths[0]} does not exist" + (f", nor does any of {len(paths)}" if paths[1:] else ""))
    return tuple(paths), tuple(skipped)


def same_names(files: Files) -> list[tuple[Path, ...]]:
    """Pictures in one folder that have one name but for the suffix (x.png, x.jpg): often the same picture twice."""
    groups: dict[str, list[Path]] = {}
    for path in files.paths:
        groups.setdefault(os.path.splitext(path)[0], []).append(path)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _loose(directory: Path) -> tuple[Path, ...]:
    """The pictures in a folder itself, sorted."""
    with os.scandir(directory) as entries:
        names = sorted(e.name for e in entries if is_picture(e.name) and not is_ignored(e.name) and not e.is_dir())
    return tuple(directory / name for name in names)


def is_flat(folder: Path) -> bool:
    """True if most of the pictures below a folder, and at least one, lie in the folder itself."""
    return _flat_share(folder) >= 0.5


def _has_classes(folder: Path) -> bool:
    """True if most of the pictures below a folder, and at least one, lie in sub-folders."""
    return 0 <= _flat_share(folder) < 0.5


def _flat_share(folder: Path) -> float:
    """The share of the pictures below a folder that lie in the folder itself; -1 if there are none."""
    below = [path for path in files_below(folder).paths if is_picture(path.name)]
    return sum(path.parent == folder for path in below) / len(below) if below else -1.0


def _check_no_split(directory: Path, names: Sequence[str]) -> None:
    """Refuse folders that are a split by names such as train2017 and val2017."""
    words = {name: re.split("[^a-z]+", name.lower()) for name in names}
    trains, tests = ([name for name in names if _of(words[name], known)] for known in (TRAIN, TEST))
    if not trains or not tests:
        return
    if set(names) == {*trains, *tests} or (_has_classes(directory / trains[0]) and _has_classes(directory / tests[0])):
        folders = _and(list(dict.fromkeys((*trains, *tests))))
        expected = "expected one folder per class, or train and val"
        raise DataError(f"{directory} looks like a split, by its folders {folders}: {expected}")


def _of(names: Iterable[str], known: tuple[str, ...]) -> list[str]:
    """The names that are known, in any case, in the order in which they are known."""
    return sorted((name for name in names if name.lower() in known), key=lambda name: (known.index(name.lower()), name))


def _and(names: Sequence[str]) -> str:
    names = [*names[:4], *([f"{len(names) - 4} more"] if len(names) > 4 else [])]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
