"""Experiments on two processes: the curve, files and figures of one, resumed on another number; faults."""

import functools
import json
import math
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import launched
from tests.experiments import runs
from tests.experiments.gpt_runs import TEXT, call, state_of
from tests.experiments.runs import ROOT, one_error, refused, same_bits, script, wait_for_step
from tests.registry.experiments import EXPERIMENTS, Experiment
from train.run import checkpoints
from train.run.ranks import PLAN, Ranks
from train.scale import launch

FLAGS = ("--text", "text.txt", "--batch", "4", "--no-compile", "--dropout", "0.1", "--save-every", "4")
together = functools.partial(launched.together, script("gpt"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def figures(folder, experiment: str, name: str) -> dict:
    return json.loads((folder / "runs" / experiment / name / "result.json").read_text())


@pytest.mark.parametrize(
    ("experiment", "flags", "message"),
    [
        ("gpt", ("--shard", "fsdp"), "--shard fsdp is for several processes; start it as torchrun --nproc-per-node 2"),
        ("gpt", ("--mesh", "data=2"), "--mesh data=2 is for several processes; start it as torchrun"),
        ("classify", ("--local-norm",), "--local-norm is for several processes; start it as torchrun"),
        ("gan", ("--mesh", "data=2"), "--mesh data=2 is for several processes; gan.py trains on one"),
    ],
)
def test_flags_of_several_processes_are_refused_on_one(here, capfd, experiment, flags, message):
    assert message in refused(experiment, capfd, *flags)


@pytest.mark.parametrize(
    ("experiment", "flags", "message"),
    [
        ("detect", ("--net", "detr"), "--net detr trains on one process, but 2 run; start it without torchrun"),
        ("segment", ("--members", "3"), "--members 3 trains on one process, but 2 run; start it without torchrun"),
        ("sequences", ("--task", "forecast"), "--task forecast trains on one process, but 2 run; start it without"),
        ("sequences", ("--members", "3"), "--members 3 trains on one process, but 2 run; start it without torchrun"),
        ("superres", ("--net", "srgan-small"), "--net srgan-small trains on one process, but 2 run; start it without"),
        *(
            (row.name, (), f"{row.name}.py trains on one process, but 2 run; start it")
            for row in EXPERIMENTS
            if not row.shards
        ),
    ],
)
def test_flags_of_one_process_are_refused_on_several(here, monkeypatch, experiment, flags, message):
    first_of_two = SimpleNamespace(rank=0, ranks=2, restarts=0, close=lambda: None)
    monkeypatch.setattr(launch, "current", lambda: first_of_two)
    monkeypatch.setenv("FUNCTREE_DEBUG", "1")  # the error is raised, and no process ended by it
    with pytest.raises(ValueError, match=re.escape(message)):
        runs.call(experiment, *flags)
    assert not (here / "runs").exists()


def test_the_page_says_which_script_takes_which_way():
    page = (ROOT / "train" / "scale" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:\w+\.py(?:, )?)+) \| ((?:\w+(?:, )?)+) \|$", page, re.MULTILINE)
    taken = {name.removesuffix(".py"): ways for names, ways in rows for name in names.split(", ")}
    assert taken == {row.name: ", ".join(row.shards) for row in EXPERIMENTS if row.shards}


def numbers(record: dict) -> dict[str, float]:
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, (int, float)) and not name.endswith(("time", "seconds", "per_second"))
    }


