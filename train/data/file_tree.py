"""The files below a folder, without hidden ones and the leftovers of file managers, each folder once."""

import os
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

from train.data import DataError

LEFTOVERS = frozenset(
    name.lower() for name in ("__MACOSX", "@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "lost+found", "__pycache__")
) | {"system volume information", "thumbs.db", "desktop.ini"}
"""Names, in lower case, of what archives, network drives and file managers leave; never data."""

LINK = "is a link to a folder above or beside it"

Skipped = tuple[Path, str]
"""A file or folder that is not used, and the reason in a few words."""


class Below(NamedTuple):
    """paths: the files below a folder, sorted. skipped: folders that were not entered, with the reason."""

    paths: tuple[Path, ...]
    skipped: tuple[Skipped, ...]


def is_ignored(name: str) -> bool:
    """True for a name of a hidden file or folder, or of a left-over."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def files_below(folder: str | os.PathLike, apart: Container[tuple[int, int]] = ()) -> Below:
    """The files of a folder and of the folders in it, links followed, each folder read once.

    Args:
        apart: the `inode` of folders that no link may lead to, besides the folder itself and those above it.

    Raises DataError if it is no folder, or cannot be read.
    """
    folder, paths, skipped = Path(folder), [], []
    subfolders(folder)  # an error about the folder itself is one
    real = folder.resolve()
    above = {inode(path) for path in (real, *real.parents)}
    visited = set()

    def unreadable(error: OSError) -> None:
        skipped.append((Path(error.filename), f"cannot be read: {error.strerror}"))

    for current, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        entered = []
        for name in sorted(folders):
            path = os.path.join(current, name)
            if is_ignored(name):
                continue
            own = inode(path)
            if own in above or own in apart or own in visited:
                skipped.append((Path(path), LINK))
                continue
            visited.add(own)
            entered.append(name)
        folders[:] = entered
        paths += [os.path.join(current, name) for name in names if not is_ignored(name)]
    return Below(tuple(Path(path) for path in sorted(paths)), tuple(skipped))


def subfolders(folder: Path, expected: str = "a folder") -> list[str]:
    """The names of the folders in a folder, sorted, without ignored ones. Raises DataError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not is_ignored(entry.name))
    except FileNotFoundError:
        raise DataError(f"{folder} does not exist, expected {expected}") from None
    except NotADirectoryError:
        raise DataError(f"{folder} is a file, expected {expected}") from None
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}") from None


def inode(path: str | os.PathLike) -> tuple[int, int]:
    """Device and inode of a file or folder, or of the target of a link: equal for one and the same."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino
