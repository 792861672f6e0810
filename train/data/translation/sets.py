"""The sentence pairs that the `--data` of an experiment names: one entrance, whatever files they come from."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.data import DataError
from train.data.downloads import Download, fetch_all
from train.data.file_tree import Skipped
from train.data.text import docstrings
from train.data.text.tokenizers import SentenceTokenizer
from train.data.translation import dates, number_pairs
from train.data.translation.corpus import Corpus, fitting
from train.data.translation.files import Pair, PairFiles, Pairs, column_name, lines, no_pairs, read, table
from train.files import shown

log = logging.getLogger(__name__)

VALIDATIONS = ("val", "valid", "validation", "dev")
"""Names of the validation part of a folder; the first that is there is used."""
TABLES = ("tsv", "csv", "jsonl")
"""Ends of the names of tables, in a folder."""
HELD = 100
"""Where there is no validation part, every hundredth pair is held out for it."""


class ParallelSet(NamedTuple):
    """Pairs for training, validation and testing (by name, perhaps none); `languages` is (source, target).

    `origin` says where the validation part comes from; `skipped` are files that are not used, with the reason.
    """

    name: str
    languages: Pair
    train: Pairs
    validation: list[Pair]
    tests: dict[str, list[Pair]]
    origin: str = ""
    skipped: tuple[Skipped, ...] = ()

    @property
    def test_sets(self) -> dict[str, list[Pair]]:
        """`tests`, or where there are none the validation part."""
        return self.tests or {"validation": self.validation}


_MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/a3d2e0d26b56f3846f66a952536ffed4e401d05a/data/task1/raw"
_WMT = "https://www.statmt.org"
DOWNLOADS = {
    # The SHA-256 of the files at this commit.
    "multi30k": [
        Download(f"{_MULTI30K}/{file}.gz", f"sha256:{checksum}")
        for file, checksum in {
            "train.de": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
            "train.en": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
            "val.de": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
            "val.en": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
            "test_2016_flickr.de": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
            "test_2016_flickr.en": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
            "test_2017_flickr.de": "a2c89666db00c495cd8513b9d708d5a3acc205d7de312ef2bf5fb7ebc1540aee",
            "test_2017_flickr.en": "76a444ee25172e72695cddb13ae4a3bda59430617be88e0bb46b60504f054074",
        }.items()
    ],
    # The MD5 by which sacrebleu checks this archive.
    "iwslt17": [
        Download(
            "https://raw.githubusercontent.com/hlt-mt/WIT3/master/archive/2017-01-trnted/texts/de/en/de-en.tgz",
            "md5:ca2b94d694150d4d6c5dc64c200fa589",
            None,
        )
    ],
    # The MD5 by which sockeye checks the archives for training and validation, sacrebleu the one for testing.
    "wmt14": [
        Download(
            f"{_WMT}/wmt13/training-parallel-europarl-v7.tgz",
            "md5:c52404583294a1b609e56d45b2ed06f5",
            ("training/europarl-v7.de-en.de", "training/europarl-v7.de-en.en"),
        ),
        Download(
            f"{_WMT}/wmt13/training-parallel-commoncrawl.tgz",
            "md5:7e0acbe86b0d7816300e14650f5b2bd4",
            ("commoncrawl.de-en.de", "commoncrawl.de-en.en"),
        ),
        Download(
            f"{_WMT}/wmt14/training-parallel-nc-v9.tgz",
            "md5:92e42b68f9d3c2ae9722e6d1c2623e21",
            ("training/news-commentary-v9.de-en.de", "training/news-commentary-v9.de-en.en"),
        ),
        Download(f"{_WMT}/wmt14/dev.tgz", "md5:88ba3fc60b2278d59277122e1c7dd6e7", None),
        Download(f"{_WMT}/wmt14/test-full.tgz", "md5:a8cd784e006feb32ac6f3d9ec7eb389a", None),
    ],
}
UNCHECKED = {"iwslt14": "https://wit3.fbk.eu/archive/2014-01/texts/de/en/de-en.tgz"}
"""Sets whose files have no published checksum, and their addresses; they are read from a folder."""


def open_pairs(data: str, source: str = "de", target: str = "en", *, every: int = HELD, block: int = 1) -> ParallelSet:
    """The pairs that `data` names.

    - "dates": the embedded sentences (`dates.pairs`), German and English.
    - "numbers": numbers, dates and prices in words and in digits (`number_pairs.pairs`), both ways.
    - "docstrings": first line and body of the docstrings of Python's library (`docstrings.title_and_body`).
    - "multi30k", "iwslt17", "wmt14": downloaded once, checked, kept in the user's cache; German and English.
    - a folder with `train.de` and `train.en` (any two languages, gzipped or not), `train.tsv`, `train.csv` or
      `train.jsonl`; the same with `val`, `valid`, `validation` or `dev` for validation, and with any names that begin
      with `test`; or a folder with the original files of IWSLT-14, IWSLT-17 or WMT-14.
    - FILE.tsv, FILE.csv or FILE.jsonl, or SOURCE,TARGET: one file or two; or PREFIX, where PREFIX.de and PREFIX.en are.

    A table has the source in its first column and the target in its second, unless its first line names the columns
    (`files.table`). Without a validation part one pair in a hundred is for validation.

    Args:
        every, block: without a validation part, one of `every` blocks of `block` pairs in a row is for validation;
            smaller blocks where the pairs are few.

    Raises:
        DataError: nothing of this is there, or not in these languages; an empty part; or as `files.lines`.
    """
    path = Path(data)
    if source == target:
        raise DataError(f"source and target are both {source}; expected two languages or columns")
    if not path.exists():
        if data in EMBEDDED:
            return EMBEDDED[data](source, target)
        if data in DOWNLOADS:
            return _open_folder(download(data), data, source, target)
        if data in UNCHECKED:
            address = UNCHECKED[data]
            raise DataError(f"{data} has no published checksum to download by: unpack {address} and name the folder")
    if path.is_dir():
        return _open_folder(path, path.resolve().name, source, target, every, block)
    part = _one_part(data, source, target)
    if part is None:
        expected = f"a folder, a TSV, CSV or JSONL, SOURCE,TARGET or one of {', '.join(NAMES)}"
        raise DataError(f"'{data}' does not exist; expected {expected}")
    return _held_out(*part, (source, target), every, block)


def open_tests(data: str, source: str = "de", target: str = "en") -> dict[str, list[Pair]]:
    """Pairs to evaluate on, by name: all pairs of a TSV, SOURCE,TARGET or PREFIX; of a folder, which needs no training
    part, or of a name the test sets, or the validation part where there are none.

    Raises DataError as `open_pairs`.
    """
    path, part = Path(data), _one_part(data, source, target)
    if part is not None:
        return {part[0]: read(part[1])}
    tests = _tests(path, _parts(path), source, target)[0] if path.is_dir() else {}
    return tests or open_pairs(data, source, target).test_sets


def fit(
    parts: Mapping[str, list[Pair]], tokenizer: SentenceTokenizer, longest: int
) -> tuple[dict[str, list[Pair]], list[str]]:
    """(Validation and test parts without their pairs that are too long, a note per part that had some), by the rule by
    which `corpus.open_corpus` leaves them out of the training part.

    Raises DataError: no pair of a part is left.
    """
    fitting_parts, notes = {}, []
    for name, pairs in parts.items():
        fitting_parts[name], too_long = fitting(pairs, tokenizer, longest)
        if too_long:
            notes.append(f"{name}: {len(too_long):,} pairs with over {longest} tokens")
        if not fitting_parts[name]:
            raise DataError(f"{name}: not one of {len(pairs)} pairs has up to {longest} tokens on both sides")
    return fitting_parts, notes


def download(name: str, directory: Path | None = None, base_url: str | None = None) -> Path:
    """Fetch a known set and return its folder; files that are there already and whole are not fetched again.

    Args:
        name: a key of `DOWNLOADS`.
        directory: folder to keep it in, one in the user's cache if None.
        base_url: another address of files of the same names (their checksums are compared).

    Raises DataError: no connection, wrong checksum.
    """
    return fetch_all(name, DOWNLOADS[name], directory, base_url)


def _embedded(source: str, target: str) -> ParallelSet:
    if {source, target} != {"de", "en"}:
        raise DataError(f"dates: no pair of languages {source}-{target}; there are de, en")
    order = 1 if source == "de" else -1
    train, validation, test = ([pair[::order] for pair in part] for part in dates.pairs())
    return ParallelSet("dates", (source, target), train, validation, {"test": test}, "random sentences")


def _numbers(source: str, target: str) -> ParallelSet:
    train, validation, test = number_pairs.pairs()
    origin = "what is held out is so both ways"
    return ParallelSet("numbers", (source, target), train, validation, {"test": test}, origin)


def _docstrings(source: str, target: str) -> ParallelSet:
    parts: tuple[list[Pair], ...] = ([], [], [])
    for i, pair in enumerate(docstrings.title_and_body()):
        parts[max(0, i // docstrings.BLOCK % 10 - 7)].append(pair)
    origin = f"validation and test are two of every ten blocks of {docstrings.BLOCK} neighbours"
    return ParallelSet("docstrings", (source, target), *parts[:2], {"test": parts[2]}, origin)


EMBEDDED = {"dates": _embedded, "docstrings": _docstrings, "numbers": _numbers}
NAMES = (*EMBEDDED, *DOWNLOADS, *UNCHECKED)


def _open_folder(folder: Path, name: str, source: str, target: str, every: int = HELD, block: int = 1) -> ParallelSet:
    tagged = [*folder.glob("train.tags.*"), *folder.glob("*/train.tags.*")]
    if tagged:
        return _open_iwslt(tagged[0].parent, name, source, target)
    if (folder / "training" / "europarl-v7.de-en.de").exists():
        return _open_wmt14(folder, name, source, target)
    parts = _parts(folder)
    if "train" not in parts:
        raise DataError(f"no train.{source} and train.{target}, nor train.tsv, train.csv or train.jsonl, in {folder}")
    train = _files(folder / "train", source, target)
    tests, skipped = _tests(folder, parts, source, target)
    validations = [part for part in VALIDATIONS if part in parts]
    skipped += [(folder / part, f"is not used: {validations[0]} is for validation") for part in validations[1:]]
    if not validations:
        held_out = _held_out(name, train, (source, target), every, block)
        return held_out._replace(tests=tests, skipped=tuple(skipped))
    validation = read(_files(folder / validations[0], source, target))
    return ParallelSet(name, (source, target), train, validation, tests, validations[0], tuple(skipped))


def _tests(
    folder: Path, parts: Mapping[str, Any], source: str, target: str
) -> tuple[dict[str, list[Pair]], list[Skipped]]:
    """(The test sets of a folder by name, those that are not in both languages)."""
    tests, skipped = {}, []
    for part in sorted(part for part in parts if part.startswith("test")):
        if parts[part].keys() >= {source, target} or parts[part].keys() & set(TABLES):
            tests[part] = read(_files(folder / part, source, target))
        else:
            reason = f"there is only {', '.join(parts[part])}; this test set is left out"
            log.warning("%s: %s", shown(folder / part), reason)
            skipped.append((folder / part, f"is left out: there is only {', '.join(parts[part])}"))
    return tests, skipped


def _open_iwslt(folder: Path, name: str, source: str, target: str) -> ParallelSet:
    """IWSLT-17 with dev2010 for validation and tst2010 to tst2015 as one test set; IWSLT-14 as is usual since Ranzato
    et al. 2015 (arXiv:1511.06732): every 23rd training sentence for validation, all dev and tst sets as one to test."""
    training = sorted(folder.glob("train.tags.*"))
    pair = training[0].name.split(".")[2]
    languages = {path.name.rpartition(".")[2] for path in training}
    if not languages >= {source, target}:
        raise DataError(f"{folder}: no pair of languages {source}-{target}; there are {', '.join(sorted(languages))}")

    def files(parts: list[str]) -> PairFiles:
        sides = (tuple(folder / part.format(language) for part in parts) for language in (source, target))
        return PairFiles(*sides)

    names = sorted(path.name for path in folder.glob(f"IWSLT*.{pair}.{source}.xml"))
    names = [name.removesuffix(f".{source}.xml") + ".{}.xml" for name in names]
    train = files([f"train.tags.{pair}.{{}}"])
    validations = [name for name in names if name.startswith("IWSLT17.TED.dev2010.")]
    tests = [name for name in names if name not in validations]
    test_sets = {"test": read(files(tests))} if tests else {}
    if not validations:
        return _held_out(name, train, (source, target), every=23)._replace(tests=test_sets)
    return ParallelSet(name, (source, target), train, read(files(validations)), test_sets, "dev2010")


def _open_wmt14(folder: Path, name: str, source: str, target: str) -> ParallelSet:
    """Trained on Europarl, Common Crawl and News Commentary, validated on newstest2013, tested on newstest2014."""
    if {source, target} != {"de", "en"}:
        raise DataError(f"{folder}: no pair of languages {source}-{target}; there are de, en")
    names = ("training/europarl-v7.de-en", "commoncrawl.de-en", "training/news-commentary-v9.de-en")
    sides = (tuple(folder / f"{name}.{language}" for name in names) for language in (source, target))

    def test(prefix: str) -> list[Pair]:
        return read(PairFiles((folder / f"{prefix}-src.{source}.sgm",), (folder / f"{prefix}-ref.{target}.sgm",)))

    tests = {"newstest2014": test("test-full/newstest2014-deen")}
    validation = test("dev/newstest2013")
    return ParallelSet(name, (source, target), PairFiles(*sides), validation, tests, "newstest2013")


def _held_out(name: str, files: PairFiles, languages: Pair, every: int = HELD, block: int = 1) -> ParallelSet:
    if block > 1:
        block = max(1, min(block, sum(1 for _ in lines(files)) // every))
    options = {"columns": files.columns, "header": files.header, "every": every, "block": block}
    train, held = (PairFiles(files.sources, files.targets, held=held, **options) for held in (False, True))
    validation = list(held)
    if not validation:
        if not any(True for _ in files):
            raise no_pairs(files)
        raise DataError(f"{files.name}: too few sentences to hold out one in {every} for validation")
    origin = f"one pair in {every}" if block == 1 else f"one of every {every} blocks of {block} pairs"
    return ParallelSet(name, languages, train, validation, {}, origin)


def facts(
    data: ParallelSet, train: Corpus | None = None, validation: Corpus | None = None, left_out: Sequence[str] = ()
) -> dict[str, Any]:
    """Names and values of a set, for `train.data.understood`.

    Args:
        train, validation: its parts as token ids, with their notes on pairs that were left out.
        left_out: further notes, such as overlong pairs of a test set.
    """
    out: dict[str, Any] = {"pairs": data.name, "languages": " to ".join(data.languages)}
    if isinstance(data.train, PairFiles) and data.train.columns:
        order = " and ".join(map(column_name, data.train.columns))
        named = "named by the first line" if data.train.header else "no header"
        out["columns"] = f"{order} ({named})" if isinstance(data.train.columns[0], int) else order
    first = next(iter(data.train), None)
    if first is not None:
        out["first pair"] = " = ".join(text if len(text) <= 60 else text[:57] + "..." for text in first)
    if train is not None:
        out["training pairs"] = len(train)
    count = len(data.validation if validation is None else validation)
    out["validation pairs"] = f"{count:,} ({data.origin})" if data.origin else count
    out["test pairs"] = {name: len(pairs) for name, pairs in data.tests.items()}
    parts = {"training": train, "validation": validation}
    notes = [f"{name}: {note}" for name, corpus in parts.items() if corpus is not None for note in corpus.notes]
    return out | {"left out": [*notes, *left_out], "skipped": list(data.skipped)}


def _one_part(data: str, source: str, target: str) -> tuple[str, PairFiles] | None:
    """(name, pairs) of a TSV, SOURCE,TARGET or PREFIX; None for anything else."""
    path = Path(data)
    if path.is_file():
        return path.name, table(path, source, target)
    if path.exists() or data in NAMES:
        return None
    if "," in data:
        first, second = (Path(part.strip()) for part in data.split(",", 1))
        return first.name, PairFiles((first,), (second,))
    if path.parent.is_dir() and path.name in _parts(path.parent):
        return path.name, _files(path, source, target)
    return None


def _parts(folder: Path) -> dict[str, dict[str, Path]]:
    """The files of a folder by the name before the last dot and the end after it, without `.gz`."""
    parts: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        stem, _, end = path.name.removesuffix(".gz").rpartition(".")
        if stem and path.is_file():
            parts.setdefault(stem, {})[end] = path
    return parts


def _files(prefix: Path, source: str, target: str) -> PairFiles:
    """The files of one part. Raises DataError, listing the languages there are, if one is missing."""
    files = _parts(prefix.parent)[prefix.name]
    if source in files and target in files:
        return PairFiles((files[source],), (files[target],))
    for kind in TABLES:
        if kind in files:
            return table(files[kind], source, target)
    raise DataError(f"{prefix}: no pair of languages {source}-{target}; there are {', '.join(sorted(files))}")
