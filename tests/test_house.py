"""The layout of the house: who may import whom, how long a file may be, and how its sentences read."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.experiments.runs import ENVIRONMENT
from tests.registry.experiments import EXPERIMENTS

ROOT = Path(__file__).parents[1]
FLOORS = ("core", "nets", "train", "experiments")
FILES = {path: path.relative_to(ROOT).as_posix() for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))}
MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path, name in FILES.items()}
TOP = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES = [*TOP, *sorted(p.relative_to(ROOT).as_posix() for floor in FLOORS for p in (ROOT / floor).rglob("*.md"))]
SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if not path.stem.startswith("__"))


def imported(path: Path, top_level: bool = False) -> set[str]:
    """The modules of ours that a file imports; those of `from package import module` by their own name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (own & MODULES.keys()) or {node.module}
    return {name for name in names if name in MODULES}


IMPORTS = {module: imported(path) for module, path in MODULES.items()}


def family(module: str) -> str:
    """nets.classifiers.resnet -> classifiers; nets.weights -> weights."""
    return module.split(".")[1] if "." in module else ""


def test_floors():
    """core <- nets, core <- train; only experiments joins them."""
    allowed = {"core": {"core"}, "nets": {"core", "nets"}, "train": {"core", "train"}, "experiments": set(FLOORS)}
    wrong = [
        (module, other)
        for module, others in IMPORTS.items()
        for other in others
        if other.split(".")[0] not in allowed[module.split(".")[0]]
    ]
    assert not wrong


FOUNDATIONS = {"torch", "optree", "numpy"}  # beside the standard library, all that core imports


def test_core_imports_its_foundations_only():
    """Inside functions too."""
    wrong = []
    for path in sorted((ROOT / "core").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module if not node.level else "."]
            tops = {name.split(".")[0] for name in names}
            wrong += [(str(path), name) for name in tops - sys.stdlib_module_names - FOUNDATIONS - {"core"}]
    assert not wrong


# Runs with the names of modules that must not be there, and of those to import.
BLOCKED = """
import importlib, sys
blocked, modules = (words.split() for words in sys.argv[1:])
sys.modules.update(dict.fromkeys(blocked))  # None: ImportError, as if it were not installed
for name in modules:
    importlib.import_module(name)
"""


