import functools
import gzip
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch

from core import random, spec, tree
from nets.classifiers import mlp
from tests.experiments import runs
from tests.experiments.runs import (
    config,
    contents,
    finish,
    flag_id,
    is_png,
    metrics,
    one_error,
    result,
    same_bits,
    wait_for_step,
)
from train import optimizers
from train.data import batching
from train.data.images import arrays
from train.run import checkpoints
from train.step import TrainState, compiled, create

call, start, refused, completed = (
    functools.partial(function, "ensemble") for function in (runs.call, runs.start, runs.refused, runs.completed)
)
# Small enough for milliseconds a step.
QUICK = ("--members", "3", "--widths", "16", "--no-compile")
STEPS = ("--steps", "24", "--save-every", "12")
CFG = mlp.Config((64, 16, 10))


def initial(members: int = 3) -> TrainState:
    """The states that a run of seed 0 begins with, one after the other and stacked."""
    optimizer = optimizers.adamw(lambda count: 0.0)
    return tree.stack([create(key, mlp.spec(CFG), optimizer) for key in random.split(random.key(0), members)])


def state_of(run: Path) -> TrainState:
    members = checkpoints.read_config(run / "checkpoints")["members"]
    return checkpoints.restore(run / "checkpoints", initial(members))


def modules(params: tree.Tree) -> list[torch.nn.Module]:
    """Each member as a module."""
    found = []
    for member in tree.unstack(params):
        first, second = member["layers"]
        module = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
        module[0].load_state_dict(first)
        module[2].load_state_dict(second)
        found.append(module)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run of 24 steps, runs/ensemble/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("ensemble")
    (folder / "stdout").write_text(completed(folder, *QUICK, *STEPS, "--name", "whole"), encoding="utf-8")
    return folder


def test_folder_of_a_run(place):
    run = place / "runs" / "ensemble" / "whole"
    assert checkpoints.steps(run / "checkpoints") == [12, 24]
    assert is_png(run / "ensemble.png")
    figures = result(run)
    assert figures["steps"] == 24 and figures["seconds"] > 0 and figures["parameters"] == 3 * (65 * 16 + 17 * 10)
    stored, records = config(run), metrics(run)
    assert stored["examples"] == {"train": 500, "test": 1297} and stored["net"]["widths"] == [64, 16, 10]
    assert [r["step"] for r in records] == [10, 20, 24] and records[0]["train/loss"] > records[-1]["train/loss"]
    out = (place / "stdout").read_text(encoding="utf-8")
    assert "step 24/24" in out and f"ECE {figures['ensemble_ece']:.2%}" in out
    assert out.splitlines()[-1].endswith("files in runs/ensemble/whole/")


def test_figures_are_those_of_scikit_learn(place):
    run = place / "runs" / "ensemble" / "whole"
    _, test = arrays.digits(1297)
    labels, figures = test.labels.numpy(), result(run)
    with torch.no_grad():
        logits = [module(test.images.flatten(1)).double() for module in modules(state_of(run).params)]
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
    for i, module in enumerate(modules(initial().params)):
        order_key = random.fold_in(random.split(random.key(0), 3)[i], 2)
        adamw = torch.optim.AdamW(module.parameters(), lr=3e-3)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 24)
        for step in range(24):
            chosen = batching.epoch_batch(order_key, step, 500, 50)
            loss = torch.nn.functional.cross_entropy(module(train.images[chosen].flatten(1)), train.labels[chosen])
            adamw.zero_grad()
            loss.backward()
            adamw.step()
            falling.step()
        trained = tree.unstack(state_of(place / "runs/ensemble/whole").params)[i]["layers"]
        for layer, found in ((module[0], trained[0]), (module[2], trained[1])):
            torch.testing.assert_close(found, dict(layer.state_dict()), rtol=1e-3, atol=2e-5)


