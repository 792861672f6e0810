"""Text and tokens: the embedded text, files of text, and windows of tokens for language models."""

import codecs
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from core import random
from train.data import DataError
from train.data.text.token_files import TokenFile

Tokens = TypeVar("Tokens", Tensor, TokenFile)


def embedded_text() -> str:
    """Half a million characters of English that every Python brings along: the help texts of its language reference.

    The same for one Python version, slightly different from version to version.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


def read_text(path: str | os.PathLike, minimum: int = 1) -> str:
    """A UTF-8 file as it is (line ends untouched, a byte order mark dropped).

    Raises DataError: not there, a directory, not UTF-8 (with the offset of the first such byte), fewer than `minimum`
    characters.
    """
    path = Path(path)
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist, expected a text file") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, expected a text file") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        offset = error.start + path.stat().st_size - len(error.object)
        raise DataError(f"{path} is not UTF-8 text: byte 0x{bad:02x} at offset {offset}") from None
    if len(text) < minimum:
        found = f"has {len(text)} characters" if text else "is empty"
        raise DataError(f"{path} {found}, expected at least {minimum}")
    return text


def split(tokens: Tokens, validation: float = 0.1) -> tuple[Tokens, Tokens]:
    """(training part, validation part): the validation part is the last tenth, or whatever `validation` says."""
    if not 0 < validation < 1:
        raise DataError(f"the validation part is {validation} of the tokens, expected a number between 0 and 1")
    cut = int(len(tokens) * (1 - validation))
    return tokens[:cut], tokens[cut:]


def token_batch(tokens: Tensor | TokenFile, key: Tensor, step: int | Tensor, batch: int, length: int) -> tuple:
    """Random windows and the tokens that follow each position; a pure function of key and step.

    Args:
        tokens: (count,) integers, or a TokenFile.
        key: (2,). Window starts are uniform, drawn from `fold_in(key, step)`.

    Returns:
        inputs (batch, length) and targets (batch, length), int64, on the tokens' device (the CPU for a TokenFile);
        targets[i, t] is the token after inputs[i, t].

    Raises DataError if there are not `length + 1` tokens.
    """
    _check(tokens, batch, length)
    starts = random.randint(random.fold_in(key, step), (batch,), 0, len(tokens) - length, dtype=torch.int64)
    return _windows_at(tokens, starts, length)


def token_batches(
    tokens: Tensor | TokenFile, key: Tensor, steps: range, batch: int, length: int, block: int = 128
) -> Iterator[tuple[Tensor, Tensor]]:
    """`token_batch` of one step after the other; the starts of `block` steps are drawn in one call, which is faster."""
    _check(tokens, batch, length)
    for first in range(steps.start, steps.stop, block):
        several = torch.arange(first, min(first + block, steps.stop), device=key.device)
        starts = random.randint(random.fold_in(key, several), (batch,), 0, len(tokens) - length, dtype=torch.int64)
        for row in starts.unbind(0):
            yield _windows_at(tokens, row, length)


def _windows_at(tokens: Tensor | TokenFile, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    starts = starts.to(getattr(tokens, "device", "cpu"))
    window = tokens[starts[:, None] + torch.arange(length + 1, device=starts.device)].long()
    return window[:, :-1], window[:, 1:]


def windows(tokens: Tensor | TokenFile, length: int, batch: int, whole: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive windows for evaluation: (inputs, targets) pairs, int64, in which each token is a target at most once.

    Args:
        tokens: (count,) integers, or a TokenFile.
        whole: every token but the first is a target once: the last pair of full windows has fewer than `batch` rows,
            and the tokens that fill no window come as one pair (1, rest). If False only pairs (batch, length) come, so
            that a compiled function sees one shape.

    Raises DataError if there are not `length + 1` tokens, or none comes because `whole` is False.
    """
    _check(tokens, batch, length)
    count = (len(tokens) - 1) // length
    if not whole and count < batch:
        raise DataError(f"{len(tokens)} tokens make {count} windows of {length}, expected at least {batch}")
    for first in range(0, count if whole else count // batch * batch, batch):
        rows = min(batch, count - first)
        start = torch.arange(first, first + rows, device=getattr(tokens, "device", "cpu")) * length
        window = tokens[start[:, None] + torch.arange(length + 1, device=start.device)].long()
        yield window[:, :-1], window[:, 1:]
    rest = torch.arange(count * length, len(tokens), device=getattr(tokens, "device", "cpu"))
    if whole and len(rest) > 1:
        window = tokens[rest[None]].long()
        yield window[:, :-1], window[:, 1:]


def _check(tokens: Tensor | TokenFile, batch: int, length: int) -> None:
    if batch < 1 or length < 1:
        raise DataError(f"cannot make batches of {batch} windows of {length} tokens")
    if len(tokens) <= length:
        raise DataError(f"{len(tokens)} tokens are too few for windows of {length}: expected at least {length + 1}")
