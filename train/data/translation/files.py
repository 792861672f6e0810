"""Sentences and their translations in files: a sentence per line in two files, a TSV, or the markup of IWSLT and WMT.

A line that cannot be used (not UTF-8, too few columns) counts as empty and is logged; a file with more than a tenth of
such lines is an error.
"""

import codecs
import functools
import gzip
import html
import itertools
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.data import DataError
from train.data.text.files import unpacked
from train.data.translation.columns import columns
from train.files import shown

log = logging.getLogger(__name__)

Pair = tuple[str, str]

SEGMENT = re.compile(r"<seg[^>]*>(.*)</seg>")


@dataclass(frozen=True)
class PairFiles:
    """Pairs in files, which are read anew each time: a corpus need not fit into memory.

    Files may be gzipped. In ".sgm" and ".xml" files the sentences are the `<seg>` elements, in "train.tags." files all
    lines that do not begin with "<".

    Attributes:
        sources, targets: files with a sentence per line, translations of each other, read one after the other; or one
            TSV, twice.
        columns: those of source and target in a TSV.
        header: True if the first line of the TSV names its columns.
        every: if not 0, sentences every - 1, 2 every - 1 ... are held out as a part of their own, and the rest is the
            other part.
        held: True for the part that is held out.
    """

    sources: tuple[Path, ...]
    targets: tuple[Path, ...]
    columns: tuple[int, int] | None = None
    header: bool = False
    every: int = 0
    held: bool = False

    @property
    def name(self) -> str:
        """For messages: the first file, or the first two."""
        return str(self.sources[0]) if self.columns else f"{self.sources[0]} and {self.targets[0]}"

    def __iter__(self) -> Iterator[Pair]:
        """The pairs that have both sides. Raises DataError as `lines` does."""
        return (pair for pair in lines(self) if all(pair))


Pairs = PairFiles | Sequence[Pair]


def lines(pairs: Pairs) -> Iterator[Pair]:
    """The pairs of all lines, white space at both ends removed; a side can be empty.

    Raises DataError: a file is missing or cannot be read, there are more lines on one side than on the other, or too
    many lines that cannot be used.
    """
    if not isinstance(pairs, PairFiles):
        yield from pairs
        return
    both = (
        _columns(pairs) if pairs.columns else itertools.chain.from_iterable(map(_aligned, pairs.sources, pairs.targets))
    )
    for number, pair in enumerate(both):
        if not pairs.every or (number % pairs.every == pairs.every - 1) == pairs.held:
            yield pair


def read(pairs: Pairs) -> list[Pair]:
    """All pairs with two sides, in memory; the number of other lines is logged.

    Raises DataError as `lines` does, or if there is no pair.
    """
    everything = list(lines(pairs))
    whole = [pair for pair in everything if all(pair)]
    report_empty(pairs, len(everything) - len(whole))
    if not whole:
        raise no_pairs(pairs)
    return whole


def sentences(path: Path) -> list[str]:
    """The lines of one file (gzipped or not), without the white space around them; empty where one cannot be read.

    Raises DataError as `lines` does.
    """
    return [line.strip() for line in _decoded(path)]


def report_empty(pairs: Pairs, count: int) -> None:
    """Log the number of pairs that are left out because a side is empty."""
    if count:
        log.warning("%s: %d lines are empty on one side or both; these pairs are dropped", shown(name_of(pairs)), count)


def no_pairs(pairs: Pairs) -> DataError:
    """The error for pairs of which none has two sides; it names the side that is empty."""
    everything = list(lines(pairs))
    for side, name in enumerate(("source", "target")):
        if everything and not any(pair[side] for pair in everything):
            where = f"the {name}s"
            if isinstance(pairs, PairFiles):
                files = (pairs.sources, pairs.targets)[side]
                where = f"column {pairs.columns[side] + 1} of {files[0]}" if pairs.columns else str(files[0])
            return DataError(f"{name_of(pairs)}: there is not one pair of sentences, as all of {where} is empty")
    return DataError(f"{name_of(pairs)}: there is not one pair of sentences")


def name_of(pairs: Pairs) -> str:
    return pairs.name if isinstance(pairs, PairFiles) else "the sentences"


def tsv(path: Path, source: str, target: str) -> PairFiles:
    """A TSV with a pair per line: source first, then target, unless the first line names the columns (`columns`).

    Raises DataError: the first line names columns, but not these languages; or as `lines` for the first line.
    """
    first = next(_decoded(path), "")
    try:
        order = columns(first, source, target)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return PairFiles((path,), (path,), order or (0, 1), header=order is not None)


def _aligned(source: Path, target: Path) -> Iterator[Pair]:
    for pair in itertools.zip_longest(_decoded(source), _decoded(target)):
        if None in pair:
            counts = [f"{path} has {sum(1 for _ in _decoded(path))} sentences" for path in (source, target)]
            raise DataError(f"{' and '.join(counts)}; expected as many, line by line translations of each other")
        yield pair[0].strip(), pair[1].strip()


def _columns(pairs: PairFiles) -> Iterator[Pair]:
    (path,), least = pairs.sources, 1 + max(pairs.columns)
    number, bad = 0, _Unusable(path)
    for number, line in enumerate(_decoded(path), 1):
        cells = line.split("\t")
        if number == 1 and pairs.header:
            continue
        if len(cells) < least and line.strip():
            bad.add(number, f"has {len(cells)} columns, expected at least {least}")
            cells = []
        cells += [""] * least
        yield cells[pairs.columns[0]].strip(), cells[pairs.columns[1]].strip()
    bad.report(number)


def _decoded(path: Path) -> Iterator[str]:
    """The sentences of a file, with the white space around them; only a line feed ends a line."""
    kind = path.name.removesuffix(".gz")
    for line, is_text in _decoded_lines(path):
        if kind.endswith((".sgm", ".xml")):
            if segment := SEGMENT.search(line):
                yield html.unescape(segment[1]) if is_text else ""
        elif not (kind.startswith("train.tags.") and line.lstrip().startswith("<")):
            yield line if is_text else ""


def _decoded_lines(path: Path) -> Iterator[tuple[str, bool]]:
    """(line, True), or (line with replacement characters, False) where it is not UTF-8."""
    number, bad = 0, _Unusable(path)
    with unpacked(path, "a file with a sentence per line") as file:
        try:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                try:
                    yield line.decode("utf-8"), True
                except UnicodeDecodeError as error:
                    bad.add(number, f"is not UTF-8 text: byte 0x{error.object[error.start]:02x}")
                    yield line.decode("utf-8", "replace"), False
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is truncated or garbled after line {number}: {error}") from None
    bad.report(number)


class _Unusable:
    """The lines of a file that cannot be used: their number, and the first of them."""

    def __init__(self, path: Path):
        self.path, self.count, self.first = path, 0, ""

    def add(self, line: int, problem: str) -> None:
        self.count += 1
        self.first = self.first or f"line {line} {problem}"
        if line >= 1000 and self.count > line / 10:
            self._refuse()

    def report(self, lines: int) -> None:
        """Log or refuse the file at its end, after `lines` lines."""
        if self.count > lines / 10:
            self._refuse()
        if self.count:
            _warn(f"{shown(self.path)}: {self.count} lines are left empty; {self.first}")

    def _refuse(self) -> None:
        rest = f" (and {self.count - 1} more lines)" if self.count > 1 else ""
        raise DataError(f"{self.path} {self.first}{rest}")


@functools.cache
def _warn(message: str) -> None:
    """Log a message once, however often a file is read."""
    log.warning("%s", message)
