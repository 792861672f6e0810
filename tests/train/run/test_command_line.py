import errno
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from train.files import write_json
from train.run import Common, Count, Shared, command_line

pytestmark = pytest.mark.usefixtures("default_handlers")
ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Args:
    preset: Literal["small", "large"] = "small"
    """Sizes and recipe."""
    steps: Count = 10
    """Training steps."""
    common: Shared = Common()


PRESETS = {"large": Args("large", 1000)}


@dataclass(frozen=True)
class Other:
    word: str = "none"
    """A word."""
    data: str = "none"
    """A name, a path or two."""
    out: Path | None = None
    """A path."""


def run(monkeypatch, *argv, train=print, show=print, presets=PRESETS, root=None) -> int:
    monkeypatch.setattr(sys, "argv", ["program.py", *argv])
    try:
        command_line.run("A purpose.", (Args, train, presets), root=root, show=(Other, show))
    except SystemExit as stop:
        return stop.code
    return 0


def failing(error):
    def command(args):
        raise error

    return command


# --- run


@pytest.mark.parametrize(
    ("argv", "other"),
    [
        (["--out=~/a,~/b", "--word=~/a"], Other("~/a", out=Path("/home/me/a,~/b"))),
        (["--out", "~", "--data", "~/a,~/b"], Other(out=Path("/home/me"), data="/home/me/a,/home/me/b")),
        (["--data=a~,b/~"], Other(data="a~,b/~")),
    ],
)
def test_home_folder_in_paths(argv, other, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    calls = []
    assert run(monkeypatch, "show", *argv, show=calls.append) == 0 and calls == [other]


@pytest.mark.parametrize(
    ("encoding", "errors", "expected"),
    [
        ("ascii", "strict", rb"\u4eca\u5929 caf\xe9 \udcff"),
        ("ascii", "surrogateescape", rb"\u4eca\u5929 caf\xe9 \udcff"),
        ("latin-1", "strict", b"\\u4eca\\u5929 caf\xe9 \\udcff"),
        ("utf-8", "strict", "今天 café ".encode() + rb"\udcff"),
        ("utf-8", "surrogateescape", "今天 café ".encode() + b"\xff"),  # the byte of a file name
    ],
)
def test_any_text_is_printed(encoding, errors, expected, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors)
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(monkeypatch, "--no-compile", train=lambda _: print("今天 café \udcff", end="", flush=True)) == 0
    assert stream.buffer.getvalue() == expected


def test_pictures_need_no_backend_of_matplotlib(monkeypatch):
    """Notebooks leave theirs to the processes that they start, whose Python may not have it."""
    import matplotlib

    def draw(args):
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"]  # as matplotlib does where it is first imported

    backend = matplotlib.get_backend()
    monkeypatch.setenv("MPLBACKEND", "nowhere")
    assert run(monkeypatch, "--no-compile", train=draw) == 0
    matplotlib.rcParams["backend"] = backend


def test_sub_commands(monkeypatch):
    calls = []
    assert run(monkeypatch, "--steps", "3", "--no-compile", train=calls.append) == 0
    assert run(monkeypatch, "show", "--word", "show", show=calls.append) == 0
    assert calls == [Args(steps=3, common=Common(compile=False)), Other("show")]


def test_presets_are_the_defaults(monkeypatch, capsys):
    calls = []
    for argv in (["--preset", "large"], ["--preset=large", "--steps", "3"], []):
        assert run(monkeypatch, *argv, train=calls.append) == 0
    assert calls == [Args("large", 1000), Args("large", 3), Args()]
    assert run(monkeypatch, "--preset", "large", "--help") == 0
    assert "(default: 1000)" in capsys.readouterr().out
    for_words = []
    assert run(monkeypatch, "--steps", "7", "--no-compile", presets=lambda words: for_words.append(words)) == 0
    assert for_words == [{"steps": "7", "no_compile": ""}]


def test_a_resumed_run_has_the_flags_it_was_started_with(monkeypatch, tmp_path, capsys):
    calls, root = [], tmp_path / "program"
    (root / "a").mkdir(parents=True)
    write_json(root / "a" / "config.json", {"experiment": "program", "args": Args("large", 77, Common(5, "a"))})
    for argv in (["--resume"], ["--resume", "--name", "a", "--steps", "10"], ["--resume", "--seed=0"]):
        assert run(monkeypatch, *argv, train=calls.append, root=root) == 0
    expected = [
        ("large", 77, Common(5, "a", True)),
        ("large", 10, Common(5, "a", True)),
        ("large", 77, Common(0, "a", True)),
    ]
    assert calls == [Args(*values) for values in expected]
    assert run(monkeypatch, "--resume", "--name", "b", root=root) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert run(monkeypatch, "--resume", "--help", root=root) == 0


def test_help_names_the_sub_commands(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert "A purpose." in out and "    show    " in out and "--save-every" in out
    assert run(monkeypatch, "show", "--help") == 0
    assert "--word" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "error: two lines"),
        (ValueError(), "error: ValueError"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b.json"), "error: 'a/b.json': No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: cannot write: No space left on device"),
        (OSError("a message of a library"), "error: a message of a library"),
    ],
)
def test_errors_are_one_line(error, line, monkeypatch, capsys):
    assert run(monkeypatch, train=failing(error)) == 2
    assert capsys.readouterr() == ("", line + "\n")


