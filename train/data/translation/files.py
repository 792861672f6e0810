"""Sentences and their translations, or any pairs of texts, in files: a sentence per line in two files, a table (TSV,
CSV, JSON lines), or the markup of IWSLT and WMT.

A line that cannot be used (not UTF-8, too few columns, no JSON) counts as empty and is logged; a file with more than a
tenth of such lines is an error.
"""

import codecs
import csv
import functools
import gzip
import html
import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        sources: files with a sentence per line, read one after the other; or one table.
        targets: files with the translations of these sentences; or the same table.
        columns: those of source and target in a table: their numbers, or of JSON objects their keys.
        header: True if the first line of the table names its columns.
        every: if not 0, sentences every - 1, 2 every - 1 ... are held out as a part of their own, and the rest is the
            other part.
        held: True for the part that is held out.
        block: number of sentences in a row that are held out together, as neighbours may resemble each other.
    """

    sources: tuple[Path, ...]
    targets: tuple[Path, ...]
    columns: tuple[int, int] | tuple[str, str] | None = None
    header: bool = False
    every: int = 0
    held: bool = False
    block: int = 1

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
        if not pairs.every or (number // pairs.block % pairs.every == pairs.every - 1) == pairs.held:
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
                where = f"column {column_name(pairs.columns[side])} of {files[0]}" if pairs.columns else str(files[0])
            return DataError(f"{name_of(pairs)}: there is not one pair of sentences, as all of {where} is empty")
    return DataError(f"{name_of(pairs)}: there is not one pair of sentences")


def name_of(pairs: Pairs) -> str:
    """Name of the pairs for an error."""
    return pairs.name if isinstance(pairs, PairFiles) else "the sentences"


def column_name(column: int | str) -> str:
    """The name of a column for messages: its number, from 1, or its key."""
    return str(column + 1) if isinstance(column, int) else f"'{shown(column)}'"


def table(path: Path, source: str, target: str) -> PairFiles:
    """The pairs of a TSV, of a CSV (by its name), or of JSON lines (.jsonl, .ndjson, .json): an object per line.

    The first line may name the columns (`columns`), by languages, as "source" and "target", or just as the arguments
    are; otherwise source comes first, then target. JSON objects with two other keys have them in this order.

    Raises DataError: the first line names columns, but not these; or as `lines` for the first line.
    """
    first = next(_rows(path), (0, []))[1]
    if isinstance(first, str):
        raise DataError(f"{path} line 1 {first}")
    keys = list(first) if isinstance(first, dict) else None
    try:
        order = columns("\t".join(keys or map(str, first)), source, target)
    except DataError as error:
        if keys is None or len(keys) != 2 or not {source, target} == {"source", "target"}:
            raise DataError(f"{path}: {error}") from None
        order = 0, 1
    if keys is None:
        return PairFiles((path,), (path,), order or (0, 1), header=order is not None)
    if order is None and len(keys) != 2:
        raise DataError(f"{path}: no keys '{source}' and '{target}'; there are {', '.join(keys)}")
    return PairFiles((path,), (path,), tuple(keys[i] for i in order or (0, 1)))


def _aligned(source: Path, target: Path) -> Iterator[Pair]:
    for pair in itertools.zip_longest(_decoded(source), _decoded(target)):
        if None in pair:
            counts = [f"{path} has {sum(1 for _ in _decoded(path))} sentences" for path in (source, target)]
            raise DataError(f"{' and '.join(counts)}; expected as many, line by line translations of each other")
        yield pair[0].strip(), pair[1].strip()


def _columns(pairs: PairFiles) -> Iterator[Pair]:
    (path,), both = pairs.sources, pairs.columns
    number, bad = 0, _Unusable(path)
    for number, row in _rows(path):
        if number == 1 and pairs.header:
            continue
        problem = row if isinstance(row, str) else _problem(row, both)
        if problem:
            bad.add(number, problem)
        source, target = ("", "") if problem or not row else (str(row[column]) for column in both)
        yield source.strip(), target.strip()
    bad.report(number)


def _problem(row: Any, both: tuple) -> str:
    """Why a row has no pair; "" if it has one, or is empty."""
    if row == []:
        return ""
    if isinstance(both[0], str):
        if not isinstance(row, dict) or not set(both) <= row.keys():
            there = f"; there are {', '.join(map(shown, row))}" if isinstance(row, dict) else ""
            return f"has no {' and '.join(map(column_name, both))}{there}"
    elif isinstance(row, dict) or len(row) <= max(both):
        size = "an object" if isinstance(row, dict) else f"{len(row)} columns"
        return f"has {size}, expected at least {1 + max(both)}"
    odd = [row[column] for column in both if isinstance(row[column], bool | None | list | dict)]
    if odd:
        return f"has {json.dumps(odd[0])[:40]} instead of a text"
    # JSON can spell half of a surrogate pair.
    return "is no Unicode text" if any("\ud800" <= c <= "\udfff" for i in both for c in str(row[i])) else ""


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of the line, cells) of a table, [] of an empty line; of JSON a list or a dict, or its fault as a text."""
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "csv":
        csv.field_size_limit(2**31 - 1)  # documents are longer than the library's 131,072
        reader = csv.reader(_decoded(path))
        try:
            yield from ((reader.line_num, row if any(row) else []) for row in reader)
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num} is no CSV: {error}") from None
    elif kind not in ("json", "jsonl", "ndjson"):
        for number, line in enumerate(_decoded(path), 1):
            yield number, line.split("\t") if line.strip() else []
    else:
        for number, line in enumerate(_records(path) if kind == "json" else _decoded(path), 1):
            try:
                value = json.loads(line) if line.strip() else []
                yield number, value if isinstance(value, list | dict) else "is no JSON object"
            except json.JSONDecodeError as error:
                yield number, f"is no JSON: {error.msg} at character {error.pos + 1}"


def _records(path: Path) -> Iterator[str]:
    """The lines of a file, or the entries of the one list that it is."""
    try:
        whole = json.loads("".join(_decoded(path)))
    except json.JSONDecodeError:
        whole = None
    return map(json.dumps, whole) if isinstance(whole, list) else _decoded(path)


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
