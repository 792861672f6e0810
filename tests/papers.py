"""Which paper is where: nets/PAPERS.md, from what docstrings and comments of core, nets and train cite.

    python -m tests.papers        writes the page

A citation is "Ho et al. 2020", perhaps with a title in quotes, an arXiv id, and what is cited: (eq. 4), algorithm 2.
Titles and links that the sources lack come from the pages. Where a module says that "equations are its", a number
without a citation belongs to the paper that the module's docstring names first.
"""

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "nets" / "PAPERS.md"
FOLDERS = ("core", "nets", "train")
PAGES = [ROOT / name for name in ("README.md", "core/README.md", "nets/README.md", "train/README.md")]
HEAD = """# Which paper is where

Every paper that the sources cite, by year, with the places that cite it: the function or class, and the equations that
it names. `python -m tests.papers` writes this page from docstrings and comments.

| paper | where |
| --- | --- |"""

NAME = r"(?:(?:van|von|den|der|de|la)\s+)*[A-ZÀ-Ý][\w’-]*[a-zß-ÿ](?:-[A-Z]\w+)?"
AUTHORS = rf"{NAME}(?:(?:,\s+{NAME})*,?\s+(?:and|&)\s+{NAME}|\s+et\s+al\.)?"
ID = r"arXiv:(?P<id>[a-z-]*/?[\d.]*\d)"
CITATION = re.compile(
    rf"(?P<authors>{AUTHORS})(?:'s?)?\s+\(?(?P<year>(?:19|20)\d\d)\b\)?"
    rf'(?:[\s,(]*"(?P<title>[^"]+)")?(?:[\s,(]*(?:[\w-]+[\s,(]+)?{ID})?'
)
NUMBERED = r"(?:eqs?\.|equations?|algorithms?|alg\.)"
PLACED = r"(?:sections?|appendix|tables?|figures?)"
PART = re.compile(rf"(?:{NUMBERED}\s\d+|{PLACED}\s[\dA-Z][\d.]*\b)(?:(?:,| and| to)\s\d[\d.]*\b)*")
EXCEPT = {"ImageNet"}  # names before a year that are no author's


class Citation(NamedTuple):
    """A citation: authors with "and", year, title and arXiv id or "", and where it is."""

    authors: str
    year: int
    title: str
    id: str
    file: str
    line: int
    name: str
    parts: tuple[str, ...]

    @property
    def short(self) -> str:
        """Authors and year, of three authors and more the first alone: "Ho et al. 2020"."""
        return short(self.authors, self.year)


def blocks(source: str) -> Iterator[tuple[int, str, str]]:
    """(first line, text, name of the function or class around it or "") of docstrings and of adjacent comments."""
    spans, strings = [], []

    def visit(node: ast.AST) -> None:
        for inner in getattr(node, "body", []):
            if isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
                spans.append((inner.lineno, inner.end_lineno, inner.name))
            if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant):
                strings.append((inner.lineno, inner.end_lineno, str(inner.value.value)))
            visit(inner)

    def around(line: int) -> str:
        names = [name for first, last, name in spans if first <= line <= last and not name.startswith("__")]
        return names[0] if names else ""

    visit(ast.parse(source))
    for first, _, text in strings:
        yield first, text, around(first)
    within = {line for first, last, _ in strings for line in range(first, last + 1)}
    lines = enumerate(source.splitlines(), 1)
    comments = {at: line.partition("# ") for at, line in lines if at not in within and "# " in line}
    run: list[int] = []
    for at in [*comments, 0]:
        # A comment on a line of its own goes on with the next such line.
        if run and not (at == run[-1] + 1 and not comments[at][0].strip()):
            yield run[0], "\n".join(comments[i][2] for i in run), around(run[0])
            run = []
        run += [at] if at else []


