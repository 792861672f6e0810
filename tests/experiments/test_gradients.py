"""experiments/gradients.py: its record against gradients that are computed one by one, its task of text."""

import functools

import pytest
import torch

from core import random, tree
from core.per_example import each
from nets.classifiers import mlp
from tests.experiments import runs
from tests.experiments.runs import result
from tests.experiments.test_laws import colours, final_state
from train import optimizers
from train.data import batching
from train.data.images import arrays
from train.losses import cross_entropy
from train.step import create

DRAWN = True
call, completed = (functools.partial(function, "gradients") for function in (runs.call, runs.completed))
QUICK = ("--batch", "20", "--no-compile", "--name", "a")


def test_record_is_of_every_example(tmp_path, monkeypatch):
    """The first row against the gradients of the first batch, one by one."""
    monkeypatch.chdir(tmp_path)
    runs.undrawn(monkeypatch)
    assert call(*QUICK, "--examples", "60", "--steps", "12") == 0
    figures = result(tmp_path / "runs" / "gradients" / "a")
    assert 0 < figures["norm_easiest"] < figures["norm_median"] < figures["norm_hardest"]
    assert -1 <= figures["cosine_mean"] <= 1

    _, record = final_state(tmp_path / "runs" / "gradients" / "a")
    assert record["visits"].tolist() == [4] * 60 and record["counts"].sum(1).tolist() == [20] * 12
    learn, _ = arrays.digits()
    net = mlp.Config((64, 128, 128, 10))
    create_key, data_key = random.split(random.key(0)).unbind(0)
    params = create(create_key, mlp.spec(net), optimizers.adamw(0.0)).params
    indices = batching.epoch_batch(data_key, 0, 60, 20)

    def losses(p, batch):
        return cross_entropy(mlp.apply(p, batch[0], net), batch[1], reduction="none")

    gradients = tree.leaves(each(losses, params, (learn.images[indices], learn.labels[indices])))
    trace = torch.stack([g.flatten(1).var(0).sum() for g in gradients])
    torch.testing.assert_close(record["trace"][0], trace, rtol=1e-4, atol=1e-5)
    square = torch.stack([g.mean(0).square().sum() for g in gradients]) - trace / 20
    torch.testing.assert_close(record["square"][0], square, rtol=1e-3, atol=1e-4)


def test_text(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines").write_text("to be or not to be, that is the $question$\n" * 60 + "zyx!" * 40, encoding="utf-8")
    assert call(*QUICK, "--task", "text", "--data", "lines", "--examples", "30", "--steps", "3") == 0
    run = tmp_path / "runs" / "gradients" / "a"
    assert colours(run / "gradients.png") > 2 and colours(run / "examples.png") > 2
    assert "question" in (run / "examples.txt").read_text(encoding="utf-8")
    assert "validation tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_no_flags(tmp_path):
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "gradients").iterdir()
    figures = result(run)
    # In the end |G|² is lost in the noise: its estimate is near 0, on either side.
    assert not 0 < figures["noise_scale_last_quarter"] < 2 * figures["noise_scale_first_quarter"]
    assert 50 < figures["noise_scale_first_quarter"] < 200
    assert figures["norm_hardest"] > 20 * figures["norm_easiest"]
