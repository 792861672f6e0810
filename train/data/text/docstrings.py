"""Docstrings of Python's standard library: 1.6 million characters that every Python brings along.

They are read from the sources once, which takes some seconds, and kept in the user's cache. The same for one Python
version, slightly different from version to version.
"""

import ast
import json
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from train.data import DataError
from train.data.downloads import folder_of
from train.data.text.text import RULE, embedded_text
from train.files import replacing

OMITTED = frozenset("site-packages dist-packages test tests idlelib lib2to3 turtledemo distutils pydoc_data".split())
"""Folders without documentation, with other people's, or not in every Python."""
CLASSES = 10
BLANK = "_"
"""In place of the names that would give a package away."""
BLOCK = 8
"""Consecutive docstrings, often of one class, that are held out together."""


class Docstring(NamedTuple):
    """A docstring without its indentation, the dotted `name` of what it documents, and the first part of that."""

    package: str
    name: str
    text: str


def docstrings() -> tuple[Docstring, ...]:
    """All docstrings, in the order of the files and of the lines in them; each text once.

    Raises DataError if there are no sources: a Python in a zip file, or without its library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    cache = folder_of("docstrings") / f"{platform.python_version()}.json"
    try:
        stored = json.loads(cache.read_text(encoding="utf-8"))
        if stored["library"] == str(library):
            return tuple(Docstring(*entry) for entry in stored["docstrings"])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not there, or garbled: read again
    out = tuple(_read(library))
    if not out:
        raise DataError(f"no docstrings below {library}; expected the sources of the standard library")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as path:
            content = json.dumps({"library": str(library), "docstrings": out}, ensure_ascii=False)
            path.write_text(content, encoding="utf-8", errors="backslashreplace")
    except OSError:
        pass  # a cache that cannot be written costs some seconds next time
    return out


def _read(library: Path) -> Iterator[Docstring]:
    seen = set()
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if OMITTED & set(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # escapes of old sources
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        module = ".".join(parts).removesuffix(".__init__")
        for name, text in _documented(tree, module):
            text = "\n".join(line.rstrip() for line in text.split("\n") if not RULE.fullmatch(line)).strip()
            if text and text not in seen:
                seen.add(text)
                yield Docstring(parts[0], name, text)


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module, class or function and of what is inside it."""
    text = ast.get_docstring(node)
    if text:
        yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}")


def corpus() -> str:
    """All docstrings, then the help texts of the language reference: a text to learn from, about 2 million characters.

    Paragraphs are separated by empty lines.
    """
    return "\n\n".join([*(entry.text for entry in docstrings()), embedded_text()])


def paragraphs() -> list[tuple[str, str, str]]:
    """(package, name, first paragraph on one line) of every docstring with one of at least four words; each once."""
    out: dict[str, tuple[str, str, str]] = {}
    for package, name, text in docstrings():
        first = " ".join(text.split("\n\n")[0].split())
        if len(first.split()) >= 4:
            out.setdefault(first, (package, name, first))
    return list(out.values())


def by_package() -> tuple[list[tuple[str, str]], list[int]]:
    """(text, package) of first paragraphs of the ten packages that have most, and the number of the block of each.

    Names of the package and its modules, classes and functions that a text documents are blanked, or they would tell.
    Blocks are of eight records in a row, to be held out as a whole: neighbours resemble each other.
    """
    entries = paragraphs()
    packages = {package for package, _ in Counter(package for package, *_ in entries).most_common(CLASSES)}
    records: dict[str, str] = {}
    for package, name, text in entries:
        if package in packages:
            blanked = _blanked(text, {package, *name.split(".")})
            records.setdefault(blanked, package)
    return list(records.items()), [i // BLOCK for i in range(len(records))]


def _blanked(text: str, names: set[str]) -> str:
    parts = sorted({part for name in names for part in (name, name.strip("_")) if len(part) > 2}, key=len, reverse=True)
    if not parts:
        return text
    return re.sub(rf"(?i)(?<![a-z0-9])({'|'.join(map(re.escape, parts))})(?![a-z0-9])", BLANK, text)


def title_and_body() -> list[tuple[str, str]]:
    """(first line, the rest on one line) of each docstring that has both, of at least three and eight words."""
    out: dict[str, str] = {}
    for entry in docstrings():
        first, _, rest = entry.text.partition("\n")
        first, rest = " ".join(first.split()), " ".join(rest.split())
        if len(first.split()) >= 3 and len(rest.split()) >= 8:
            out.setdefault(first, rest)
    return list(out.items())
