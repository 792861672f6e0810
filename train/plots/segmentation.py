"""Pictures of a segmentation: classes over a picture, its errors and its uncertainty, and figures per class as bars."""

import colorsys
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.plots import fonts
from train.plots.figures import COLOURS, GRID, INK, array, axes_for, new_figure, write
from train.plots.image_grids import axes_in_inches

FURTHER = ("#8C564B", "#78DC3C", "#7A3FD0", "#FFFFFF", "#12603A", "#B5B09A", "#1B2A80", "#FF8FB1")
"""Colours of classes after those of all plots."""
VOID_COLOUR = (90, 90, 90)
ERROR_COLOUR = (230, 40, 40)


def palette(classes: int, background: bool) -> np.ndarray:
    """(classes, 3) bytes: colours of classes, the first ones easy to tell apart; black for a background."""
    colours = [(0, 0, 0)] if background else []
    own = [*(c for c in COLOURS if c != "#000000"), *FURTHER]
    for i in range(classes - len(colours)):
        if i < len(own):
            colours.append(tuple(int(own[i][k : k + 2], 16) for k in (1, 3, 5)))
        else:  # hues by the golden ratio, in two shades
            shade = (0.75, 0.95) if i % 2 else (0.55, 0.6)
            colours.append(tuple(round(255 * x) for x in colorsys.hsv_to_rgb(0.618034 * i % 1, *shade)))
    return np.array(colours[:classes], np.uint8)


def coloured(labels: Any, colours: np.ndarray) -> np.ndarray:
    """(height, width, 3) bytes: each label in its colour; labels without one, such as void, grey."""
    indices = array(labels).astype(np.int64)
    table = np.concatenate([colours, np.array([VOID_COLOUR], np.uint8)])
    return table[np.where(indices < len(colours), indices, len(colours))]


def overlay(image: Any, labels: Any, colours: np.ndarray, background: bool, opacity: float = 0.5) -> np.ndarray:
    """(height, width, 3) bytes: a picture (3, height, width) of bytes under the colours of its labels; a background is
    left clear."""
    pixels, classes = array(image).transpose(1, 2, 0).astype(float), array(labels)
    share = np.where(background & (classes == 0), 0.0, opacity)[..., None]
    return np.round(pixels * (1 - share) + coloured(classes, colours) * share).astype(np.uint8)


def errors(image: Any, labels: Any, truth: Any, void: int) -> np.ndarray:
    """(height, width, 3) bytes: a faint grey picture, wrong pixels red, void ones dark."""
    grey = array(image).astype(float).mean(0)
    out = np.repeat((170 + grey / 3)[..., None], 3, 2)
    target = array(truth)
    out[(array(labels) != target) & (target != void)] = ERROR_COLOUR
    out[target == void] = VOID_COLOUR
    return np.round(out).astype(np.uint8)


def heat(values: Any, high: float) -> np.ndarray:
    """(height, width, 3) bytes: numbers from 0, black, to `high`, nearly white."""
    from matplotlib import colormaps

    share = (array(values).astype(float) / max(high, 1e-12)).clip(0, 1)
    return np.round(255 * colormaps["magma"](share)[..., :3]).astype(np.uint8)


def comparison(
    path: str | os.PathLike,
    rows: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str],
    classes: Mapping[str, Sequence[int]],
    title: str = "",
    width: float = 1.9,
) -> None:
    """Pictures of any sizes side by side, a row per example, with a legend of the classes.

    Args:
        rows: (height, width, 3) bytes each, of one size per row.
        columns: one heading per picture of a row.
        classes: {name: colour (3,) of bytes}.
        width: of a picture, in inches.
    """
    from matplotlib.patches import Patch

    if not rows or any(len(row) != len(columns) for row in rows):
        sizes = [len(row) for row in rows]
        raise ValueError(f"rows of {sizes} pictures; expected at least one row, of {len(columns)} each")
    gap, head = 0.06, 0.5 if title else 0.25
    heights = [width * row[0].shape[0] / row[0].shape[1] for row in rows]
    across = len(columns) * (width + gap) + gap
    longest = max((fonts.width(name) for name in classes), default=0)
    beside = max(1, int(across / (0.08 * longest + 0.4)))
    lines = -(-len(classes) // beside)
    foot = 0.2 * lines + 0.12 if classes else 0.05
    tall = head + sum(heights) + gap * len(rows) + foot
    figure = new_figure(across, tall)
    top, axes = tall - head, axes_in_inches(figure)
    for row, height in zip(rows, heights, strict=True):
        for i, pixels in enumerate(row):
            left = gap + i * (width + gap)
            place = (left, left + width, top - height, top)
            axes.imshow(pixels, interpolation="nearest", aspect="auto", extent=place)
            if row is rows[0]:
                words = {"fontsize": 9, "color": INK, "ha": "center", "parse_math": False}
                axes.text(left + width / 2, top + 3 / 72, columns[i], **words)
        top -= height + gap
    if classes:
        patches = [
            Patch(facecolor=np.array(c) / 255, edgecolor="#888888", lw=0.5, label=name) for name, c in classes.items()
        ]
        style = {"fontsize": 8, "frameon": False, "handlelength": 1.0, "columnspacing": 1.0}
        legend = figure.legend(handles=patches, ncols=beside, loc="lower center", **style)
        for text in legend.get_texts():
            text.set_parse_math(False)
    if title:
        figure.text(0.5, 1 - 0.16 / tall, title, ha="center", va="center", fontsize=11, color=INK)
    write(path, figure)


def class_bars(
    path: str | os.PathLike, series: Mapping[str, Sequence[float]], classes: Sequence[str], xlabel: str, title: str = ""
) -> None:
    """A figure in [0, 1] of each class as horizontal bars, one colour per series; nan is written as absent.

    Args:
        series: {name: values (classes,)}.
    """
    tall = max(2.2, 0.16 * len(series) * len(classes) + 0.12 * len(classes) + 1.0)
    figure, axes = axes_for(path, 5.6, tall, xlabel, "", title)
    axes.grid(axis="y", visible=False)
    thick = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        numbers = np.array(values, float)
        places = np.arange(len(classes)) + (i - (len(series) - 1) / 2) * thick
        axes.barh(places, np.nan_to_num(numbers), thick, color=COLOURS[i % len(COLOURS)], label=name)
        for place, number in zip(places, numbers, strict=True):
            label = "absent" if np.isnan(number) else f"{number:.2f}"
            axes.text(np.nan_to_num(number) + 0.01, place, label, va="center", fontsize=7, color=INK)
    axes.set_yticks(range(len(classes)), classes, fontsize=9, parse_math=False)
    axes.set_xlim(0, 1.08)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color=GRID, lw=0.8)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(series))
        axes.set_title(title, color=INK, fontsize=11, pad=24)
    write(path, figure)
