"""How the tests of experiments/gpt.py start it: in this process, or for real as a process of its own."""

import hashlib
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from core import random, tree
from nets import gpt2
from train import checkpoints, optimizers
from train.step import TrainState, create

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "gpt.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
# Small enough for milliseconds a step.
QUICK = ("--text", "text.txt", "--batch", "2", "--no-compile")
TEXT = "".join(f"The {n} quick brown foxes jump over {n * n} lazy dogs, and café owners laugh.\n" for n in range(40))


def call(*argv: str) -> int:
    """Run the script in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            return stop.code
    return 0


def start(folder: Path, *argv: str, **options) -> subprocess.Popen:
    """Start the script as a process of its own, in `folder`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT} | options
    return subprocess.Popen([sys.executable, SCRIPT, *map(str, argv)], cwd=folder, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Return when the run has a checkpoint of at least `step`."""
    limit = time.monotonic() + 300
    while (checkpoints.latest(run / "checkpoints") or 0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.005)


def state_of(run: Path, step: int | None = None) -> TrainState:
    """Everything in a checkpoint of a run."""
    cfg = gpt2.Config(**checkpoints.read_config(run / "checkpoints", step)["net"])
    optimizer = optimizers.chain(optimizers.clip_by_global_norm(1.0), optimizers.adamw(lambda count: 0.0))
    return checkpoints.restore(run / "checkpoints", create(random.key(0), gpt2.spec(cfg), optimizer), step)


def same_bits(a: tree.Tree, b: tree.Tree) -> bool:
    """Whether two trees have the same names, dtypes, shapes and bits (NaN and -0.0 included)."""
    left, right = tree.flatten(a), tree.flatten(b)
    return left.keys() == right.keys() and all(
        (x.dtype, x.shape, x.numpy().tobytes()) == (right[n].dtype, right[n].shape, right[n].numpy().tobytes())
        for n, x in left.items()
    )


def contents(folder: Path) -> dict[str, str]:
    """{path: hash} of all files under a folder, and of the folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def finite(state: TrainState) -> bool:
    return all(x.isfinite().all() for x in tree.leaves(state) if torch.is_floating_point(x))


def one_error(err: str) -> str:
    """The line on stderr, checked to be the only one."""
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 600, err
    return lines[0]
