import json
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
from gpt_runs import (
    ENVIRONMENT,
    QUICK,
    SCRIPT,
    TEXT,
    call,
    contents,
    finish,
    finite,
    one_error,
    same_bits,
    start,
    state_of,
    wait_for_step,
)

from train import checkpoints

LONG = (*QUICK, "--steps", "120", "--dropout", "0.1", "--eval-every", "40")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and a finished run of 6 steps, runs/gpt/done; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "short.txt").write_text("a few words\n")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    (folder / "binary.json").write_bytes(b"\x00\xff\x00")
    (folder / "other.json").write_text('{"a": 1}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, "--steps", "6", "--save-every", "2", "--name", "done") == 0
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of it, in which the test stands."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capfd, *argv: str) -> str:
    """The one line with which the script refuses; nothing on disk may have changed, no folder been added."""
    before = contents(Path.cwd())
    capfd.readouterr()
    code = call(*argv)
    line = one_error(capfd.readouterr().err)
    assert code == 2 and contents(Path.cwd()) == before
    return line


# --- a start that cannot be


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "none.txt"], "none.txt does not exist, expected a text file"),
        (["--text", "runs"], "runs is a folder, expected a text file"),
        (["--text", "empty.txt"], "empty.txt is empty"),
        (["--text", "short.txt"], "'short.txt' has 12 tokens; a context of 64 needs over 640"),
        (["--text", "latin.txt"], "latin.txt is not UTF-8 text: byte 0xe9 at offset 3"),
        (["--preset", "huge"], "--preset 'huge' is unknown; expected one of tiny, "),
        (["--device", "abacus"], "--device 'abacus' cannot be used; available here: cpu"),
        (["--device", "meta"], "--device 'meta' cannot be used"),
        (["--device", "cuda:99"], "--device 'cuda:99' cannot be used"),
        (["--dtype", "float8"], "--dtype 'float8' is unknown; expected one of float32, bfloat16"),
        (["--name", "done"], "done' exists already; continue it with --resume or choose another --name"),
        (["--name", "a/b"], "--name 'a/b' is not the name of a folder"),
        (["--name", ".."], "--name '..' is not the name of a folder"),
        (["--steps", "0"], "--steps is 0; expected at least 1"),
        (["--save-every", "0"], "--save-every is 0; expected at least 1"),
        (["--eval-every", "-1"], "--eval-every is -1; expected at least 1"),
        (["--batch", "3", "--micro-batches", "2"], "--batch 3 does not divide into --micro-batches 2"),
        (["--dropout", "1.5"], "dropout 1.5 is outside [0, 1)"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0; expected a positive number"),
        (["--learning-rate", "nan"], "--learning-rate is nan; expected a positive number"),
        (["--tokenizer", "none.json"], "none.json"),
        (["--tokenizer", "binary.json"], "binary.json"),
        (["--tokenizer", "other.json"], "other.json is not a tokenizer"),
        (["--tokenizer", "runs"], "no tokenizer in runs: expected tokenizer.json, or vocab.json and merges.txt"),
        (["--weights", "runs"], "'runs' has none of the files config.json"),
        (["--resume", "--name", "nothing"], "nothing to resume: 'runs/gpt/nothing' has no config.json"),
    ],
    ids=lambda value: "_".join(value).lstrip("-") if isinstance(value, list) else "",
)
def test_start_is_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, *QUICK, *flags)


def test_refusal_of_a_real_process(here):
    code, out, err = finish(start(here, *QUICK, "--preset", "huge"))
    assert code == 2 and out == "" and "expected one of tiny" in one_error(err)
    code, out, err = finish(start(here, "--stepz", "3"))  # tyro's own words
    assert code == 2 and "--stepz" in err and "Traceback" not in err


