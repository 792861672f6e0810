"""Batches of sentence pairs of similar length, in a few fixed shapes: a compiled step sees as many graphs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.data import DataError, batching
from train.data.text.tokenizers import PAD
from train.data.translation.corpus import Corpus, exceeds

MARKS = np.array([1, 2])
"""Tokens that are added to a source (<eos>) and to a target (<bos>, <eos>)."""


class Bucket(NamedTuple):
    """The shape of a batch, source (rows, source) and target (rows, target), and the indices of its pairs."""

    rows: int
    source: int
    target: int
    members: np.ndarray


@dataclass(frozen=True)
class Buckets:
    """Pairs by shape.

    Attributes:
        too_long: number of pairs that are in no bucket because a side is longer than the network's positions.
        efficiency: the share of the entries of a batch, on average, that is not padding.
    """

    buckets: tuple[Bucket, ...]
    too_long: int
    efficiency: float

    @property
    def batches(self) -> int:
        """Number of batches per epoch."""
        return sum(len(bucket.members) // bucket.rows for bucket in self.buckets)

    def __str__(self) -> str:
        text = [f"{self.batches} batches per epoch in {len(self.buckets)} shapes, {1 - self.efficiency:.1%} padding"]
        text += [f"  {b.rows} rows of {b.source} and {b.target}: {len(b.members)} pairs" for b in self.buckets]
        return "\n".join(text)


def make_buckets(corpus: Corpus, tokens: int, longest: int, shapes: int = 6, multiple: int = 1) -> Buckets:
    """Divide a corpus by the longer side of each pair, where that pads least (found by dynamic programming).

    Args:
        tokens: the budget: the largest number of source tokens, and of target tokens, in a batch, padding included. A
            batch has fewer where this makes the batches of a bucket equally large, so that hardly a pair is left over.
        longest: the network's positions; pairs of which a side has more tokens (`exceeds`) are left out and counted.
        shapes: the largest number of buckets; there are fewer if one would not fill a batch.
        multiple: lengths are rounded up to multiples of it (8 suits a GPU), those of targets without the last token.

    Raises DataError: no pair is short enough, or the budget is less than a sentence.
    """
    if tokens < 1 or longest < 2 or shapes < 1 or multiple < 1:
        raise DataError(f"cannot make {shapes} shapes of {tokens} tokens, lengths up to {longest}")
    lengths = corpus.lengths + MARKS
    inputs = lengths - [0, 1]  # (count, 2): the decoder does not read the last target token
    short = np.flatnonzero(~exceeds(corpus.lengths, longest))
    if not len(short):
        raise DataError(f"not one of {len(corpus)} pairs has up to {longest} tokens on both sides")
    widths = np.minimum(-(-inputs[short] // multiple) * multiple, longest) + [0, 1]  # (short pairs, 2)
    order = np.argsort(widths.max(1), kind="stable")
    buckets = []
    for members in np.split(order, _cuts(widths[order], tokens, shapes)):
        source, target = widths[members].max(0).tolist()
        if tokens < max(source, target - 1):
            raise DataError(f"a batch of {tokens} tokens has no room for a sentence of {max(source, target - 1)}")
        rows = len(members) // _batches(len(members), tokens, source, target)
        buckets.append(Bucket(rows, source, target, short[members]))
    padded = sum(len(b.members) * (b.source + b.target) for b in buckets)
    return Buckets(tuple(buckets), len(corpus) - len(short), int(lengths[short].sum()) / padded)


def batch_at(
    corpus: Corpus, buckets: Buckets, key: Tensor, step: int | Tensor, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """The batch of one step; a pure function of key and step, so a resumed run repeats it.

    Every epoch goes through the batches of all buckets in an order of its own, and through the pairs of a bucket in an
    order of its own; the pairs that fill no batch are left out of that epoch.

    Args:
        key: (2,).
        step: 0, 1, 2 ...
        parts: the batch is filled up to a multiple of this many rows, to be cut into micro-batches. These rows are no
            pairs: an empty source (<eos>) and a target of <bos> only, in which no token counts.

    Returns:
        source (rows, length), the sentence and <eos>, and target (rows, length), <bos>, the sentence and <eos>, int64
        on the CPU, filled up with <pad>. Teacher forcing feeds `target[:, :-1]` and compares with `target[:, 1:]`.
    """
    counts, rows = zip(*((len(bucket.members), bucket.rows) for bucket in buckets.buckets), strict=True)
    number, positions = batching.bucket_batch(key, step, counts, rows)
    bucket = buckets.buckets[number]
    indices = bucket.members[positions]
    return _padded(corpus, indices, -(-bucket.rows // parts) * parts, bucket.source, bucket.target)


def evaluation_batches(
    corpus: Corpus, tokens: int, longest: int, shapes: int | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(indices, source, target) that cover all pairs once, short ones first, as `batch_at` makes them.

    Results go back into order by `results[indices] = ...`.

    Args:
        tokens: the budget, as in `make_buckets`.
        longest: as in `make_buckets`; `open_corpus` leaves out longer pairs, so that no part of the data has them.
        shapes: None lets each batch be as large as its sentences. A number is the largest number of shapes, for a
            compiled function: then the last batch of a bucket is filled up with rows that are no pairs, an empty source
            (<eos>) and a target of <bos> only; the first `len(indices)` rows are pairs.

    Raises DataError naming the number of the first pair that is too long.
    """
    too_long = np.flatnonzero(exceeds(corpus.lengths, longest))
    if len(too_long):
        count = int(corpus.lengths[too_long[0]].max()) + 1
        raise DataError(f"sentence {too_long[0] + 1} has {count} tokens, the network positions for {longest}")
    lengths = corpus.lengths + MARKS
    if not len(corpus):
        return
    if shapes is not None:
        for bucket in make_buckets(corpus, tokens, longest, shapes).buckets:
            count = len(bucket.members)
            rows = -(-count // _batches(count, tokens, bucket.source, bucket.target))
            for first in range(0, count, rows):
                indices = bucket.members[first : first + rows]
                yield torch.from_numpy(indices), *_padded(corpus, indices, rows, bucket.source, bucket.target)
        return
    order = np.lexsort((*lengths.T, lengths.max(1)))
    first, widest = 0, lengths[order].max(1)
    while first < len(order):
        last = first + 1
        while last < len(order) and (last + 1 - first) * widest[last] <= tokens:
            last += 1
        indices = order[first:last]
        yield torch.from_numpy(indices), *_padded(corpus, indices, len(indices), *lengths[indices].max(0).tolist())
        first = last


def _batches(count: int, tokens: int, source: int, target: int) -> int:
    """The number of batches that `count` pairs of these lengths make."""
    room = tokens // max(source, target - 1)
    return -(-count // room)


def _cuts(widths: np.ndarray, tokens: int, shapes: int) -> np.ndarray:
    """Indices at which to cut pairs, in order of their longer side, into up to `shapes` parts that together pad least.

    least[k][j] = min over i of least[k - 1][i] + padded(i, j), for the pairs of the lengths before the j-th.

    Args:
        widths: (count, 2) of source and target.
    """
    starts = np.unique(widths.max(1), return_index=True)[1]
    n, ends = len(starts), np.append(starts[1:], len(widths))
    widest = np.maximum.reduceat(widths, starts)
    padded = np.full((n, n + 1), np.inf)
    for i in range(n):
        count, most = ends[i:] - starts[i], np.maximum.accumulate(widest[i:])
        fills = count * np.maximum(most[:, 0], most[:, 1] - 1) >= tokens
        padded[i, i + 1 :] = np.where(fills, count * most.sum(1), np.inf)
    padded[0, n] = len(widths) * int(widest.max(0).sum())
    least, before = [np.append(0, np.full(n, np.inf))], []
    for _ in range(shapes):
        table = least[-1][:n, None] + padded
        before.append(table.argmin(0))
        least.append(table.min(0))
    parts = 1 + int(np.argmin([row[n] for row in least[1:]]))
    cuts, j = [], n
    for k in reversed(range(parts)):
        j = before[k][j]
        cuts.append(int(starts[j]))
    return np.array(cuts[-2::-1], np.int64)


def _padded(corpus: Corpus, indices: np.ndarray, rows: int, source: int, target: int) -> tuple[Tensor, Tensor]:
    """These pairs, and empty ones up to `rows`: source (rows, source), target (rows, target)."""
    tables = []
    for side, width in enumerate((source, target)):
        lengths = np.zeros(rows, np.int64)
        lengths[: len(indices)] = corpus.lengths[indices, side]
        text = np.arange(width - side) < lengths[:, None]  # (rows, width without <bos>)
        table = np.full((rows, width), PAD, np.int64)
        words = table[:, side:]
        if len(corpus.tokens):
            at = corpus.starts[indices, side][:, None] + np.arange(width - side)  # (pairs, width without <bos>)
            words[: len(indices)] = corpus.tokens.ids[np.minimum(at, len(corpus.tokens) - 1)]
            words[~text] = PAD
        words[np.arange(rows), lengths] = corpus.last
        if side:
            table[:, 0] = corpus.first
            table[len(indices) :, 1] = PAD
        tables.append(torch.from_numpy(table))
    return tables[0], tables[1]
