import functools
import shutil

import pytest
import torch

from core import random, tree
from core.per_example import each
from nets.classifiers import mlp
from tests.experiments import runs
from tests.experiments.runs import config, flag_id, is_png, metrics, result, same_bits
from train import optimizers
from train.data import batching
from train.data.images import arrays
from train.losses import cross_entropy
from train.run import checkpoints
from train.step import create

call, refused, completed = (
    functools.partial(function, "gradients") for function in (runs.call, runs.refused, runs.completed)
)
QUICK = ("--examples", "60", "--batch", "20", "--steps", "12", "--save-every", "6", "--no-compile")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run, runs/gradients/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("gradients")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, "--name", "whole") == 0
    return folder


def held(folder, steps=12, count=60, leaves=6, bins=240):
    """(state, record) of the last checkpoint."""
    rows = {name: torch.zeros(steps, leaves) for name in ("trace", "square", "snr")}
    seen = {**rows, "counts": torch.zeros(steps, bins, dtype=torch.int64)}
    seen |= {"norms": torch.zeros(count), "times": torch.zeros(count, dtype=torch.int64)}
    model = mlp.spec(mlp.Config((64, 128, 128, 10)))
    state = create(random.key(0), model, optimizers.adamw(lambda step: 0.0))
    return checkpoints.restore(folder / "checkpoints", (state, seen))


def test_folder_of_a_run(place):
    run = place / "runs" / "gradients" / "whole"
    assert checkpoints.steps(run / "checkpoints") == [6, 12]
    assert is_png(run / "gradients.png") and is_png(run / "examples.png")
    figures = result(run)
    assert 0 < figures["norm_easiest"] < figures["norm_median"] < figures["norm_hardest"]
    assert -1 <= figures["cosine_mean"] <= 1 and figures["steps"] == 12
    assert [r["step"] for r in metrics(run)] == [10, 12] and config(run)["examples"] == 60


def test_record_is_of_every_example(place):
    """The first row against the gradients of the first batch, one by one."""
    _, seen = held(place / "runs" / "gradients" / "whole")
    assert seen["times"].tolist() == [4] * 60 and seen["counts"].sum(1).tolist() == [20] * 12
    learn, _ = arrays.digits()
    net = mlp.Config((64, 128, 128, 10))
    params = create(random.key(0), mlp.spec(net), optimizers.adamw(0.0)).params
    chosen = batching.epoch_batch(random.fold_in(random.key(0), 2), 0, 60, 20)

    def losses(p, batch):
        return cross_entropy(mlp.apply(p, batch[0], net), batch[1], reduction="none")

    found = tree.leaves(each(losses, params, (learn.images[chosen], learn.labels[chosen])))
    trace = torch.stack([g.flatten(1).var(0).sum() for g in found])
    torch.testing.assert_close(seen["trace"][0], trace, rtol=1e-4, atol=1e-5)
    square = torch.stack([g.mean(0).square().sum() for g in found]) - trace / 20
    torch.testing.assert_close(seen["square"][0], square, rtol=1e-3, atol=1e-4)


def test_resumed_run_has_the_same_bits(here):
    run = here / "runs" / "gradients" / "whole"
    whole, figures = held(run), result(run)
    shutil.rmtree(run / "checkpoints" / "12")
    assert call("--resume") == 0
    assert same_bits(held(run), whole) and {**result(run), "seconds": 0} == {**figures, "seconds": 0}


def test_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines").write_text("to be or not to be, that is the $question$\n" * 60 + "zyx!" * 40, encoding="utf-8")
    assert call("--task", "text", "--data", "lines", *QUICK, "--examples", "30", "--name", "text") == 0
    run = tmp_path / "runs" / "gradients" / "text"
    assert is_png(run / "gradients.png") and is_png(run / "examples.png")
    assert "question" in (run / "examples.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "sound"], "--task 'sound' is unknown; expected one of images, text"),
        (["--batch", "1"], "--batch is 1; expected 2 to 1000, the number of examples"),
        (["--steps", "0"], "--steps is 0; expected at least 1"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0; expected a positive number"),
        (["--data", "nowhere"], "no train-images-idx3-ubyte"),
        (["--resume", "--name", "whole", "--steps", "20"], "with --steps 20: it was started with 12"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, *flags)


@pytest.mark.slow
def test_no_flags(tmp_path):
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "gradients").iterdir()
    figures = result(run)
    # In the end |G|² is lost in the noise: its estimate is near 0, on either side.
    assert not 0 < figures["noise_scale_last_quarter"] < 2 * figures["noise_scale_first_quarter"]
    assert 50 < figures["noise_scale_first_quarter"] < 200
    assert figures["norm_hardest"] > 20 * figures["norm_easiest"]
