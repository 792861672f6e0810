"""experiments/private.py: its accounting, its step without privacy, its ways to clip and sample, its net."""

import functools

import pytest
import torch

from core import random, tree
from experiments import private as experiment
from tests.experiments import runs
from tests.experiments.runs import metrics, result
from tests.experiments.test_laws import final_state
from train import optimizers
from train.data.images import arrays
from train.gradients.private import poisson_sample, spent_epsilon
from train.losses import cross_entropy
from train.step import create

call, completed = (functools.partial(function, "private") for function in (runs.call, runs.completed))
QUICK = ("--batch", "30", "--physical-batch", "16", "--noise-multiplier", "2", "--no-compile", "--name", "a")
CFG = experiment.Config(8, 10)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of the run that a test makes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "private" / "a"


@pytest.mark.slow
def test_epsilon_of_every_measurement_and_of_further_steps(run, capsys):
    assert call(*QUICK, "--steps", "8", "--eval-every", "4") == 0
    records = [record for record in metrics(run) if "test/epsilon" in record]
    assert [record["step"] for record in records] == [0, 4, 8]
    first, middle, last = (record["test/epsilon"] for record in records)
    assert first == 0 < middle < last == spent_epsilon(2.0, 30 / 1500, 8, 5e-4)
    figures, (_, test) = result(run), arrays.digits()
    assert figures["epsilon"] == last and figures["delta"] == 5e-4
    logits = experiment.logits_of(final_state(run)["params"], test.images, CFG)
    assert figures["accuracy"] == pytest.approx(float((logits.argmax(1) == test.labels).float().mean()))
    assert f"at epsilon {last:.2f}, delta 0.0005" in capsys.readouterr().out.splitlines()[-1]
    assert call("--resume", "--steps", "9") == 0
    assert result(run)["epsilon"] == spent_epsilon(2.0, 30 / 1500, 9, 5e-4) > last


def test_without_privacy_it_is_plain_descent(run, capsys):
    """params - learning rate sum_n g_n / expected batch, with torch's own gradient."""
    assert call(*QUICK, "--steps", "1", "--non-private") == 0
    assert result(run)["epsilon"] is None and "right without privacy" in capsys.readouterr().out
    learn, _ = arrays.digits()
    create_key, batch_key = random.split(random.key(0)).unbind(0)
    params = create(create_key, experiment.spec(CFG), optimizers.sgd(1.0)).params
    indices, mask = poisson_sample(batch_key, 0, 1500, 30 / 1500)
    indices = indices[mask]

    def loss(p):
        logits = experiment.apply(p, learn.images[indices], CFG)
        return cross_entropy(logits, learn.labels[indices], reduction="sum") / 30

    expected = tree.map(lambda p, g: p - g, params, torch.func.grad(loss)(params))
    torch.testing.assert_close(final_state(run)["params"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        ("--clipping", "adaptive"),
        pytest.param(("--sampling", "fixed", "--dtype", "bfloat16"), marks=pytest.mark.slow),
        *(pytest.param(("--clipping", name), marks=pytest.mark.slow) for name in ("automatic", "per_layer", "groups")),
    ],
    ids=lambda flags: flags[1],
)
def test_ways_to_clip_and_to_sample(run, flags):
    assert call(*QUICK, "--steps", "2", *flags) == 0
    figures, last = result(run), [record for record in metrics(run) if "train/loss" in record][-1]
    sampling = "fixed" if "fixed" in flags else "poisson"
    assert figures["epsilon"] == spent_epsilon(2.0, 30 / 1500, 2, 5e-4, sampling=sampling)
    assert ("train/clip_norm" in last) == ("adaptive" in flags)
    if sampling == "fixed":
        assert last["train/examples"] == 30


def test_net_has_the_size_of_the_paper():
    assert tree.count(experiment.spec(experiment.Config(28, 10))) == 26010  # Papernot et al. 2021


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "private").iterdir()
    figures = result(run)
    assert figures["accuracy"] > 0.84 and figures["epsilon"] == pytest.approx(2.78, abs=0.01)
