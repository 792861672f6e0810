import dataclasses
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from train.files import plain, write_json
from train.run import checkpoints
from train.run import run as runs


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


# --- a run from begin to end


def count_to(root, args, total, stop_at=None):
    """A run whose state is the number of its steps; the state at its end, None if it was stopped."""
    origin, args = runs.begin(root, args, free=("steps",))
    identity = {"net": {"width": 3}}
    state = runs.restore(origin, {"count": torch.tensor(0)}, identity, total)
    files = {"words.txt": lambda path: path.write_text("words")}
    with runs.opened(origin, {"args": args, **identity}, total=total, best="loss", files=files) as run:
        at = run.first
        for at in range(run.first + 1, total + 1):
            state = {"count": state["count"] + 1}
            runs.check_finite(run, at, {"loss": torch.tensor(1.0 / at), "norm": torch.tensor(2.0)})
            if at == stop_at:
                signal.raise_signal(signal.SIGTERM)
            last = at == total or run.stop.requested
            if at % 2 == 0 or last:
                runs.save(run, at, state, loss=float(at))
            if last:
                break
        if runs.stopped(run, at):
            return None
    return int(state["count"])


def test_new_run_from_begin_to_end(tmp_path, capsys):
    assert count_to(tmp_path, Args(name="a"), 9) == 9
    folder = tmp_path / "a"
    assert (folder / "words.txt").read_text() == "words"
    assert checkpoints.steps(folder / "checkpoints") == [2, 6, 8, 9]  # 2 has the best loss
    assert json.loads((folder / "config.json").read_text())["args"]["name"] == "a"
    assert checkpoints.read_config(folder / "checkpoints")["net"] == {"width": 3}
    assert capsys.readouterr() == ("", "")


def test_stopped_run_says_how_to_continue_and_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["my experiments/counter.py"])
    assert count_to(tmp_path, Args(name="a b"), 9, stop_at=5) is None
    line = "stopped at step 5; continue with: python 'my experiments/counter.py' --resume --name 'a b'\n"
    assert capsys.readouterr().out == line
    before = checkpoints.read_record(tmp_path / "a b" / "checkpoints")
    (tmp_path / "a b" / "words.txt").write_text("old words")
    assert before.step == 5 and count_to(tmp_path, Args(resume=True), 9) == 9
    after = checkpoints.read_record(tmp_path / "a b" / "checkpoints")
    assert after.metrics["seconds"] > before.metrics["seconds"] > 0
    assert (tmp_path / "a b" / "words.txt").read_text() == "old words"


def test_seconds_go_on_where_they_were(tmp_path):
    config = {"args": Args(name="a")}
    with runs.opened(runs.Origin(tmp_path, "a"), config, total=2) as run:
        run.saved.save(1, {"w": torch.ones(1)}, {"seconds": 1000.0})
    origin, _ = runs.begin(tmp_path, Args(resume=True), free=())
    with runs.opened(origin, config, total=2) as run:
        assert run.first == 1 and 1000 <= runs.seconds(run) < 1060


def test_resume_before_the_first_checkpoint_begins_again(tmp_path):
    with runs.opened(runs.Origin(tmp_path, "a"), {"args": Args(name="a")}, total=2) as run:
        assert run.first == 0
    origin, args = runs.begin(tmp_path, Args(resume=True), free=())
    assert origin == (tmp_path, "a", tmp_path / "a", None) and args.name == "a"
    state = {"w": torch.ones(1)}
    assert runs.restore(origin, state, {"net": 3}, 2) is state
    with runs.opened(origin, {"args": args}, total=2) as run:
        assert run.first == 0


def test_state_of_another_net_or_a_later_step(tmp_path):
    count_to(tmp_path, Args(name="a"), 3)
    origin, _ = runs.begin(tmp_path, Args(name="a", resume=True), free=())
    state, here = {"count": torch.tensor(0)}, f"'{tmp_path / 'a'}'"
    assert runs.restore(origin, state, {"net": {"width": 3}}, 3)["count"] == 3
    with pytest.raises(ValueError, match=f"^cannot resume {here}: its checkpoint has net width 3, expected 4$"):
        runs.restore(origin, state, {"net": {"width": 4}}, 3)
    with pytest.raises(ValueError, match=f"^--steps is 2, but {here} has done 3$"):
        runs.restore(origin, state, {"net": {"width": 3}}, 2)
    with pytest.raises(checkpoints.CheckpointError, match="'w' is missing"):
        runs.restore(origin, {"w": torch.ones(1)}, {}, 3)


def test_run_that_cannot_begin_leaves_no_folder(tmp_path):
    def full(path):
        path.write_text("half")
        raise OSError("the disk is full")

    config = {"args": Args(name="a")}
    with pytest.raises(OSError, match="the disk is full"):
        with runs.opened(runs.Origin(tmp_path / "runs", "a"), config, total=1, files={"words.txt": full}):
            raise AssertionError("it must not begin")
    with pytest.raises(TypeError, match="cannot write a object as JSON"):
        with runs.opened(runs.Origin(tmp_path / "runs", "a"), {"args": object()}, total=1):
            raise AssertionError("it must not begin")
    assert list((tmp_path / "runs").iterdir()) == []
    with pytest.raises(KeyError):  # an error of the loop leaves what there is
        with runs.opened(runs.Origin(tmp_path / "runs", "a"), config, total=1):
            raise KeyError("a bug")
    assert (tmp_path / "runs" / "a" / "config.json").exists()