def test_resume_where_no_run_is(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert "nothing to resume: no run in 'runs/gpt'" in refused(capfd, "--resume")


# --- resume that cannot be


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "4"], "with --batch 4: it was started with 2"),
        (["--preset", "nanogpt-cpu"], "with --preset nanogpt-cpu: it was started with tiny"),
        (["--learning-rate", "1e-3"], "with --learning-rate 0.001: it was started with None"),
        (["--text", "short.txt"], "with --text short.txt: it was started with text.txt"),
        (["--dtype", "bfloat16"], "with --dtype bfloat16: it was started with float32"),
        (["--seed=1"], "with --seed 1: it was started with 0"),
        (["--steps", "3"], "--steps is 3, but 'runs/gpt/done' has done 6"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_resume_with_a_contradicting_flag(flags, message, here, capfd):
    assert message in refused(capfd, "--resume", "--name", "done", *flags)


def test_contradiction_by_an_explicit_default(here, capfd):
    assert call(*QUICK, "--steps", "1", "--name", "seeded", "--seed", "5") == 0
    assert "with --seed 0: it was started with 5" in refused(capfd, "--resume", "--name", "seeded", "--seed", "0")


@pytest.mark.parametrize(
    "content",
    ["", "[1, 2", "[]", '{"args": 3}', '{"args": {"steps": "many"}}', '{"args": {"lightbulbs": 4}}'],
)
def test_config_that_is_no_config(content, here, capfd):
    (here / "runs/gpt/done/config.json").write_text(content)
    assert "runs/gpt/done/config.json'" in refused(capfd, "--resume", "--name", "done")


def test_text_that_has_changed(here, capfd):
    (here / "text.txt").write_text(TEXT + "more", encoding="utf-8")
    line = refused(capfd, "--resume", "--name", "done")
    assert f"its checkpoint has tokens {len(TEXT)}, expected {len(TEXT) + 4}" in line


def test_checkpoint_of_another_config(here, capfd):
    assert call(*QUICK, "--steps", "6", "--name", "other", "--dropout", "0.2") == 0
    shutil.rmtree(here / "runs/gpt/done/checkpoints")
    shutil.copytree(here / "runs/gpt/other/checkpoints", here / "runs/gpt/done/checkpoints")
    line = refused(capfd, "--resume", "--name", "done")
    assert "cannot resume 'runs/gpt/done': its checkpoint has net dropout 0.2, expected 0.0" in line


def test_checkpoint_of_another_net(here, capfd):
    """Its config claims to be ours, its tensors are not."""
    folder = here / "runs/gpt/done/checkpoints"
    config, state = checkpoints.read_config(folder), state_of(here / "runs/gpt/done")
    shutil.rmtree(folder)
    wider = state._replace(params={**state.params, "tokens": {"weight": torch.zeros(40, 128)}})
    with checkpoints.Checkpoints(folder, config) as saved:
        saved.save(6, wider, {"seconds": 1.0})
    for argv in (("--resume", "--name", "done"), ("sample", "--run", "runs/gpt/done")):
        assert "tokens.weight' is float32 (40, 128), expected float32 (41, 128)" in refused(capfd, *argv)


@pytest.mark.parametrize("config", [None, {"net": 3}, {"net": {"pixels": 28}}, [1]])
def test_checkpoint_of_another_experiment(config, here, capfd):
    folder = here / "runs/gpt/done/checkpoints"
    shutil.rmtree(folder)
    with checkpoints.Checkpoints(folder, config) as saved:
        saved.save(6, {"w": torch.ones(3)})
    assert "its checkpoint has " in refused(capfd, "--resume", "--name", "done")
    line = refused(capfd, "sample", "--run", "runs/gpt/done")
    assert "the configuration of 'runs/gpt/done' does not fit: expected 'net' with the fields vocabulary, " in line


def truncate(folder):
    for path in (folder / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(folder):
    for path in (folder / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 0x5A
        path.write_bytes(content)


def forget_manifest(folder):
    shutil.rmtree(folder / "manifest")


def replace_by_a_pickle(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save({"w": torch.ones(3)}, folder / "checkpoint.pt")


@pytest.mark.parametrize("damage", [truncate, garble, forget_manifest, replace_by_a_pickle])
def test_damaged_checkpoint(damage, here, capfd):
    damage(here / "runs/gpt/done/checkpoints/6")
    line = refused(capfd, "--resume", "--name", "done")
    assert "checkpoints/6 is " in line and "damaged" in line
    assert "checkpoints/6 is " in refused(capfd, "sample", "--run", "runs/gpt/done")
    # What the advice says: without the damaged one the run continues.
    shutil.rmtree(here / "runs/gpt/done/checkpoints/6")
    assert call("--resume", "--name", "done") == 0
    assert checkpoints.latest(here / "runs/gpt/done/checkpoints") == 6


# --- sample that cannot be


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "Tea or ☕?"], "character '☕' at position 7 is not among the 41 of the vocabulary"),
        (["--prompt", "\udcff"], "is not among the 41 of the vocabulary"),
        (["--temperature", "-1"], "temperature -1.0 is not above 0"),
        (["--temperature", "nan"], "temperature nan is not above 0"),
        (["--top-k", "0"], "top_k 0 is not at least 1"),
        (["--top-p", "1.5"], "top_p 1.5 is outside (0, 1]"),
        (["--tokens", "0"], "--tokens is 0; expected at least 1"),
        (["--device", "abacus"], "--device 'abacus' cannot be used"),
        (["--weights", "runs"], "expected either --run DIR or --weights SOURCE"),
    ],
    ids=lambda value: "_".join(value).lstrip("-") if isinstance(value, list) else "",
)
def test_sample_is_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, "sample", "--run", "runs/gpt/done", *flags)


