"""Starting an experiment from a test, in this process or as a process of its own, and reading its runs.

A file of tests binds the functions to its experiment: `call = functools.partial(runs.call, "gpt")`.
"""

import ast
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from core import tree
from tests import processes
from train.run import checkpoints

MAIN = types.ModuleType("__main__")
BLACK = Image.new("RGB", (8, 8))
ROOT = Path(__file__).parents[2]
# As many threads as in this process: how a sum is cut into parts, and so its last bit, depends on it.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(THREADS), "COLUMNS": "200"}


def script(experiment: str) -> Path:
    return ROOT / "experiments" / f"{experiment}.py"


def call(experiment: str, *argv: Any, module: Mapping[str, Any] | None = None) -> int:
    """Run the script in this process; returns its exit code."""
    try:
        execute(script(experiment), *argv, module=module)
    except SystemExit as stop:
        return stop.code
    return 0


def execute(path: Path, *argv: Any, module: Mapping[str, Any] | None = None) -> None:
    """As `runpy.run_path` does, but with one module for all: Dynamo keeps the first that it has seen of a name.

    With the definitions of a `module` only what follows `if __name__ == "__main__"` is executed, which is quick where
    flags are refused. Nothing may be compiled then: Dynamo would count the graphs of all tests as of one function.
    """
    code = ast.parse(path.read_text(encoding="utf-8"), path)
    if module is not None:
        code.body = code.body[-1:]
    MAIN.__dict__.clear()
    MAIN.__dict__.update(module or {}, __name__="__main__", __file__=str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *map(str, argv)])
        patch.setitem(sys.modules, "__main__", MAIN)
        exec(compile(code, path, "exec"), MAIN.__dict__)


@functools.cache
def definitions(path: Path) -> dict[str, Any]:
    """The names of a script, all but its last statement executed."""
    *body, last = ast.parse(path.read_text(encoding="utf-8"), path).body
    assert ast.unparse(last.test) == "__name__ == '__main__'", path
    names = {"__name__": "__main__", "__file__": str(path)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "__main__", MAIN)
        exec(compile(ast.Module(body, []), path, "exec"), names)
    return names


def undrawn(patch: pytest.MonkeyPatch) -> None:
    """Write black squares in place of figures, which take half the time of a tiny run: where no test looks at them."""
    patch.setattr(Figure, "savefig", lambda figure, path, **_: BLACK.save(path, "PNG"))


def coarse(patch: pytest.MonkeyPatch) -> None:
    """Write figures with few pixels, as they come without the work of a layout engine: enough to count colours."""

    def write(figure: Figure, path: Path, **options: Any) -> None:
        figure.set_layout_engine(None)
        savefig(figure, path, **{**options, "dpi": 30})

    savefig = Figure.savefig
    patch.setattr(Figure, "savefig", write)


def refused(experiment: str, capfd: pytest.CaptureFixture, *argv: Any) -> str:
    """The one line with which the script refuses; nothing on disk may have changed, no folder been added."""
    before = stamps(Path.cwd())
    capfd.readouterr()
    code = call(experiment, *argv, module=definitions(script(experiment)))
    line = one_error(capfd.readouterr().err)
    assert code == 2 and stamps(Path.cwd()) == before
    return line


def start(experiment: str, folder: Path, *argv: Any, **options: Any) -> subprocess.Popen:
    """Start the script as a process of its own, in `folder`, which ends with the test at the latest."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT} | options
    return processes.start([sys.executable, script(experiment), *map(str, argv)], cwd=folder, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    out, err = process.communicate()
    return process.returncode, out, err


def completed(experiment: str, folder: Path, *argv: Any) -> str:
    """Output of the script as a process of its own, which must succeed and leave stderr empty."""
    code, out, err = finish(start(experiment, folder, *argv))
    assert (code, err) == (0, "")
    return out


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Return when the run has a checkpoint of at least `step`."""
    while (checkpoints.latest(run / "checkpoints") or 0) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def config(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text(encoding="utf-8"))


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: {"step", "time", names ...}."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def same_bits(a: tree.Tree, b: tree.Tree) -> bool:
    """Whether two trees have the same names, dtypes, shapes and bits (NaN and -0.0 included)."""
    left, right = tree.flatten(a), tree.flatten(b)
    return left.keys() == right.keys() and all(
        (x.dtype, x.shape, x.numpy().tobytes()) == (right[n].dtype, right[n].shape, right[n].numpy().tobytes())
        for n, x in left.items()
    )


def finite(state: tree.Tree) -> bool:
    return all(x.isfinite().all() for x in tree.leaves(state) if x.is_floating_point())


def contents(folder: Path) -> dict[str, str]:
    """{path: hash} of all files under a folder, and of the folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def stamps(folder: Path) -> dict[str, tuple[int, ...]]:
    """{path: size and time of the last change} of all files under a folder; of folders no more than that they are."""
    statuses = {path: path.stat() for path in folder.rglob("*")}
    return {
        str(path.relative_to(folder)): (status.st_size, status.st_mtime_ns) if path.is_file() else ()
        for path, status in statuses.items()
    }


def one_error(err: str) -> str:
    """The line on stderr, checked to be the only one."""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 600, err
    return lines[0]


def flag_id(value: Any) -> str:
    """The id of a test that has (flags, message) as parameters: the flags."""
    return "_".join(value).lstrip("-") if isinstance(value, list) else ""
