"""Pictures inside tars, which stay packed: an index says at which byte of which tar each picture begins.

    write_index("imagenet")                  # imagenet/train/*.tar, imagenet/val/*.tar -> imagenet/index.jsonl
    train, test, origins = listings("imagenet")  # Files, as those of class folders

As pictures are read by their offsets, any of them can be in any batch: the order is that of `batching.epoch_batch`, and
there is no buffer that only shuffles neighbours. The class of a picture is, in this order, what a table of labels says,
the text of `NAME.cls` beside it in the tar (as WebDataset has it), its folder in the tar, or the name of its tar. A tar
inside a tar is read where it lies, so the two files of ILSVRC 2012 may stay as they were published.

The index is JSON Lines: a line with the format, the tars (name, part, size, time of change), the classes and what was
skipped; then a line per picture: number of the tar, offset, size, checksum of its header, number of the class, name.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from train.data import DataError
from train.data.file_tree import Skipped, is_ignored
from train.data.images.folders import TEST, TRAIN, Files
from train.data.images.picture import Member, is_picture
from train.files import replacing, shown

INDEX = "index.jsonl"
FORMAT = "functree shards 1"
BLOCK = 512
"""Bytes of a header, and of the units that a tar is made of."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MAKE = "make it with: python experiments/imagenet.py index"


class Entry(NamedTuple):
    """A file in a tar: its bytes, the checksum of its header, and its name, that of a tar around it included."""

    offset: int
    size: int
    checksum: int
    name: str
    text: str | None = None
    """The content of a file .cls; None for a picture."""


def tars_of(folder: Path) -> list[str]:
    """The names of the tars in a folder and in the folders in it, relative to it, sorted."""
    names = [path.relative_to(folder).as_posix() for pattern in ("*.tar", "*/*.tar") for path in folder.glob(pattern)]
    return sorted(name for name in names if not any(map(is_ignored, PurePosixPath(name).parts)))


