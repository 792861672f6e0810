"""Checkpoints that are missing, damaged, or cut short by a full disk or a kill."""

import asyncio
import errno
import gc
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from core import random
from tests import processes
from tests.train.run.checkpoint_cases import make_state, same, write
from train.run import checkpoints
from train.run.checkpoint_storage import LIMITS, Unretrieved, reason
from train.run.checkpoints import CheckpointError, Checkpoints

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "does not exist, expected a folder with checkpoints named by their step"),
        (lambda d: d.write_text("hello"), "is a file, expected a folder with checkpoints"),
        (lambda d: (d / "pictures").mkdir(parents=True), "no checkpoint in .*: expected folders named by their step"),
        (
            lambda d: (d / "7").mkdir(parents=True),
            "7 is not a checkpoint of functree, or is damaged: it has no ",
        ),
        (lambda d: (d / "07").mkdir(parents=True), "no checkpoint in "),
    ],
    ids=["missing", "file", "no-steps", "empty-step", "padded"],
)
def test_not_a_checkpoint(prepare, message, tmp_path):
    directory = tmp_path / "checkpoints"
    prepare(directory)
    for read in (checkpoints.read_config, lambda d: checkpoints.restore(d, make_state())):
        with pytest.raises(CheckpointError, match=message):
            read(directory)


def test_missing_step_lists_what_is_there(tmp_path):
    write(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5 in .*: it has 1, 2"):
        checkpoints.restore(tmp_path, make_state(), step=5)


# --- damage


def data_files(folder: Path) -> list[Path]:
    return [p for p in (folder / "state").rglob("d/*") if p.is_file()]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 3, len(content) // 3 + 40):
        content[at] ^= 0x5A
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: [truncate(p) for p in data_files(f)],
        lambda f: [garble(p) for p in data_files(f)],
        lambda f: [p.unlink() for p in data_files(f)],
        lambda f: (f / "state" / "manifest.ocdbt").write_bytes(b""),
        lambda f: shutil.rmtree(f / "state"),
        lambda f: truncate(f / "manifest" / "metadata"),
        lambda f: (f / "manifest" / "metadata").unlink(),
        lambda f: (f / "manifest" / "metadata").write_text('{"format": "something else"}'),
        lambda f: (f / "manifest" / "metadata").write_text('{"format": "functree checkpoint 2", "step": 3}'),
        lambda f: (f / "manifest" / "metadata").write_bytes(b"\xff\xfe"),
    ],
    ids=[
        "truncated", "garbled", "no-data", "empty-index", "no-state", "half-manifest", "no-manifest",
        "foreign-manifest", "incomplete-manifest", "binary-manifest",
    ],
)  # fmt: skip
def test_damage_is_said_and_an_intact_step_is_named(damage, tmp_path):
    write(tmp_path, 1, 2, 3)
    for path in data_files(tmp_path / "2"):
        garble(path)
    damage(tmp_path / "3")
    with pytest.raises(CheckpointError, match="step 1 is intact: choose it with step=1") as caught:
        checkpoints.restore(tmp_path, make_state())
    line = str(caught.value)
    assert line.startswith(str(tmp_path / "3")) and "\n" not in line and len(line) < 500
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert same(checkpoints.restore(tmp_path, make_state(), step=1), make_state(1))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.restore(tmp_path, make_state(), step=2)


@pytest.mark.parametrize("damage", [truncate, garble, Path.unlink])
def test_damage_to_any_one_file_is_found_or_harmless(damage, tmp_path):
    write(tmp_path, 1)
    refused = 0
    for path in [p for p in (tmp_path / "1").rglob("*") if p.is_file()]:
        content = path.read_bytes()
        damage(path)
        try:
            assert same(checkpoints.restore(tmp_path, make_state()), make_state(1))
        except CheckpointError as error:
            assert "damaged" in str(error)
            refused += 1
        path.write_bytes(content)
    assert refused >= 3


def test_silent_bit_flip_is_found(tmp_path):
    """A value that decodes well but is another one: the checksum in the manifest sees it."""
    write(tmp_path, 1)
    path = tmp_path / "1" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    manifest["leaves"]["key"]["crc32"] ^= 1
    manifest["crc32"] = checkpoints._checksum(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="'key' is not what was written .wrong checksum.; no older checkpoint"):
        checkpoints.restore(tmp_path, make_state())


# --- a full disk, a kill


