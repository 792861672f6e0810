"""experiments/gpt.py and classify.py on two processes: the figures of one, resumed on another number; faults."""

import functools
import json
import signal
import time

import pytest

from tests import launched
from tests.experiments import runs
from tests.experiments.gpt_runs import TEXT, call, state_of
from tests.experiments.runs import one_error, refused, same_bits, script, wait_for_step
from train.run import checkpoints
from train.run.ranks import PLAN

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
        ("vae", ("--mesh", "data=2"), "--mesh data=2 is for several processes; vae.py trains on one"),
    ],
)
def test_flags_of_several_processes_are_refused_on_one(here, capfd, experiment, flags, message):
    assert message in refused(experiment, capfd, *flags)


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
