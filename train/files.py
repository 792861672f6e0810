"""Files that are either whole or absent, JSON that any reader accepts, and file names that any terminal accepts.

Worker processes import this, so it does without torch.
"""

import dataclasses
import json
import math
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def shown(name: str | os.PathLike) -> str:
    """A file name, or any text, as it can be printed, logged and written on one line.

    Bytes of a file name that are no UTF-8 become `\\xff`, line feeds and other control characters `\\n`, `\\x1b`.
    """
    text = os.fspath(name)
    if text.isprintable():
        return text
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte that the file system's encoding could not decode (PEP 383)
        return f"\\x{ord(character) - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return character.encode("unicode_escape").decode()
    return character


def distinct_stems(paths: Iterable[str | os.PathLike]) -> list[str]:
    """A name for each file's result, none twice: the stems of the paths, numbered from the second use on.

    a/x.png, b/x.jpg, y.png -> x, x_2, y. Case does not tell two names apart, as on some file systems it does not.
    """
    names, taken = [], set()
    for path in map(Path, paths):
        name, number = path.stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{path.stem}_{number}"
        taken.add(name.lower())
        names.append(name)
    return names


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Let an OSError that does not say which file it is about (a write to a full disk does not) name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name `path` when the block ends, and vanishes if it raises.

    Whoever looks at `path` sees the old file or the new one, never half of one. An OSError about the temporary file
    names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # The prefix is short, so that a long name stays within the file system's limit.
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files that only their owner can read; give this one the permissions of a new file.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or str(error.filename) not in ("None", name):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """`value` as plain JSON types.

    Dataclasses and NamedTuples become dicts, tuples lists, paths and dtypes strings, numpy and torch scalars numbers.
    JSON has no non-finite numbers, so these become the strings "NaN", "Infinity" and "-Infinity", which `float()` reads
    back. Raises TypeError naming the type of anything else.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if hasattr(value, "tolist") and not isinstance(value, type):  # arrays and scalars of numpy and torch
        return plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [plain(item) for item in items]
    if isinstance(value, os.PathLike) or type(value).__module__ == "torch":  # torch.dtype and torch.device
        return str(value)
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `plain(value)` as a JSON file, atomically."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        # A file name that is no UTF-8 holds lone surrogates; `\udcff` is JSON's own escape for one, which loads back.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file. Raises ValueError with one line for a missing or garbled one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {shown(path)}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{shown(path)} is not valid JSON: {error}") from None
