"""experiments/ensemble.py: its figures against scikit-learn's, its members against torch's modules and optimizer."""

import functools
import gzip
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch

from core import random, tree
from nets.classifiers import mlp
from tests.experiments import runs
from tests.experiments.runs import contents, one_error, result
from tests.experiments.test_laws import final_state
from train import optimizers
from train.data import batching
from train.data.images import arrays
from train.run import checkpoints
from train.step import compiled, create

call, completed = (functools.partial(function, "ensemble") for function in (runs.call, runs.completed))
# Small enough for milliseconds a step.
QUICK = ("--members", "3", "--widths", "16", "--steps", "24")
CREATE_KEYS, DATA_KEYS = (random.split(key, 3) for key in random.split(random.key(0)).unbind(0))


def modules(params: tree.Tree) -> list[torch.nn.Module]:
    """Each member as a module."""
    nets = []
    for member in tree.unstack(params):
        first, second = member["layers"]
        module = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
        module[0].load_state_dict(first)
        module[2].load_state_dict(second)
        nets.append(module)
    return nets


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run of 24 steps, runs/ensemble/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("ensemble")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, "--no-compile", "--name", "whole") == 0
    return folder


def test_figures_are_those_of_scikit_learn(place):
    run = place / "runs" / "ensemble" / "whole"
    _, test = arrays.digits(1297)
    labels, figures = test.labels.numpy(), result(run)
    with torch.no_grad():
        logits = [module(test.images.flatten(1)).double() for module in modules(final_state(run)["params"])]
    members = [torch.softmax(x, -1).numpy() for x in logits]
    averaged = np.mean(members, 0)
    right = [sklearn.metrics.accuracy_score(labels, p.argmax(-1)) for p in members]
    expected = {
        "member_accuracy_mean": np.mean(right),
        "member_accuracy_std": np.std(right),
        "member_accuracy_min": min(right),
        "member_accuracy_max": max(right),
        "member_nll": np.mean([sklearn.metrics.log_loss(labels, p) for p in members]),
        "ensemble_accuracy": sklearn.metrics.accuracy_score(labels, averaged.argmax(-1)),
        "ensemble_nll": sklearn.metrics.log_loss(labels, averaged),
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert figures["ensemble_nll"] < figures["member_nll"]
    # A bin's share times its gap is |right - confident| over all examples, so one sum a bin will do.
    for name, group in (("member_ece", members), ("ensemble_ece", [averaged])):
        errors = []
        for p in group:
            surplus = (p.argmax(-1) == labels) - p.max(-1)
            tenth = np.ceil(p.max(-1) * 10)
            errors.append(sum(abs(surplus[tenth == b].sum()) for b in range(1, 11)) / len(labels))
        assert figures[name] == pytest.approx(np.mean(errors), rel=1e-4)


def test_each_member_trains_as_it_would_alone(place):
    """The same initial values and order of the data, with torch's modules and optimizer."""
    train, _ = arrays.digits(1297)
    model, optimizer = mlp.spec(mlp.Config((64, 16, 10))), optimizers.adamw(lambda count: 0.0)
    initial = tree.stack([create(key, model, optimizer).params for key in CREATE_KEYS])
    members = tree.unstack(final_state(place / "runs/ensemble/whole")["params"])
    for i, module in enumerate(modules(initial)):
        adamw = torch.optim.AdamW(module.parameters(), lr=3e-3)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 24)
        for step in range(24):
            indices = batching.epoch_batch(DATA_KEYS[i], step, 500, 50)
            loss = torch.nn.functional.cross_entropy(module(train.images[indices].flatten(1)), train.labels[indices])
            adamw.zero_grad()
            loss.backward()
            adamw.step()
            falling.step()
        for layer, actual in zip((module[0], module[2]), members[i]["layers"], strict=True):
            torch.testing.assert_close(actual, dict(layer.state_dict()), rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_compiled_run_is_one_graph_with_the_same_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = ("--members", "2", "--widths", "--steps", "6")
    assert call(*tiny, "--no-compile", "--name", "eager") == 0
    torch._dynamo.reset()
    monkeypatch.setattr("train.step.compiled", functools.partial(compiled, backend="aot_eager"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert call(*tiny, "--name", "compiled") == 0
    torch._dynamo.reset()
    # aot_eager takes the operations apart, so the last bits may differ.
    actual, expected = (final_state(tmp_path / "runs" / "ensemble" / name)["params"] for name in ("compiled", "eager"))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


def test_batch_norm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ("--net", "cifar-resnet8", "--members", "2", "--steps", "3", "--batch", "20", "--no-compile")
    assert call(*flags, "--name", "resnet") == 0
    figures = result(tmp_path / "runs" / "ensemble" / "resnet")
    assert figures["parameters"] == 2 * 75_002
    capsys.readouterr()
    assert call("evaluate", "--run", "runs/ensemble/resnet") == 0
    assert f"NLL {figures['ensemble_nll']:.4f}" in capsys.readouterr().out  # with the running statistics of each


def test_evaluate_draws_and_prints_the_same_again(here, capsys):
    run = here / "runs" / "ensemble" / "whole"
    before, figures = contents(run), result(run)
    (run / "ensemble.png").unlink()
    assert call("evaluate", "--run", "runs/ensemble/whole") == 0
    assert contents(run) == before
    out = capsys.readouterr().out.splitlines()
    assert out[-2].endswith(f"NLL {figures['ensemble_nll']:.4f}, ECE {figures['ensemble_ece']:.2%}")
    assert out[-1] == "after 24 steps; figure in runs/ensemble/whole/ensemble.png"


def idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def test_folder_in_the_format_of_mnist(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    for part, count in (("train", 40), ("t10k", 12)):
        labels = np.arange(count) % 4
        idx(tmp_path / "files" / f"{part}-labels-idx1-ubyte.gz", labels)
        idx(tmp_path / "files" / f"{part}-images-idx3-ubyte.gz", 255 * np.eye(16).reshape(16, 4, 4)[labels])
    flags = ("--data", "files", "--members", "2", "--widths", "8", "8", "--batch", "20", "--steps", "60")
    assert call(*flags, "--no-compile", "--name", "files", "--learning-rate", "0.03") == 0
    run = tmp_path / "runs" / "ensemble" / "files"
    assert checkpoints.read_config(run / "checkpoints")["net"]["widths"] == [16, 8, 8, 4]
    assert result(run)["ensemble_accuracy"] == 1.0
    assert call("evaluate", "--run", run) == 0 and "averaged  100.00%" in capsys.readouterr().out


def test_one_member_without_hidden_layer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--members", "1", "--widths", "--steps", "2", "--no-compile", "--name", "one") == 0
    figures = result(tmp_path / "runs" / "ensemble" / "one")
    assert figures["member_accuracy_std"] == 0 and figures["ensemble_accuracy"] == figures["member_accuracy_mean"]
    assert figures["ensemble_nll"] == pytest.approx(figures["member_nll"])


def test_member_that_is_not_finite_is_named(here, capfd):
    run = here / "runs" / "ensemble" / "whole"
    folder = run / "checkpoints"
    config, state = checkpoints.read_config(folder), final_state(run)
    state["params"]["layers"][0]["bias"][1] = float("nan")
    with checkpoints.Checkpoints(folder, config, resume=24) as saved:
        saved.save(24, state, {"seconds": 1.0})
    before = contents(folder)
    assert call("--resume", "--name", "whole", "--steps", "30", "--no-compile") == 2
    line = one_error(capfd.readouterr().err)
    assert "step 25 of member 1 is not finite (loss nan, " in line
    assert line.endswith("stopped, the last good checkpoint is that of step 24") and contents(folder) == before


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise, compiled."""
    out = completed(tmp_path)
    (run,) = (tmp_path / "runs" / "ensemble").iterdir()
    figures = result(run)
    assert figures["member_accuracy_mean"] > 0.96 and figures["ensemble_accuracy"] >= figures["member_accuracy_mean"]
    assert figures["ensemble_nll"] < 0.9 * figures["member_nll"] and figures["ensemble_ece"] < figures["member_ece"]
    assert f"NLL {figures['ensemble_nll']:.4f}" in out