def read_labels(path: Path) -> dict[str, str]:
    """{name of a picture without suffix: class} of a file with both on each line, parted by spaces, a tab or a comma.

    What follows is ignored, and a first line that says ImageId: ILSVRC's `LOC_val_solution.csv` has this form.

    Raises DataError: the file cannot be read, or a line has one word.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--labels-from {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    table = {}
    for number, line in enumerate(lines, 1):
        words = [word for word in re.split(r"[\s,]+", line.strip()) if word]
        if len(words) == 1:
            raise DataError(f"{path}, line {number} is '{shown(line)}'; expected the name of a picture and its class")
        if words and words[0] != "ImageId":
            table[_key(words[0])] = words[1]
    return table


def write_index(folder: str | os.PathLike, labels: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Read the headers of all tars of a folder and write its `index.jsonl`; the first line of that is returned.

    A tar belongs to the part that its folder names, or a word of its own name: train, val and the others of
    `folders.TRAIN` and `TEST`. Of a truncated tar the whole pictures are used; this, and every picture without a class,
    goes to "skipped".

    Args:
        labels: {name of a picture without suffix: class}, which goes before all else.

    Raises DataError: no such folder, no tar in it, a compressed tar, no picture in any.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}, expected a folder of tars")
    names, skipped = tars_of(folder), []
    if not names:
        raise DataError(f"{folder} has no file NAME.tar, nor has a folder in it")
    shards, rows = [], []
    for number, name in enumerate(names):
        stat = os.stat(folder / name)
        entries, count = _entries(folder, name, skipped), len(rows)
        for entry, label in _labelled(name, entries, labels or {}, skipped):
            rows.append((number, *entry[:3], label, entry.name))
        if len(rows) == count:
            skipped.append((name, "has no picture"))
        shards.append({"name": name, "part": _part_of(name), "bytes": stat.st_size, "time": stat.st_mtime_ns})
    if not rows:
        raise DataError(f"no picture in the {len(names)} tars of {folder}; {skipped[0][0]} {skipped[0][1]}")
    classes = sorted({label for *_, label, _ in rows})
    number_of = {label: i for i, label in enumerate(classes)}
    head = {"format": FORMAT, "pictures": len(rows), "classes": classes, "skipped": skipped, "shards": shards}
    with replacing(folder / INDEX) as path, open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(head) + "\n")
        for shard, offset, size, checksum, label, name in rows:
            file.write(json.dumps([shard, offset, size, checksum, number_of[label], name]) + "\n")
    return head


def _part_of(name: str) -> str:
    """ "train", "test", or "" where neither the folder of a tar nor a word of its name says it."""
    *folders, own = name.lower().split("/")
    for words in (folders, re.split("[^a-z]+", own)):
        for part, known in (("train", TRAIN), ("test", TEST)):
            if any(word in known for word in words):
                return part
    return ""


def _key(name: str) -> str:
    """The name of a picture without its folder and all suffixes: what belongs together in a tar has one."""
    return PurePosixPath(name).name.partition(".")[0]


def _entries(folder: Path, name: str, skipped: list[tuple[str, str]]) -> list[Entry]:
    """The pictures and labels in a tar, in order."""
    path = folder / name
    with open(path, "rb") as file:
        start = file.read(6)
        kind = next((kind for mark, kind in COMPRESSED.items() if start.startswith(mark)), None)
        if kind:
            raise DataError(f"{path} is compressed by {kind}; expected a plain tar, which can be read from any byte on")
        return list(_walk(file, 0, os.path.getsize(path), name, "", skipped))


def _walk(file: Any, start: int, end: int, tar: str, prefix: str, skipped: list[tuple[str, str]]) -> Iterator[Entry]:
    """The entries of the tar that lies in the bytes from `start` to `end` of a file, those of tars inside it too."""
    file.seek(start)
    count, problem, inner = 0, "", []
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for item in archive:
                name, stop = prefix + item.name, item.offset_data + item.size
                if stop > end:
                    raise tarfile.ReadError(f"{shown(name)} is cut off")
                if not item.isreg() or is_ignored(PurePosixPath(name).name):
                    if item.issym() or item.islnk():
                        skipped.append((f"{tar}/{name}", "is a link"))
                    continue
                count += 1
                if name.endswith(".tar"):
                    inner.append((item.offset_data, stop, f"{name}/"))
                elif name.endswith(".cls"):
                    text = archive.extractfile(item).read().decode("utf-8", "replace").strip()
                    yield Entry(item.offset_data, item.size, item.chksum, name, text)
                elif is_picture(PurePosixPath(name).name):
                    yield Entry(item.offset_data, item.size, item.chksum, name)
            file.seek(archive.offset)
            mark = file.read(BLOCK)
            if mark.strip(b"\0"):
                problem = f"has no header at byte {archive.offset}"
            elif len(mark) < BLOCK:
                problem = "has no end mark"
            for place in inner:  # after the headers around them, as both move in the one file
                yield from _walk(file, *place[:2], tar, place[2], skipped)
    except (tarfile.TarError, EOFError, OSError) as error:
        problem = str(error) or "is unreadable"
    if problem:
        skipped.append((f"{tar}/{prefix}".rstrip("/"), f"is truncated or damaged after {count:,} files: {problem}"))


def _labelled(
    tar: str, entries: list[Entry], labels: Mapping[str, str], skipped: list[tuple[str, str]]
) -> Iterator[tuple[Entry, str]]:
    """(picture, its class) of the entries of a tar."""

    def place(entry: Entry) -> tuple[str, str]:
        return entry.name.rpartition("/")[0], _key(entry.name)

    beside = {place(entry): entry.text for entry in entries if entry.text is not None}
    for entry in (entry for entry in entries if entry.text is None):
        if _key(entry.name) in labels:
            yield entry, labels[_key(entry.name)]
        elif not beside:
            yield entry, PurePosixPath(f"{tar}/{entry.name}").parent.name.removesuffix(".tar")
        elif beside.get(place(entry)):
            yield entry, beside[place(entry)]
        else:
            skipped.append((f"{tar}/{entry.name}", "has no class beside it in a file .cls, as others have"))


class Shards(NamedTuple):
    """The pictures to train on and to test on, None for a part without a tar. Tars that name no part are to train on if
    there is no other; `skipped` lists what is not used, with the reason."""

    train: Files | None
    test: Files | None
    skipped: tuple[Skipped, ...]


def listings(folder: str | os.PathLike) -> Shards:
    """The pictures in the tars of a folder, by its index; both parts have the classes of the one to train on.

    Raises DataError: no index, one of another form, a tar that is not there or is not the one that was indexed, a
    class that only the part to test on has.
    """
    folder = Path(folder)
    head, rows = _read_index(folder)
    members: list[list[list]] = [[] for _ in head["shards"]]
    for row in rows:
        members[row[0]].append(row)
    parts: dict[str, list[list]] = {}
    for shard, own in zip(head["shards"], members, strict=True):
        _check_unchanged(folder, shard, own)
        parts.setdefault(shard["part"], []).extend(own)
    skipped = [(folder / name, reason) for name, reason in head["skipped"]]
    undivided = parts.pop("", [])
    if undivided and parts:
        names = [shard["name"] for shard in head["shards"] if not shard["part"]]
        skipped += [(folder / name, "is no part of the split") for name in names]
    elif undivided:
        parts["train"] = undivided
    tars = [str(folder / shard["name"]) for shard in head["shards"]]
    train, test = ([row for row in parts.get(part, ())] for part in ("train", "test"))
    numbers = sorted({row[4] for row in train or test})
    classes = tuple(head["classes"][number] for number in numbers)
    label_of = {number: label for label, number in enumerate(numbers)}

    def files(rows: list[list]) -> Files:
        paths = tuple(Member(tars[row[0]], row[1], row[2], row[5]) for row in rows)
        for path, row in zip(paths, rows, strict=True):
            if row[4] not in label_of:
                name = head["classes"][row[4]]
                raise DataError(f"{path} is of the class {name}, none of the {len(classes)} of the training part")
        return Files(paths, torch.tensor([label_of[row[4]] for row in rows]), classes)

    return Shards(files(train) if train else None, files(test) if test else None, tuple(skipped))


def _read_index(folder: Path) -> tuple[dict[str, Any], list[list]]:
    """(first line, the others) of an index."""
    path = folder / INDEX
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        head, rows = json.loads(lines[0]), [json.loads(line) for line in lines[1:]]
        if head["format"] != FORMAT or len(rows) != head["pictures"] or any(len(row) != 6 for row in rows):
            raise ValueError("it is cut off, or of another format")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} is no index of tars ({reason}); {MAKE} {folder}") from None
    return head, rows


def _check_unchanged(folder: Path, shard: Mapping[str, Any], rows: list[list]) -> None:
    """Raise DataError unless a tar is the one that was indexed: by size and time, or by size and all headers."""
    path = folder / shard["name"]
    try:
        stat = os.stat(path)
        if (stat.st_size, stat.st_mtime_ns) == (shard["bytes"], shard["time"]):
            return
        with open(path, "rb") as file:  # a copy has a time of its own
            same = stat.st_size == shard["bytes"] and all(_checksum(file, row[1]) == row[3] for row in rows)
    except OSError as error:
        raise DataError(f"cannot read {path}, which {folder / INDEX} names: {error.strerror or error}") from None
    if not same:
        raise DataError(f"{path} has changed since {folder / INDEX} was made; {MAKE} {folder}")


def _checksum(file: Any, offset: int) -> int:
    """The checksum in the header before the file that begins at `offset`; -1 if there is none."""
    file.seek(offset - BLOCK)
    digits = file.read(BLOCK)[148:156].strip(b" \0")
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else -1
