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
    """A text in pieces (letters, words), and what is written above.

    Attributes:
        values: one per piece, (n,) from -1 to 1; or their colours themselves, bytes (n, 3).
        notes: a text per piece that the web page shows when pointed at; the value if None.
    """

    title: str
    pieces: Sequence[str]
    values: Any
    notes: Sequence[str] | None = None


def colours(values: Any) -> np.ndarray:
    """Bytes (n, 3): blue at -1, white at 0, orange at 1. Values beyond are clipped, NaN is white; colours stay."""
    if array(values).ndim == 2:
        return array(values).astype(np.uint8)
    x = np.nan_to_num(array(values).astype(float)).clip(-1, 1)[:, None]  # (n, 1)
    ends = np.where(x < 0, LOW, HIGH)
    return np.rint(255 + np.abs(x) * (ends - 255)).astype(np.uint8)


def pale(colour: str) -> tuple[int, int, int]:
    """A colour such as "#0072B2", light enough to read black letters on."""
    return tuple(round(255 + 0.45 * (int(colour[i : i + 2], 16) - 255)) for i in (1, 3, 5))


def picture(path: str | os.PathLike, passages: Sequence[Passage], columns: int = 88) -> None:
    """The passages below each other, in lines as in the text; one longer than `columns` is broken, after a space."""
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
            if letter == "\n":
                lines, column = [*lines, []], 0
            elif column + wide > columns:
                cut = max((k for k, cell in enumerate(lines[-1], 1) if cell[0].isspace()), default=column)
                rest = [] if letter.isspace() else lines[-1][cut:]
                shift = rest[0][1] if rest else column
                lines[-1] = lines[-1][: len(lines[-1]) - len(rest)]
                lines.append([(c, at - shift, width, own) for c, at, width, own in rest])
                column -= shift
            if letter.isprintable():
                lines[-1].append((letter, column, wide, colour))
                column += wide
    return lines


def page(path: str | os.PathLike, passages: Sequence[Passage], title: str) -> None:
    """A web page with the passages. Each piece shows its note, or value, when pointed at."""
    head = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>\n'
        "body { font-family: sans-serif; margin: 2em auto; max-width: 60em; color: #333 }\n"
        "pre { color: black; line-height: 1.35; white-space: pre-wrap; overflow-wrap: anywhere }\n"
        "</style>\n"
    )
    parts = [head, f"<h1>{html.escape(title)}</h1>\n"]
    for passage in passages:
        parts.append(f"<h2>{html.escape(passage.title)}</h2>\n<pre>\n")
        for piece, note, (r, g, b) in zip(passage.pieces, _notes(passage), colours(passage.values), strict=True):
            title = f' title="{html.escape(note)}"' if note else ""
            parts.append(f'<span style="background:#{r:02x}{g:02x}{b:02x}"{title}>{html.escape(piece)}</span>')
        parts.append("</pre>\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(parts) + "</html>\n", encoding="utf-8")


def _notes(passage: Passage) -> Sequence[str]:
    if passage.notes is not None:
        return passage.notes
    values = array(passage.values).astype(float)
    return ["" if math.isnan(value) else f"{value:.2f}" for value in values] if values.ndim == 1 else [""] * len(values)
