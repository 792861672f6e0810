import functools
import shutil
import signal

import numpy as np
import pytest
import torch

from core import random
from experiments import private as experiment
from tests.experiments import runs
from tests.experiments.runs import config, finish, flag_id, is_png, metrics, result, same_bits, wait_for_step
from tests.experiments.test_ensemble import idx
from train import optimizers
from train.data.images import arrays
from train.gradients.private import spent_epsilon
from train.run import checkpoints
from train.step import create

call, start, refused, completed = (
    functools.partial(function, "private") for function in (runs.call, runs.start, runs.refused, runs.completed)
)
QUICK = ("--batch", "30", "--physical-batch", "16", "--noise-multiplier", "2", "--no-compile")
STEPS = ("--steps", "8", "--save-every", "4", "--every", "4")
CFG = experiment.Config(8, 10)


def state_of(run):
    return checkpoints.restore(
        run / "checkpoints", create(random.key(0), experiment.spec(CFG), optimizers.sgd(1.0, momentum=0.5))
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run of 8 steps, runs/private/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("private")
    (folder / "stdout").write_text(completed(folder, *QUICK, *STEPS, "--name", "whole"), encoding="utf-8")
    return folder


def test_folder_of_a_run(place):
    run = place / "runs" / "private" / "whole"
    assert checkpoints.steps(run / "checkpoints") == [4, 8]
    assert all(is_png(run / f"{name}.png") for name in ("accuracy", "gradient_norms", "mistakes"))
    figures, records = result(run), metrics(run)
    assert config(run)["examples"] == {"train": 1500, "test": 297}
    assert [r["step"] for r in records] == [0, 4, 8]
    assert [r["privacy/epsilon"] for r in records] == [spent_epsilon(2.0, 30 / 1500, n, 5e-4) for n in (0, 4, 8)]
    assert figures["epsilon"] == records[-1]["privacy/epsilon"] > 0 and figures["delta"] == 5e-4
    _, test = arrays.digits(297)
    guesses = experiment.predicted(state_of(run).params, test.images, CFG)
    assert figures["accuracy"] == pytest.approx(float((guesses == test.labels).float().mean()))
    out = (place / "stdout").read_text(encoding="utf-8")
    assert f"at epsilon {figures['epsilon']:.2f}, delta 0.0005 after 8 steps" in out.splitlines()[-1]


def test_resume_from_a_checkpoint_gives_the_same_bits_and_epsilon(here, place):
    run, whole = here / "runs" / "private" / "whole", place / "runs" / "private" / "whole"
    shutil.rmtree(run / "checkpoints" / "8")
    assert call("--resume") == 0
    assert same_bits(state_of(run), state_of(whole))
    assert {**result(run), "seconds": 0} == {**result(whole), "seconds": 0}
    assert [record["step"] for record in metrics(run)] == [0, 4, 8]
    # More steps spend more.
    assert call("--resume", "--steps", "9") == 0
    assert result(run)["epsilon"] == spent_epsilon(2.0, 30 / 1500, 9, 5e-4) > result(whole)["epsilon"]


def test_stopped_run_saves_and_goes_on(here):
    process = start(here, *QUICK, "--steps", "2000", "--save-every", "2", "--every", "1000", "--name", "stopped")
    run = here / "runs" / "private" / "stopped"
    wait_for_step(process, run, 2)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    at = checkpoints.latest(run / "checkpoints")
    assert code == 0 and 2 <= at < 2000 and "Traceback" not in err and f"stopped at step {at}" in out
    assert call("--resume", "--name", "stopped", "--steps", at + 1) == 0
    assert result(run)["steps"] == at + 1 and result(run)["epsilon"] == spent_epsilon(2.0, 30 / 1500, at + 1, 5e-4)


def test_without_privacy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*QUICK, *STEPS, "--non-private", "--name", "plain") == 0
    figures = result(tmp_path / "runs" / "private" / "plain")
    assert figures["epsilon"] is None and "right without privacy after 8 steps" in capsys.readouterr().out


def test_folder_in_the_format_of_mnist_with_its_net(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    for part, count in (("train", 40), ("t10k", 12)):
        labels = np.arange(count) % 10
        idx(tmp_path / "files" / f"{part}-labels-idx1-ubyte.gz", labels)
        idx(tmp_path / "files" / f"{part}-images-idx3-ubyte.gz", 9 * labels[:, None, None] * np.ones((28, 28)))
    assert call("--data", "files", *QUICK, "--steps", "2", "--name", "files") == 0
    net = experiment.spec(experiment.Config(28, 10))
    assert experiment.tree.count(net) == 26010  # Papernot et al. 2021
    assert torch.tensor(result(tmp_path / "runs" / "private" / "files")["accuracy"]) <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch", "1501"], "--batch is 1501, but 'digits' has 1500 examples to learn from"),
        (["--steps", "0"], "--steps is 0; expected at least 1"),
        (["--noise-multiplier", "0"], "--noise-multiplier is 0.0; expected a positive number"),
        (["--clipping", "global"], "--clipping 'global' is unknown; expected one of flat, per_layer, automatic"),
        (["--delta", "1"], "--delta is 1.0; expected a number between 0 and 1"),
        (["--data", "nowhere"], "no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in nowhere"),
        (["--resume", "--name", "whole", "--noise-multiplier", "1"], "1.0: it was started with 2.0"),
        (["--resume", "--name", "whole", "--max-norm", "2"], "with --max-norm 2.0: it was started with 1.0"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, *flags)


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "private").iterdir()
    figures = result(run)
    assert figures["accuracy"] > 0.84 and figures["epsilon"] == pytest.approx(2.78, abs=0.01)
