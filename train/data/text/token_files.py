"""Token ids on disk, read by memory map: for text that is larger than memory or slow to tokenize.

The file is one line of JSON padded with spaces to 512 bytes, then the ids as little-endian uint16 or uint32.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from train.data import DataError
from train.data.text.files import CHUNK, decoded, whole_words
from train.files import replacing, shown

if TYPE_CHECKING:
    from train.data.text.tokenizers import Tokenizer

FORMAT, HEADER = "functree tokens 1", 512
END_OF_TEXT = "<|endoftext|>"


class TokenFile:
    """A sequence of token ids, memory-mapped. A slice is a TokenFile, a tensor of indices gives an int64 tensor.

    `tokenizer` is the fingerprint of the ids' tokenizer, `digest` their SHA-256 where the file records it.
    """

    def __init__(self, ids: np.ndarray, tokenizer: str = "", digest: str = ""):
        self.ids, self.tokenizer, self.digest = ids, tokenizer, digest

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: slice | Tensor) -> "TokenFile | Tensor":
        if isinstance(index, slice):
            return TokenFile(self.ids[index], self.tokenizer)
        return torch.from_numpy(self.ids[index.numpy(force=True)].astype(np.int64))


@dataclass(frozen=True)
class Blocks:
    """Blocks of `size` tokens at equal distances in a TokenFile as one sequence, without a copy: token i is
    `tokens[first + i // size * period + i % size]`."""

    tokens: TokenFile
    first: int
    size: int
    period: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        if isinstance(index, slice):
            index = torch.arange(*index.indices(self.count))
        return self.tokens[self.first + index // self.size * self.period + index % self.size]


def open_tokens(path: str | os.PathLike, tokenizer: "Tokenizer | None" = None) -> TokenFile:
    """Map a file that `write_tokens` wrote.

    Args:
        tokenizer: the one whose ids the file must hold; any if None.

    Raises DataError if the file is missing, foreign, truncated, or of another tokenizer.
    """
    path = Path(path)
    foreign = f"{path} is not a file of tokens"
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(HEADER))
        dtype, count, origin = np.dtype(header["dtype"]), int(header["count"]), header["tokenizer"]
        known = header["format"] == FORMAT and header["dtype"] in ("uint16", "uint32")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{foreign}: it does not begin with our header") from None
    if not known:
        raise DataError(f"{foreign}: its header says {header['format']!r} of {dtype}, expected {FORMAT!r}")
    size, expected = path.stat().st_size, HEADER + count * dtype.itemsize
    if size != expected:
        raise DataError(f"{path} has {size} bytes, expected {expected} for {count} tokens: it is truncated or garbled")
    if tokenizer is not None and tokenizer.fingerprint != origin:
        difference = f"{origin[:12]}, expected {tokenizer.fingerprint[:12]}"
        raise DataError(f"{path} was made with another tokenizer ({difference})")
    little = dtype.newbyteorder("<")
    ids = np.memmap(path, little, "r", HEADER, (count,)) if count else np.empty(0, little)
    return TokenFile(ids, origin, header.get("digest", ""))


def write_tokens(path: str | os.PathLike, chunks: Iterable[list[int]], tokenizer: "Tokenizer") -> TokenFile:
    """Write the ids that `chunks` yields; atomic. uint16 where the vocabulary allows it."""
    dtype = np.dtype("<u2" if tokenizer.vocabulary_size <= 2**16 else "<u4")
    count, digest = 0, hashlib.sha256()
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(b" " * HEADER)
            for chunk in chunks:
                ids = np.asarray(chunk, dtype)
                ids.tofile(file)
                digest.update(ids.tobytes())
                count += len(ids)
            header = {"format": FORMAT, "dtype": dtype.name, "count": count, "tokenizer": tokenizer.fingerprint}
            header["digest"] = digest.hexdigest()
            file.seek(0)
            file.write(json.dumps(header).encode().ljust(HEADER - 1) + b"\n")
    return open_tokens(path)


def tokenize_to_file(
    text_path: str | os.PathLike | Sequence[Path],
    tokenizer: "Tokenizer",
    path: str | os.PathLike,
    chunk_bytes: int = CHUNK,
    progress: bool = True,
) -> TokenFile:
    """Tokenize a UTF-8 file of any size, plain or gzipped, into a token file, a chunk at a time.

    Chunks end where a word ends (`whole_words`), so that byte-pair tokenizers whose tokens do not cross it
    (GPT-2's, and all that `train_byte_pairs` makes) give the ids they give for the whole text.

    Args:
        text_path: one file, or several, which are joined as `open_text` joins the files of a folder.

    Raises DataError as `read_text` and `open_tokens` do.
    """
    from rich.progress import Progress

    paths = [Path(text_path)] if isinstance(text_path, (str, os.PathLike)) else list(text_path)
    between = separator(tokenizer)
    with Progress(disable=not progress, transient=True) as bar:
        sizes = [path.stat().st_size for path in paths if path.is_file()]
        task = bar.add_task(f"tokenizing {shown(paths[0].name)}", total=sum(sizes))

        def chunks() -> Iterator[list[int]]:
            count = 0
            for number, path in enumerate(paths):
                if number:
                    yield tokenizer.encode(between)
                for text in whole_words(decoded(path, chunk_bytes)):
                    ids = tokenizer.encode(text)
                    count += len(ids)
                    yield ids
                    bar.advance(task, len(text.encode()))
            if not count:
                raise DataError(f"{paths[0]} is empty, expected at least 1 character")

        return write_tokens(path, chunks(), tokenizer)


def separator(tokenizer: "Tokenizer") -> str:
    """The text between two files of a folder: the end-of-text token, or a blank line if the tokenizer has none."""
    token_id = getattr(tokenizer, "token_id", lambda token: None)
    return "\n\n" if token_id(END_OF_TEXT) is None else END_OF_TEXT


def tokens_of(
    path: str | os.PathLike | None, tokenizer: "Tokenizer | None", cache: str | os.PathLike
) -> "tuple[Tensor | TokenFile, Tokenizer]":
    """The tokens and the tokenizer of `text.open_text`, with its arguments and errors."""
    from train.data.text.text import open_text

    return open_text(path, tokenizer, cache)[:2]