@contextmanager
def file_size_limit(size: int):
    """Stands for a full disk: the system refuses what orbax's own threads write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_one_line_and_the_last_good_one_stays(tmp_path, capfd, caplog):
    big = {"w": random.normal(random.key(0), (1000, 1000))}
    with Checkpoints(tmp_path) as writer:
        writer.save(1, big, wait=True)
        with file_size_limit(1_000_000), caplog.at_level(logging.INFO):
            writer.save(2, big)
            with pytest.raises(CheckpointError, match="cannot write .*2: file too large; the last good one is step 1"):
                writer.wait()
        assert not caplog.records and capfd.readouterr() == ("", "")
        assert os.listdir(tmp_path) == ["1"] and checkpoints.latest(tmp_path) == 1
        writer.save(3, big)  # with room again the run goes on
    assert same(checkpoints.restore(tmp_path, big), big) and checkpoints.steps(tmp_path) == [1, 3]


@pytest.mark.parametrize(("package", "messages"), [("orbax", 0), ("other", 1)])
def test_writes_that_fail_after_another_are_not_heard_of(package, messages, tmp_path, caplog):
    """asyncio logs a task whose failure nobody asked for; those of orbax follow a failure that was raised to us."""
    write(tmp_path / "checkpoints", 1)
    source = compile("async def fail():\n    raise OSError('the disk is full')", f"/{package}/handlers.py", "exec")
    names = {}
    exec(source, names)

    async def leave_behind():
        task = asyncio.ensure_future(names["fail"]())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task

    with caplog.at_level(logging.ERROR):
        asyncio.run(leave_behind())
        gc.collect()
    assert len([r for r in caplog.records if "never retrieved" in r.getMessage()]) == messages


def test_full_disk_on_close_does_not_hide_the_error_of_the_run(tmp_path):
    with file_size_limit(1_000_000), pytest.raises(KeyboardInterrupt) as caught:
        with Checkpoints(tmp_path) as writer:
            writer.save(2, {"w": random.normal(random.key(0), (1000, 1000))})
            raise KeyboardInterrupt
    assert "file too large; there is no earlier one" in caught.value.__notes__[0]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_reasons_of_a_full_disk(code):
    """The two forms in which the system's code arrives: from Python, and in the text of a tensorstore error."""
    inside = ValueError(f"RESOURCE_EXHAUSTED: Failed to write 7 bytes: {os.strerror(code)} [os_error_code='{code}']")
    assert {reason(inside), reason(OSError(code, os.strerror(code)))} == {LIMITS[code]}


def test_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot make the checkpoint folder"):
        Checkpoints(tmp_path / "file" / "checkpoints")


KILLED = """
import sys, torch
from train.run.checkpoints import Checkpoints
writer = Checkpoints(sys.argv[1], resume=0)
state = {"w": torch.ones(1500, 1500)}
for step in range(1, 1000):
    writer.save(step, {"w": state["w"] * step})
    print(step, flush=True)
"""


def test_killed_while_saving_leaves_only_whole_checkpoints(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path]
    with processes.start(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        while int(process.stdout.readline()) < 5:
            pass
        partial = False
        while not partial:  # stopped now and then, until that is in the middle of a save
            process.send_signal(signal.SIGCONT)
            time.sleep(0.003)
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            partial = any(not name.isdecimal() for name in os.listdir(tmp_path))
        process.kill()
    like = {"w": torch.empty(1500, 1500)}
    for step in checkpoints.steps(tmp_path):
        assert torch.equal(checkpoints.restore(tmp_path, like, step)["w"], torch.full((1500, 1500), float(step)))
    assert checkpoints.latest(tmp_path) >= 4
    assert any(not name.isdecimal() for name in os.listdir(tmp_path))
    with Checkpoints(tmp_path, resume=checkpoints.latest(tmp_path)):
        assert all(name.isdecimal() for name in os.listdir(tmp_path))  # the remains are swept away


@pytest.mark.parametrize(("raised", "messages"), [(False, 0), (True, 1)], ids=["native", "in Python"])
def test_writes_that_fail_after_another_one_are_not_mentioned(raised, messages, caplog):
    """A future that failed in native code, as tensorstore's do, and one whose error Python code has raised."""
    record = logging.getLogger("asyncio")
    silent = Unretrieved()
    record.addFilter(silent)
    loop = asyncio.new_event_loop()
    try:
        future, error = loop.create_future(), ValueError("no space left")
        if raised:
            try:
                raise error
            except ValueError:
                pass
        future.set_exception(error)
        del future
        gc.collect()
    finally:
        loop.close()
        record.removeFilter(silent)
    assert len(caplog.records) == messages
