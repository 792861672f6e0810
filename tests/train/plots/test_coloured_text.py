"""Coloured text: letters where they belong, the colours of their values."""

import re

import numpy as np
import torch
from PIL import Image

from train.plots import coloured_text
from train.plots.coloured_text import Passage


def test_colours_go_from_blue_over_white_to_orange():
    blue, half, white, orange, beyond, nan = coloured_text.colours(torch.tensor([-1, 0.5, 0, 1, 7, torch.nan])).tolist()
    assert white == nan == [255, 255, 255] and orange == beyond
    assert blue[2] > blue[0] and orange[0] > orange[2]
    assert np.abs(np.array(half) - (np.array(orange) + 255) / 2).max() <= 1


def test_lines_are_those_of_the_text_and_long_ones_are_broken():
    passage = Passage("", ["ab", "\n", "", "cdef", "龙", "\t", "\n", "\n", "g"], [0.1] * 9)
    lines = coloured_text._lines(passage, 4)
    assert [[cell[:3] for cell in line] for line in lines] == [
        [("a", 0, 1), ("b", 1, 1)],
        [("c", 0, 1), ("d", 1, 1), ("e", 2, 1), ("f", 3, 1)],
        [("龙", 0, 2)],
        [],
        [("g", 0, 1)],
    ]


def test_long_lines_are_broken_after_a_space():
    lines = coloured_text._lines(Passage("", list("ab cde 龙龙x"), [0.0] * 10), 7)
    assert ["".join(cell[0] for cell in line) for line in lines] == ["ab cde ", "龙龙x"]
    assert [cell[1:3] for cell in lines[1]] == [(0, 2), (2, 2), (4, 1)]
    lines = coloured_text._lines(Passage("", list("ab cdef ghijklmnop q"), [0.0] * 20), 6)
    assert ["".join(cell[0] for cell in line) for line in lines] == ["ab ", "cdef ", "ghijkl", "mnop q"]


def test_colours_and_notes_of_pieces(tmp_path):
    passage = Passage("t", ["a", "b"], torch.tensor([[1, 2, 3], [255, 0, 0]], dtype=torch.uint8), ['"x"', ""])
    assert coloured_text.colours(passage.values).tolist() == [[1, 2, 3], [255, 0, 0]]
    coloured_text.picture(tmp_path / "text.png", [passage], columns=12)
    coloured_text.page(tmp_path / "text.html", [passage, passage._replace(notes=None)], "T")
    source = (tmp_path / "text.html").read_text(encoding="utf-8")
    assert '<span style="background:#010203" title="&quot;x&quot;">a</span>' in source
    assert source.count('<span style="background:#ff0000">b</span>') == 2


def test_picture_has_each_colour_and_the_letters(tmp_path):
    path = tmp_path / "text.png"
    coloured_text.picture(path, [Passage("title", list("low high\nx"), [-1] * 4 + [1] * 4 + [0] * 2)], columns=12)
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    for value in (-1, 1):
        assert (pixels == coloured_text.colours([value])[0]).all(1).mean() > 0.01
    assert (pixels.max(1) < 60).mean() > 0.001  # letters
    empty = tmp_path / "empty.png"
    coloured_text.picture(empty, [Passage("title", list("    \n "), [0] * 6)], columns=12)
    assert (np.asarray(Image.open(empty).convert("RGB")).reshape(-1, 3).max(1) < 45).sum() == 0


def test_page_escapes_and_keeps_the_text(tmp_path):
    pieces = ["<b>", "&", ' "q"', "\n", "龙"]
    coloured_text.page(tmp_path / "text.html", [Passage("a < b", pieces, [-1.0, 0.5, torch.nan, 0.0, 1.0])], "T & U")
    source = (tmp_path / "text.html").read_text(encoding="utf-8")
    assert "<h2>a &lt; b</h2>" in source and "<title>T &amp; U</title>" in source
    spans = re.findall(r'<span style="background:(#\w{6})"(?: title="(.*?)")?>(.*?)</span>', source, re.DOTALL)
    assert [span[1] for span in spans] == ["-1.00", "0.50", "", "0.00", "1.00"]
    assert [span[2] for span in spans] == ["&lt;b&gt;", "&amp;", " &quot;q&quot;", "\n", "龙"]
    assert spans[2][0] == spans[3][0] == "#ffffff" and len({span[0] for span in spans}) == 4
