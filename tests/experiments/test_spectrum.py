import functools
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from core import random, spec, tree
from nets.classifiers import mlp
from tests.experiments import runs
from tests.experiments.runs import config, finish, flag_id, is_png, metrics, result, same_bits, wait_for_step
from train import optimizers
from train.data.images import arrays
from train.run import checkpoints
from train.step import TrainState, create

call, start, refused, completed = (
    functools.partial(function, "spectrum") for function in (runs.call, runs.start, runs.refused, runs.completed)
)
QUICK = ("--pool", "4", "--widths", "6", "--lanczos-steps", "30", "--probes", "4", "--every", "10")
STEPS = ("--steps", "20", "--save-every", "10", "--spectra", "0", "10")
CFG = mlp.Config((4, 6, 10), activation="tanh")


def state_of(run: Path) -> TrainState:
    state = create(random.key(0), mlp.spec(CFG), optimizers.sgd(0.3))
    return checkpoints.restore(run / "checkpoints", state)


def spectrum_at(run: Path, step: int) -> dict:
    return json.loads((run / "spectra" / f"{step}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run of 20 steps, runs/spectrum/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("spectrum")
    (folder / "stdout").write_text(completed(folder, *QUICK, *STEPS, "--name", "whole"), encoding="utf-8")
    return folder


def test_folder_of_a_run(place):
    run = place / "runs" / "spectrum" / "whole"
    assert is_png(run / "spectra.png") and is_png(run / "sharpness.png")
    assert sorted(path.stem for path in (run / "spectra").iterdir()) == ["0", "10", "20"]
    assert [record["step"] for record in metrics(run)] == [0, 10, 20]
    figures = result(run)
    assert figures["parameters"] == 5 * 6 + 7 * 10 and figures["steps"] == 20
    assert figures["sharpness"] == metrics(run)[-1]["sharpness/hessian"] <= figures["sharpness_max"]
    assert config(run)["examples"] == {"train": 500, "test": 1297}
    for name in ("hessian", "ggn"):
        assert figures[f"{name}_top_error"] < 1e-6 and figures[f"{name}_trace_standard_errors"] < 4
        assert 0 < figures[f"{name}_density_error"] < 0.2
    out = (place / "stdout").read_text(encoding="utf-8")
    assert "Gauss-Newton" in out and out.splitlines()[-1].endswith("files in runs/spectrum/whole/")


def test_exact_eigenvalues_are_those_of_torch(place):
    run = place / "runs" / "spectrum" / "whole"
    learn, _ = arrays.digits(1297)
    pixels = torch.nn.functional.avg_pool2d(learn.images, 4).flatten(1).double()
    params = tree.cast(state_of(run).params, torch.float64)
    names, shapes = tree.names(params), [x.shape for x in tree.leaves(params)]

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        p = dict(zip(names, (x.view(s) for x, s in zip(parts, shapes, strict=True)), strict=True))
        hidden = torch.tanh(pixels @ p["layers.0.weight"].T + p["layers.0.bias"])
        logits = hidden @ p["layers.1.weight"].T + p["layers.1.bias"]
        return torch.nn.functional.cross_entropy(logits, learn.labels)

    vector = torch.cat([x.flatten() for x in tree.leaves(params)])
    exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, vector)).flip(0)
    found = torch.tensor(spectrum_at(run, 20)["hessian"]["exact"], dtype=torch.float64)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    assert result(run)["sharpness"] == pytest.approx(float(exact[0]), rel=1e-9)


def test_without_exact_the_rest_is_the_same(here, place):
    assert call(*QUICK, *STEPS, "--no-exact", "--name", "lanczos") == 0
    run, whole = here / "runs/spectrum/lanczos", place / "runs/spectrum/whole"
    mine, theirs = spectrum_at(run, 20)["hessian"], spectrum_at(whole, 20)["hessian"]
    assert mine == {**theirs, "exact": []} and is_png(run / "spectra.png")
    assert "hessian_top_error" not in result(run) and result(run)["hessian_residual"] < 1e-6


def test_resume_gives_the_same_bits(here, place):
    run, whole = here / "runs/spectrum/whole", place / "runs/spectrum/whole"
    shutil.rmtree(run / "checkpoints" / "20")
    (run / "spectra" / "20.json").unlink()
    assert call("--resume") == 0
    assert same_bits(state_of(run), state_of(whole)) and spectrum_at(run, 20) == spectrum_at(whole, 20)
    assert {**result(run), "seconds": 0} == {**result(whole), "seconds": 0}
    assert [record["step"] for record in metrics(run)] == [0, 10, 20]


def test_stopped_run_can_be_resumed(here):
    long = ("--steps", "3000", "--every", "1000", "--save-every", "20", "--spectra", "0")
    process = start(here, *QUICK[:-2], *long, "--name", "stopped")
    run = here / "runs/spectrum/stopped"
    wait_for_step(process, run, 1)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    at = checkpoints.latest(run / "checkpoints")
    assert code == 0 and at < 3000 and "stopping after this step" in err and "Traceback" not in err
    assert f"stopped at step {at}; continue with: " in out and not (run / "result.json").exists()
    assert call("--resume", "--name", "stopped", "--steps", str(at + 3)) == 0
    assert result(run)["steps"] == at + 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--widths", "0"], "--widths is 0; expected at least 1"),
        (["--pool", "3"], "--pool is 3; expected 1, 2 or 4"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0; expected a positive number"),
        (["--spectra", "-5"], "--spectra is -5; expected steps of at least 0"),
        (["--probes", "0"], "--probes is 0; expected at least 1"),
        (["--name", "whole"], "whole' exists already; continue it with --resume or choose another --name"),
        (["--resume", "--name", "whole", "--pool", "2"], "with --pool 2: it was started with 4"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, *flags)


def test_divergence_is_named(here, capfd):
    assert call(*QUICK, "--learning-rate", "1e30", "--steps", "9", "--spectra", "9", "--name", "far") == 2
    assert "is not finite (loss " in runs.one_error(capfd.readouterr().err)


def test_help(capsys):
    assert call("--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "edge of stability" in out and "Random vectors of a density" in out


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "spectrum").iterdir()
    figures = result(run)
    assert figures["parameters"] == tree.count(spec.abstract(mlp.spec(mlp.Config((16, 20, 20, 10))))) == 970
    assert figures["sharpness"] == pytest.approx(figures["threshold"], rel=0.15)
    assert figures["hessian_top_error"] < 1e-9 and figures["hessian_density_error"] < 0.02
    assert figures["hessian_trace_standard_errors"] < 4
