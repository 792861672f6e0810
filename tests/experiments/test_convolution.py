import functools

import pytest
from PIL import Image
from torch.nn.functional import conv2d

from core import random
from nets.explained.convolution import WAYS
from tests.experiments import runs
from tests.experiments.runs import config, flag_id, is_png, metrics, result

call, refused, completed = (
    functools.partial(function, "convolution") for function in (runs.call, runs.refused, runs.completed)
)
QUICK = ("--size", "32", "--kernels", "3", "1", "--sides", "8", "6", "--channels", "2", "--rounds", "2")
PICTURES = ("kernels", "matrices", "im2col", "spectra", "timings")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run, runs/convolution/whole, and no images; not to be changed by a test."""
    folder = tmp_path_factory.mktemp("convolution")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*QUICK, "--name", "whole") == 0
    (folder / "text.png").write_text("no image", encoding="utf-8")
    (folder / "folder.png").mkdir()
    return folder


def test_folder_of_a_run(place):
    run = place / "runs" / "convolution" / "whole"
    assert all(is_png(run / f"{name}.png") for name in PICTURES)
    assert config(run)["args"]["kernels"] == [3, 1] and config(run)["threads"] == 1
    figures = result(run)
    timings = figures["timings"]
    # The sweep over kernels is on the middle side, the sweep over sides with a kernel of 5.
    assert [(r["side"], r["kernel"]) for r in timings] == [(6, 5), (8, 1), (8, 3), (8, 5)]
    assert all(r[f"seconds/{way}"] > 0 for r in timings for way in ("torch", *WAYS, "matrix, kept"))
    assert figures["error"].keys() == {"torch", *WAYS} and all(0 <= e < 3e-6 for e in figures["error"].values())
    assert figures["error"]["FFT"] == max(r["error/FFT"] for r in timings)
    for record, timing in zip(metrics(run), timings, strict=True):
        assert {name: record[name] for name in timing} == timing


def test_errors_are_against_double_precision(place):
    """The figures of the second setting again."""
    x_key, weight_key, _ = random.split(random.fold_in(random.key(0), 2), 3)
    x, weight = random.normal(x_key, (1, 2, 8, 8)), random.normal(weight_key, (2, 2, 1, 1))
    exact = conv2d(x.double(), weight.double())
    timing = result(place / "runs" / "convolution" / "whole")["timings"][1]
    for way in WAYS:
        error = (WAYS[way](x, weight) - exact).abs().max() / exact.abs().max()
        assert timing[f"error/{way}"] == pytest.approx(float(error), rel=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_own_image(mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new(mode, (20, 40)).save("black.png")  # nothing to see: no division by zero either
    assert call("--image", "black.png", "--size", "16", *QUICK[2:4], "--sides", "8", "--rounds", "1") == 0
    (run,) = (tmp_path / "runs" / "convolution").iterdir()
    assert all(is_png(run / f"{name}.png") for name in PICTURES)


def test_matrices_that_are_too_large_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--kernels", "9", "--sides", "64", "--channels", "3", "--rounds", "1")
    assert call("--size", "16", *options, "--name", "large") == 0
    five, nine = result(tmp_path / "runs" / "convolution" / "large")["timings"]
    assert "seconds/matrix" in five and "seconds/matrix" not in nine and "seconds/matrix, kept" not in nine
    assert nine["seconds/FFT"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "nowhere.png"], "nowhere.png does not exist, expected a picture"),
        (["--image", "text.png"], "text.png cannot be read as a picture"),
        (["--image", "folder.png"], "folder.png cannot be read as a picture"),
        (["--size", "0"], "--size is 0; expected at least 1"),
        (["--size", "15"], "--size is 15; expected at least 16, room for the largest kernel"),
        (["--kernels", "3", "0"], "--kernels is 0; expected at least 1"),
        (["--sides"], "--kernels and --sides expect at least one number each"),
        (["--sides", "0"], "--sides is 0; expected at least 1"),
        (["--channels", "0"], "--channels is 0; expected at least 1"),
        (["--rounds", "0"], "--rounds is 0; expected at least 1"),
        (["--device", "abacus"], "--device 'abacus' cannot be used; available here: cpu"),
        (["--name", "whole"], "whole' exists already"),
        (["--name", "a/b"], "--name 'a/b' is not the name of a folder"),
    ],
    ids=flag_id,
)
def test_refused_in_one_line(flags, message, here, capfd):
    assert message in refused(capfd, *flags)


def test_help(capsys):
    assert call("--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "danielbuechele" in out and "the median counts" in out


@pytest.mark.slow
def test_no_flags(tmp_path):
    """The run that the experiment's first lines promise."""
    out = completed(tmp_path)
    (run,) = (tmp_path / "runs" / "convolution").iterdir()
    assert all(is_png(run / f"{name}.png") for name in PICTURES)
    figures = result(run)
    assert max(figures["error"].values()) < 2e-6
    large = next(r for r in figures["timings"] if (r["side"], r["kernel"]) == (64, 25))
    assert large["seconds/FFT"] < min(large["seconds/torch"], large["seconds/im2col"], large["seconds/definition"])
    assert f"files in {run.relative_to(tmp_path)}/" in out.splitlines()[-1]
