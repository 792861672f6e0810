"""The API reference: all that is public has a docstring and a page, and the site builds without a warning."""

import ast
import html
import re
import subprocess
import sys

import pytest

from tests.experiments.runs import ENVIRONMENT
from tests.reference import (
    ROOT,
    SITE,
    broken_links,
    four_spaces,
    link_names,
    navigation,
    page_of,
    pages,
    public_definitions,
    public_modules,
    relinked,
    targets,
)

MODULES = public_modules()


def overload(node: ast.AST) -> bool:
    """True for a signature by typing.overload, whose last definition has the docstring."""
    return any("overload" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ()))


@pytest.mark.parametrize("package", ["core", "nets", "train"])
def test_all_that_is_public_has_a_docstring(package):
    missing = []
    for name, path in MODULES.items():
        if path.parts[0] == package:
            module = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            parts = [("module", module), *public_definitions(ROOT / path)]
            missing += [f"{name}: {part}" for part, node in parts if not ast.get_docstring(node) and not overload(node)]
    assert not missing, "\n".join(missing)


def test_public_definitions(tmp_path):
    source = "def f(): ...\ndef _g(): ...\nclass A:\n    def m(self): ...\n    def _n(self): ...\n"
    source += "class _B:\n    def o(self): ...\n"
    (tmp_path / "module.py").write_text(source)
    assert [name for name, _ in public_definitions(tmp_path / "module.py")] == ["f", "A", "A.m"]


def test_links_of_pages_hold_in_the_site():
    text = "[a](tree.py) [b](layers) [c](../README.md#keys) [d](../tests/conftest.py#L3) [e](https://a.org) `[f](x.py)`"
    text += " [g](per_example) ![h](../experiments/gallery/gpt.png) [j](#k)"
    text += " [i](../experiments/tutorials/notebooks/vae.zh.ipynb)"
    links = re.findall(r"\]\(([^)]+)\)", relinked(text, "core", targets()))
    assert links[:3] == ["tree.md", "layers/README.md", "../README.md#keys"]
    assert links[3].startswith("https://github.com/") and links[3].endswith("/blob/main/tests/conftest.py#L3")
    assert links[4:7] == ["https://a.org", "x.py", "per_example/README.md"]
    assert links[7:] == ["../experiments/gallery/gpt.png", "#k", "../experiments/tutorials/notebooks/vae.zh.md"]


def test_lists_are_indented_for_python_markdown():
    text = "Text:\n- a\n  b\n  - c\n\n1. d\n\n   ```py\n   - e\n       f\n   ```\n\nEnd"
    expected = "Text:\n\n- a\n    b\n    - c\n\n1. d\n\n    ```py\n    - e\n        f\n    ```\n\nEnd"
    assert four_spaces(text) == expected


def test_names_in_code_become_links():
    text = "<code>core.tree.map</code> <code>core/spec.py</code> <code>x</code> <a><code>core.tree</code></a>"
    out = link_names(text, "nets/language/gpt2.html", targets())
    assert re.findall(r'href="([^"]+)"', out) == ["../../core/tree.html#core.tree.map", "../../core/spec.html"]
    text = "<code>merge</code> <code>spec.init</code> <code>random</code> <code>layers/linear.py</code>"
    out = link_names(text, "core/tree.html", targets())
    assert re.findall(r'href="([^"]+)"', out) == [
        "tree.html#core.tree.merge",
        "spec.html#core.spec.init",
        "layers/linear.html",
    ]


def test_navigation_has_a_folder_per_folder():
    paths = ["core/tree.md", "core/README.md", "core/layers/a.md", "core/layers/README.md"]
    assert navigation(paths, "core/") == [
        "core/README.md",
        "core/tree.md",
        {"layers": ["core/layers/README.md", "core/layers/a.md"]},
    ]


def test_broken_links_are_named(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here"> <a href="b.html#there"> <img src="c.png"> <a href="https://d.org">'
    )
    (tmp_path / "b.html").write_text('<p id="here"> <a href="a.html">')
    assert broken_links(tmp_path) == ["a.html: b.html#there", "a.html: c.png"]


def test_every_readme_tutorial_and_module_is_a_page():
    pytest.importorskip("latex2mathml")
    texts = pages()
    assert {page_of(path) for path in MODULES.values()} <= texts.keys()
    readmes = {
        path.relative_to(ROOT).as_posix() for name in ("core", "nets", "train") for path in (ROOT / name).rglob("*.md")
    }
    assert readmes | {"README.md", "experiments/README.md"} <= texts.keys()
    tutorial = texts["experiments/tutorials/notebooks/per_example_gradients.md"]
    assert "<math" in tutorial and "data:image/png;base64," in tutorial and "$$" not in tutorial


@pytest.mark.slow
def test_site_builds_without_a_warning():
    pytest.importorskip("zensical")
    command = [sys.executable, "-m", "tests.reference"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    for name, path in MODULES.items():
        page = re.sub(r"README$", "index", page_of(path).removesuffix(".md"))
        text = html.unescape((SITE / f"{page}.html").read_text(encoding="utf-8"))
        assert f"::: {name}" not in text
        if path.name != "__init__.py":
            missing = [other for other, _ in public_definitions(ROOT / path) if f'id="{name}.{other}"' not in text]
            assert not missing, (name, missing)
