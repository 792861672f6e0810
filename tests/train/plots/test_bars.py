"""Bars that begin at a baseline."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from train.plots import coloured_text
from train.plots.bars import bars, grouped_bars
from train.plots.figures import COLOURS


@pytest.fixture
def drawn_figures(monkeypatch):
    """The figures that are written."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k))
    return figures


def test_bars_begin_at_the_baseline(tmp_path, drawn_figures):
    figures = {"PSNR": {"bicubic": 30.0, "net": 32.5, "worse": 29.0}, "SSIM": {"bicubic": 0.87, "net": 0.91}}
    bars(tmp_path / "bars.png", figures, "bicubic", "net", title="Set5")
    left, right = drawn_figures[0].axes
    assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in left.patches] == [(30, 30), (30, 32.5), (30, 29)]
    assert [label.get_text() for label in left.get_yticklabels()] == ["bicubic", "net", "worse"]
    assert [text.get_text() for text in right.texts] == [" 0.87", " 0.91"]
    assert left.patches[1].get_facecolor() != left.patches[0].get_facecolor() == left.patches[2].get_facecolor()
    assert left.get_title() == "Set5: PSNR" and (tmp_path / "bars.png").stat().st_size


def test_equal_values(tmp_path):
    bars(tmp_path / "bars.png", {"PSNR": {"bicubic": 30.0, "net": 30.0}}, "bicubic")
    assert (tmp_path / "bars.png").stat().st_size


def test_bars_have_the_lengths_of_their_values(tmp_path):
    grouped_bars(tmp_path / "a.png", {"net": {"one": 1.0, "$two_": 0.5}, "other": {"one": 0.25}}, "F1", "title")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    first, second = (
        (pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(2).sum(1) for colour in COLOURS[:2]
    )  # pixels of each row
    longest = first.max()
    assert sorted(set(np.round(first[first > 0.4 * longest] / longest, 1))) == [0.5, 1.0]
    assert abs(second[second > 0].max() / longest - 0.25) < 0.03


def test_pale_colours_keep_their_order():
    for colour in COLOURS:
        pale = coloured_text.pale(colour)
        assert all(100 < value <= 255 for value in pale)