def test_metrics_that_are_not_finite(tmp_path):
    good, bad = torch.tensor(1.5), torch.tensor(float("inf"))
    with runs.opened(runs.Origin(tmp_path, "a"), {"args": Args()}, total=9) as run:
        runs.check_finite(run, 1, {"loss": good, "norm": good})
        with pytest.raises(
            ValueError, match=r"^step 1 is not finite \(loss 1.5, norm inf\); stopped, there is no check"
        ):
            runs.check_finite(run, 1, {"loss": good, "norm": bad})
        runs.save(run, 3, {"w": torch.ones(1)})
        members = {"loss": torch.tensor([1.0, 2.0, 3.0]), "norm": torch.tensor([4.0, 5.0, float("nan")])}
        message = r"^step 4 of member 2 is not finite \(loss 3, norm nan\); stopped, the last good .* that of step 3$"
        with pytest.raises(ValueError, match=message):
            runs.check_finite(run, 4, members)
        runs.check_finite(run, 4, {name: values[:2] for name, values in members.items()})


def test_config_of_a_run(tmp_path):
    args = Args(name="a", rate=0.5, sizes=(1, 2))
    with runs.opened(runs.Origin(tmp_path, "a"), {"args": args}, total=1) as run:
        runs.save(run, 1, {"w": torch.ones(1)})
    assert runs.read_config(tmp_path / "a", "args", Args) == args
    with pytest.raises(
        ValueError, match="^the configuration of '.*a' does not fit: expected 'net' with the fields name, "
    ):
        runs.read_config(tmp_path / "a", "net", Args)
    with pytest.raises(checkpoints.CheckpointError, match="b/checkpoints does not exist"):
        runs.read_config(tmp_path / "b", "args", Args)


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
    folder, args = runs.resume(tmp_path, Args(name="a", resume=True), free=())
    assert folder == tmp_path / "a" and args == dataclasses.replace(stored, resume=True)
    assert isinstance(args.text, Path) and isinstance(args.sizes, tuple) and isinstance(args.rate, float)


def test_resume_takes_the_newest_run(stored, tmp_path):
    make_run(tmp_path, "b", Args(name="b", steps=2))
    os.utime(tmp_path / "a" / "config.json", (time.time() + 5,) * 2)
    assert runs.resume(tmp_path, Args(resume=True), free=())[1].name == "a"
    os.utime(tmp_path / "b" / "config.json", (time.time() + 9,) * 2)
    assert runs.resume(tmp_path, Args(resume=True), free=())[1] == Args(name="b", resume=True, steps=2)


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
        runs.resume(tmp_path, given, free=("rate",))
    (name,) = change
    assert getattr(runs.resume(tmp_path, given, free=(name,))[1], name) == change[name]


@pytest.mark.parametrize("flag", [["--save-every", "500"], ["--save-every=500"], ["--save_every", "500"]])
def test_an_explicit_default_is_said_too(flag, stored, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py", "--resume", *flag])
    with pytest.raises(ValueError, match="with --save-every 500: it was started with 7"):
        runs.resume(tmp_path, Args(name="a", resume=True), free=())
    assert runs.resume(tmp_path, Args(name="a", resume=True), free=("save_every",))[1].save_every == 500


def test_an_explicit_switch_is_said_too(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py", "--compile"])
    assert runs.resume(tmp_path, Args(name="a", resume=True), free=("compile",))[1].compile is True
    with pytest.raises(ValueError, match="with --compile True: it was started with False"):
        runs.resume(tmp_path, Args(name="a", resume=True), free=())


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
        runs.resume(tmp_path, Args(name="a", resume=True), free=())


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume: no run in"):
        runs.resume(tmp_path / "runs", Args(resume=True), free=())


# --- from_json, check_same


@pytest.mark.parametrize(
    "args",
    [Args(), Args("x", True, 1, float("inf"), Path("p"), (1, 2), 3, False), Args(rate=float("-inf"))],
)
def test_from_json_inverts_plain(args):
    config = json.loads(json.dumps({"args": plain(args)}))
    assert runs.from_json(Args, config, "args", "it") == args


def test_from_json_fills_in_fields_that_are_new():
    assert runs.from_json(Args, {"args": {"steps": 3}}, "args", "it") == Args(steps=3)


def test_check_same():
    now = {"net": {"width": 3, "attention": {"heads": 2}}, "tokens": 7}
    runs.check_same("it has", {**now, "torch": "2.13"}, now)
    for stored, message in [
        ({**now, "tokens": 8}, "^it has tokens 8, expected 7$"),
        ({**now, "net": {"width": 3, "attention": {"heads": 4}}}, "^it has net attention heads 4, expected 2$"),
        ({"tokens": 7}, "^it has net width None, expected 3$"),
        (None, "^it has net width None, expected 3$"),
    ]:
        with pytest.raises(ValueError, match=message):
            runs.check_same("it has", stored, now)


# --- new_folder


def test_new_folder(tmp_path):
    root = tmp_path / "runs" / "experiment"
    assert runs.new_folder(root, "a") == root / "a"
    with pytest.raises(ValueError, match="a' exists already; continue it with --resume or choose another --name"):
        runs.new_folder(root, "a")
    several = [runs.new_folder(root, None) for _ in range(3)]
    assert len(set(several)) == 3 and all(folder.is_dir() for folder in several)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp", "a/"])
def test_names_that_are_no_folder(name, tmp_path):
    with pytest.raises(ValueError, match=f"--name '{name}' is not the name of a folder"):
        runs.new_folder(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()
