"""The annotations of core, which ships them (py.typed), are held by mypy with the settings in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_core_has_no_error_of_types(tmp_path):
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
