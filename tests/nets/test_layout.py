"""The layout of nets: a folder imports the core, `nets.weights`, `nets.blocks` and its own files, and nothing else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "nets").glob("**/*.py"))
HOME = {"core", "nets", "train", "experiments", "tests"}


def imports(path):
    """Modules of this repository that a file imports, `from a import b` as both a and a.b."""
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name for name in names if name.partition(".")[0] in HOME}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_stay_within_the_layout(path):
    folder = ".".join(path.parts[:-1])
    allowed = ("core.", "nets.weights.") + (() if folder == "nets" else ("nets.blocks.", f"{folder}."))
    assert not sorted(name for name in imports(path) if not f"{name}.".startswith(allowed))
