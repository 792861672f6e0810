"""sequences.py: its two tasks, predictions, other data; the default's figures."""

import functools
import io
import json
import math
import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from core import random
from experiments.parts import forecaster
from tests.experiments import runs
from tests.registry.experiments import sequences as rows
from train.data import series as data
from train.run import checkpoints

SETS = Path(os.environ.get("FUNCTREE_DATA", ""))
call = functools.partial(runs.call, "sequences")
SMALL = ("--width", "4", "--members", "2", "--batch", "8", "--epochs", "2", "--save-every", "4", "--no-compile")
SERIES = ("--task", "forecast", "--data", "load.csv", "--column", "load", "--window", "24", "--season", "12")
RUN = Path("runs/sequences/a")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run called `a` that forecasts, and `b` that classifies."""
    folder = tmp_path_factory.mktemp("sequences")
    rows.files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(*SERIES, "--horizon", "6", "--patch", "6", *SMALL, "--name", "a") == 0
        assert call(*rows.REVIEWS, "--no-compile", "--name", "b") == 0
    return folder


def test_forecast_stands_beside_forecasts_without_a_net(here):
    result = runs.result(RUN)
    assert {"rmse", "member_rmse", "seasonal_naive_rmse", "ridge_rmse", "band_coverage"} <= result.keys()
    assert result["ridge_rmse"] < 0.5 < result["seasonal_naive_rmse"]  # the series is a sine and a cycle of three
    assert 0 <= result["band_coverage"] <= 1 and (RUN / "forecast.png").exists()
    assert {"validation/loss", "validation/rmse"} <= runs.metrics(RUN)[-1].keys()


def test_resumed_forecast_ends_with_the_same_bits(here):
    """All members, optimizers and keys are in the checkpoint."""
    whole, folder = runs.result(RUN), RUN / "checkpoints"
    first, *later = checkpoints.steps(folder)
    for step in later:
        shutil.rmtree(folder / str(step))
    assert call("--resume", "--name", "a") == 0
    again = runs.result(RUN)
    assert later and first < whole["steps"]
    assert {k: v for k, v in whole.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}


def test_predict_continues_a_series(here, capsys):
    capsys.readouterr()
    assert call("predict", "--run", RUN) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "step,mean,low,high" and [int(line.split(",")[0]) for line in lines] == list(range(200, 206))
    for line in lines:
        _, mean, low, high = map(float, line.split(","))
        assert low < mean < high
    (here / "short.csv").write_text("load\n1\n2\n", encoding="utf-8")
    assert call("predict", "--run", RUN, "--file", "short.csv") == 2
    assert "short.csv, load has 2 values; expected 24 to forecast from" in capsys.readouterr().err
    assert call("predict", "--run", RUN, "a text") == 2
    assert "'a text' is a text, and 'runs/sequences/a' forecasts" in capsys.readouterr().err


def test_predict_reads_a_file_and_standard_input(here, monkeypatch, capsys):
    (here / "lines.txt").write_text("a moving film\n\ndull\n", encoding="utf-8")
    capsys.readouterr()
    assert call("predict", "--run", "runs/sequences/b", "--file", "lines.txt") == 0
    first = capsys.readouterr()
    assert [line.split("\t")[2] for line in first.out.splitlines()] == ["a moving film", "dull"]
    assert all(line.split("\t")[0] in ("good", "bad") for line in first.out.splitlines())
    assert first.err == "1 empty lines are left out\n"
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"a moving film\n\ndull\n")))
    assert call("predict", "--run", "runs/sequences/b") == 0
    assert capsys.readouterr().out == first.out


def test_bad_records_are_counted(here):
    assert runs.result(Path("runs/sequences/b"))["skipped"] == 1  # the line without a tab


def test_bands_of_members_are_those_of_their_mixture():
    """Draws of the members' normal distributions, all together, have the moments of the ensemble."""
    trained = forecaster.Trained(8, 3, 4, 4, 1.0, 3)
    args = types.SimpleNamespace(net="gru", width=4, layers=1, bidirectional=False, pooling="last", dropout=0.0)
    cfg = forecaster.net_of(args, d_in=4, outputs=6)
    params = torch.vmap(lambda key: forecaster.spec.init(key, forecaster.net.spec(cfg)))(random.split(random.key(0), 3))
    x = random.normal(random.key(1), (2, 2, 4))
    out = forecaster.forecast(forecaster.Forecaster(params, cfg, trained), x)
    with torch.no_grad():
        means, logs = torch.vmap(lambda p: forecaster.outputs(p, x, cfg))(params)
    draws = means + (logs / 2).exp() * random.normal(random.key(2), (100_000, *means.shape))
    torch.testing.assert_close(out.mean, draws.mean((0, 1)), rtol=0, atol=0.01)
    torch.testing.assert_close(out.std, draws.transpose(0, 1).flatten(0, 1).std(0), rtol=0.01, atol=0)


def test_examples_are_relative_to_their_window():
    trained = forecaster.Trained(4, 2, 2, 2, 10.0, 1)
    x, y = forecaster.examples(torch.arange(20.0, dtype=torch.float64), torch.tensor([6]), trained)
    assert x.shape == (1, 2, 2) and torch.allclose(x.flatten(), torch.tensor([-0.15, -0.05, 0.05, 0.15]))
    assert torch.allclose(y.flatten(), torch.tensor([0.25, 0.35]))


def test_ridge_knows_a_line():
    """A trend is a linear function of any window."""
    series = data.Series("line", torch.arange(200, dtype=torch.float64))
    origins = data.windows(series, 8, 3)
    _, y = data.cut(series.values, origins.test, 8, 3)
    predicted = forecaster.ridge(series.values, origins, forecaster.Trained(8, 3, 4, 4, 5.0, 1))
    assert float((predicted - y).abs().max()) < 1e-3


@pytest.mark.slow
def test_default_knows_balanced_brackets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--name", "a", "--no-compile") == 0
    result = runs.result(RUN)
    assert result["accuracy"] >= 0.99 and 0.45 < result["bag_of_words_accuracy"] < 0.55


@pytest.mark.slow
def test_default_forecast_is_better_than_those_without_a_net(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--task", "forecast", "--name", "a", "--no-compile") == 0
    result = runs.result(RUN)
    assert result["least_rmse"] < result["rmse"] < result["ridge_rmse"] < result["seasonal_naive_rmse"]
    assert result["rmse_over_sigma"] < 1.72 and math.isclose(result["band_coverage"], 0.9, abs_tol=0.04)


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("FUNCTREE_DATA"), reason="FUNCTREE_DATA names no folder of public data")
def test_sst2_from_scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = SETS / "text_cls_en" / "stsa.binary.train"
    assert call("--data", source, "--name", "a", "--no-compile") == 0
    result = json.loads((RUN / "result.json").read_text(encoding="utf-8"))
    assert result["accuracy"] >= 0.80