@pytest.mark.slow
def test_core_is_imported_without_the_other_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    others = {canonical(Requirement(line).name) for line in lines} - FOUNDATIONS
    installed = importlib.metadata.packages_distributions()
    blocked = {top for top, distributions in installed.items() if others & set(map(canonical, distributions))}
    assert {"matplotlib", "tyro", "orbax", "sklearn", "PIL", "jax"} <= blocked
    blocked |= set(FLOORS) - {"core"}
    modules = [name for name in MODULES if name.split(".")[0] == "core"]
    process = subprocess.run(
        [sys.executable, "-c", BLOCKED, " ".join(sorted(blocked)), " ".join(modules)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stderr) == (0, "")


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def test_families_of_nets_read_weights_and_blocks_and_themselves():
    allowed = {"weights": {"weights"}, "blocks": {"weights", "blocks"}}
    wrong = [
        (module, other)
        for module, others in IMPORTS.items()
        for other in others
        if module.startswith("nets.")
        and other.startswith("nets.")
        and family(other) not in allowed.get(family(module), {"weights", "blocks", family(module)})
    ]
    assert not wrong


def test_plots_know_no_other_part_of_training():
    others = {other for module, others in IMPORTS.items() if module.startswith("train.plots.") for other in others}
    assert {other for other in others if other.startswith("train.")} <= {"train.files"} | {
        module for module in MODULES if module.startswith("train.plots")
    }


def test_no_circle_of_imports():
    graph = {module: imported(path, top_level=True) for module, path in MODULES.items()}
    done, path = set(), []

    def visit(module):
        if module in path:
            raise AssertionError(" -> ".join([*path[path.index(module) :], module]))
        if module in done:
            return
        path.append(module)
        for other in sorted(graph[module] - {module}):
            visit(other)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


@pytest.mark.parametrize("name", SCRIPTS)
def test_experiments_are_scripts_with_an_entry_in_their_page(name):
    path = ROOT / "experiments" / f"{name}.py"
    source = path.read_text(encoding="utf-8")
    assert '\nif __name__ == "__main__":\n    command_line.run(' in source
    assert f"[{name}.py](" in (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    siblings = {other for other in IMPORTS[f"experiments.{name}"] if other.startswith("experiments.")}
    assert all(other.startswith("experiments.parts") for other in siblings)
    assert f'RUNS = Path("runs/{name}")' in source or "RUNS" not in source
    assert "begin(RUNS" not in source or name in map(str, EXPERIMENTS)  # what trains keeps the laws of experiments


def test_parts_import_no_script():
    for module, others in IMPORTS.items():
        if module.startswith("experiments.parts."):
            assert not {other for other in others if other.startswith("experiments.")} - {
                other for other in others if other.startswith("experiments.parts")
            }, module


@pytest.mark.parametrize("floor", [*FLOORS, "tests"])
def test_length_of_files(floor):
    for path in (ROOT / floor).rglob("*.py"):
        limit = 300 if path.parent == ROOT / "experiments" else 400
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= limit, f"{path.relative_to(ROOT)} has {lines} lines; is it still one room?"


# Wording that reads as translated, and the better word: docstrings, comments and the pages are held to it.
WORDING = {
    r"^(What|How|Of|Into|Whose)\b": "a noun phrase or an imperative at the beginning",
    r"\b(left|stands?|lies|stays?|padding) behind\b": "after",
    r"\bin front of\b": "before",
    r"\bat (most|least) so many\b": "up to n",
    r"\bso many\b": "the number itself",
    r"\b(is|are) to be\b": "must be, is",
    r"\bchances? (of|that)\b": "probability",
    r"\b[Tt]he perceptrons?\b": "the MLP",
    r"\b(nats|bits|perplexity|error|loss|cost) an? (token|character|example|step|pixel|dimension)\b": "per token",
    r"\bstands? in (front|the place) of\b": "replaces",
    r"\b(if|where) not given\b": "if None, or show the default itself",
    r"\bof yours\b": "yours",
}
# Variables are named by what they hold, not by how it came about.
PARTICIPLES = {"found", "said", "given", "chosen", "made", "drawn", "measured", "who"}


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring, description of a field and comment of a file."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        for inner in getattr(node, "body", []) if isinstance(getattr(node, "body", []), list) else []:
            if (
                isinstance(inner, ast.Expr)
                and isinstance(inner.value, ast.Constant)
                and isinstance(inner.value.value, str)
            ):
                yield inner.lineno, inner.value.value
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("# ") or "  # " in line:
            yield number, "# " + line.partition("# ")[2]


@pytest.mark.parametrize("floor", [*FLOORS, "tests"])
def test_wording(floor):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: '{match[0]}'; better: {better}"
        for path in sorted((ROOT / floor).rglob("*.py"))
        if path != Path(__file__)
        for line, text in sentences(path)
        for pattern, better in WORDING.items()
        if (match := re.search(pattern, text))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_wording_of_pages(page):
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    wrong = [
        f"{page}:{number}: '{match[0]}'; better: {better}"
        for number, line in enumerate(lines, 1)
        for pattern, better in WORDING.items()
        if not pattern.startswith("^") and (match := re.search(pattern, line))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("floor", [*FLOORS, "tests"])
def test_names_are_no_participles(floor):
    wrong = []
    for path in sorted((ROOT / floor).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.arg if isinstance(node, ast.arg) else getattr(node, "id", None)
            stored = isinstance(node, ast.arg) or isinstance(getattr(node, "ctx", None), ast.Store)
            if stored and name in PARTICIPLES:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not wrong, "\n".join(wrong)
