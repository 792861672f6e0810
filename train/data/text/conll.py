"""Sentences with entities: files of the CoNLL kind, a word and its tag per line; the ways to write entities as tags.

Three ways are in use; all are read, and told from each other:

    IOB2   B- begins each entity, I- continues it (Tjong Kim Sang and Veenstra 1999, arXiv:cs/9907006)
    IOB1   I- does both, but B- begins the one that follows another of its type at once (Ramshaw and Marcus 1995)
    BIOES  as IOB2, but E- ends an entity and S- is one of a single word; also as BILOU (L, U) and BMES (M)

An entity goes on as conlleval, the script of the CoNLL shared tasks, has it: an I- that follows no entity of its type
begins one. From here on all tags are IOB2.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.data import DataError
from train.data.text import entities as generated
from train.data.text.files import decoded_lines, unpacked
from train.data.text.labelled import Skipped
from train.data.text.parts import HELD, files_of, held_out
from train.files import shown

TAG = re.compile(r"O|[BIESLUM]-.+")
DOCUMENT = "-DOCSTART-"
BLOCK = 8
"""Sentences in a row, of a file without documents, that are held out together."""


class Entity(NamedTuple):
    """The words from `first` up to `last`, which is not among them."""

    type: str
    first: int
    last: int


class Sentence(NamedTuple):
    """Words, and the tag of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


class Tagged(NamedTuple):
    """Sentences with IOB2 tags, the document (or block) that each is from, the form that they were in, and those that
    are not used."""

    sentences: tuple[Sentence, ...]
    groups: tuple[int, ...] = ()
    form: str = ""
    skipped: tuple[Skipped, ...] = ()

    def some(self, indices: Sequence[int]) -> "Tagged":
        """The sentences with these numbers."""
        return self._replace(sentences=tuple(self.sentences[i] for i in indices), groups=(), skipped=())


class TaggedSet(NamedTuple):
    """Sentences for training, validation and testing; `types` are those of the entities to learn from."""

    name: str
    types: tuple[str, ...]
    train: Tagged
    validation: Tagged
    test: Tagged
    origin: str
    skipped: tuple[Skipped, ...] = ()

    @property
    def parts(self) -> dict[str, Tagged]:
        """The parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


# Tags.


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of tags in any of the three ways."""
    out, type_, first, ended = [], "", 0, True
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if prefix in ("O", "B", "S", "U") or name != type_ or ended:
            if type_:
                out.append(Entity(type_, first, i))
            type_, first = name, i
        ended = prefix in ("O", "E", "L", "S", "U")
    return out


def iob2(spans: Sequence[Entity], count: int) -> tuple[str, ...]:
    """Tags of a sentence of `count` words."""
    tags = ["O"] * count
    for type_, first, last in spans:
        tags[first:last] = [f"B-{type_}", *[f"I-{type_}"] * (last - first - 1)]
    return tuple(tags)


def scheme(tags: Sequence[Sequence[str]]) -> str:
    """The name of the way that the tags of some sentences are written."""
    prefixes = {tag[0] for row in tags for tag in row}
    if prefixes & set("ESLUM"):
        return "BILOU" if prefixes & set("LU") else "BMES" if "M" in prefixes else "BIOES"
    begun, needed, spare = 0, 0, 0  # entities that begin with I-; B- after one of its type; B- elsewhere
    for row in tags:
        spans = entities(row)
        ends = {(span.type, span.last) for span in spans}
        for type_, first, _ in spans:
            begun += row[first][0] == "I"
            needed += row[first][0] == "B" and (type_, first) in ends
            spare += row[first][0] == "B" and (type_, first) not in ends
    if not begun:
        return "IOB2"
    return "IOB1" if not spare else f"IOB2, but {begun:,} entities begin with I-"


# Files.


