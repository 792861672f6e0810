import errno
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from train.run import command_line


@dataclass(frozen=True)
class Args:
    steps: int | None = None
    save_every: int = 500
    compile: bool = True


@dataclass(frozen=True)
class Other:
    word: str = "none"


def run(monkeypatch, *argv, train=print, show=print) -> int:
    monkeypatch.setattr(sys, "argv", ["program.py", *argv])
    try:
        command_line.run("What it does.", (Args, train), show=(Other, show))
    except SystemExit as stop:
        return stop.code
    return 0


def failing(error):
    def command(args):
        raise error

    return command


# --- run


def test_sub_commands(monkeypatch):
    seen = []
    assert run(monkeypatch, "--steps", "3", "--no-compile", train=seen.append) == 0
    assert run(monkeypatch, "show", "--word", "show", show=seen.append) == 0
    assert seen == [Args(steps=3, compile=False), Other("show")]


def test_help_names_the_sub_commands(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert "What it does." in out and "each has its own --help): show" in out and "--save-every" in out
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_outside_of_stop(number, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert run(monkeypatch, train=lambda args: signal.raise_signal(number)) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_unknown_flags_exit_with_2(monkeypatch, capsys):
    assert run(monkeypatch, "--stepz", "3") == 2
    assert "--stepz" in capsys.readouterr().err


# --- choice, at_least_one, positive, device


def test_choice():
    assert command_line.choice("--size", "big", {"big": 1, "small": 2}) == "big"
    with pytest.raises(ValueError, match="^--size 'huge' is unknown; expected one of big, small$"):
        command_line.choice("--size", "huge", {"big": 1, "small": 2})


def test_numbers():
    command_line.at_least_one(batch=1, save_every=500)
    command_line.positive(learning_rate=1e-9)
    for count in (0, -3):
        with pytest.raises(ValueError, match=f"^--save-every is {count}; expected at least 1$"):
            command_line.at_least_one(batch=1, save_every=count)
    for number in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"^--learning-rate is {number}; expected a positive number$"):
            command_line.positive(learning_rate=number)


def test_device():
    assert command_line.device("cpu") == torch.device("cpu")
    for name in ("abacus", "", "meta", "cuda:77", "hpu", "xla", "0"):
        with pytest.raises(ValueError, match=f"^--device '{name}' cannot be used; available here: cpu"):
            command_line.device(name)


# --- Stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop(number, capfd):
    before = signal.getsignal(number)
    with command_line.Stop() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
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
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.stdout == "stopped\n" and "Error" not in result.stderr