def check_same_run(one: Path, other: Path) -> None:
    """The curve of one to rounding, its figures and its files; the plan of the processes is more."""
    for a, b in zip(runs.metrics(one), runs.metrics(other), strict=True):
        assert numbers(a).keys() == numbers(b).keys()
        for name, value in numbers(a).items():
            tolerance = 2e-5 if name.endswith("/loss") else 1e-3  # norms of gradients and counts of hits are rougher
            assert math.isclose(value, b[name], rel_tol=tolerance, abs_tol=1e-6), (a["step"], name, value, b[name])
    figures = [numbers(runs.result(run)) for run in (one, other)]
    assert figures[0].keys() == figures[1].keys()
    for name, value in figures[0].items():
        assert math.isclose(value, figures[1][name], rel_tol=2e-4, abs_tol=1e-6), (name, value, figures[1][name])
    files = [{path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} for run in (one, other)]
    differ = {name for name in files[0] ^ files[1] if not name.startswith(("checkpoints/", "events."))}
    assert differ == {PLAN}


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(row, marks=pytest.mark.slow if row.name in ("char_rnn", "detect") else pytest.mark.long)
        for row in EXPERIMENTS
        if row.shards
    ],
    ids=str,
)
def test_two_processes_give_the_run_of_one_and_one_goes_on(experiment: Experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment.inputs(tmp_path)
    flags = (*experiment.flags, *experiment.together, "--no-compile")
    way = "fsdp" if "fsdp" in experiment.shards else "replicate"
    ended = launched.together(script(experiment.name), *flags, "--shard", way, "--name", "two")
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert ended[1][1:] == ("", "") and f"2 processes (data=2), --shard {way}" in ended[0][1]
    assert runs.call(experiment.name, *flags, "--name", "one") == 0
    root = tmp_path / "runs" / experiment.name
    check_same_run(root / "one", root / "two")

    first, *later = checkpoints.steps(root / "two" / "checkpoints")
    shutil.copytree(root / "two", root / "half")
    for step in later:
        shutil.rmtree(root / "half" / "checkpoints" / str(step))
    assert first < experiment.steps and runs.call(experiment.name, "--resume", "--name", "half") == 0
    check_same_run(root / "one", root / "half")


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one_and_one_goes_on(here):
    flags = (*FLAGS, "--steps", "8")
    (code, out, err), (other_code, other_out, other_err) = together(*flags, "--shard", "fsdp", "--name", "two")
    assert (code, other_code, err, other_out, other_err) == (0, 0, "", "", "")
    assert "2 processes (data=2), --shard fsdp" in out and (here / "runs/gpt/two" / PLAN).exists()
    assert call(*flags, "--name", "one") == 0
    for name, value in figures(here, "gpt", "one").items():
        if name in ("val_loss", "train_loss"):
            assert abs(value - figures(here, "gpt", "two")[name]) < 2e-6, name
    assert [path.name for path in (here / "runs/gpt").iterdir() if path.is_dir()].count("two") == 1

    checkpoints_of_two = here / "runs/gpt/two/checkpoints"
    assert checkpoints.steps(checkpoints_of_two) == [4, 8]
    assert call("--resume", "--name", "two", "--steps", "12", "--no-compile") == 0
    assert call("--resume", "--name", "one", "--steps", "12", "--no-compile") == 0
    assert abs(figures(here, "gpt", "one")["val_loss"] - figures(here, "gpt", "two")["val_loss"]) < 2e-6


@pytest.mark.long
def test_two_processes_of_a_classifier(here):
    flags = ("--epochs", "0.2", "--batch", "32", "--no-compile", "--ema", "0.9")
    ended = launched.together(script("classify"), *flags, "--shard", "fsdp", "--name", "two")
    assert [(code, err) for code, _, err in ended] == [(0, ""), (0, "")]
    assert runs.call("classify", *flags, "--name", "one") == 0
    one, two = (figures(here, "classify", name) for name in ("one", "two"))
    assert abs(one["nll"] - two["nll"]) < 1e-3  # batch norms and AdamW pass rounding on

    stopped = launched.together(script("classify"), "--batch", "33", "--name", "three")
    assert [code for code, _, _ in stopped] == [2, 2] and stopped[1][2] == ""
    assert "--batch 33 does not divide over 2 processes" in one_error(stopped[0][2])
    assert not (here / "runs/classify/three").exists()


@pytest.mark.long
def test_a_signal_to_one_process_ends_both_and_they_continue(here):
    flags = (*FLAGS, "--steps", "30", "--shard", "fsdp")
    assert [code for code, _, _ in together(*flags, "--name", "whole")] == [0, 0]
    started = launched.begin(script("gpt"), *flags, "--name", "stopped")
    wait_for_step(started[0], here / "runs/gpt/stopped", 4)
    started[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [143, 143], outputs
    assert "stopped at step" in outputs[0][0] and "torchrun --nproc-per-node 2" in outputs[0][0]
    assert [code for code, _, _ in together("--resume", "--name", "stopped")] == [0, 0]
    assert same_bits(state_of(here / "runs/gpt/whole"), state_of(here / "runs/gpt/stopped"))


FULL = """
import errno, os, runpy, sys
from train.run.logs import RunLog

def write(log, step, values, metrics=RunLog.metrics):
    if os.environ["RANK"] == "1":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(log.directory / "metrics.jsonl"))
    metrics(log, step, values)

RunLog.metrics, sys.argv = write, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
def test_a_full_disk_of_one_process_ends_both_in_one_line(here):
    (here / "full.py").write_text(FULL, encoding="utf-8")
    flags = (*FLAGS, "--steps", "30", "--shard", "fsdp", "--name", "full")
    ended = launched.together(here / "full.py", script("gpt"), *flags)  # the first metrics are those of step 10
    assert [code for code, _, _ in ended] == [2, 2]
    line = one_error("".join(err for _, _, err in ended))
    assert "process 1" in line and line.endswith("metrics.jsonl': No space left on device")
    saved = here / "runs/gpt/full/checkpoints"
    assert checkpoints.steps(saved) == [4, 8]
    for step in checkpoints.steps(saved):
        checkpoints.verify(saved, step)
    assert call("--resume", "--name", "full") == 0


def test_a_straggler_is_named_once_and_not_by_its_start():
    ranks, lines = object.__new__(Ranks), []
    others = iter([["0.0", "9.0"], ["0.01", "0.02"], ["0.01", "0.3"], ["0.01", "0.3"]])
    ranks.processes = SimpleNamespace(ranks=3, exchange=lambda own: [own, *next(others)])
    ranks.clock, ranks._calls, ranks._named = SimpleNamespace(mean=lambda: 0.03), 0, False
    logged = [ranks.waits(lines.append) for _ in range(4)]
    assert lines == ["process 2 takes 0.30 s a step for its data, the others 0.02 s"]
    assert logged[1] == {"data/seconds": pytest.approx(0.02), "data/slowest_seconds": 0.03}


SLOW = """
import os, runpy, sys, time
from train.run.run import Run

def late(batches):
    for batch in batches:
        time.sleep(0.1 if os.environ["RANK"] == "1" else 0.0)
        yield batch

own, Run.steps = Run.steps, lambda run, batches: own(run, late(batches))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
def test_a_straggler_is_named_and_changes_nothing(here):
    (here / "slow.py").write_text(SLOW, encoding="utf-8")
    flags = (*FLAGS, "--steps", "30", "--shard", "fsdp")
    ended = launched.together(here / "slow.py", script("gpt"), *flags, "--name", "slow")
    assert [(code, err) for code, _, err in ended] == [(0, ""), (0, "")]
    assert re.search(r"process 1 takes 0\.\d+ s a step for its data, the others 0\.0\d s", ended[0][1])
    assert ended[0][1].count("a step for its data") == 1
    assert [code for code, _, _ in together(*flags, "--name", "whole")] == [0, 0]
    assert same_bits(state_of(here / "runs/gpt/slow"), state_of(here / "runs/gpt/whole"))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_in_one_line(here):
    started = launched.begin(script("gpt"), *FLAGS, "--steps", "2000", "--name", "killed")
    wait_for_step(started[0], here / "runs/gpt/killed", 4)
    started[1].kill()
    began = time.monotonic()
    _, err = started[0].communicate()
    assert started[0].returncode == 2 and time.monotonic() - began < 30
    assert "another process has gone" in one_error(err)

    ended = together(*FLAGS, "--name", "unlike", others=("--seed", "3"))
    assert [code for code, _, _ in ended] == [2, 2] and ended[1][2] == ""
    assert "process 1 has --seed 3, process 0 has 0; expected the same on all" in one_error(ended[0][2])
