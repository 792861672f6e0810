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

from core import random, tree
from experiments.parts import forecaster, text_classifier
from tests.experiments import runs
from tests.registry.experiments import sequences as rows
from train.data import series as data
from train.data.text import ragged
from train.run import checkpoints, open_run

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
    days = "".join(f"2020-02-{day + 1:02d};{day % 7},5\n" for day in range(29))
    (here / "days.csv").write_text(f"day;power\n{days}", encoding="utf-8")
    assert call("predict", "--run", RUN, "--file", "days.csv", "--column", "power") == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == "time,mean,low,high" and lines[0].startswith("2020-03-01,") and len(lines) == 6
    assert call("predict", "--run", RUN, "a text") == 2
    assert "'a text' is a text, and 'runs/sequences/a' forecasts" in capsys.readouterr().err


def test_predict_reads_a_file_and_standard_input(here, monkeypatch, capsys):
    (here / "lines.txt").write_text("a moving film\n\ndull\n", encoding="utf-8")
    capsys.readouterr()
    assert call("predict", "--run", "runs/sequences/b", "--file", "lines.txt") == 0
    first = capsys.readouterr()
    assert [line.split("\t")[2] for line in first.out.splitlines()] == ["a moving film", "dull"]
    assert all(line.split("\t")[0] in ("good", "bad") for line in first.out.splitlines())
    assert first.err == "1 empty line is left out\n"
    lines = b"\xef\xbb\xbfa moving film\r\n\r\ndull"  # as Windows writes them
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(lines)))
    assert call("predict", "--run", "runs/sequences/b") == 0
    assert capsys.readouterr().out == first.out
    (here / "latin.txt").write_bytes(b"a caf\xe9\n")
    assert call("predict", "--run", "runs/sequences/b", "--file", "latin.txt") == 0
    assert capsys.readouterr().out.endswith("\ta café\n")
    assert call("predict", "--run", "runs/sequences/b", "dull", "--file", "lines.txt") == 2
    assert "there are texts and a --file; expected one of them" in capsys.readouterr().err
    assert call("evaluate", "--run", "runs/sequences/b", "--column", "load") == 2
    assert "--column 'load' is that of a CSV, and 'runs/sequences/b' classifies texts" in capsys.readouterr().err


@pytest.mark.parametrize("net", ["fasttext", "text_cnn"])
def test_nets_of_texts_are_trained_used_and_resumed(net, here, capsys):
    flags = (*rows.REVIEWS, "--net", net, "--windows", "2", "3", "--no-compile", "--save-every", "4", "--name", net)
    run = Path("runs/sequences") / net
    assert call(*flags) == 0
    result, args = runs.result(run), json.loads((run / "config.json").read_text(encoding="utf-8"))["args"]
    assert args["best_by"] == "loss" and args["tokenizer"] == "words"  # defaults of the net, and of texts
    assert "TF-IDF: " in capsys.readouterr().out and 0 <= result["tf_idf_accuracy"] <= 1
    assert call("predict", "--run", run, "a moving film", "dull") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] in ("good", "bad") for line in lines] == [True, True]
    assert call("evaluate", "--run", run, "--data", "reviews.tsv") == 0
    assert (run / "evaluations" / "reviews.tsv" / "result.json").exists()
    first, *later = checkpoints.steps(run / "checkpoints")
    for step in later:
        shutil.rmtree(run / "checkpoints" / str(step))
    assert call("--resume", "--name", net) == 0
    again = runs.result(run)
    assert later and {**result, "seconds": 0} == {**again, "seconds": 0}


