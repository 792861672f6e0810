"""The command `functree`: its list of experiments, and the start of one."""

import ast
import os
import subprocess
import sys

import pytest

from experiments import __main__ as functree
from tests.experiments.runs import ENVIRONMENT, ROOT, one_error

SCRIPT = '''
"""A purpose. And more."""

import sys
from dataclasses import dataclass

from train.run import command_line


@dataclass(frozen=True)
class Args:
    word: str = "none"
    """A word."""


def show(args):
    print(__name__, sys.argv[0], args.word, sys.modules["__main__"].Args is Args)


if __name__ == "__main__":
    command_line.run(__doc__, (Args, show), other=(Args, show))
'''


def start(monkeypatch, *argv: str, program: str = "/some/where/bin/functree") -> int:
    monkeypatch.setattr(sys, "argv", [program, *argv])
    try:
        functree.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture
def script(tmp_path, monkeypatch, default_handlers):
    """An experiment called `small`, beside one called `smaller`, in place of the real ones."""
    monkeypatch.setattr(functree, "FOLDER", tmp_path)
    (tmp_path / "__init__.py").touch()
    (tmp_path / "smaller.py").touch()
    (tmp_path / "small.py").write_text(SCRIPT, encoding="utf-8")
    return tmp_path / "small.py"


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_list(monkeypatch, capsys, argv):
    assert start(monkeypatch, *argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: functree EXPERIMENT [flags]\n")
    lines = dict(line.split(maxsplit=1) for line in out.partition("experiments:\n")[2].splitlines())
    paths = [path for path in (ROOT / "experiments").glob("*.py") if not path.stem.startswith("__")]
    assert list(lines) == sorted(path.stem for path in paths)
    assert lines["gpt"] == "GPT or Llama on characters or byte pairs: train it, then let it write."
    for path in paths:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert " ".join(docstring.split()).startswith(lines[path.stem]) and lines[path.stem].endswith("."), path


def test_summary_is_the_first_sentence(script):
    assert functree.summary(script) == "A purpose."
    assert functree.summary(script.with_name("smaller.py")) == ""
    script.write_text('"""Two lines\nof 1.5 sentences. The second."""', encoding="utf-8")
    assert functree.summary(script) == "Two lines of 1.5 sentences."
    script.write_text('"""No full stop\n\nMore. Of it."""', encoding="utf-8")
    assert functree.summary(script) == "No full stop"


def test_list_without_torch():
    code = "import sys; from experiments.__main__ import main; main(); sys.exit('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert (out.returncode, out.stderr) == (0, "") and "  gpt  " in out.stdout


def test_script_runs_as_from_its_path(script, monkeypatch, capsys):
    assert start(monkeypatch, "small", "--word", "some") == 0
    assert capsys.readouterr().out == f"__main__ {script} some True\n"


@pytest.mark.parametrize(
    ("program", "words"),
    [("/some/where/bin/functree", "functree"), ("/some/where/experiments/__main__.py", "python -m experiments")],
)
def test_help_names_the_command(script, monkeypatch, capsys, program, words):
    assert start(monkeypatch, "small", "--help", program=program) == 0
    assert f"\nusage: {words} small [-h]" in capsys.readouterr().out
    assert start(monkeypatch, "small", "other", "--help", program=program) == 0
    assert f"\nusage: {words} small other [-h]" in capsys.readouterr().out
    assert start(monkeypatch, "--help", program=program) == 0
    assert capsys.readouterr().out.startswith(f"usage: {words} EXPERIMENT [flags]")


def test_errors_of_a_script_are_its_own(script, monkeypatch, capsys):
    assert start(monkeypatch, "small", "--wrod", "some") == 2
    assert "--wrod" in one_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smal", "did you mean small or smaller?"),
        ("small.py", "did you mean small or smaller?"),
        ("__init__", "expected one of the list"),
        ("--word", "expected one of the list"),
        ("", "expected one of the list"),
    ],
)
def test_unknown_name(script, monkeypatch, capsys, name, hint):
    assert start(monkeypatch, name) == 2
    line = one_error(capsys.readouterr().err)
    assert line == f"error: '{name}' is no experiment; {hint} (see functree --help)"


def test_list_into_a_closed_pipe():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "experiments"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, which is a full disk, on this system")
def test_list_onto_a_full_disk():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "experiments"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, b"error: cannot write: No space left on device\n")
