"""Token ids on disk, read by memory map: for text that is larger than memory or slow to tokenize.

The file is one line of JSON padded with spaces to 512 bytes, then the ids as little-endian uint16 or uint32.
"""

import codecs
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from train.data import DataError
from train.files import replacing

if TYPE_CHECKING:
    from train.data.text.tokenizers import Tokenizer

FORMAT, HEADER = "functree tokens 1", 512


class TokenFile:
    """A sequence of token ids, memory-mapped. A slice is a TokenFile, a tensor of indices gives an int64 tensor.

    `tokenizer` is the fingerprint of the tokenizer that made the ids.
    """

    def __init__(self, ids: np.ndarray, tokenizer: str = ""):
        self.ids, self.tokenizer = ids, tokenizer

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: slice | Tensor) -> "TokenFile | Tensor":
        if isinstance(index, slice):
            return TokenFile(self.ids[index], self.tokenizer)
        return torch.from_numpy(self.ids[index.numpy(force=True)].astype(np.int64))


def open_tokens(path: str | os.PathLike, tokenizer: "Tokenizer | None" = None) -> TokenFile:
    """Map a file that `write_tokens` made.

    Args:
        tokenizer: if given, the one whose ids the file must hold.

    Raises DataError if the file is missing, foreign, truncated, or made with another tokenizer.
    """
    path = Path(path)
    foreign = f"{path} is not a file of tokens"
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(HEADER))
        dtype, count, maker = np.dtype(header["dtype"]), int(header["count"]), header["tokenizer"]
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
    if tokenizer is not None and tokenizer.fingerprint != maker:
        raise DataError(f"{path} was made with another tokenizer ({maker[:12]}, expected {tokenizer.fingerprint[:12]})")
    little = dtype.newbyteorder("<")
    ids = np.memmap(path, little, "r", HEADER, (count,)) if count else np.empty(0, little)
    return TokenFile(ids, maker)


def write_tokens(path: str | os.PathLike, chunks: Iterator[list[int]], tokenizer: "Tokenizer") -> TokenFile:
    """Write the ids that `chunks` yields; atomic. uint16 where the vocabulary allows it."""
    dtype = np.dtype("<u2" if tokenizer.vocabulary_size <= 2**16 else "<u4")
    count = 0
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(b" " * HEADER)
            for chunk in chunks:
                np.asarray(chunk, dtype).tofile(file)
                count += len(chunk)
            header = {"format": FORMAT, "dtype": dtype.name, "count": count, "tokenizer": tokenizer.fingerprint}
            file.seek(0)
            file.write(json.dumps(header).encode().ljust(HEADER - 1) + b"\n")
    return open_tokens(path)


def tokenize_to_file(
    text_path: str | os.PathLike,
    tokenizer: "Tokenizer",
    path: str | os.PathLike,
    chunk_bytes: int = 1 << 20,
    progress: bool = True,
) -> TokenFile:
    """Tokenize a UTF-8 file of any size into a token file, a chunk at a time.

    Chunks end where white space begins after a word, so that byte-pair tokenizers whose tokens do not cross that place
    (GPT-2's, and all that `train_byte_pairs` makes) give the ids they give for the whole text.

    Raises DataError as `read_text` and `open_tokens` do.
    """
    from rich.progress import Progress

    text_path = Path(text_path)
    if not text_path.is_file():
        problem = "is a folder" if text_path.is_dir() else "does not exist"
        raise DataError(f"{text_path} {problem}, expected a text file")
    size = text_path.stat().st_size
    if not size:
        raise DataError(f"{text_path} is empty, expected at least 1 character")
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task(f"tokenizing {text_path.name}", total=size)

        def chunks() -> Iterator[list[int]]:
            for text in _pieces(text_path, chunk_bytes):
                yield tokenizer.encode(text)
                bar.advance(task, len(text.encode()))

        return write_tokens(path, chunks(), tokenizer)


def tokens_of(
    path: str | os.PathLike | None, tokenizer: "Tokenizer | None", cache: str | os.PathLike
) -> "tuple[Tensor | TokenFile, Tokenizer]":
    """The tokens of a text file, or of the embedded text if `path` is None, and the tokenizer that made them.

    Args:
        tokenizer: None for the characters of the text itself.
        cache: folder in which a file of byte pairs is kept tokenized, so that the next run only maps it.

    Raises DataError as `read_text` and `open_tokens` do.
    """
    from train.data.text import text
    from train.data.text.tokenizers import CharTokenizer

    content = text.embedded_text() if path is None else text.read_text(path, minimum=2)
    if tokenizer is None:
        tokenizer = CharTokenizer.from_text(content)
    if path is None or isinstance(tokenizer, CharTokenizer):
        return torch.tensor(tokenizer.encode(content), dtype=torch.int64), tokenizer
    made = Path(cache) / f"{Path(path).stem}-{zlib.crc32(content.encode()):08x}-{tokenizer.fingerprint[:8]}.tokens"
    if made.exists():
        return open_tokens(made, tokenizer), tokenizer
    made.parent.mkdir(parents=True, exist_ok=True)
    return tokenize_to_file(path, tokenizer, made), tokenizer


def _pieces(path: Path, chunk_bytes: int) -> Iterator[str]:
    """The text of a file in pieces, cut only between a character and the white space after it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, consumed = "", 0
    with open(path, "rb") as file:
        if file.read(3) == codecs.BOM_UTF8:
            consumed = 3
        file.seek(consumed)
        while True:
            content = file.read(chunk_bytes)
            waiting = len(decoder.getstate()[0])
            try:
                rest += decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                offset, bad = consumed - waiting + error.start, error.object[error.start]
                raise DataError(f"{path} is not UTF-8 text: byte 0x{bad:02x} at offset {offset}") from None
            consumed += len(content)
            if not content:
                break
            cut = _last_word_end(rest)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
    if rest:
        yield rest


def _last_word_end(text: str) -> int:
    """The last place before which no white space stands and after which it does; 0 if there is none."""
    for at in range(len(text) - 1, 0, -1):
        if text[at].isspace() and not text[at - 1].isspace():
            return at
    return 0
