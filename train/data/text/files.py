"""Text files: UTF-8, plain or gzipped, read whole or in pieces; folders of them; streams, which can be read once."""

import codecs
import contextlib
import gzip
import hashlib
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from train.data import DataError
from train.data.file_tree import Skipped, files_below
from train.files import shown

GZIP = b"\x1f\x8b"
PACKED = "expected plain or gzipped text: unpack it first"
UTF16 = "UTF-16 text, expected UTF-8: convert it first (iconv -f utf-16 -t utf-8)"
FOREIGN = {
    rb"PK\x03\x04": f"a zip archive, {PACKED}",
    rb"BZh[1-9]1AY": f"packed by bzip2, {PACKED}",
    rb"\xfd7zXZ": f"packed by xz, {PACKED}",
    rb"\x28\xb5\x2f\xfd": f"packed by zstd, {PACKED}",
    rb"\xff\xfe|\xfe\xff": UTF16,
}
"""Patterns of the first bytes of files that hold text in some other form, with the ends of their error messages."""

CHUNK = 1 << 20  # bytes
LONGEST = 1 << 20
"""Characters without a word's end, after which `whole_words` cuts anywhere."""

WORD_END = re.compile(r"(?<=[^\W_])(?=\s)|(?<=\S)(?= )")
MARK = re.compile(r"(?<=[^\W\d_])(?=[.,;:!?。，、；：！？…—·「」『』（）《》〈〉【】])")


