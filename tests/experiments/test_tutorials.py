"""The tutorials: they run and end in a picture, in two languages, and their notebooks are in step with them."""

import os
import re
import subprocess
import sys

import pytest

from experiments.tutorials.__main__ import FOLDER, LANGUAGES, NAMES, cells_of, path_of
from tests.experiments.runs import ENVIRONMENT

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")

LAST_PICTURE = """
import runpy, sys, warnings
import matplotlib.pyplot as plt
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="`torch.jit.script", category=DeprecationWarning)  # as in pyproject.toml
sys.modules.setdefault("torchvision", None)  # which transformers would import, and that may be of another torch
shown = []
plt.show = lambda *args, **options: (shown.append(plt.get_fignums()), plt.close("all"))
runpy.run_path(sys.argv[1], run_name="__main__")
assert shown and shown[-1], "the tutorial shows no picture at its end"
assert not plt.get_fignums(), "a picture is not shown"
"""


def source(name: str):
    return jupytext.read(FOLDER / f"{name}.py", fmt="py:percent").cells


@pytest.mark.parametrize("name", NAMES)
def test_two_languages(name):
    """Each text stands there in English and then in Chinese, with the same headings, formulas and code."""
    texts = [cell for cell in source(name) if cell.cell_type != "code"]
    assert [cell.metadata.get("lang") for cell in texts] == list(LANGUAGES) * (len(texts) // 2)
    for english, chinese in zip(texts[::2], texts[1::2], strict=True):
        for pattern in (r"^#+ ", r"\$\$.+?\$\$", r"\]\(([^)]+)\)", r"```.+?```"):
            first, second = (re.findall(pattern, x.source, re.M | re.S) for x in (english, chinese))
            assert first == second, english.source
        assert re.search(r"[\u4e00-\u9fff]", chinese.source), chinese.source


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_notebook_is_in_step(name, language):
    """`python -m experiments.tutorials NAME` writes it again."""
    assert path_of(name, language).is_file(), f"python -m experiments.tutorials {name}"
    book = nbformat.read(path_of(name, language), as_version=4)
    nbformat.validate(book)
    expected = [(cell.cell_type, cell.source) for cell in cells_of(name, language)]
    assert [(cell.cell_type, cell.source) for cell in book.cells] == expected
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    outputs = [out for cell in code for out in cell.outputs]
    assert not any(out.output_type == "error" for out in outputs)
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert path_of(name, language).stat().st_size < 600_000


def test_every_tutorial_has_its_row():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        for file in (f"{name}.py", f"notebooks/{name}.ipynb", f"notebooks/{name}.zh.ipynb"):
            assert f"]({file})" in page, file


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_tutorial_runs(name, tmp_path):
    command = [sys.executable, "-c", LAST_PICTURE, str(FOLDER / f"{name}.py")]
    environment = {**ENVIRONMENT, "MPLBACKEND": "template", "PYTHONPATH": os.fspath(FOLDER.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr[-3000:]
