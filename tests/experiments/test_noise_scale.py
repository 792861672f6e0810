"""experiments/noise_scale.py: its figures against gradients that are computed one by one."""

import functools

import numpy as np
import pytest
import torch

from core import random, tree
from core.per_example import each
from nets.language import gpt2
from tests.experiments import runs
from tests.experiments.runs import config, metrics, result
from train import optimizers
from train.data.text import text
from train.losses import cross_entropy
from train.step import create

call, completed = (functools.partial(function, "noise_scale") for function in (runs.call, runs.completed))


def test_first_step_is_that_of_single_gradients(tmp_path, monkeypatch):
    """The figures of one step against the gradients of its windows, one by one, at the initial values."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    quick = ("--batch", "8", "--steps", "1", "--text", "words", "--no-compile")
    assert call(*quick, "--name", "one") == 0 and call(*quick, "--micro-batches", "2", "--name", "parts") == 0
    figures, parts = (result(tmp_path / "runs" / "noise_scale" / name) for name in ("one", "parts"))

    data = text.open_text(tmp_path / "words", None, cache=tmp_path / "tokens")
    cfg = gpt2.Config(data.tokenizer.vocabulary_size, 64, 2, 4, 64, 0.0, bias=False)
    create_key, data_key = random.split(random.key(0)).unbind(0)
    params = create(create_key, gpt2.spec(cfg), optimizers.sgd(0.0)).params
    (batch,) = text.token_batches(text.split(data.tokens)[0], data_key, range(1), 8, 64)

    def losses(p, b):
        return cross_entropy(gpt2.apply(p, b[0], cfg), b[1], reduction="none").mean(1)

    flat = {name: g.flatten(1).double() for name, g in tree.items(each(losses, params, batch))}
    rest = {name: g for name, g in flat.items() if name != "tokens.weight"}
    for ending, gradients in (("", flat), ("_without_embedding", rest)):
        rows = torch.cat(list(gradients.values()), 1).numpy()
        trace = rows.var(0, ddof=1).sum()
        square = np.square(rows.mean(0)).sum() - trace / 8
        for actual in (figures, parts):
            assert actual[f"trace{ending}"] == pytest.approx(trace, rel=1e-4)
            assert actual[f"square{ending}"] == pytest.approx(square, rel=1e-3)
            assert actual[f"noise_scale{ending}"] == pytest.approx(trace / square, rel=2e-3)
    last = metrics(tmp_path / "runs" / "noise_scale" / "one")[-1]
    assert last["step"] == 1 and last["train/noise_trace"] == pytest.approx(figures["trace"], rel=1e-5)
    assert "spread_every_example" in figures and "spread_every_example" not in parts


@pytest.mark.long
def test_no_flags(tmp_path):
    """The noise scale grows past the batch, and one small batch is a far more uncertain estimate than all examples."""
    completed(tmp_path)
    (run,) = (tmp_path / "runs" / "noise_scale").iterdir()
    figures = result(run)
    assert config(run)["args"]["steps"] == figures["steps"] == 400
    assert 10 < figures["noise_scale"] < 100 and figures["steps_with_noise_scale_above_batch"] > 40
    assert figures["spread_every_example"] < 0.6 * figures["spread_one_small_batch"]
