"""Notebooks of the tutorials, executed, in English and Chinese.

    python -m experiments.tutorials                      all of them
    python -m experiments.tutorials tensors gpt2         some
    python -m experiments.tutorials --sources            texts and code alone; outputs of unchanged code stay

A tutorial is a Python script in the percent format of Jupytext. Each text stands in it twice, as a cell
`# %% [markdown] lang="en"` and as one of lang="zh"; code stands in it once, and runs once for both notebooks.
Needs the extra `notebooks`.
"""

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from train.files import replacing
from train.run import command_line

if TYPE_CHECKING:
    from nbformat import NotebookNode

FOLDER = Path(__file__).parent
NOTEBOOKS = FOLDER / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
LANGUAGES = ("en", "zh")
REPOSITORY = "functree/functree"
"""Owner and name on GitHub, from which Colab opens a notebook and its first cell installs the library."""
COLAB = {"en": "Open in Colab", "zh": "在 Colab 中打开"}


@dataclass(frozen=True)
class Args:
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Tutorials, such as "tensors"; all if none is named."""
    sources: bool = False
    """Write texts and code without running them, keeping the outputs of cells whose code is unchanged."""
    timeout: float = 600.0
    """Seconds that a cell may take."""


def path_of(name: str, language: str) -> Path:
    return NOTEBOOKS / (f"{name}.ipynb" if language == "en" else f"{name}.{language}.ipynb")


def cells_of(name: str, language: str) -> "list[NotebookNode]":
    """Cells of a tutorial in one language, without outputs; a badge of Colab and its set-up come first."""
    import jupytext
    from nbformat.v4 import new_code_cell, new_markdown_cell

    book = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    out = []
    for cell in book.cells:
        if cell.cell_type == "code":
            # The comment is for the linter of the script.
            out.append(new_code_cell(re.sub(r"  # noqa: \w+$", "", cell.source, flags=re.MULTILINE)))
        elif cell.metadata.get("lang") == language:
            out.append(new_markdown_cell(re.sub(r"\]\(\.\./", "](../../", cell.source)))
    at = path_of(name, language).relative_to(FOLDER.parents[1]).as_posix()
    url = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/{at}"
    badge = f"[![{COLAB[language]}](https://colab.research.google.com/assets/colab-badge.svg)]({url})"
    clone = f"https://github.com/{REPOSITORY}"
    setup = (
        "import importlib.util\n\n"
        f'if importlib.util.find_spec("nets") is None:  # in Colab\n    %pip install -q git+{clone}'
    )
    out = [new_markdown_cell(badge), new_code_cell(setup), *out]
    for i, cell in enumerate(out):
        cell.id = f"cell-{i}"
        cell.metadata = {}
    return out


def notebook(cells: "list[NotebookNode]") -> "NotebookNode":
    from nbformat.v4 import new_notebook

    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def execute(name: str, timeout: float) -> "list[NotebookNode]":
    """Code cells of a tutorial with their outputs. Raises ValueError: a cell raised, or took too long."""
    import nbclient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    book = notebook(cells_of(name, "en"))
    # Small pictures: a notebook is read in a browser, and many of them lie in the repository.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    # transformers imports a progress bar that misses a widget, and would say so with this machine's paths.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    try:
        nbclient.NotebookClient(book, timeout=timeout, kernel_name="python3").execute()
    except (CellExecutionError, CellTimeoutError) as error:
        raise ValueError(f"{name}: {str(error).strip().splitlines()[-1]}") from error
    return [cell for cell in book.cells if cell.cell_type == "code"]


def stored(name: str) -> "list[NotebookNode]":
    """Code cells of the notebook that is there, with their outputs."""
    import nbformat

    path = path_of(name, "en")
    book = nbformat.read(path, as_version=4) if path.is_file() else notebook([])
    return [cell for cell in book.cells if cell.cell_type == "code"]


def write(name: str, args: Args) -> None:
    """Both notebooks of a tutorial."""
    import nbformat

    code = stored(name) if args.sources else execute(name, args.timeout)
    outputs = {cell.source: cell.outputs for cell in code}
    for language in LANGUAGES:
        cells, count = cells_of(name, language), 0
        for cell in cells:
            if cell.cell_type == "code":
                count += 1
                cell.execution_count = count
                cell.outputs = outputs.get(cell.source, [])
                for out in cell.outputs:
                    if out.output_type == "execute_result":
                        out.execution_count = count
        NOTEBOOKS.mkdir(exist_ok=True)
        with replacing(path_of(name, language)) as path:
            path.write_text(nbformat.writes(notebook(cells)) + "\n", encoding="utf-8")


def main(args: Args) -> None:
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        raise ValueError(f"tutorial '{unknown[0]}' is unknown; expected {', '.join(NAMES)}")
    for package in ("jupytext", "nbformat") if args.sources else ("jupytext", "nbclient", "ipykernel"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed; expected pip install -e '.[notebooks]'")
    for name in args.names or NAMES:
        write(name, args)
        print(f"{path_of(name, 'en')}, {path_of(name, 'zh').name}", flush=True)


if __name__ == "__main__":
    command_line.run(__doc__, (Args, main))
