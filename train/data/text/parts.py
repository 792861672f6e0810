"""Parts of a data set: the files that hold them, and what is held out in groups where there is no file."""

import re
from collections.abc import Hashable, Sequence
from pathlib import Path

from train.data import DataError
from train.files import shown

VALIDATIONS = ("dev", "valid", "val", "validation", "testa")
"""Words in the names of validation files; testa is CoNLL-2003's."""
TESTS = ("test", "testb")
HELD = 10
"""Where there are no files for validation and testing, each gets one of ten records or groups in a row."""


def has(name: str, part: str) -> bool:
    """True if a file's name has this word: "train" is in "a.train.txt" and "a17train", not in "training"."""
    return re.search(rf"(?<![a-zA-Z]){part}(?![a-zA-Z])", name) is not None


def training_file(path: Path) -> Path:
    """A file itself, or the one of a folder with "train" in its name. Raises DataError if there is none, or several."""
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.is_file() and has(file.name, "train"))
    if len(files) == 1:
        return files[0]
    names = f": {', '.join(shown(file.name) for file in files)}" if files else ""
    raise DataError(f"{path} has {len(files)} files with 'train' in their names{names}; expected one, or name a file")


def neighbour(path: Path, names: tuple[str, ...]) -> Path | None:
    """The file of another part beside a training file: train.tsv -> dev.tsv, a.train -> a.dev."""
    if not has(path.name, "train"):
        return None
    others = (path.with_name(re.sub(r"(?<![a-zA-Z])train(?![a-zA-Z])", name, path.name)) for name in names)
    return next((other for other in others if other.is_file()), None)


def files_of(data: str, validation: str | None = None, test: str | None = None) -> dict[str, Path]:
    """The files of train and, where there are any, validation and test.

    These are the ones named; else, in a folder, those with "dev", "valid", "val", "validation" or "testa", and "test"
    or "testb" in their names, or beside a single file those of its name with such a word for "train".

    Raises DataError: a folder without a training file, or with several files of one part.
    """
    path, out = Path(data), {"train": training_file(Path(data))}
    for part, other, names in (("validation", validation, VALIDATIONS), ("test", test, TESTS)):
        files = []
        if other is not None:
            files = [Path(other)]
        elif path.is_dir():
            files = sorted(f for f in path.iterdir() if f.is_file() and any(has(f.name, name) for name in names))
        elif other_file := neighbour(path, names):
            files = [other_file]
        if len(files) > 1:
            listed = ", ".join(shown(file.name) for file in files)
            raise DataError(f"{path} has {len(files)} files for {part}: {listed}; name one with --{part}")
        if files:
            out[part] = files[0]
    return out


def held_out(groups: Sequence[Hashable], parts: Sequence[str]) -> dict[str, list[int]]:
    """{part: indices of its records}, "train" among them: whole groups, one of ten in a row for each of the others.

    Of fewer than ten groups each part gets one.

    Raises DataError if there is no group for each part.
    """
    numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    row = min(HELD, len(numbers))
    if row <= len(parts):
        raise DataError(f"there are {len(numbers)} groups of records; expected one each for train, {', '.join(parts)}")
    names = ["train"] * (row - len(parts)) + list(parts)
    out: dict[str, list[int]] = {name: [] for name in ("train", *parts)}
    for i, group in enumerate(groups):
        out[names[numbers[group] % row]].append(i)
    return out
