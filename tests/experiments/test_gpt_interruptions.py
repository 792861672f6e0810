"""experiments/gpt.py stopped by signals and full disks, and continued."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from tests.experiments.gpt_runs import QUICK, TEXT, call, completed, start, state_of
from tests.experiments.runs import (
    ENVIRONMENT,
    contents,
    finish,
    finite,
    metrics,
    one_error,
    same_bits,
    script,
    wait_for_step,
)
from train.run import checkpoints

LONG = (*QUICK, "--steps", "30", "--dropout", "0.1", "--eval-every", "20")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Stands in a folder with a text."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The state at the end of an uninterrupted run of LONG, in a process of its own."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    completed(folder, *LONG, "--name", "whole")
    return state_of(folder / "runs/gpt/whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "every", "delay"),
    [
        (signal.SIGKILL, "1", 0.0),  # a save is always under way
        (signal.SIGTERM, "20", 0.0),
        (signal.SIGINT, "7", 0.0),
        (signal.SIGKILL, "20", 0.1),
        (signal.SIGKILL, "1", 0.33),
        (signal.SIGKILL, "1", 0.71),
        (signal.SIGKILL, "13", 0.25),
    ],
)
def test_stopped_and_resumed_run_has_the_same_bits(number, every, delay, here, whole):
    process = start(here, *LONG, "--save-every", every, "--name", "stopped")
    run = here / "runs" / "gpt" / "stopped"
    wait_for_step(process, run, 1)
    time.sleep(delay)
    process.send_signal(number)
    code, out, err = finish(process)
    at = checkpoints.latest(run / "checkpoints")
    assert at < 30
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 128 + number and "stopping after this step" in err and "Traceback" not in err
        assert f"stopped at step {at}; continue with: " in out and "--resume --name stopped" in out
        assert int(state_of(run).step) == at
    assert not (run / "result.json").exists()
    completed(here, "--resume", "--name", "stopped")
    assert same_bits(state_of(run), whole)
    assert all(name.isdecimal() for name in os.listdir(run / "checkpoints"))  # no remains of a save cut short
    steps = [record["step"] for record in metrics(run)]
    assert steps == sorted(steps)


@pytest.mark.slow
def test_second_interruption_ends_at_once(here):
    process = start(here, *LONG, "--save-every", "1", "--name", "twice")
    wait_for_step(process, here / "runs/gpt/twice", 1)
    os.kill(process.pid, signal.SIGSTOP)  # so that both arrive before it can act on the first
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    code, out, err = finish(process)
    assert code in (130, 143) and "interrupted" in err and "Traceback" not in err
    assert finite(state_of(here / "runs/gpt/twice"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_interruption_before_the_first_step_leaves_nothing(number, here):
    before = contents(here)
    os.mkfifo(here / "pipe.txt")  # it waits for this text for ever
    process = start(here, "--text", "pipe.txt", "--name", "early")
    with open(here / "pipe.txt", "w"):
        process.send_signal(number)
        assert finish(process) == (128 + number, "", "interrupted\n")
    (here / "pipe.txt").unlink()
    assert contents(here) == before


# --- a full disk


@contextmanager
def file_size_limit(size: int):
    """The system refuses what is written beyond it, to whichever file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [10, 300])  # too little for tokenizer.json; enough for it but not for config.json
def test_start_on_a_full_disk_leaves_no_folder(size, here, capsys):
    with file_size_limit(size):
        code = call(*QUICK, "--steps", "3", "--name", "full")
    line = one_error(capsys.readouterr().err)
    assert code == 2 and "File too large" in line and "runs/gpt/full/" in line
    assert not (here / "runs/gpt/full").exists()


def test_full_disk_while_saving(here, capsys):
    with file_size_limit(1_000_000):
        code = call(*QUICK, "--steps", "9", "--save-every", "3", "--name", "full")
    line = one_error(capsys.readouterr().err)
    assert code == 2 and "cannot write checkpoint" in line and "file too large; there is no earlier one" in line
    assert os.listdir(here / "runs/gpt/full/checkpoints") == []
    assert call("--resume", "--name", "full") == 0  # with room again


# The first argument is where to mount; the rest is the command. What it leaves must go on when there is room again.
FULL = """
mount -t tmpfs -o size=$SIZE none "$1" && cd "$1" && printf "%s" "$TEXT" > text.txt || exit 99
shift
"$@"
echo "code $?"
mount -o remount,size=200m "$PWD"
"$1" "$2" --resume --name full
echo "resumed $?"
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("12k", "No space left on device"),
        ("60k", "the disk is full; there is no earlier one"),
        ("20m", "the disk is full; the last good one is step 6"),
    ],
)
def test_file_system_without_space(size, message, here):
    """A real one of a few pages, in a mount namespace that ends with its process."""
    (here / "mounted").mkdir()
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", here / "mounted"]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    train = [sys.executable, script("gpt"), *QUICK, "--steps", "9", "--save-every", "3", "--name", "full"]
    command = ["unshare", "-rm", "sh", "-c", FULL, "sh", here / "mounted", *train]
    variables = {**ENVIRONMENT, "TEXT": TEXT, "SIZE": size}
    process = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    out, errors = process.stdout, process.stderr.splitlines()
    assert "code 2" in out and errors[0].startswith("error: ") and message in errors[0]
    if size == "12k":
        assert len(errors) == 2 and "nothing to resume: 'runs/gpt/full' has no config.json" in errors[1]
    else:
        assert len(errors) == 1 and "resumed 0" in out