def test_errors_of_the_program_itself_keep_their_traceback(monkeypatch):
    with pytest.raises(KeyError):
        run(monkeypatch, train=failing(KeyError("a bug")))
    monkeypatch.setenv("FUNCTREE_DEBUG", "1")
    with pytest.raises(ValueError, match="a wrong flag"):
        run(monkeypatch, train=failing(ValueError("a wrong flag")))


@pytest.fixture(autouse=True)
def handlers():
    """Signals as a terminal sends them, whatever the tests were started with."""
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interruption_outside_of_stop(number, monkeypatch, capsys):
    before = signal.getsignal(number)
    assert run(monkeypatch, train=lambda args: signal.raise_signal(number)) == 128 + number
    assert capsys.readouterr() == ("", "interrupted\n")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--stepz", "3"], "error: Unrecognized options: --stepz, 3 Perhaps you meant: --steps"),
        (["--max_steps", "3"], "error: Unrecognized options: --max_steps; this script has --steps"),
        (["--epochs=3"], "error: Unrecognized options: --epochs; this script has --steps"),
        (["--lr", "3"], "error: Unrecognized options: --lr, 3"),  # this script has none
        (["--steps", "many"], "error: Error parsing --steps: invalid literal for int() with base 10: 'many'"),
        (["--steps", "0"], "error: --steps is 0; expected at least 1"),
        (["--preset", "huge"], "error: invalid choice 'huge' for argument '--preset'"),
        (["shwo"], "error: 'shwo' is unknown; expected flags, or one of the sub-commands show"),
        (
            ["–steps", "3"],
            "error: '–steps' is unknown; expected flags, or one of the sub-commands show; flags begin with",
        ),
        (
            ["--compile=False"],
            "error: Unrecognized options: False; a switch has no value: --NAME switches it on, --no-",
        ),
        (["--no-compile", "True"], "error: Unrecognized options: True; a switch has no value: --NAME switches it on"),
        (["show", "--wrod", "x"], "error: Unrecognized options: --wrod, x"),
    ],
)
def test_wrong_flags_are_one_line(argv, line, monkeypatch, capsys):
    assert run(monkeypatch, *argv, train=failing(AssertionError), show=failing(AssertionError)) == 2
    out, err = capsys.readouterr()
    assert err.startswith(line) and err.count("\n") == 1 and out == ""


# --- device


def test_device():
    assert command_line.device("cpu") == torch.device("cpu")
    for name in ("abacus", "", "meta", "cuda:77", "hpu", "xla", "0"):
        with pytest.raises(ValueError, match=f"^--device '{name}' cannot be used; available here: cpu"):
            command_line.device(name)


# --- Stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop(number, capfd):
    before = signal.getsignal(number)
    with command_line.Stop() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested and stop.signal == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capfd.readouterr().err


def test_what_dies_of_the_signal_counts_as_the_interruption():
    """The compiler's processes get Ctrl-C too; but that a checkpoint could not be written must be said."""
    with pytest.raises(KeyboardInterrupt), command_line.Stop():
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("a worker of the compiler died")
    for error in (ValueError("the disk is full"), OSError("the disk is full")):
        with pytest.raises(type(error), match="the disk is full"), command_line.Stop():
            signal.raise_signal(signal.SIGTERM)
            raise error
    with pytest.raises(RuntimeError), command_line.Stop():
        raise RuntimeError("an error of the program")


def test_stop_may_interrupt_a_print_to_the_same_stream():
    """A signal that arrives in the middle of a write to stderr must not enter the stream a second time."""
    code = """
import os, signal, sys, threading
from train.run.command_line import Stop
with Stop() as stop:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while not stop.requested:
        print("x" * 50, file=sys.stderr)
print("stopped")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.stdout == "stopped\n" and "Error" not in result.stderr


def test_sub_commands_have_words_of_their_own(tmp_path, monkeypatch, capsys):
    def write(args: Other) -> None:
        """Write on from a prompt.

        More about it.
        """

    doc = "Everything.\n\n    python a.py --steps 2        train\n    python a.py write --steps 3  then write"
    for argv, expected, other in (
        (("write", "--help"), ("Write on from a prompt.", "python a.py write --steps 3"), ("Everything", "train")),
        (("--help",), ("Everything.", "python a.py --steps 2", "write       Write on from a prompt."), ("More",)),
    ):
        monkeypatch.setattr("sys.argv", ["a.py", *argv])
        with pytest.raises(SystemExit):
            command_line.run(doc, (Args, print), write=(Other, write))
        out = capsys.readouterr().out
        assert all(text in out for text in expected) and not any(text in out for text in other)


def test_head_of_the_help_fits_the_terminal():
    prose, remark = "Some words of a purpose. " * 9, "a remark that says more than fits beside the command"
    text = f"{prose}\n\n    python a.py --steps 2  short\n    python a.py --steps 3000 --flag  {remark}"
    lines = command_line._fitted(text, 60).splitlines()
    assert max(map(len, lines)) <= 60 and " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert "    python a.py --steps 2  short" in lines and "    python a.py --steps 3000 --flag" in lines


WAITING = """
import threading, time
from dataclasses import dataclass
from train.run import command_line

@dataclass(frozen=True)
class Args:
    pass

def wait(args):
    threading.Thread(target=time.sleep, args=(300,)).start()
    raise command_line.Interrupted(15)

command_line.run("Waits.", (Args, wait))
"""


def test_an_interrupted_program_does_not_wait_for_its_threads():
    """As for one that writes a checkpoint; the limit is far below the thread's 300 s."""
    command = [sys.executable, "-c", WAITING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (143, "interrupted\n")
