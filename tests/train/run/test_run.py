"""A run from its beginning to its end: folder, checkpoints, stopping, resuming."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from train.files import shown
from train.run import Common, Count, Positive, Shared, begin, checkpoints
from train.run.run import Run, new_folder

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.usefixtures("default_handlers")


@dataclass(frozen=True)
class Args:
    steps: Count = 9
    rate: Positive = 1.0
    common: Shared = Common(save_every=2, compile=False)


def args_of(name=None, **changes) -> Args:
    common = Common(name=name, save_every=2, compile=False)
    return dataclasses.replace(Args(common=common), **changes)


def resumed(args: Args, name=None, **changes) -> Args:
    return dataclasses.replace(args, common=dataclasses.replace(args.common, resume=True, name=name), **changes)


def count_to(root, args, stop_at=None, number=signal.SIGTERM, metric=lambda at: 1.0 / at):
    """A run whose state is the number of its steps; the state at its end."""
    run = begin(root, args, free=("steps",))
    state = run.restore({"count": torch.tensor(0)}, {"net": {"width": 3}}, args.steps)
    with run.open({"recipe": 1}, best="loss", files={"words.txt": lambda path: path.write_text("words")}):
        for at, batch in run.steps(torch.tensor(i) for i in run.remaining):
            state = {"count": state["count"] + 1}
            assert int(batch) == at - 1 == int(state["count"]) - 1
            if at == stop_at:
                signal.raise_signal(number)
            run.record(at, {"loss": torch.tensor(metric(at)), "norm": torch.tensor(2.0)}, 1)
            if run.due(at, args.common.save_every):
                run.save(at, state, loss=float(at))
        assert checkpoints.latest(run.folder / "checkpoints") == args.steps  # before any result
        run.result({"count": int(state["count"])})
    return int(state["count"])


@pytest.fixture(autouse=True)
def handlers():
    """Signals as a terminal sends them, whatever the tests were started with."""
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


def test_new_run_from_begin_to_end(tmp_path):
    root = tmp_path / "counter"
    assert count_to(root, args_of("a")) == 9
    folder = root / "a"
    assert (folder / "words.txt").read_text() == "words"
    assert checkpoints.steps(folder / "checkpoints") == [2, 6, 8, 9]  # 2 has the best loss
    config = json.loads((folder / "config.json").read_text())
    assert config["experiment"] == "counter" and config["args"]["common"]["name"] == "a" and config["recipe"] == 1
    assert config == checkpoints.read_config(folder / "checkpoints") and config["net"] == {"width": 3}
    result = json.loads((folder / "result.json").read_text())
    assert result["count"] == result["steps"] == 9 and result["seconds"] > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(9, pytest.approx(1 / 9))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopped_run_is_saved_says_how_to_continue_and_continues(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["my experiments/counter.py"])
    with pytest.raises(SystemExit) as stop:
        count_to(tmp_path, args_of("a b"), stop_at=5, number=number)
    assert stop.value.code == 128 + number
    line = "stopped at step 5; continue with: python 'my experiments/counter.py' --resume --name 'a b'\n"
    assert capsys.readouterr().out.endswith(line)
    before = checkpoints.read_record(tmp_path / "a b" / "checkpoints")
    (tmp_path / "a b" / "words.txt").write_text("old words")
    assert before.step == 5 and not (tmp_path / "a b" / "result.json").exists()
    assert count_to(tmp_path, resumed(args_of(), "a b")) == 9
    after = checkpoints.read_record(tmp_path / "a b" / "checkpoints")
    assert after.metrics["seconds"] > before.metrics["seconds"] > 0
    assert (tmp_path / "a b" / "words.txt").read_text() == "old words"


def test_stopped_run_names_the_command_that_started_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["__main__"], "PROGRAM", "functree counter", raising=False)
    with pytest.raises(SystemExit):
        count_to(tmp_path, args_of("a"), stop_at=5, number=signal.SIGTERM)
    assert capsys.readouterr().out.endswith("; continue with: functree counter --resume --name a\n")


def test_an_ignored_signal_stays_ignored(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert count_to(tmp_path, args_of("a"), stop_at=5, number=signal.SIGHUP) == 9


def test_seconds_go_on_where_they_were(tmp_path):
    run = begin(tmp_path, args_of("a"))
    run.restore({}, {}, 2)
    with run.open({}):
        run._saved.save(1, {"w": torch.ones(1)}, {"seconds": 1000.0})
    run = begin(tmp_path, resumed(args_of(), "a"))
    run.restore({"w": torch.ones(1)}, {}, 2)
    with run.open({}):
        assert run.first == 1 and 1000 <= run.seconds < 1060


def test_resume_before_the_first_checkpoint_begins_again(tmp_path):
    run = begin(tmp_path, args_of("a"))
    run.restore({}, {}, 2)
    with run.open({}):
        assert run.first == 0
    run = begin(tmp_path, resumed(args_of(), "a"))
    state = {"w": torch.ones(1)}
    assert run.restore(state, {"net": 3}, 2) is state
    with run.open({}):
        assert run.first == 0 and run.folder == tmp_path / "a"


def test_state_of_another_net_or_a_later_step(tmp_path):
    count_to(tmp_path, args_of("a", steps=3))
    run = begin(tmp_path, resumed(args_of(steps=3), "a"))
    state, here = {"count": torch.tensor(0)}, f"'{tmp_path / 'a'}'"
    assert run.restore(state, {"net": {"width": 3}}, 3)["count"] == 3
    with pytest.raises(ValueError, match=f"^cannot resume {here}: its checkpoint has net width 3, expected 4$"):
        run.restore(state, {"net": {"width": 4}}, 3)
    with pytest.raises(ValueError, match=f"^--steps is 2, but {here} has done 3$"):
        run.restore(state, {"net": {"width": 3}}, 2)
    with pytest.raises(checkpoints.CheckpointError, match="'w' is missing"):
        run.restore({"w": torch.ones(1)}, {}, 3)


def test_what_is_done_otherwise_is_said_or_refused(tmp_path, capsys):
    count_to(tmp_path, args_of("a", steps=3))
    with pytest.raises(ValueError, match=r"^cannot resume '.*a' with --rate 2.0: it was started with 1.0$"):
        begin(tmp_path, resumed(args_of(steps=3, rate=2.0), "a"), free=("steps",))
    capsys.readouterr()
    assert count_to(tmp_path, resumed(args_of(steps=5), "a")) == 5
    assert "resumed with --steps 5 (it was started with 3)" in capsys.readouterr().out


def test_run_that_cannot_begin_leaves_no_folder(tmp_path):
    def full(path):
        path.write_text("half")
        raise OSError("the disk is full")

    def opened(config, **options):
        run = begin(tmp_path / "runs", args_of("a"))
        run.restore({}, {}, 1)
        return run.open(config, **options)

    with pytest.raises(OSError, match="the disk is full"), opened({}, files={"words.txt": full}):
        raise AssertionError("it must not begin")
    with pytest.raises(TypeError, match="cannot write a object as JSON"), opened({"net": object()}):
        raise AssertionError("it must not begin")
    assert list((tmp_path / "runs").iterdir()) == []
    with pytest.raises(KeyError), opened({}):  # an error of the loop leaves what there is
        raise KeyError("a bug")
    assert (tmp_path / "runs" / "a" / "config.json").exists()


def test_a_folder_has_one_process_at_work(tmp_path):
    count_to(tmp_path, args_of("a", steps=3))
    run = begin(tmp_path, resumed(args_of(steps=5), "a"), free=("steps",))
    run.restore({"count": torch.tensor(0)}, {}, 5)
    code = f"""
