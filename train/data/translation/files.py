"""Sentences and their translations in files: a sentence a line in two files, a TSV, or the markup of IWSLT and WMT."""

import codecs
import gzip
import hashlib
import html
import itertools
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from train.data import DataError

log = logging.getLogger(__name__)

Pair = tuple[str, str]

SEGMENT = re.compile(r"<seg[^>]*>(.*)</seg>")


@dataclass(frozen=True)
class PairFiles:
    """Pairs in files, which are read anew each time: a corpus need not fit into memory.

    Files may be gzipped (".gz"). In ".sgm" and ".xml" files the sentences are the `<seg>` elements, in "train.tags."
    files all lines that do not begin with "<".

    Attributes:
        sources, targets: files with a sentence a line, translations of each other, read one after the other; or one
            TSV, twice.
        columns: those of source and target in a TSV.
        header: whether the first line of the TSV names the languages.
        every: if not 0, sentences every - 1, 2 every - 1 ... are a part of their own: this one if `held`; if not,
            this is the rest.
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
        """The pairs without those of which a side is empty. Raises DataError as `lines` does."""
        return (pair for pair in lines(self) if all(pair))


Pairs = PairFiles | Sequence[Pair]


def lines(pairs: Pairs) -> Iterator[Pair]:
    """The pairs of all lines, white space at both ends removed; a side can be empty.

    Raises DataError: a file is missing or cannot be read, a line is not UTF-8, there are more lines on one side than on
    the other, a line of a TSV has too few columns.
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
    """All pairs with two sides, in memory; how many others there are is logged.

    Raises DataError as `lines` does, or if there is no pair.
    """
    everything = list(lines(pairs))
    kept = [pair for pair in everything if all(pair)]
    report_empty(pairs, len(everything) - len(kept))
    if not kept:
        raise DataError(f"{name_of(pairs)}: there is not one pair of sentences")
    return kept


def sentences(path: Path) -> list[str]:
    """The lines of one file (gzipped or not), a sentence each or empty, without the white space around them.

    Raises DataError as `lines` does.
    """
    return [line.strip() for line in _decoded(path)]


def report_empty(pairs: Pairs, count: int) -> None:
    """Log how many pairs were dropped because a side is empty."""
    if count:
        log.warning("%s: %d lines are empty on one side or both; these pairs are dropped", name_of(pairs), count)


def name_of(pairs: Pairs) -> str:
    return pairs.name if isinstance(pairs, PairFiles) else "the given sentences"


def fingerprint(pairs: Pairs) -> str:
    """The same for the same pairs: a hash of the files' bytes, or of the text.

    Raises DataError if a file cannot be read.
    """
    if not isinstance(pairs, PairFiles):
        text = "\n".join(itertools.chain.from_iterable(pairs))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    made = hashlib.sha256(repr((pairs.columns, pairs.header, pairs.every, pairs.held)).encode())
    for path in dict.fromkeys(pairs.sources + pairs.targets):
        try:
            with open(path, "rb") as file:
                made.update(hashlib.file_digest(file, "sha256").digest())
        except FileNotFoundError:
            raise _missing(path) from None
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    return made.hexdigest()


def tsv(path: Path, source: str, target: str) -> PairFiles:
    """A TSV with a pair a line: source first, then target, unless the first line names the languages.

    Raises DataError: the first line names languages, but not these; what `lines` raises for the first line.
    """
    names = [name.strip() for name in next(_decoded(path), "").split("\t")]
    if len(names) < 2 or not all(re.fullmatch(r"[a-z]{2,3}([-_][A-Za-z]+)?", name) for name in names):
        return PairFiles((path,), (path,), (0, 1))
    if source not in names or target not in names:
        raise DataError(f"{path}: no pair of languages {source}-{target}; there are {', '.join(names)}")
    return PairFiles((path,), (path,), (names.index(source), names.index(target)), header=True)


def _aligned(source: Path, target: Path) -> Iterator[Pair]:
    for pair in itertools.zip_longest(_decoded(source), _decoded(target)):
        if None in pair:
            counts = [f"{path} has {sum(1 for _ in _decoded(path))} sentences" for path in (source, target)]
            raise DataError(f"{' and '.join(counts)}; expected as many, line by line translations of each other")
        yield pair[0].strip(), pair[1].strip()


def _columns(pairs: PairFiles) -> Iterator[Pair]:
    (path,), wanted = pairs.sources, 1 + max(pairs.columns)
    for number, line in enumerate(_decoded(path), 1):
        cells = line.split("\t")
        if number == 1 and pairs.header:
            continue
        if len(cells) < wanted and line.strip():
            raise DataError(f"{path} line {number} has {len(cells)} columns, expected at least {wanted}")
        cells += [""] * wanted
        yield cells[pairs.columns[0]].strip(), cells[pairs.columns[1]].strip()


def _decoded(path: Path) -> Iterator[str]:
    """The sentences of a file, with the white space around them; only a line feed ends a line."""
    kind = path.name.removesuffix(".gz")
    for line in _decoded_lines(path):
        if kind.endswith((".sgm", ".xml")):
            if found := SEGMENT.search(line):
                yield html.unescape(found[1])
        elif not (kind.startswith("train.tags.") and line.lstrip().startswith("<")):
            yield line


def _decoded_lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8")
    except FileNotFoundError:
        raise _missing(path) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} line {number} is not UTF-8 text: byte 0x{error.object[error.start]:02x}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or garbled after line {number}: {error}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _missing(path: Path) -> DataError:
    return DataError(f"{path} does not exist, expected a file with a sentence a line")


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")
