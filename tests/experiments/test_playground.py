import sys
import types

import pytest

from tests.experiments.runs import call, execute, is_png, result, script
from tests.registry.experiments import EXPERIMENTS
from tests.registry.experiments.language import pairs

QUICK = ("--lengths", "16", "32", "--rounds", "1", "--name", "one")


@pytest.mark.slow
def test_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("playground", *QUICK, "--steps", "300") == 0
    figures = result(tmp_path / "runs" / "playground" / "one")
    # Copied letters: 1 of 26 of them, and the end, which is always right: (10 / 26 + 1) / 11.
    assert figures["reversed_letters_right"] > 0.95
    assert figures["copied_letters_right"] == pytest.approx(0.126, abs=0.02)
    # The peak of width^-0.5 min(step^-0.5, step warmup^-1.5) is at the end of the warm-up.
    assert figures["peak_width_512"] == pytest.approx((512 * 4000) ** -0.5, rel=1e-3)
    assert figures["divergence_when_sure_0.4"] > figures["divergence_when_sure_0.1"] > 0.1
    assert figures["divergence_when_sure_0.0"] < 1e-3
    assert all(figures[f"{method}/{n}/seconds"] > 0 for method in ("explicit", "fused") for n in (16, 32))


def test_attention_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs(tmp_path)
    options = ("--data", "pairs", "--steps", "2", "--vocabulary", "300", "--tokens", "300", "--no-compile")
    assert call("translate", *options, "--eval-every", "1000", "--name", "trained") == 0
    assert call("playground", *QUICK, "--run", "runs/translate/trained", "Der Bus") == 0
    folder = tmp_path / "runs" / "playground" / "one"
    assert is_png(folder / "attention_maps.png") and is_png(folder / "attention_maps" / "cross.png")
    figures = result(folder)
    assert "translation" in figures and figures["steps"] == 0 and "reversed_letters_right" not in figures


@pytest.mark.slow
def test_cells_of_a_notebook(tmp_path, monkeypatch):
    """Each cell draws its picture at once and shows it; the last one is the whole script, which is not run here."""
    monkeypatch.chdir(tmp_path)
    shown = []
    display = types.SimpleNamespace(Image=lambda path: path, display=shown.append)
    for name, module in {"ipykernel": display, "IPython": display, "IPython.display": display}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("train.run.command_line.run", lambda *args, **options: None)
    execute(script("playground"), "-f", "kernel.json")
    row = next(row for row in EXPERIMENTS if row.name == "playground")
    assert [path.name for path in shown] == list(row.pictures) and all(map(is_png, shown))