@contextlib.contextmanager
def unpacked(path: str | os.PathLike, expected: str = "a text file") -> Iterator[BinaryIO]:
    """The bytes of a file or stream, decompressed if it is gzipped (which its first bytes say, not its name).

    Raises DataError: not there, a folder, damaged, packed or encoded in some other way.
    """
    try:
        with open(path, "rb") as file:
            start = file.peek(8)[:8]
            for pattern, problem in FOREIGN.items():
                if re.match(pattern, start):
                    raise DataError(f"{path} is {problem}")
            if not start.startswith(GZIP):
                yield file
                return
            with gzip.GzipFile(fileobj=file) as inner:
                yield inner
    except FileNotFoundError:
        raise DataError(f"{path} does not exist, expected {expected}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, expected {expected}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or garbled: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def decoded(path: str | os.PathLike, chunk_bytes: int = CHUNK) -> Iterator[str]:
    """The text of a file in chunks: line ends untouched, a byte order mark dropped.

    Raises DataError as `unpacked` does, or if it is not UTF-8 (with the offset of the first such byte).
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with unpacked(path) as file:
        consumed, content = 0, file.read(max(chunk_bytes, len(codecs.BOM_UTF8)))
        if content.startswith(codecs.BOM_UTF8):
            consumed, content = len(codecs.BOM_UTF8), content[len(codecs.BOM_UTF8) :]
            content = content or file.read(chunk_bytes)
        while True:
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                offset, bad = consumed - waiting + error.start, error.object[error.start]
                raise DataError(f"{path} is not UTF-8 text: byte 0x{bad:02x} at offset {offset}") from None
            if text:
                yield text
            if not content:
                return
            consumed += len(content)
            content = file.read(chunk_bytes)


def read_text(path: str | os.PathLike, minimum: int = 1) -> str:
    """A UTF-8 file, plain or gzipped, as it is (line ends untouched, a byte order mark dropped).

    Raises DataError as `decoded` does, or for fewer than `minimum` characters.
    """
    text = "".join(decoded(path))
    if len(text) < minimum:
        problem = f"has {len(text)} characters" if text else "is empty"
        raise DataError(f"{path} {problem}, expected at least {minimum}")
    return text


def decoded_lines(content: bytes) -> tuple[list[str], int]:
    """The lines of a file, and the number of those that are no UTF-8, read as Latin-1."""
    lines, foreign = [], 0
    for line in byte_lines(content):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            foreign += 1
            lines.append(line.decode("latin-1"))
    return lines, foreign


def byte_lines(content: bytes) -> list[bytes]:
    """The lines of a file, without their ends: line feeds, with or without carriage returns, or these alone.

    A byte order mark is dropped, and so is a last line that is empty.
    """
    content = content.removeprefix(b"\xef\xbb\xbf")
    lines = content.split(b"\n" if b"\n" in content else b"\r")
    lines = [line.removesuffix(b"\r") for line in lines]
    return lines if lines[-1] else lines[:-1]


def lines_of(texts: Sequence[str], path: str | os.PathLike | None) -> Iterator[str]:
    """The texts; without any the lines of a file, or of standard input as they come, without their ends and without a
    byte order mark.

    Lines of a file that are no UTF-8 are read as Latin-1; elsewhere, bytes that are none become U+FFFD. Raises
    ValueError: there are texts and a file; DataError: the file cannot be read.
    """
    if texts and path is not None:
        raise ValueError("there are texts and a --file; expected one of them")
    if texts:
        for text in texts:
            yield text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    elif path is not None:
        with unpacked(path) as file:
            yield from decoded_lines(file.read())[0]
    else:
        for line in sys.stdin.buffer:
            yield line.decode("utf-8", "replace").rstrip("\r\n").removeprefix("\ufeff")


class Survey(NamedTuple):
    """The text files of a path: `paths` in order, `skipped` files with the reason, the number of
    characters, and the SHA-256 of their text."""

    paths: tuple[Path, ...]
    skipped: tuple[Skipped, ...]
    characters: int
    digest: str


def survey(path: str | os.PathLike) -> Survey:
    """Read a text file, or all text files below a folder in sorted order, once, to count and identify them.

    In a folder a file that is not UTF-8 text, or that is empty or has NUL bytes, is skipped.

    Raises DataError: the path is no such file; a folder without one.
    """
    path = Path(path)
    total, characters, used = hashlib.sha256(), 0, []
    below = files_below(path) if path.is_dir() else None
    skipped = list(below.skipped) if below else []
    for file in below.paths if below else (path,):
        try:
            count, digest = _measure(file, folder=below is not None)
        except DataError as error:
            if below is None:
                raise
            skipped.append((file, str(error).removeprefix(f"{shown(file)} ")))
            continue
        used.append(file)
        characters += count
        total.update(digest)
    if not used:
        reason = f" ({skipped[0][0]} {skipped[0][1]})" if skipped else ""
        raise DataError(f"there is no text file in {path}{reason}")
    return Survey(tuple(used), tuple(skipped), characters, total.hexdigest())


def _measure(path: Path, folder: bool) -> tuple[int, bytes]:
    """(characters, SHA-256 of the text)."""
    count, digest = 0, hashlib.sha256()
    for chunk in decoded(path):
        if folder and "\0" in chunk:
            raise DataError(f"{path} has NUL bytes, expected text")
        count += len(chunk)
        digest.update(chunk.encode())
    if not count:
        raise DataError(f"{path} is empty, expected at least 1 character")
    return count, digest.digest()


def whole_words(chunks: Iterable[str], longest: int = LONGEST) -> Iterator[str]:
    """The same text in pieces that end where a word ends: before white space, or, in text that has none, before a
    punctuation mark; in text with neither, after `longest` characters. Takes time linear in the text."""
    waiting: list[str] = []
    length = 0
    for chunk in chunks:
        last = waiting[-1][-1] if waiting else ""
        cut = _last_word_end(last + chunk) - len(last)
        if cut >= 0:
            yield "".join(waiting) + chunk[:cut]
            waiting, length = ([chunk[cut:]] if cut < len(chunk) else []), len(chunk) - cut
            continue
        waiting.append(chunk)
        length += len(chunk)
        if length >= longest:
            yield "".join(waiting)
            waiting, length = [], 0
    if waiting:
        yield "".join(waiting)


def _last_word_end(text: str) -> int:
    """The last position between two characters where a word ends; -1 if there is none.

    Tokens of the byte-pair tokenizers in use (GPT-2's, GPT-4's, Llama 3's) do not cross it.
    """
    for pattern in (WORD_END, MARK):
        for first in dict.fromkeys([max(0, len(text) - 4096), 0]):  # mostly the end will do
            ends = [match.start() for match in pattern.finditer(text, first)]
            if ends:
                return ends[-1]
    return -1
