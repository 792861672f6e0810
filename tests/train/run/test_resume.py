"""Runs on disk: what they were started with, what they have trained."""

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from core import spec
from train.files import plain, write_json
from train.run import Common, Count, Positive, Shared, checkpoints, open_run, resume


@dataclass(frozen=True)
class Args:
    steps: Count | None = None
    rate: Positive | None = None
    text: Path | None = None
    sizes: tuple[Count, ...] = (3, 4)
    kind: Literal["flat", "deep"] = "flat"
    common: Shared = Common()


STORED = Args(30, 1.0, Path("some/text.txt"), (5,), "deep", Common(3, "a", save_every=7, compile=False))


def make_run(root, name, args):
    (root / name).mkdir(parents=True)
    write_json(root / name / "config.json", {"experiment": root.name, "args": args, "net": {"width": 3}})


@pytest.fixture
def root(tmp_path):
    make_run(tmp_path / "counter", "a", STORED)
    return tmp_path / "counter"


def test_stored_args(root):
    args = resume.stored_args(root / "a", Args, "counter")
    assert args == STORED
    assert isinstance(args.text, Path) and isinstance(args.sizes, tuple) and isinstance(args.rate, float)
    with pytest.raises(ValueError, match=r"a' is a run of counter.py, expected one of painter.py$"):
        resume.stored_args(root / "a", Args, "painter")


def test_the_newest_run(root):
    make_run(root, "b", Args(steps=2))
    os.utime(root / "a" / "config.json", (time.time() + 5,) * 2)
    assert resume.folder_to_resume(root, None) == root / "a"
    os.utime(root / "b" / "config.json", (time.time() + 9,) * 2)
    assert resume.folder_to_resume(root, None) == root / "b" and resume.folder_to_resume(root, "a") == root / "a"
    with pytest.raises(ValueError, match=r"nothing to resume: '.*c' has no config.json; the runs in '.*' are a, b$"):
        resume.folder_to_resume(root, "c")
    with pytest.raises(ValueError, match="nothing to resume: no run in"):
        resume.folder_to_resume(root / "nowhere", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 31}, "with --steps 31: it was started with 30"),
        ({"text": Path("other.txt")}, "with --text other.txt: it was started with some/text.txt"),
        ({"sizes": (6,)}, r"with --sizes \(6,\): it was started with \(5,\)"),
        ({"common": dataclasses.replace(STORED.common, seed=4)}, "with --seed 4: it was started with 3"),
    ],
)
def test_changes(change, message):
    args, folder = dataclasses.replace(STORED, **change), Path("runs/a")
    with pytest.raises(ValueError, match=f"^cannot resume 'runs/a' {message}$"):
        resume.changes(folder, STORED, args, ("rate",))
    (line,) = resume.changes(folder, STORED, args, (*change, "seed"))
    assert line == "resumed " + message.replace(": it", " (it").replace("\\", "") + ")"
    other_name = dataclasses.replace(STORED, common=dataclasses.replace(STORED.common, name="b", resume=True))
    assert resume.changes(folder, STORED, other_name, ()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a' is not the folder of a run: it has no config.json"),
        ("{", "config.json' is not readable as a run's configuration"),
        ("[]", "config.json' does not fit: expected 'args' with the fields steps, rate, "),
        ('{"args": {"steps": "many"}}', "config.json' does not fit"),
        ('{"args": {"steps": true}}', "config.json' does not fit"),
        ('{"args": {"wheels": 4}}', "config.json' does not fit: expected 'args' with .*; it has 'wheels'$"),
        ('{"args": {"kind": "round"}}', "config.json' does not fit"),
        ('{"args": {"common": {"seed": "x"}}}', "config.json' does not fit"),
    ],
)
def test_configurations_that_are_none(content, message, root):
    path = root / "a" / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message):
        resume.stored_args(root / "a", Args, "counter")


@pytest.mark.parametrize(
    "args", [Args(), STORED, Args(3, float("inf"), Path("p"), (1, 2)), Args(rate=float("-inf"), common=Common(1, "x"))]
)
def test_from_json_inverts_plain(args):
    config = json.loads(json.dumps({"args": plain(args)}))
    assert resume.from_json(Args, config, "args", "it") == args


def test_from_json_fills_in_fields_that_are_new():
    assert resume.from_json(Args, {"args": {"steps": 3}}, "args", "it") == Args(steps=3)


def test_check_same():
    now = {"net": {"width": 3, "attention": {"heads": 2}}, "tokens": 7}
    resume.check_same("it has", {**now, "torch": "2.13"}, now)
    for stored, message in [
        ({**now, "tokens": 8}, "^it has tokens 8, expected 7$"),
        ({**now, "net": {"width": 3, "attention": {"heads": 4}}}, "^it has net attention heads 4, expected 2$"),
        ({"tokens": 7}, "^it has net width None, expected 3$"),
        (None, "^it has net width None, expected 3$"),
    ]:
        with pytest.raises(ValueError, match=message):
            resume.check_same("it has", stored, now)


# --- what a run has trained

MODEL = {"w": spec.Param((2,), torch.zeros), "mean": spec.Stat((2,), torch.zeros)}


def save(folder, steps, best=None):
    config = {"experiment": folder.parent.name, "args": STORED, "best": best}
    with checkpoints.Checkpoints(folder / "checkpoints", config, best=best) as saved:
        for step in steps:
            average = {"correction": torch.tensor(0.5), "average": {"w": torch.full((2,), float(step))}}
            state = {"params": {"w": torch.ones(2)}, "stats": {"mean": torch.ones(2)}, "opt_state": average}
            saved.save(step, state, {"loss": abs(step - 2.0)})


def test_open_run(root):
    save(root / "a", [1, 2, 3, 4, 5], best="loss")
    run = open_run(root / "a", root)
    assert run.step == 5 and run.read("args", Args) == STORED
    assert [open_run(root / "a", root, name).step for name in ("latest", "best", "4")] == [5, 2, 4]
    torch.testing.assert_close(run.learned(MODEL)["w"], torch.full((2,), 10.0))
    torch.testing.assert_close(run.learned(MODEL, averaged=False)["w"], torch.ones(2))
    assert (
        run.learned(MODEL)["mean"].tolist() == [1, 1] and run.restore({"w": torch.zeros(2)}, "params")["w"].sum() == 2
    )
    message = "the configuration of '.*a' does not fit: expected 'net' with the fields steps, "
    with pytest.raises(ValueError, match=message):
        run.read("net", Args)


@pytest.mark.parametrize(
    ("name", "checkpoint", "message"),
    [
        ("b", "latest", "b' is not the folder of a run; the runs in '.*counter' are a$"),
        ("a", "first", "^--checkpoint 'first' is unknown; expected latest, best or a step$"),
        ("a", "3", "no checkpoint of step 3 in .*: it has 1, 2"),
        ("a", "best", "^--checkpoint best: '.*a' keeps no best checkpoint; expected latest or a step$"),
    ],
)
def test_runs_that_cannot_be_opened(name, checkpoint, message, root):
    save(root / "a", [1, 2])
    with pytest.raises(ValueError, match=message):
        open_run(root / name, root, checkpoint)


def test_run_of_another_experiment(root):
    save(root / "a", [1])
    with pytest.raises(ValueError, match="a' is a run of counter.py, expected one of painter.py"):
        open_run(root / "a", root.parent / "painter")
