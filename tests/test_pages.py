"""The links, anchors, pictures and command lines of every page."""

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.experiments.runs import execute
from train.run import command_line

ROOT = Path(__file__).parents[1]
FOLDERS = ("core", "nets", "train", "experiments", "tests", ".github")
FILES = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in FILES)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def read(page: str) -> str:
    """The text of a page or of another file, by its path."""
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The fragments that a page has: explicit ones, and those of its headings by the rules of GitHub."""
    text = FENCE.sub("", text)
    names = set(re.findall(r"<\w+ (?:name|id)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6} +(.*?)(?: +#+)? *$", text, re.MULTILINE):
        heading = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)  # a link's text alone
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        same = sum(other == name or re.fullmatch(rf"{re.escape(name)}-\d+", other) is not None for other in names)
        names.add(f"{name}-{same}" if same else name)
    return names


def links(text: str) -> list[str]:
    """The targets of a page's links and pictures, of Markdown and of HTML, outside of code."""
    text = re.sub(r"`[^`\n]+`", "code", FENCE.sub("", text))
    inline = re.findall(r"\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)(?: \"[^\"]*\")?\)", text)
    references = re.findall(r"^ *\[[^]]+\]: +(\S+)", text, re.MULTILINE)
    return inline + references + re.findall(r"<\w+ [^>]*?(?:href|src)=\"([^\"]*)\"", text)


def fault(page: str, link: str) -> str:
    """A link's fault in a word or two; "" for none."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        whole = parts.scheme == "https" and re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc)
        return "" if whole and not re.search(r"[<>\"{}|\\^`]|\.$", link) else "no https address"
    path = (ROOT / page).parent / unquote(parts.path) if parts.path else ROOT / page
    if not path.exists() or not path.resolve().is_relative_to(ROOT):
        return "no such file"
    if line := re.fullmatch(r"L(\d+)", parts.fragment):
        return "" if int(line[1]) <= len(path.read_text(encoding="utf-8").splitlines()) else "no such line"
    if path.is_dir():
        path /= "README.md"  # which GitHub shows below the files
    if parts.fragment and (not path.exists() or parts.fragment not in anchors(path.read_text(encoding="utf-8"))):
        return "no such heading"
    return ""


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    wrong = [f"{link}: {what}" for link in links(read(page)) if (what := fault(page, link))]
    assert not wrong, "\n".join(wrong)


def test_every_net_is_in_the_table_of_nets_with_its_run():
    rows = [line.strip("| ").split(" | ") for line in read("nets/README.md").splitlines() if line.count(" | ") == 5]
    nets, runs = [row[2] for row in rows[2:]], [row[5] for row in rows[2:]]
    assert not [run for run in runs if not re.search(r"\]\(\.\./experiments/[A-Z]+\.md(#[\w-]+)?\)", run)]
    files = [path.relative_to(ROOT / "nets").as_posix() for path in (ROOT / "nets").glob("*/*.py")]
    files = [file for file in files if not re.search(r"^blocks/|^explained/|/by_name", file)]
    files = [file for file in files if re.search(r"^(PRESETS\b|def spec\()", read(f"nets/{file}"), re.MULTILINE)]
    assert len(files) > 40 and not [file for file in files if f"`{file}`" not in " ".join(nets)]


def test_links_are_told_from_code_and_have_the_anchors_of_github():
    text = (
        '# A `b`: C, d_e!\n## Twice\n## Twice\n<a name="own"></a>\n```sh\n# no heading\n```\n`[x](y)` [x](z) ![](q.png)'
    )
    assert anchors(text) == {"a-b-c-d_e", "twice", "twice-1", "own"}
    assert links(text) == ["z", "q.png"]
    expected = {"http://a.org": "no https address", "https://a": "no https address", "https://a.org/b#c": ""}
    expected |= {"missing.md": "no such file", "README.md#missing": "no such heading", "../../etc": "no such file"}
    expected |= {"README.md#L99999": "no such line", "tests": "", "core#keys": "", "#functree": ""}
    assert {link: fault("README.md", link) for link in expected} == expected


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of a text, as words: of its sh blocks, of `python ...` within a line, of a column of a table
    with the head `python FOLDER/`, and of a docstring, where a remark may follow after two spaces."""
    blocks = "\n".join(code for _, language, code in FENCE.findall(text) if language == "sh")
    text = re.sub(r" *\\\n +", " ", FENCE.sub("", text))  # one line of several
    lines = re.sub(r"\\\n", " ", blocks).splitlines() + re.findall(r"`(python [^`\n]+)`", text)
    lines += re.findall(r"^    (python .*?)(?:  .*)?$", text, re.MULTILINE)
    for folder, rows in re.findall(r"^\|.*\| `(python [\w/]+/)` \|\n((?:\|.*\n)+)", text, re.MULTILINE):
        lines += [folder + rest for rest in re.findall(r"\| `(\w+\.py[^`\n]*)` \|$", rows, re.MULTILINE)]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;<>"):  # the next command, or the file of a redirection, which is no command
                yield words
                words = []
            else:
                words.append(word)


SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("[!_]*.py"))
SOURCES = {page: read(page) for page in PAGES}
SOURCES |= {f"{name}.py": ast.get_docstring(ast.parse(read(f"experiments/{name}.py")), clean=False) for name in SCRIPTS}
ALL = [(page, words) for page, text in SOURCES.items() for words in commands(text)]
COMMANDS = [(page, words) for page, words in ALL if words[:1] == ["python"] and len(words) > 1]


def test_commands_are_told_from_remarks():
    text = "`python a.py --x 'y z'`\n```sh\npip install . && python b.py < in > out  # remark\n```\n"
    text += "    python c.py          about a minute; it's\n    python d.py --long 1 \\\n        --longer 2\n"
    text += "| time | `python x/` |\n| --- | --- |\n| 3 | `e.py --f` |\n"
    programs = [" ".join(words[1:]) for words in commands(text) if words[:1] == ["python"]]
    assert programs == ["b.py", "a.py --x y z", "x/", "c.py", "d.py --long 1 --longer 2", "x/e.py --f"]


def test_commands_name_programs():
    programs = [(page, words[1]) for page, words in COMMANDS if not words[1].startswith("-")]
    missing = [f"{page}: {program}" for page, program in programs if not (ROOT / program).exists()]
    assert not missing, "\n".join(missing)
    assert {f"experiments/{name}.py" for name in SCRIPTS} <= {program for _, program in programs}


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_of_experiments_are_understood(name, monkeypatch, capsys):
    """By the script itself, up to the call of what the command asks for."""
    run, wrong, seen = command_line.run, [], []

    def parse(description, default, *, root=None, **others):
        def understood(command):
            return command_line.Command(*command)._replace(function=seen.append)

        others = {name: understood(command) for name, command in others.items()}
        for page, words in COMMANDS:
            if words[1] == f"experiments/{name}.py":
                monkeypatch.setattr(sys, "argv", [word for word in words[1:] if word != "..."])
                try:
                    run(description, understood(default), **others)
                except SystemExit:
                    wrong.append(f"{page}: {shlex.join(words)}\n  {capsys.readouterr().err.strip()}")

    monkeypatch.setattr(command_line, "run", parse)
    execute(ROOT / "experiments" / f"{name}.py")
    assert seen and not wrong, "\n".join(wrong)


def test_commands_of_benchmarks_have_their_flags():
    """The flags stand in the source: importing a program would import what it compares with."""
    wrong = []
    for page, words in COMMANDS:
        if re.fullmatch(r"tests/(benchmarks|comparisons)/\w+\.py", words[1]):
            present = set(re.findall(r"add_argument\(\"(--[\w-]+)\"", read(words[1])))
            wrong += [f"{page}: {word} of {words[1]}" for word in words[2:] if word[:2] == "--" and word not in present]
    assert not wrong, "\n".join(wrong)
