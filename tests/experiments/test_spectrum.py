"""experiments/spectrum.py: its exact eigenvalues against torch's, its estimates against these."""

import functools
import json
from pathlib import Path

import pytest
import torch

from core import spec, tree
from nets.classifiers import mlp
from tests.experiments import runs
from tests.experiments.runs import metrics, result
from tests.experiments.test_laws import colours, final_state
from train.data.images import arrays

DRAWN = True
call, completed = (functools.partial(function, "spectrum") for function in (runs.call, runs.completed))
QUICK = ("--pool", "4", "--widths", "6", "--lanczos-steps", "25", "--probes", "3", "--steps", "10", "--spectra")


def spectrum_at(run: Path, step: int) -> dict:
    return json.loads((run / "spectra" / f"{step}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run of 10 steps, runs/spectrum/whole; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("spectrum")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs.undrawn(patch)
        assert call(*QUICK, "--eval-every", "5", "--name", "whole") == 0
    return folder


def test_estimates_are_near_the_exact_values(place):
    run = place / "runs" / "spectrum" / "whole"
    assert sorted(path.stem for path in (run / "spectra").iterdir()) == ["10"]
    sharpness = [record["sharpness/hessian"] for record in metrics(run) if "sharpness/hessian" in record]
    figures = result(run)
    assert figures["parameters"] == 5 * 6 + 7 * 10 and len(sharpness) == 3
    assert figures["sharpness"] == sharpness[-1] <= figures["sharpness_max"] == max(sharpness)
    for name in ("hessian", "ggn"):
        assert figures[f"{name}_top_error"] < 1e-6 and figures[f"{name}_trace_standard_errors"] < 4
        assert 0 < figures[f"{name}_density_error"] < 0.2


def test_exact_eigenvalues_are_those_of_torch(place):
    run = place / "runs" / "spectrum" / "whole"
    learn, _ = arrays.digits(1297)
    pixels = torch.nn.functional.avg_pool2d(learn.images, 4).flatten(1).double()
    params = tree.cast(final_state(run)["params"], torch.float64)
    names, shapes = tree.names(params), [x.shape for x in tree.leaves(params)]

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        p = dict(zip(names, (x.view(s) for x, s in zip(parts, shapes, strict=True)), strict=True))
        hidden = torch.tanh(pixels @ p["layers.0.weight"].T + p["layers.0.bias"])
        logits = hidden @ p["layers.1.weight"].T + p["layers.1.bias"]
        return torch.nn.functional.cross_entropy(logits, learn.labels)

    vector = torch.cat([x.flatten() for x in tree.leaves(params)])
    exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, vector)).flip(0)
    actual = torch.tensor(spectrum_at(run, 10)["hessian"]["exact"], dtype=torch.float64)
    torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-12)
    assert result(run)["sharpness"] == pytest.approx(float(exact[0]), rel=1e-9)


@pytest.mark.slow
def test_without_exact_the_rest_is_the_same(here, place):
    assert call(*QUICK, "--no-exact", "--name", "lanczos") == 0
    run, whole = here / "runs/spectrum/lanczos", place / "runs/spectrum/whole"
    actual, expected = spectrum_at(run, 10)["hessian"], spectrum_at(whole, 10)["hessian"]
    assert actual == {**expected, "exact": []} and colours(run / "spectra.png") > 2
    assert "hessian_top_error" not in result(run) and result(run)["hessian_residual"] < 1e-6


def test_divergence_is_named(here, capfd):
    assert call(*QUICK, "--learning-rate", "1e38", "--name", "far") == 2
    assert "is not finite (loss " in runs.one_error(capfd.readouterr().err)


@pytest.mark.long
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "spectrum").iterdir()
    figures = result(run)
    assert figures["parameters"] == tree.count(spec.abstract(mlp.spec(mlp.Config((16, 20, 20, 10))))) == 970
    assert figures["sharpness"] == pytest.approx(figures["threshold"], rel=0.15)
    assert figures["hessian_top_error"] < 1e-9 and figures["hessian_density_error"] < 0.02
    assert figures["hessian_trace_standard_errors"] < 4
