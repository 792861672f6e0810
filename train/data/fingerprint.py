"""The identity of data: a hash of its content, the same wherever the data lies."""

import dataclasses
import gzip
import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.data import DataError
from train.data.file_tree import files_below
from train.data.images.picture import Member
from train.data.text.token_files import TokenFile

WHOLE = 1 << 30
"""Bytes up to which the files of a listing are read whole."""
SAMPLED = 4096
"""Files of a larger listing that are read, at equal distances in it."""


def fingerprint(*data: Any) -> str:
    """A hash of data, 32 hexadecimal digits: equal for equal content, in every process and at every place.

    - Tensors and arrays: dtype, shape and bytes, all of them.
    - Token files: the hash that their header records. Tokenizers: their own fingerprint.
    - A `Path`: the bytes of the file, unpacked if it is gzipped, or of the files below the folder with their names in
      it. Names above that do not count, nor does the name of a single file.
    - Several paths or members of tars, as a listing of pictures has them: the bytes of all, in order. Above 1 GiB:
      their names below the folder they share, their sizes, and the bytes of 4096 of them.
    - Numbers, strings, None by value; sequences, mappings, NamedTuples and dataclasses (pairs of sentences, images with
      labels) piece by piece, without fields called `name` or `skipped`.

    Raises DataError if a file cannot be read; TypeError for anything else.
    """
    total = hashlib.sha256()
    for value in data:
        _add(total, value)
    return total.hexdigest()[:32]


def _add(total: Any, value: Any) -> None:
    """Hash a value, after a mark of its kind and length, so that no two structures give the same bytes."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy lacks some of torch's dtypes
        _add(total, ("array", str(value.dtype).removeprefix("torch."), tuple(value.shape)))
        total.update(content.numpy().data)
    elif isinstance(value, np.ndarray):
        content = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
        _add(total, ("array", value.dtype.name, value.shape))
        total.update(content.data)
    elif isinstance(value, TokenFile):
        content = value.digest or hashlib.sha256(np.ascontiguousarray(value.ids).data).hexdigest()
        _add(total, ("tokens", len(value), content, value.tokenizer))
    elif isinstance(value, Path):
        total.update(_content(value))
    elif value is None or isinstance(value, (bool, int, float, np.generic)):
        total.update(f"{type(value).__name__} {value!r};".encode())
    elif isinstance(value, (str, bytes)):
        content = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        total.update(f"{type(value).__name__} {len(content)};".encode() + content)
    elif isinstance(value, Mapping):
        _add(total, "mapping")
        _add(total, sorted(value.items(), key=lambda item: str(item[0])))
    elif isinstance(getattr(value, "fingerprint", None), str):  # a tokenizer
        _add(total, ("fingerprint", value.fingerprint))
    elif dataclasses.is_dataclass(value) or hasattr(value, "_asdict"):
        _add(total, {name: item for name, item in _fields(value).items() if name not in ("name", "skipped")})
    elif isinstance(value, Sequence):
        total.update(f"sequence {len(value)};".encode())
        if value and all(isinstance(item, (Path, Member)) for item in value):
            _add_listing(total, value)
        else:
            for item in value:
                _add(total, item)
    else:
        raise TypeError(f"no fingerprint of a {type(value).__name__}; expected arrays, paths, numbers or text")


def _fields(value: Any) -> dict[str, Any]:
    if hasattr(value, "_asdict"):
        return value._asdict()
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _add_listing(total: Any, paths: Sequence[Path | Member]) -> None:
    try:
        sizes = [_size(path) for path in paths]
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
    if sum(sizes) <= WHOLE:
        sample = list(paths)
    else:
        shared = os.path.commonpath([path.parent for path in paths])
        for path, size in zip(paths, sizes, strict=True):
            total.update(f"{os.path.relpath(path, shared)!a} {size};".encode())
        sample = paths[:: max(1, len(paths) // SAMPLED)]
    with ThreadPoolExecutor(8) as pool:  # hashing and reading release Python's lock
        for digest in pool.map(_content, sample):
            total.update(digest)


def _size(path: Path | Member) -> int:
    if isinstance(path, Member):
        return path.size
    return os.stat(path).st_size if os.path.exists(path) else -1


def _content(path: Path | Member) -> bytes:
    """SHA-256 of a file's bytes, unpacked if it is gzipped, of those of a member of a tar, or of a folder's files and
    their names; zeros for a link to nothing."""
    if isinstance(path, Member):
        try:
            return hashlib.sha256(path.read()).digest()
        except (OSError, EOFError) as error:
            raise DataError(f"cannot read {path}: {error}") from None
    if path.is_dir():
        total = hashlib.sha256()
        for file in files_below(path).paths:
            _add(total, str(file.relative_to(path)))
            total.update(_content(file))
        return total.digest()
    if path.is_symlink() and not path.exists():
        return bytes(32)
    try:
        with open(path, "rb") as file:
            if file.peek(2)[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=file) as inner:
                    return hashlib.file_digest(inner, "sha256").digest()
            return hashlib.file_digest(file, "sha256").digest()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist, expected a file to read") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or garbled: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
