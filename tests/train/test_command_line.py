import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from train import command_line
from train.files import plain, write_json


@dataclass(frozen=True)
class Args:
    name: str | None = None
    resume: bool = False
    steps: int | None = None
    rate: float | None = None
    text: Path | None = None
    sizes: tuple[int, ...] = (3, 4)
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


# --- choice, device


def test_choice():
    assert command_line.choice("--size", "big", {"big": 1, "small": 2}) == "big"
    with pytest.raises(ValueError, match="^--size 'huge' is unknown; expected one of big, small$"):
        command_line.choice("--size", "huge", {"big": 1, "small": 2})


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
from train.command_line import Stop
with Stop() as stop:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while not stop.requested:
        print("x" * 50, file=sys.stderr)
print("stopped")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.stdout == "stopped\n" and "Error" not in result.stderr


# --- resume


def make_run(root, name, args):
    (root / name).mkdir(parents=True)
    write_json(root / name / "config.json", {"args": args, "net": {"width": 3}})


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py"])
    args = Args("a", False, 30, 1.0, Path("some/text.txt"), (5,), 7, False)
    make_run(tmp_path, "a", args)
    return args


def test_resume_takes_what_the_run_was_started_with(stored, tmp_path):
    folder, args = command_line.resume(tmp_path, Args(name="a", resume=True), free=())
    assert folder == tmp_path / "a" and args == dataclasses.replace(stored, resume=True)
    assert isinstance(args.text, Path) and isinstance(args.sizes, tuple) and isinstance(args.rate, float)


def test_resume_takes_the_newest_run(stored, tmp_path):
    make_run(tmp_path, "b", Args(name="b", steps=2))
    os.utime(tmp_path / "a" / "config.json", (time.time() + 5,) * 2)
    assert command_line.resume(tmp_path, Args(resume=True), free=())[1].name == "a"
    os.utime(tmp_path / "b" / "config.json", (time.time() + 9,) * 2)
    assert command_line.resume(tmp_path, Args(resume=True), free=())[1] == Args(name="b", resume=True, steps=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 31}, "with --steps 31: it was started with 30"),
        ({"save_every": 8}, "with --save-every 8: it was started with 7"),
        ({"text": Path("other.txt")}, "with --text other.txt: it was started with some/text.txt"),
        ({"sizes": (6,)}, r"with --sizes \(6,\): it was started with \(5,\)"),
    ],
)
def test_resume_with_a_contradiction(change, message, stored, tmp_path):
    given = Args(name="a", resume=True, **change)
    with pytest.raises(ValueError, match=f"^cannot resume '{tmp_path / 'a'}' {message}$"):
        command_line.resume(tmp_path, given, free=("rate",))
    (name,) = change
    assert getattr(command_line.resume(tmp_path, given, free=(name,))[1], name) == change[name]


@pytest.mark.parametrize("flag", [["--save-every", "500"], ["--save-every=500"], ["--save_every", "500"]])
def test_an_explicit_default_is_said_too(flag, stored, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py", "--resume", *flag])
    with pytest.raises(ValueError, match="with --save-every 500: it was started with 7"):
        command_line.resume(tmp_path, Args(name="a", resume=True), free=())
    assert command_line.resume(tmp_path, Args(name="a", resume=True), free=("save_every",))[1].save_every == 500


def test_an_explicit_switch_is_said_too(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py", "--compile"])
    assert command_line.resume(tmp_path, Args(name="a", resume=True), free=("compile",))[1].compile is True
    with pytest.raises(ValueError, match="with --compile True: it was started with False"):
        command_line.resume(tmp_path, Args(name="a", resume=True), free=())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "nothing to resume: '.*a' has no config.json"),
        ("{", "config.json' is not readable as a run's configuration"),
        ("[]", "config.json' does not fit: expected 'args' with the fields name, resume, "),
        ('{"args": {"steps": "many"}}', "config.json' does not fit"),
        ('{"args": {"steps": true}}', "config.json' does not fit"),
        ('{"args": {"wheels": 4}}', "config.json' does not fit"),
    ],
)
def test_resume_of_what_is_no_run(content, message, stored, tmp_path):
    path = tmp_path / "a" / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message):
        command_line.resume(tmp_path, Args(name="a", resume=True), free=())


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume: no run in"):
        command_line.resume(tmp_path / "runs", Args(resume=True), free=())


# --- from_json, check_same


@pytest.mark.parametrize(
    "args",
    [Args(), Args("x", True, 1, float("inf"), Path("p"), (1, 2), 3, False), Args(rate=float("-inf"))],
)
def test_from_json_inverts_plain(args):
    config = json.loads(json.dumps({"args": plain(args)}))
    assert command_line.from_json(Args, config, "args", "it") == args


def test_from_json_fills_in_fields_that_are_new():
    assert command_line.from_json(Args, {"args": {"steps": 3}}, "args", "it") == Args(steps=3)


def test_check_same():
    now = {"net": {"width": 3, "attention": {"heads": 2}}, "tokens": 7}
    command_line.check_same("it has", {**now, "torch": "2.13"}, now)
    for stored, message in [
        ({**now, "tokens": 8}, "^it has tokens 8, expected 7$"),
        ({**now, "net": {"width": 3, "attention": {"heads": 4}}}, "^it has net attention heads 4, expected 2$"),
        ({"tokens": 7}, "^it has net width None, expected 3$"),
        (None, "^it has net width None, expected 3$"),
    ]:
        with pytest.raises(ValueError, match=message):
            command_line.check_same("it has", stored, now)


# --- new_folder


def test_new_folder(tmp_path):
    root = tmp_path / "runs" / "experiment"
    assert command_line.new_folder(root, "a") == root / "a"
    with pytest.raises(ValueError, match="a' exists already; continue it with --resume or choose another --name"):
        command_line.new_folder(root, "a")
    several = [command_line.new_folder(root, None) for _ in range(3)]
    assert len(set(several)) == 3 and all(folder.is_dir() for folder in several)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp", "a/"])
def test_names_that_are_no_folder(name, tmp_path):
    with pytest.raises(ValueError, match=f"--name '{name}' is not the name of a folder"):
        command_line.new_folder(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()
