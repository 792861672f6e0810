"""Text whose letters are coloured by values, such as what a cell of a recurrent net holds: as a PNG and as HTML."""

import html
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from train.files import replacing
from train.plots import fonts
from train.plots.figures import INK, array, new_figure, write

LOW, HIGH = np.array([0x4C, 0x9B, 0xD6]), np.array([0xE8, 0x7A, 0x3E])  # blue and orange: apart for the colour-blind
SIZE = 8.0  # points
LINE, COLUMN = SIZE * 1.5 / 72, SIZE * 0.602 / 72  # inches of a line, and of a letter of matplotlib's monospaced font


class Passage(NamedTuple):
    """A text in pieces (letters, words), a value for each from -1 to 1, and what is written above."""

    title: str
    pieces: Sequence[str]
    values: Any


def colours(values: Any) -> np.ndarray:
    """Bytes (n, 3): blue at -1, white at 0, orange at 1. Values beyond are clipped, NaN is white."""
    x = np.nan_to_num(array(values).astype(float)).clip(-1, 1)[:, None]  # (n, 1)
    ends = np.where(x < 0, LOW, HIGH)
    return np.rint(255 + np.abs(x) * (ends - 255)).astype(np.uint8)


def picture(path: str | os.PathLike, passages: Sequence[Passage], columns: int = 88) -> None:
    """The passages below each other, in lines as in the text; a line longer than `columns` is broken."""
    laid = [_lines(passage, columns) for passage in passages]
    rows = sum(len(lines) + 2 for lines in laid)
    size = (columns * COLUMN + 0.4, rows * LINE + 0.2)
    figure = new_figure(*size)
    axes = figure.add_axes((0.2 / size[0], 0.1 / size[1], columns * COLUMN / size[0], rows * LINE / size[1]))
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_axis_off()
    style = {"fontsize": SIZE, "va": "center", "parse_math": False}
    row, image = 0, np.full((rows, columns, 3), 255, np.uint8)
    for passage, lines in zip(passages, laid, strict=True):
        axes.text(0, row + 0.55, passage.title, color=INK, **style)
        for number, line in enumerate(lines, row + 1):
            for _, column, wide, colour in line:
                image[number, column : column + wide] = colour
            # Word by word, as one text for each letter would take long to draw.
            for blank, word in itertools.groupby(line, key=lambda cell: cell[0].isspace()):
                cells = list(word)
                for part in () if blank else _runs(cells):
                    letters = "".join(cell[0] for cell in part)
                    axes.text(part[0][1], number + 0.55, letters, family="monospace", color="black", **style)
        row += len(lines) + 2
    axes.imshow(image, extent=(0, columns, rows, 0), aspect="auto", interpolation="nearest")
    write(path, figure)


def _runs(cells: list[tuple]) -> list[list[tuple]]:
    """A word in parts that can be drawn as one: wide letters, as of Chinese, each for itself."""
    parts: list[list[tuple]] = []
    for cell in cells:
        if parts and cell[2] == 1 == parts[-1][-1][2]:
            parts[-1].append(cell)
        else:
            parts.append([cell])
    return parts


def _lines(passage: Passage, columns: int) -> list[list[tuple[str, int, int, np.ndarray]]]:
    """Lines of (letter, column, width in columns, colour)."""
    lines, column = [[]], 0
    for piece, colour in zip(passage.pieces, colours(passage.values), strict=True):
        for letter in piece:
            wide = 2 if fonts.width(letter) > 1 else 1
            if letter == "\n" or column + wide > columns:
                lines, column = [*lines, []], 0
            if letter.isprintable():
                lines[-1].append((letter, column, wide, colour))
                column += wide
    return lines


def page(path: str | os.PathLike, passages: Sequence[Passage], title: str) -> None:
    """A web page with the passages. Each piece shows its value when pointed at."""
    head = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>\n'
        "body { font-family: sans-serif; margin: 2em auto; max-width: 60em; color: #333 }\n"
        "pre { color: black; line-height: 1.35; white-space: pre-wrap; overflow-wrap: anywhere }\n"
        "</style>\n"
    )
    parts = [head, f"<h1>{html.escape(title)}</h1>\n"]
    for passage in passages:
        parts.append(f"<h2>{html.escape(passage.title)}</h2>\n<pre>\n")
        values = array(passage.values).astype(float)
        for piece, value, (r, g, b) in zip(passage.pieces, values, colours(values), strict=True):
            number = "" if math.isnan(value) else f' title="{value:.2f}"'
            parts.append(f'<span style="background:#{r:02x}{g:02x}{b:02x}"{number}>{html.escape(piece)}</span>')
        parts.append("</pre>\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(parts) + "</html>\n", encoding="utf-8")