def test_members_of_a_classifier_are_averaged(here, capsys):
    """Probabilities of a resumed run of two are the means of both, as files and evaluation give them."""
    options = ("--net", "fasttext", "--buckets", "512", "--members", "2", "--name", "two", "--no-compile")
    assert call(*rows.REVIEWS, *options) == 0
    assert "(a member: " in capsys.readouterr().out
    result = runs.result(Path("runs/sequences/two"))
    model = text_classifier.load(open_run(Path("runs/sequences/two"), Path("runs/sequences"), "best"))
    texts = ["a gripping film", "dull"]
    tokens = ragged.encode(texts, model.tokenizer, model.kind, model.longest)
    alone = [model.net.apply(tree.map(lambda x, i=i: x[i], model.params), tokens, model.cfg) for i in range(2)]
    mean = torch.stack([logits.softmax(-1) for logits in alone]).mean(0)
    torch.testing.assert_close(text_classifier.classify(model, texts).exp(), mean)
    assert not torch.equal(*alone) and 0 <= result["member_accuracy"] <= 1
    assert call("evaluate", "--run", "runs/sequences/two", "--out", "again") == 0
    again = json.loads((here / "again" / "result.json").read_text(encoding="utf-8"))
    assert again["accuracy"] == result["accuracy"]


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


@pytest.mark.parametrize("unit", [2.0**-60, 2.0**60, 2.0**200])
def test_figures_do_not_depend_on_the_unit(unit):
    """Tiny and huge values: the same errors in their unit, and the NLL moved by its logarithm."""
    values = torch.arange(60, dtype=torch.float64).sin()
    origins = torch.arange(8, 57)
    args = types.SimpleNamespace(net="gru", width=4, layers=1, bidirectional=False, pooling="last", dropout=0.0)
    cfg = forecaster.net_of(args, d_in=4, outputs=6)
    params = torch.vmap(lambda key: forecaster.spec.init(key, forecaster.net.spec(cfg)))(random.split(random.key(0), 2))

    def figures(factor):
        scale = forecaster.scale_of(factor * values, origins, 8)
        model = forecaster.Forecaster(params, cfg, forecaster.Trained(8, 3, 4, 4, scale, 2))
        return forecaster.figures(model, factor * values, origins)

    one, other = figures(1.0), figures(unit)
    assert other["rmse"] / unit == pytest.approx(one["rmse"], rel=1e-6)
    assert other["nll"] - math.log(unit) == pytest.approx(one["nll"], rel=1e-6)
    assert other["band_coverage"] == one["band_coverage"]


@pytest.mark.parametrize(("values", "message"), [([5.0] * 20, "the last one 5"), ([1e300, 9e300] * 10, "1e150")])
def test_scale_of_what_cannot_be_learned(values, message):
    with pytest.raises(ValueError, match=message):
        forecaster.scale_of(torch.tensor(values, dtype=torch.float64), torch.arange(8, 18), 8)


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
    assert "tf_idf_accuracy" not in result  # brackets are no words


@pytest.mark.slow
def test_default_forecast_is_better_than_those_without_a_net(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("--task", "forecast", "--name", "a", "--no-compile") == 0
    result = runs.result(RUN)
    assert result["least_rmse"] < result["rmse"] < result["ridge_rmse"] < result["seasonal_naive_rmse"]
    assert result["rmse_over_sigma"] < 1.72 and math.isclose(result["band_coverage"], 0.9, abs_tol=0.04)


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("FUNCTREE_DATA"), reason="FUNCTREE_DATA names no folder of public data")
def test_fasttext_reaches_tf_idf_on_titles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = SETS / "text_cls_zh" / "THUCNews" / "data"
    files = ("--data", folder / "dev.txt", "--test", folder / "test.txt")
    tokens = ("--tokenizer", "characters-and-spaces", "--vocabulary", "5000")
    assert call("--net", "fasttext", *files, *tokens, "--name", "a", "--no-compile") == 0
    result = runs.result(RUN)
    assert result["accuracy"] >= 0.865 > 0.82 > result["bag_of_words_accuracy"]
    assert abs(result["accuracy"] - result["tf_idf_accuracy"]) < 0.005


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("FUNCTREE_DATA"), reason="FUNCTREE_DATA names no folder of public data")
def test_sst2_from_scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = SETS / "text_cls_en" / "stsa.binary.train"
    assert call("--data", source, "--name", "a", "--no-compile") == 0
    result = json.loads((RUN / "result.json").read_text(encoding="utf-8"))
    assert result["accuracy"] >= 0.80
