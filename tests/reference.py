"""The API reference: a site with a page per public module, every README and every tutorial.

    pip install -e ".[docs]"
    python -m tests.reference        build/reference/site; a warning or a broken link is an error

A page lies where its source lies in the repository, so that links between pages hold as they are. A link to a module
leads to the module's page, one to any other file into the repository. The settings are in tests/reference.yml.
"""

import ast
import importlib.util
import json
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from experiments.tutorials.__main__ import REPOSITORY

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "reference"
SITE = FOLDER / "site"
URL = f"https://github.com/{REPOSITORY}"
PACKAGES = ("core", "nets", "train")
FOLDERS = (*PACKAGES, "experiments", "tests")
CODE = re.compile(r"^( *)```.*?^\1```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=\))")
ITEM = re.compile(r"( *)([-*]|\d+\.) +(?=\S)")
NOTEBOOKS = "experiments/tutorials/notebooks"
WIDE = ".md-grid { max-width: 78rem; }\n"  # lines of code have up to 120 characters


def public_modules() -> dict[str, Path]:
    """Paths of the modules of core, nets and train without a leading underscore, by their names."""
    paths = (path.relative_to(ROOT) for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py")))
    names = {path: ".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {name: path for path, name in names.items() if "._" not in name}


def public_definitions(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and public methods of these classes; a method's name with a dot."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def page_of(path: Path) -> str:
    """Page of a module: beside it. A package's is the first page of its folder, unless a README is."""
    if path.name == "__init__.py" and not (ROOT / path).with_name("README.md").exists():
        return path.with_name("README.md").as_posix()
    return path.with_suffix(".md").as_posix()


def targets() -> dict[str, str]:
    """Pages of modules by path and by name, and places in them by the names of functions and classes."""
    out = {}
    for name, path in public_modules().items():
        out |= {path.as_posix(): page_of(path), name: page_of(path)}
        out |= {f"{name}.{other}": f"{page_of(path)}#{name}.{other}" for other, _ in public_definitions(ROOT / path)}
    return out


def outside_code(change: Callable[[str], str], text: str) -> str:
    """A text with `change` made to all that is neither a block of code nor code in a line."""
    parts, at = [], 0
    for match in CODE.finditer(text):
        parts += [change(text[at : match.start()]), match[0]]
        at = match.end()
    return "".join([*parts, change(text[at:])])


def relinked(text: str, folder: str, pages: dict[str, str]) -> str:
    """The text of a page in `folder` with links that hold in the site; `pages` are the `targets`."""

    def change(match: re.Match) -> str:
        parts = urlsplit(match[0])
        if parts.scheme or not parts.path:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, unquote(parts.path)))
        fragment = f"#{parts.fragment}" if parts.fragment else ""
        if (ROOT / path).is_dir():
            path += "/README.md" if (ROOT / path / "README.md").exists() else "/__init__.py"
        if path in pages:  # a line of a module is a place in its source, which no page has
            path, fragment = pages[path], ""
        elif path.endswith(".ipynb"):
            path = path.removesuffix("ipynb") + "md"
        elif not path.endswith(".md") and not path.startswith("experiments/gallery/"):
            return f"{URL}/blob/main/{path.removesuffix('/__init__.py')}{fragment}"
        return posixpath.relpath(path, folder or ".") + fragment

    return outside_code(lambda part: LINK.sub(change, part), text)


def four_spaces(text: str) -> str:
    """Lists as Python-Markdown reads them: after a blank line, four spaces of indentation per level."""
    lines, depths, fence = [], [], False
    for line in text.splitlines():
        indent, item = len(line) - len(line.lstrip()), None if fence else ITEM.match(line)
        if line.strip() and not fence:
            first = not depths
            while depths and indent < depths[-1]:
                depths.pop()
            if item and first and lines and lines[-1]:
                lines.append("")
        inner = max(indent - depths[-1], 0) if depths else indent
        lines.append(" " * (4 * len(depths) + inner) + line.lstrip() if line.strip() else "")
        if item:
            depths.append(item.end())
        fence ^= line.lstrip().startswith("```")
    return "\n".join(lines)


def notebook(path: Path) -> str:
    """A notebook as a page: texts, code, and what it printed and drew, without the two cells for Colab."""
    from latex2mathml.converter import convert  # MathML: browsers show it without a script

    def formulas(part: str) -> str:
        part = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(m[1], display="block"), part, flags=re.DOTALL)
        # Inside of a span it stays a part of its line, where Markdown takes it for a block.
        return re.sub(r"\$([^$\n]+)\$", lambda m: f"<span>{convert(m[1])}</span>", part)

    out = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"][2:]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            out.append(outside_code(formulas, source))
            continue
        out.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                out.append(f'<img alt="" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">')
            else:
                out.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return "\n\n".join(out)