def test_compiled_run_is_one_graph_with_the_same_values(here, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr("train.step.compiled", functools.partial(compiled, backend="aot_eager"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert call(*QUICK[:-1], *STEPS, "--name", "compiled") == 0
    torch._dynamo.reset()
    folder = here / "runs" / "ensemble"
    # aot_eager takes the operations apart, so the last bits may differ.
    torch.testing.assert_close(
        state_of(folder / "compiled").params, state_of(folder / "whole").params, rtol=1e-3, atol=1e-5
    )


def test_batch_norm(here, capsys):
    flags = ("--net", "cifar-resnet8", "--members", "2", "--steps", "6", "--batch", "20", "--no-compile")
    assert call(*flags, "--name", "resnet") == 0
    figures = result(here / "runs" / "ensemble" / "resnet")
    assert figures["parameters"] == 2 * 75_002
    capsys.readouterr()
    assert call("evaluate", "--run", "runs/ensemble/resnet") == 0
    assert f"NLL {figures['ensemble_nll']:.4f}" in capsys.readouterr().out  # with the running statistics of each


def test_evaluate_draws_and_prints_the_same_again(here, capsys):
    run = here / "runs" / "ensemble" / "whole"
    before = contents(run)
    (run / "ensemble.png").unlink()
    assert call("evaluate", "--run", "runs/ensemble/whole") == 0
    assert contents(run) == before
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == (here / "stdout").read_text(encoding="utf-8").splitlines()[-3:-1]
    assert out[2] == "after 24 steps; figure in runs/ensemble/whole/ensemble.png"


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


# --- resume


def test_resume_from_a_checkpoint_gives_the_same_bits(here, place):
    run, whole = here / "runs" / "ensemble" / "whole", place / "runs" / "ensemble" / "whole"
    shutil.rmtree(run / "checkpoints" / "24")
    assert call("--resume") == 0  # the newest, and only, run
    assert same_bits(state_of(run), state_of(whole))
    assert {**result(run), "seconds": 0} == {**result(whole), "seconds": 0}
    assert [record["step"] for record in metrics(run)] == [10, 20, 24]


LONG = (*QUICK, "--steps", "250", "--save-every", "25")


@pytest.fixture(scope="module")
def uninterrupted(place):
    """The state at the end of a run of LONG that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert call(*LONG, "--name", "uninterrupted") == 0
    state = state_of(place / "runs" / "ensemble" / "uninterrupted")
    shutil.rmtree(place / "runs" / "ensemble" / "uninterrupted")
    return state


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_run_has_the_same_bits(number, here, uninterrupted):
    process = start(here, *LONG, "--name", "stopped")
    run = here / "runs" / "ensemble" / "stopped"
    wait_for_step(process, run, 1)
    process.send_signal(number)
    code, out, err = finish(process)
    at = checkpoints.latest(run / "checkpoints")
    assert code == 0 and at < 250 and "stopping after this step" in err and "Traceback" not in err
    assert f"stopped at step {at}; continue with: " in out and "ensemble.py --resume --name stopped" in out
    assert not (run / "result.json").exists()
    assert call("--resume", "--name", "stopped") == 0
    assert same_bits(state_of(run), uninterrupted)


def test_run_stopped_before_its_first_checkpoint_begins_again(here, place):
    run = here / "runs" / "ensemble" / "whole"
    shutil.rmtree(run / "checkpoints")
    assert call("--resume", "--name", "whole") == 0
    assert same_bits(state_of(run), state_of(place / "runs" / "ensemble" / "whole"))


# --- refusals


def test_member_that_is_not_finite_is_named(here, capfd):
    run = here / "runs" / "ensemble" / "whole"
    folder = run / "checkpoints"
    kept, state = checkpoints.read_config(folder), state_of(run)
    poisoned = [state.params["layers"][0]["bias"].clone(), torch.tensor([0.0, float("nan"), 0.0])[:, None]]
    layers = [{**state.params["layers"][0], "bias": sum(poisoned)}, state.params["layers"][1]]
    with checkpoints.Checkpoints(folder, kept, resume=24) as saved:
        saved.save(24, state._replace(params={"layers": layers}), {"seconds": 1.0})
    before = contents(folder)
    assert call("--resume", "--name", "whole", "--steps", "30") == 2
    line = one_error(capfd.readouterr().err)
    assert "step 25 of member 1 is not finite (loss nan, " in line
    assert line.endswith("stopped, the last good checkpoint is that of step 24") and contents(folder) == before


def test_help(capsys):
    assert call("--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Lakshminarayanan" in out and "How many classifiers." in out and "Sub-commands" in out
    assert call("evaluate", "--help") == 0
    assert "Folder of a run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--members", "0"], "--members is 0; expected at least 1"),
        (["--widths", "8", "0"], "--widths is 0; expected at least 1"),
        (["--steps", "-1"], "--steps is -1; expected at least 1"),
        (["--batch", "501"], "--batch is 501, but 'digits' has 500 examples to learn from"),
        (["--learning-rate", "nan"], "--learning-rate is nan; expected a positive number"),
        (["--data", "nowhere"], "--data 'nowhere' does not exist; expected a folder of images, or one of digits"),
        (["--device", "abacus"], "--device 'abacus' cannot be used"),
        (["--name", "whole"], "whole' exists already; continue it with --resume or choose another --name"),
        (["--resume", "--name", "whole", "--members", "4"], "with --members 4: it was started with 3"),
        (["--resume", "--name", "whole", "--widths", "8"], "with --widths (8,): it was started with (16,)"),
        (["--resume", "--name", "whole", "--steps", "3"], "--steps is 3, but 'runs/ensemble/whole' has done 24"),
        (["evaluate", "--run", "no"], "no/checkpoints does not exist"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, *flags)


def test_wrong_flag(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--memberz", "3") == 2  # tyro's own words
    assert "--memberz" in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_evaluate_of_another_experiment(here, capfd):
    folder = here / "runs/ensemble/whole/checkpoints"
    shutil.rmtree(folder)
    with checkpoints.Checkpoints(folder, {"net": 3}) as saved:
        saved.save(6, spec.init(random.key(0), mlp.spec(CFG)))
    line = refused(capfd, "evaluate", "--run", "runs/ensemble/whole")
    assert "the configuration of 'runs/ensemble/whole' does not fit: expected 'args' with the fields data, " in line


# --- slow: the whole thing


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise, compiled."""
    out = completed(tmp_path)
    (run,) = (tmp_path / "runs" / "ensemble").iterdir()
    figures = result(run)
    assert figures["member_accuracy_mean"] > 0.96 and figures["ensemble_accuracy"] >= figures["member_accuracy_mean"]
    assert figures["ensemble_nll"] < 0.9 * figures["member_nll"] and figures["ensemble_ece"] < figures["member_ece"]
    assert f"NLL {figures['ensemble_nll']:.4f}" in out
