"""experiments/ship.py, which is no row of the registry: it trains for seconds, and what is stopped is started again."""

import functools
import json

import pytest

from experiments.parts import shipped
from tests.experiments import runs
from tests.experiments.runs import config, is_png, result
from tests.registry.experiments import EXPERIMENTS

call, refused = (functools.partial(function, "ship") for function in (runs.call, runs.refused))
QUICK = ("--net", "lenet-digits", "--steps", "4", "--most", "8", "--rounds", "1", "--forms", "torchscript")
ROWS = {row.name: row for row in EXPERIMENTS}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with runs/ship/a; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("ship")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runs.coarse(patch)
        assert call(*QUICK, "--name", "a") == 0
    return folder


def test_default_leaves_packages_and_figures(place):
    run = place / "runs" / "ship" / "a"
    assert is_png(run / "ship.png") and config(run)["args"]["net"] == "lenet-digits"
    forms = result(run)["forms"]
    assert forms.keys() == {"eager float32", "int8 weights", "int4 weights", "torchscript"}
    assert forms["torchscript"]["error"] < 1e-5 and forms["torchscript"]["error_at_ends"] < 1e-5
    assert forms["torchscript"]["accuracy"] == forms["eager float32"]["accuracy"]
    assert (
        0 < forms["int8 weights"]["error"] < 0.1
        and forms["int8 weights"]["bytes"] < forms["eager float32"]["bytes"] / 3
    )
    assert (run / "packages" / "torchscript" / "manifest.json").is_file()
    assert sorted(path.name for path in (run / "packages").iterdir()) == ["torchscript"]


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (("--net", "lennet"), "'lennet'"),
        (("--batch", "9999"), "--batch is 9999, but 'digits' has 1500 examples to learn from"),
        (("--steps", "0"), "--steps is 0; expected at least 1"),
        (("--name", "a"), "'runs/ship/a' exists already"),
        (("--forms", "onnx", "onnx"), "--forms is onnx onnx; expected each once"),
        (("--forms", "tflite"), "tflite"),
        (("export", "--run", "nowhere"), "'nowhere' is not the folder of a run; expected one of classify, gpt"),
        (("export", "--run", "runs/ship/a"), "is not the folder of a run"),
        (("compare", "--run", "nowhere", "--size", "65"), "65 examples per call; expected 1 to 64, as --batch says"),
        (("bench", "--run", "nowhere", "--sizes", "1", "0"), "--sizes is 0; expected at least 1"),
        (("export", "--run", "nowhere", "--device", "cuda"), "--device is cuda; packages are written for the CPU"),
        (("export", "--run", "nowhere", "--batch", "4", "2"), "--batch is 4 2; expected two sizes, from and to"),
        (("exports",), "'exports' is unknown; expected flags, or one of the sub-commands export, compare, bench"),
    ],
    ids=runs.flag_id,
)
def test_refuses_in_one_line(place, monkeypatch, capfd, argv, error):
    monkeypatch.chdir(place)
    assert error in refused(capfd, *argv)


@pytest.mark.slow
@pytest.mark.parametrize("kind", shipped.KINDS)
def test_runs_of_every_script_leave(tmp_path, monkeypatch, capfd, kind):
    monkeypatch.chdir(tmp_path)
    runs.undrawn(monkeypatch)
    row = ROWS[kind]
    row.inputs(tmp_path)
    assert runs.call(kind, *row.flags, "--no-compile", "--name", "a") == 0
    quick = ("--run", f"runs/{kind}/a", "--forms", "torchscript", "--batch", "1", "3", "--examples", "4")
    assert call("compare", *quick, "--size", "2", "--rounds", "1") == 0, capfd.readouterr().err
    run = tmp_path / "runs" / kind / "a"
    one = json.loads((run / "comparison" / "result.json").read_text())["forms"]["torchscript"]
    assert one["error"] < 1e-4 and one["error_at_ends"] < 1e-4
    assert call("export", *quick) == 0  # the packages that are there
    assert call("bench", *quick, "--sizes", "1", "3", "--rounds", "1") == 0
    out = capfd.readouterr().out
    assert "batch 3" in out and "torchscript" in out and "writing torchscript" in out
    if kind == "classify":
        line = refused(capfd, "export", *quick[:4], "--batch", "1", "9")
        assert "holds a package of other weights or ranges; choose another --out" in line