from pathlib import Path
from train.run.run import locked
with locked(Path({str(tmp_path / "a")!r})):
    print("locked", flush=True)
    input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            before = sorted(os.listdir(tmp_path / "a"))
            with pytest.raises(ValueError, match=rf"'.*a' is in use by another process \(pid {other.pid}\)"):
                with run.open({}):
                    raise AssertionError("it must not begin")
            assert sorted(os.listdir(tmp_path / "a")) == before
        finally:
            other.kill()
    with run.open({}):
        assert run.first == 3


def test_metrics_that_are_not_finite(tmp_path):
    good, bad = torch.tensor(1.5), torch.tensor(float("inf"))
    run = begin(tmp_path, args_of("a"))
    run.restore({}, {}, 9)
    with run.open({}):
        run.record(1, {"loss": good, "norm": good}, 1)
        message = r"^step 1 is not finite \(loss 1.5, norm inf\); stopped, there is no check"
        with pytest.raises(ValueError, match=message):
            run.record(1, {"loss": good, "norm": bad}, 1)
        run.save(3, {"w": torch.ones(1)})
        members = {"loss": torch.tensor([1.0, 2.0, 3.0]), "norm": torch.tensor([4.0, 5.0, float("nan")])}
        message = r"^step 4 of member 2 is not finite \(loss 3, norm nan\); stopped, the last good .* that of step 3$"
        with pytest.raises(ValueError, match=message):
            run.record(4, members, 1)
        run.record(4, {name: values[:2] for name, values in members.items()}, 1)


def test_device_and_dtype_are_checked_first(tmp_path):
    args = dataclasses.replace(Args(), common=Common(device="abacus"))
    with pytest.raises(ValueError, match="--device 'abacus' cannot be used"):
        begin(tmp_path, args)
    run = begin(tmp_path, dataclasses.replace(Args(), common=Common(dtype="bfloat16")))
    assert isinstance(run, Run) and run.policy.compute is torch.bfloat16 and run.device == torch.device("cpu")
    assert not any(tmp_path.iterdir())


def test_new_folder(tmp_path):
    root = tmp_path / "runs" / "experiment"
    assert new_folder(root, "a") == root / "a"
    with pytest.raises(ValueError, match="a' exists already; continue it with --resume or choose another --name"):
        new_folder(root, "a")
    with pytest.raises(ValueError, match="a' exists already"):  # before anything is read
        begin(root, dataclasses.replace(Args(), common=Common(name="a")))
    several = [new_folder(root, None) for _ in range(3)]
    assert len(set(several)) == 3 and all(folder.is_dir() for folder in several)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp", "a/", "a\nb", "a\x1b[1m"])
def test_names_that_are_no_folder(name, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"--name '{shown(name)}' is not the name of a folder")):
        new_folder(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()
