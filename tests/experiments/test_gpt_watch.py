"""experiments/gpt.py --watch-gradients: the same run, with more in its log."""

import shutil

import pytest

from core import tree
from nets.language import gpt2
from tests.experiments.gpt_runs import QUICK, TEXT, call, state_of
from tests.experiments.runs import is_png, metrics, result

FLAGS = (*QUICK, "--steps", "12", "--save-every", "6")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "runs" / "gpt"


@pytest.mark.slow
def test_watched_run_is_the_run_and_resumes(here):
    assert call(*FLAGS, "--name", "plain") == 0
    assert call(*FLAGS, "--name", "watched", "--watch-gradients") == 0
    run = here / "watched"
    assert result(run)["val_loss"] == pytest.approx(result(here / "plain")["val_loss"], rel=1e-4)
    assert is_png(run / "gradients.png") and not (here / "plain" / "gradients.png").exists()
    logged = {name for record in metrics(run) for name in record}
    layers = {f"gradients/norm/{name}" for name in tree.names(gpt2.spec(gpt2.PRESETS["tiny"]))}
    assert layers | {"gradients/noise_scale", "gradients/norms"} <= logged
    assert not any("gradients/" in name for record in metrics(here / "plain") for name in record)

    whole, before = state_of(run), [{**r, "time": 0} for r in metrics(run)]
    shutil.rmtree(run / "checkpoints" / "12")
    assert call("--resume", "--name", "watched") == 0
    assert tree.map(lambda a, b: a.equal(b), state_of(run), whole) == tree.map(lambda a: True, whole)
    assert [{**r, "time": 0} for r in metrics(run)] == before
