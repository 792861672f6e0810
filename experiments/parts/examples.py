"""Examples of `experiments/pretrain.py`: windows of a text, or its lines, some blocks of either held out."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core import random
from experiments.parts import encoder as encoders
from experiments.parts.encoder import Encoder
from train.data import DataError
from train.data.text import ragged, text
from train.data.text.ragged import Bucket, Ragged

ROWS = 32
"""Examples of a batch for evaluation."""
SHAPES = 3
"""Widths of the batches of lines, at most: the step is compiled for each."""


class Windows(NamedTuple):
    """Windows of `length` tokens; `train` and `held_out` are the tokens of the two parts."""

    train: Any
    held_out: Any
    length: int

    def batches(self, key: Tensor, steps: range, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows at random places (batch, length), and the tokens after each of theirs, for each step."""
        return text.token_batches(self.train, key, steps, batch, self.length)

    @property
    def held_out_count(self) -> int:
        """Number of the batches below."""
        return -(-((len(self.held_out) - 1) // self.length) // ROWS)

    def held_out_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same of the held-out tokens, one window after the other."""
        for inputs, targets in text.windows(self.held_out, self.length, ROWS):
            if inputs.shape[1] == self.length:
                yield inputs, targets


class Lines(NamedTuple):
    """Lines with the special tokens of an encoder; the tokens of both parts, without filling, are `train` and
    `held_out`."""

    train: Tensor
    held_out: Tensor
    rows: Ragged
    held_out_rows: Ragged
    buckets: list[Bucket]

    def batches(self, key: Tensor, steps: range, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Lines of similar lengths, filled up with padding (batch, width), and their lengths, for each step."""
        for step in steps:
            part = ragged.batch_at(self.rows, self.buckets, key, step, batch)
            yield part.tokens, part.lengths

    @property
    def held_out_count(self) -> int:
        return -(-len(self.held_out_rows.lengths) // ROWS)

    def held_out_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same of all held-out lines, in their order."""
        for part in zip(self.held_out_rows.tokens.split(ROWS), self.held_out_rows.lengths.split(ROWS), strict=True):
            tokens, lengths = part
            yield tokens[:, : int(lengths.max())], lengths


Examples = Windows | Lines


def open_windows(
    data: str, tokenizer: Any, length: int, cache: Path, *, split: bool = True
) -> tuple[Windows, Any, dict[str, Any]]:
    """(windows, tokenizer, facts) of a text.

    Args:
        tokenizer: one, or a function that learns one from texts.
        split: hold out a tenth, in blocks; otherwise all of the text is both parts.

    Raises DataError: no such text, or one of fewer tokens than a window needs.
    """
    content = text.open_text(data, tokenizer, cache, lossy=True)
    parts = text.split(content.tokens, least=2 * length) if split else (content.tokens, content.tokens)
    if min(map(len, parts)) <= length:
        size = f"'{content.name}' has {len(content.tokens):,} tokens"
        raise DataError(f"{size}; windows of {length} need {'over ten times as many' if split else 'more'}")
    facts = text.facts(content, *(parts if split else ()))
    return Windows(*parts, length), content.tokenizer, facts


def read_lines(data: str, cache: Path) -> tuple[list[str], dict[str, Any]]:
    """(lines that are not empty, facts) of a text. Raises DataError: there is none."""
    content = text.open_text(data, None, cache)
    lines = [line.strip() for line in content.tokenizer.decode(content.tokens).split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"'{content.name}' has no line that is not empty")
    return lines, {"text": content.name, "lines": len(lines), "skipped": list(content.skipped)}


def make_lines(lines: list[str], encoder: Encoder, longest: int, batch: int) -> Lines:
    """Lines cut to `longest` tokens, some blocks of them held out; batch 0: all lines are both parts.

    Raises DataError: fewer lines than a batch has.
    """
    tokens, lengths = encoders.tokens_of(encoder, lines, longest)
    numbers = torch.arange(len(lines))
    parts = text.split(numbers, least=8) if batch else (numbers, numbers)
    rows = [Ragged(tokens[part], lengths[part], lengths[part]) for part in parts]
    buckets = ragged.make_buckets(rows[0].lengths, SHAPES, batch) if batch else []
    flat = [part.tokens[encoders.mask_of(part.tokens, part.lengths)] for part in rows]
    return Lines(*flat, *rows, buckets)


def keyed(key: Tensor, steps: range, batches: Iterator[Any], corrupt: Callable[[Tensor, Any], Any]) -> Iterator[Any]:
    """Each batch corrupted with a key per example, a function of the step and the example's number in its batch."""
    for step, batch in zip(steps, batches, strict=False):
        keys = random.split(random.fold_in(key, step), len(batch[0]))  # (batch, 2)
        yield corrupt(keys, batch)
