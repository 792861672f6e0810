"""The experiment that experiments/README.md shows as the pattern of a new one."""

import re
import shutil

import pytest

from tests.experiments.runs import ROOT, execute, result


@pytest.fixture
def plane(tmp_path, monkeypatch):
    """The experiment as a function of its flags."""
    page = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(\"\"\".*?)```", page, re.DOTALL)
    (tmp_path / "plane.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        execute(tmp_path / "plane.py", *argv)
        return result(tmp_path / "runs" / "plane" / "a")["error"]

    return call


def test_example_runs_and_resumes(plane, tmp_path, capsys):
    error = plane("--no-compile", "--name", "a", "--save-every", "40")
    assert error < 0.02  # the noise alone is 0.01
    shutil.rmtree(tmp_path / "runs/plane/a/checkpoints/160")
    shutil.rmtree(tmp_path / "runs/plane/a/checkpoints/200")
    assert plane("--resume") == error
    with pytest.raises(SystemExit) as stop:
        plane("--name", "b", "--batch", "0")
    assert stop.value.code == 2 and "error: --batch is 0; expected at least 1" in capsys.readouterr().err