def module_page(name: str, path: Path) -> str:
    """The page of a module: its docstring and all that is public in it; of a package, the list of its modules."""
    head = f"---\ntitle: {name.rpartition('.')[2]}\n---\n# {name}\n\n[`{path}`]({URL}/blob/main/{path})\n\n"
    if path.name != "__init__.py":
        return f"{head}::: {name}\n"
    lines = [f"{head}::: {name}", "    options:", "      members: false", ""]
    for other, file in public_modules().items():
        if other.rpartition(".")[0] == name:
            docstring = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or ""
            first = " ".join(docstring.split("\n\n")[0].split())
            link = posixpath.relpath(page_of(file), posixpath.dirname(page_of(path)))
            lines.append(f"- [{other}]({link}): {first}")
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Texts of all pages by their paths."""
    texts = {}
    for path in [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]:
        texts[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    for path in sorted((ROOT / NOTEBOOKS).glob("*.ipynb")):
        texts[path.relative_to(ROOT).with_suffix(".md").as_posix()] = notebook(path)
    places = targets()
    texts = {at: four_spaces(relinked(text, posixpath.dirname(at), places)) for at, text in texts.items()}
    return texts | {page_of(path): module_page(name, path) for name, path in public_modules().items()}


def navigation(paths: list[str], folder: str = "") -> list:
    """Paths as a tree: of each folder the README, the other pages, then the folders within it."""
    inner = [path for path in paths if path.startswith(folder)]
    here = sorted(
        (path for path in inner if "/" not in path[len(folder) :]), key=lambda p: (not p.endswith("README.md"), p)
    )
    names = sorted({path[len(folder) :].split("/")[0] for path in inner} - {path[len(folder) :] for path in here})
    return [*here, *({name: navigation(paths, f"{folder}{name}/")} for name in names)]


def link_names(html: str, at: str, places: dict[str, str]) -> str:
    """A page's HTML with links from names of modules, functions and files in code; `at` is its path.

    A name may be whole, or as its module, its package or its folder knows it: `core.tree.map`, `map`, `tree.map`.
    """
    folder = posixpath.dirname(at)
    module, package = at.removesuffix(".html").replace("/", "."), folder.replace("/", ".")

    def change(match: re.Match) -> str:
        name = match[1]
        names = [
            name,
            posixpath.join(folder, name),
            f"{module}.{name}",
            *([f"{package}.{name}"] if "." in name else []),
        ]
        target = next((places[name] for name in names if name in places), "")
        page, _, fragment = target.partition("#")
        page = re.sub(r"(README)?\.md$", lambda m: "index.html" if m[1] else ".html", page)
        if not page or page == at and not fragment:
            return match[0]
        url = posixpath.relpath(page, folder or ".")
        return f'<a href="{url}{"#" if fragment else ""}{fragment}">{match[0]}</a>'

    return re.sub(r"(?<!\">)<code>([\w./]+)</code>(?!</a>)", change, html)


def broken_links(site: Path) -> list[str]:
    """Links and pictures of a site's pages that lead to no file or no place of it, as "page: link"."""
    texts = {path.resolve(): path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html"))}
    places = {
        path: {unquote(name) for name in re.findall(r'\b(?:id|name)="([^"]+)"', text)} for path, text in texts.items()
    }
    out = []
    for path, text in texts.items():
        for link in dict.fromkeys(re.findall(r'\b(?:href|src)="([^"]+)"', text)):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fragment = unquote(parts.fragment)
            if (
                not file.is_file()
                or fragment
                and not fragment.startswith("__")
                and fragment not in places.get(file, ())
            ):
                out.append(f"{path.relative_to(site.resolve())}: {link}")
    return out


def main() -> None:
    """Write the pages, build the site, and check its links."""
    if importlib.util.find_spec("zensical") is None:
        raise SystemExit('zensical is not installed: pip install -e ".[docs]"')
    shutil.rmtree(FOLDER, ignore_errors=True)
    texts = pages()
    for at, text in {**texts, "wide.css": WIDE}.items():
        path = FOLDER / "pages" / at
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "experiments/gallery", FOLDER / "pages/experiments/gallery")
    paths = [path for path in texts if "/" in path]
    nav = ["README.md", {"中文": "README.zh.md"}]
    nav += [{name: navigation(paths, f"{name}/")} for name in FOLDERS] + ["CONTRIBUTING.md", "CHANGELOG.md"]
    settings = Path(__file__).with_suffix(".yml").read_text(encoding="utf-8")
    added = "".join(f"{name}: {json.dumps(value)}\n" for name, value in (("repo_url", URL), ("nav", nav)))
    (FOLDER / "mkdocs.yml").write_text(settings + added, encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    if code := subprocess.run(command, cwd=FOLDER).returncode:
        raise SystemExit(code)
    places = targets()
    for path in SITE.rglob("*.html"):
        html = link_names(path.read_text(encoding="utf-8"), path.relative_to(SITE).as_posix(), places)
        path.write_text(html, encoding="utf-8")
    if broken := broken_links(SITE):
        raise SystemExit("broken links:\n" + "\n".join(broken))
    print(f"{SITE / 'index.html'}")


if __name__ == "__main__":
    main()