def test_sample_of_nothing(here, capfd):
    assert "expected either --run DIR or --weights SOURCE" in refused(capfd, "sample")
    assert "no/checkpoints does not exist" in refused(capfd, "sample", "--run", "no")
    assert "text.txt/checkpoints does not exist" in refused(capfd, "sample", "--run", "text.txt")
    (here / "runs/gpt/done/tokenizer.json").unlink()
    assert "tokenizer.json" in refused(capfd, "sample", "--run", "runs/gpt/done")


def test_tokenizer_of_another_run(here, capfd):
    characters = "".join(chr(0x100 + i) for i in range(60))
    (here / "runs/gpt/done/tokenizer.json").write_text(
        json.dumps({"format": "functree characters 1", "chars": characters})
    )
    line = refused(capfd, "sample", "--run", "runs/gpt/done", "--prompt", characters[59])
    assert "the tokenizer has 60 tokens, expected at most the 41 of the net" in line


# --- a run that ends early


@pytest.mark.parametrize("rate", ["1e13", "1e30"])
def test_loss_that_is_not_finite_stops_the_run(rate, here, capfd):
    code = call(*QUICK, "--steps", "9", "--save-every", "1", "--name", "wild", "--learning-rate", rate)
    line, kept = one_error(capfd.readouterr().err), checkpoints.latest(here / "runs/gpt/wild/checkpoints")
    assert code == 2
    if rate == "1e13":
        assert "step 2 is not finite (loss nan" in line and "the last good checkpoint is that of step 1" in line
        assert kept == 1 and finite(state_of(here / "runs/gpt/wild"))
    else:  # the loss is that of the initial values, but the update spoils them
        assert "step 1 is not finite (loss 3." in line and "there is no checkpoint yet" in line
        assert kept is None


@pytest.fixture(scope="module")
def whole(place):
    """The state at the end of an uninterrupted run of LONG, in a process of its own."""
    code, _, err = finish(start(place, *LONG, "--save-every", "120", "--name", "whole"))
    assert (code, err) == (0, "")
    state = state_of(place / "runs/gpt/whole")
    shutil.rmtree(place / "runs/gpt/whole")
    return state


@pytest.mark.parametrize(
    ("number", "every", "delay"),
    [
        (signal.SIGKILL, "1", 0.0),  # a save is always under way
        (signal.SIGTERM, "40", 0.0),
        pytest.param(signal.SIGINT, "7", 0.0, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "20", 0.1, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "1", 0.33, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "1", 0.71, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "13", 0.25, marks=pytest.mark.slow),
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
    assert at < 120
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 0 and "stopping after this step" in err and "Traceback" not in err
        assert f"stopped at step {at}; continue with: " in out and "--resume --name stopped" in out
        assert int(state_of(run).step) == at
    assert not (run / "result.json").exists()
    code, out, err = finish(start(here, "--resume", "--name", "stopped"))
    assert (code, err) == (0, "")
    assert same_bits(state_of(run), whole)
    assert all(name.isdecimal() for name in os.listdir(run / "checkpoints"))  # no remains of a save cut short
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_second_interruption_ends_at_once(here):
    process = start(here, *LONG, "--save-every", "1", "--name", "twice")
    wait_for_step(process, here / "runs/gpt/twice", 1)
    os.kill(process.pid, signal.SIGSTOP)  # so that both arrive before it can act on the first
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    code, out, err = finish(process)
    assert code == 130 and "interrupted" in err and "Traceback" not in err
    assert finite(state_of(here / "runs/gpt/twice"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interruption_before_the_first_step_leaves_nothing(number, here):
    before = contents(here)
    os.mkfifo(here / "pipe.txt")  # it waits for this text for ever
    process = start(here, "--text", "pipe.txt", "--name", "early")
    with open(here / "pipe.txt", "w"):
        process.send_signal(number)
        assert finish(process) == (130, "", "interrupted\n")
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


@pytest.mark.parametrize(
    ("size", "message"),
    [
        pytest.param("12k", "No space left on device", marks=pytest.mark.slow),
        pytest.param("60k", "the disk is full; there is no earlier one", marks=pytest.mark.slow),
        ("20m", "the disk is full; the last good one is step 6"),
    ],
)
def test_file_system_without_space(size, message, here):
    """A real one of a few pages, in a mount namespace that ends with its process."""
    (here / "mounted").mkdir()
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", here / "mounted"]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    train = [sys.executable, SCRIPT, *QUICK, "--steps", "9", "--save-every", "3", "--name", "full"]
    command = ["unshare", "-rm", "sh", "-c", FULL, "sh", here / "mounted", *train]
    variables = {**ENVIRONMENT, "TEXT": TEXT, "SIZE": size}
    process = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    out, errors = process.stdout, process.stderr.splitlines()
    assert "code 2" in out and errors[0].startswith("error: ") and message in errors[0]
    if size == "12k":
        assert len(errors) == 2 and "nothing to resume: 'runs/gpt/full' has no config.json" in errors[1]
    else:
        assert len(errors) == 1 and "resumed 0" in out