def citations_of(file: str, source: str) -> Iterator[Citation]:
    """Citations of a Python file."""
    docstring = ast.get_docstring(ast.parse(source), clean=False) or ""
    own = next(CITATION.finditer(docstring), None) if re.search(r"equations\s+are\s+its", docstring) else None
    for first, text, name in blocks(source):
        matches = [match for match in CITATION.finditer(text) if match["authors"] not in EXCEPT]
        for match, following in zip(matches, [*matches, None][1:], strict=True):
            rest = text[match.end() : following.start() if following else len(text)]
            # What is cited is in the same sentence.
            parts = PART.findall(re.split(r"\n\s*\n|(?<=\w\))\.\s|(?<=[a-z])\.\s+(?=[A-Z])", rest)[0])
            yield citation(match, parts, file, first + text[: match.start()].count("\n"), name)
        parts = PART.findall(text)
        if own and not matches and any(re.match(NUMBERED, part) for part in parts):
            yield citation(own, parts, file, first, name)


def citation(match: re.Match, parts: list[str], file: str, line: int, name: str) -> Citation:
    """The citation of a match of `CITATION`."""
    authors = " ".join(match["authors"].replace("&", "and").split())
    title = " ".join((match["title"] or "").split()).rstrip(",.")
    parts = tuple(dict.fromkeys(" ".join(part.split()) for part in parts))
    return Citation(authors, int(match["year"]), title, match["id"] or "", file, line, name, parts)


def citations() -> list[Citation]:
    """Citations of all sources, in their order."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    names = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    return [cite for file, source in names.items() for cite in citations_of(file, source)]


def short(authors: str, year: int) -> str:
    names = re.split(r", | and ", authors.replace("&", "and"))
    return f"{names[0]} et al. {year}" if len(names) > 2 else f"{' and '.join(names)} {year}"


def of_pages() -> tuple[list[Citation], dict[str, str]]:
    """Citations of the pages, and links of theirs by authors and year."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    cites = [citation(match, [], "", 0, "") for match in CITATION.finditer(text)]
    linked = re.finditer(rf"\[(?P<authors>{AUTHORS})\s(?P<year>(?:19|20)\d\d)\]\((?P<link>https://[^)\s]+)\)", text)
    return cites, {short(match["authors"], int(match["year"])): match["link"] for match in linked}


class Paper(NamedTuple):
    """A paper and all that cites it."""

    authors: str
    year: int
    title: str
    link: str
    places: list[Citation]


def papers(cites: list[Citation]) -> list[Paper]:
    """Papers by year and authors.

    A paper is its arXiv id, or its title. A citation with neither is of the one that its authors and year have: of all
    citations, or of those in its file.
    """
    more, links = of_pages()
    known = {cite.title: cite.id for cite in [*more, *cites] if cite.title and cite.id}
    labels = defaultdict(set)
    for cite in [*cites, *more]:
        if label := cite.id or known.get(cite.title, cite.title):
            labels[cite.short].add(label)
            labels[cite.short, cite.file].add(label)

    def label_of(cite: Citation) -> str:
        options = labels[cite.short], labels[cite.short, cite.file]
        only = next((min(option) for option in options if len(option) == 1), cite.short)
        return cite.id or known.get(cite.title, cite.title) or only

    groups = defaultdict(list)
    for cite in cites:
        groups[label_of(cite)].append(cite)
    several = Counter(places[0].short for places in groups.values())
    titles = {label_of(cite): cite.title for cite in more if cite.title}
    out = []
    for label, places in groups.items():
        first = places[0]
        title = next((cite.title for cite in places if cite.title), titles.get(label, ""))
        arxiv = any(cite.id == label for cite in [*places, *more])
        link = f"https://arxiv.org/abs/{label}" if arxiv else links.get(first.short, "") * (several[first.short] == 1)
        out.append(Paper(first.authors, first.year, title, link, places))
    return sorted(out, key=lambda paper: (paper.year, paper.authors, paper.title))


def page(cites: list[Citation]) -> str:
    """The page: a row per paper, with a link to each place that cites it."""
    lines = [HEAD]
    for paper in papers(cites):
        name = f"{paper.authors} {paper.year}"
        name = f"[{name}]({paper.link})" if paper.link else name
        places = {}
        for cite in paper.places:
            at = f"[{cite.file}:{cite.line}](../{cite.file}#L{cite.line})"
            shown = f"`{cite.name}` " if cite.name else ""
            parts = f" ({', '.join(cite.parts)})" if cite.parts else ""
            places[cite.file, cite.line, cite.name] = f"{shown}{at}{parts}"
        lines.append(f"| {name}{', ' + paper.title if paper.title else ''} | {'; '.join(places.values())} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(citations()), encoding="utf-8")
