"""Letters that matplotlib's font lacks: drawn with an installed font that has them, or named in one line."""

import logging

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image

from train import plots
from train.plots import classification, fonts, gan

CLASSES = ["猫", "狗狗", "bird"]


def font_file(path, family: str, letters: str):
    """A font whose every letter is a black square."""
    pen = TTGlyphPen(None)
    for move, point in zip(("moveTo", *["lineTo"] * 3), ((0, 0), (0, 700), (700, 700), (700, 0)), strict=True):
        getattr(pen, move)(point)
    pen.closePath()
    square, empty = pen.glyph(), TTGlyphPen(None).glyph()
    names = [".notdef", *(f"uni{ord(letter):04X}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    builder.setupGlyf({name: empty if name == ".notdef" else square for name in names})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in names})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=100)
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def installed(monkeypatch):
    """Matplotlib's own fonts and nothing else; returns the files of fonts installed after it made its list."""
    manager, files = font_manager.fontManager, []
    own = [font for font in manager.ttflist if "mpl-data" in str(font.fname)]
    monkeypatch.setattr(manager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: files)
    monkeypatch.setattr(fonts, "WARNED", set())
    manager._findfont_cached.cache_clear()
    yield files
    manager._findfont_cached.cache_clear()


def squares(path) -> int:
    """Number of letters of `font_file` in a picture, by the corner that each has on its upper left."""
    with Image.open(path) as image:
        dark = np.asarray(image.convert("L")) < 90
    solid = np.lib.stride_tricks.sliding_window_view(dark, (7, 7)).all((2, 3))
    before = np.pad(solid, ((1, 0), (1, 0)))
    return int((solid & ~before[:-1, 1:] & ~before[1:, :-1]).sum())


def draw(path) -> None:
    plots.matrix(path, torch.zeros(3, 3), CLASSES, CLASSES, title="猫")


def test_a_font_with_the_letters_is_used(installed, tmp_path, caplog):
    draw(tmp_path / "boxes.png")
    caplog.clear()
    installed.append(font_file(tmp_path / "cjk.ttf", "Made Up CJK", "猫狗"))
    draw(tmp_path / "letters.png")
    assert squares(tmp_path / "boxes.png") == 0 and squares(tmp_path / "letters.png") == 7
    assert not caplog.records


@pytest.mark.parametrize(
    ("texts", "package"),
    [
        (CLASSES, "fonts-noto-cjk"),
        (["\U0001e900", "b", "c"], "fonts-noto"),
        (["\U0001f468\u200d\U0001f469\u2764\ufe0f", "b", "c"], "fonts-symbola"),
    ],
)
def test_without_one_a_line_says_which_to_install(installed, tmp_path, caplog, texts, package):
    with caplog.at_level(logging.WARNING):
        for name in "ab":
            plots.matrix(tmp_path / f"{name}.png", torch.eye(3), texts)
    (record,) = caplog.records
    message = record.getMessage()
    assert message.endswith(f"such as {package}") and "\n" not in message
    assert all(letter in message for letter in fonts.lacking(texts[0])) and fonts.lacking(texts[0])


def test_each_kind_of_letters_has_its_package(installed, tmp_path, caplog):
    plots.matrix(tmp_path / "a.png", torch.eye(3), ["\U0001f469", "猫？", "แมว"])
    packages = {message.rpartition(" ")[2]: message for message in caplog.messages}
    assert sorted(packages) == ["fonts-noto", "fonts-noto-cjk", "fonts-symbola"]
    assert "猫？" in packages["fonts-noto-cjk"] and "猫" not in packages["fonts-noto"]


def test_every_picture_with_classes_takes_them(installed, tmp_path, caplog):
    installed.append(font_file(tmp_path / "cjk.ttf", "Made Up CJK", "猫狗"))
    names, images = ["$猫$", "狗狗", "$x_"], torch.rand(3, 1, 8, 8)
    log_probs = torch.eye(3).log_softmax(-1)
    classification.confusion(tmp_path / "a.png", torch.eye(3, dtype=torch.int64), names)
    classification.mistakes(tmp_path / "b.png", images, log_probs, [1, 2, 0], names)
    classification.predictions(tmp_path / "c.png", images, log_probs, names, ["猫 $a$ $", "b", "c"])
    gan.image_table(tmp_path / "d.png", images[:, None], names, ["$猫$ $"])
    plots.scatter(tmp_path / "e.png", torch.rand(3, 2), torch.arange(3), names)
    plots.scatter(tmp_path / "f.png", torch.rand(2, 2), torch.arange(2), ["猫", "狗"])
    plots.heat_map(tmp_path / "g.png", torch.rand(3, 2), range(3), names)
    assert not caplog.records


def test_choice_of_fonts():
    letters = frozenset("猫狗ねこ개")
    several = {"few": frozenset("猫"), "most": frozenset("猫狗ねこ"), "other": frozenset("개狗")}
    assert fonts.choose(letters, several) == (["most", "other"], frozenset())
    assert fonts.choose(letters, {"few": frozenset("猫")}) == (["few"], frozenset("狗ねこ개"))
    assert fonts.lacking("tokens, Ünïcödé αβγ \n\x07") == frozenset()


def test_width_of_a_line():
    assert fonts.width("ab") == 2 and fonts.width("猫a") == 1 + fonts.WIDE