def read(path: Path) -> Tagged:
    """The sentences of a file: a word and its tag in the first and the last column, sentences apart by empty lines.

    Columns are separated by tabs if there are any, else by spaces. A sentence in which a line has no tag, or no word,
    is left out. Comments before a sentence, `# ...`, are passed over; lines that are no UTF-8 are read as Latin-1.

    Raises DataError: it cannot be read, has no sentence, or more than a tenth of them are unusable.
    """
    with unpacked(path, "a file with a word and its tag per line") as file:
        lines, foreign = decoded_lines(file.read())
    separator = "tab" if any("\t" in line.strip() for line in lines[:1000]) else "space"
    rows, groups, skipped, columns = [], [], [], Counter[int]()
    words, tags, problem, document = [], [], None, 0
    for i, line in enumerate([*lines, ""], 1):
        line = line.rstrip(" \t")
        cells = (
            [cell.strip(" ") for cell in line.split("\t")] if separator == "tab" else re.split(" +", line.strip(" "))
        )
        if not line or cells[0].startswith(DOCUMENT):
            if problem:
                skipped.append(problem)
            elif words:
                rows.append((tuple(words), tags))
                groups.append(document)
            words, tags, problem, document = [], [], None, document + bool(line)
        elif words or not (cells[0] == "#" or cells[0].startswith("# ")) or TAG.fullmatch(cells[-1]):
            reason = _problem(cells)
            problem = problem or (reason and (f"{shown(path.name)} line {i}", reason))
            columns[len(cells)] += 1
            words.append(cells[0])
            tags.append(cells[-1])
    _check(path, len(rows), skipped)
    way = scheme([row[1] for row in rows])
    form = f"{columns.most_common(1)[0][0]} columns separated by a {separator}, the last one tags in {way}"
    form += f"; {document} documents" if document else ""
    form += f"; {foreign} lines are not UTF-8, read as Latin-1" if foreign else ""
    if document < HELD:
        groups = [i // BLOCK for i in range(len(rows))]
    sentences = tuple(Sentence(words, iob2(entities(tags), len(words))) for words, tags in rows)
    return Tagged(sentences, tuple(groups), form, tuple(skipped))


def _problem(cells: list[str]) -> str | None:
    if not cells[0]:
        return "has no word"
    if len(cells) < 2:
        return f"'{shown(cells[0][:40])}' has no tag"
    if not TAG.fullmatch(cells[-1]):
        return f"has the tag '{shown(cells[-1][:40])}', expected O, or B- or I- (or E-, S-, L-, U-, M-) and a type"
    return None


def _check(path: Path, count: int, skipped: Sequence[Skipped]) -> None:
    if len(skipped) * HELD > count + len(skipped):
        (where, problem), more = skipped[0], len(skipped) - 1
        rest = f" (and so in {more} more sentences)" if more else ""
        raise DataError(f"{where} {problem}{rest}; more than a tenth of the sentences")
    if not count:
        raise DataError(f"{path} has no sentence, expected a word and its tag per line")


def open_tagged(data: str, validation: str | None = None, test: str | None = None) -> TaggedSet:
    """The sentences of `--data`: "entities" (generated), a file, or a folder with one training file.

    Files for validation and testing are those of `parts.files_of`. For a part that has none, one of ten documents is
    held out, or of ten blocks of eight sentences.

    Raises DataError: as `read`; there is no entity to learn from; too few sentences to hold some out.
    """
    if data == "entities" and not Path(data).exists():
        parts = {name: Tagged(tuple(map(_sentence, rows))) for name, rows in generated.parts().items()}
        origin = "other sentences, half of whose names are not in training"
    else:
        files = files_of(data, validation, test)
        parts = {name: read(path) for name, path in files.items()}
        skipped = tuple(entry for part in parts.values() for entry in part.skipped)
        missing = [name for name in ("validation", "test") if name not in parts]
        origins = [f"{name} in {shown(path.name)}" for name, path in files.items() if name != "train"]
        if missing:
            everything, groups = parts["train"], parts["train"].groups
            kind = f"blocks of {BLOCK} sentences"
            if len(set(groups)) < HELD:  # a short file
                groups = range(len(groups))
                kind = "sentences"
            elif "documents" in everything.form:
                kind = "documents"
            parts |= {name: everything.some(rows) for name, rows in held_out(groups, missing).items()}
            origins.append(f"{' and '.join(missing)} held out, one of ten {kind} each")
        origin = ", ".join(origins)
        parts = {name: parts[name]._replace(skipped=()) for name in ("train", "validation", "test")}
    types = types_of(parts["train"])
    if not types:
        raise DataError(f"'{shown(data)}' has no entity to learn from; expected tags such as B-person")
    return TaggedSet(shown(data), types, **parts, origin=origin, skipped=() if data == "entities" else skipped)


def _sentence(row: tuple[Sequence[str], Sequence[tuple[str, int, int]]]) -> Sentence:
    words, spans = row
    return Sentence(tuple(words), iob2([Entity(*span) for span in spans], len(words)))


def types_of(part: Tagged) -> tuple[str, ...]:
    """Types of the entities in a part, sorted."""
    return tuple(sorted({tag[2:] for sentence in part.sentences for tag in sentence.tags if tag != "O"}))


def open_test(data: str, types: Sequence[str]) -> Tagged:
    """All sentences of a file. Raises DataError: as `read`; no entity in it has one of these types."""
    part = read(Path(data))
    others = types_of(part)
    if not set(others) & set(types):
        names = ", ".join(map(shown, others)) or "no entity"
        raise DataError(f"{shown(data)} has {names}; expected entities such as {', '.join(map(shown, types[:8]))}")
    return part


def facts(data: TaggedSet) -> dict[str, Any]:
    """Names and values of a set, for `train.data.understood`."""
    unknown = set(types_of(data.validation)) | set(types_of(data.test))
    return {
        "data": data.name,
        "form": data.train.form,
        "types of entities": list(data.types),
        "sentences": {name: len(part.sentences) for name, part in data.parts.items()},
        "entities": {name: sum(len(entities(s.tags)) for s in part.sentences) for name, part in data.parts.items()},
        "other parts": data.origin,
        "types not in training, always missed": sorted(unknown - set(data.types)),
        "skipped sentences": list(data.skipped),
    }


# Text without tags.


def words_of(text: str) -> list[tuple[int, int]]:
    """(first, last + 1) character of each word and mark of a text, as files of the CoNLL kind have them apart.

    Hyphens and apostrophes inside a word belong to it, but 's is a word; so do dots, commas and colons between digits,
    @ and # before it. An address of the web is a word, and so is a Chinese or Japanese character.
    """
    kinds = "".join(map(_kind, text))
    for match in ADDRESS.finditer(text):
        kinds = kinds[: match.start()] + "u" * len(match[0]) + kinds[match.end() :]
    return [match.span() for match in WORD.finditer(kinds)]


ADDRESS = re.compile(r"https?://\S*[\w/]")
WORD = re.compile(r"u+|as(?![dsw])|@?[dsw]+(?:(?:-|a(?!s(?![dsw])))[dsw]+|(?<=d)n(?=d)[dsw]+)*|[^ ]")


def _kind(c: str) -> str:
    """A letter per kind of character: d digit, s the letter s, w other letter, a apostrophe, n mark of numbers, c a
    word of its own, p other mark; - and @ are themselves, as is space."""
    if c.isspace() or c in KINDS:
        return KINDS.get(c, " ")
    category = unicodedata.category(c)
    if category == "Lo" and unicodedata.east_asian_width(c) == "W" and not "가" <= c <= "힣":
        return "c"
    return "p" if category[0] not in "LMN" else "d" if category == "Nd" else "w"


KINDS = {"'": "a", "’": "a", "s": "s", "S": "s", ".": "n", ",": "n", ":": "n", "-": "-", "@": "@", "#": "@"}
