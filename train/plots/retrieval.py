"""Pictures of retrieval: similarities of images and texts, and the images that each text finds."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.plots.figures import COLOURS, INK, array, new_figure, write
from train.plots.image_grids import axes_in_inches

RIGHT, WRONG = COLOURS[2], COLOURS[1]
"""Frames of images that fit their query, and of others."""
LONGEST = 90
"""Letters of a query that are shown."""


def similarities(path: str | os.PathLike, images: Any, texts: Sequence[str], values: Any, title: str = "") -> None:
    """A matrix of similarities, texts beside it and images above it.

    Args:
        images: (columns, channels, height, width) of bytes, or in [0, 1].
        texts: one per row.
        values: (rows, columns).
    """
    cells, pixels = array(values).astype(float), _pixels(images)
    if cells.shape != (len(texts), len(pixels)):
        raise ValueError(f"{cells.shape} similarities of {len(texts)} texts and {len(pixels)} images")
    rows, columns, cell = *cells.shape, 0.5
    beside, above, margin = 0.2 + 0.075 * max(map(len, texts)), 0.35 * bool(title), 0.1
    width, height = beside + columns * cell + margin, above + (rows + 1) * cell + 2 * margin
    figure = new_figure(width, height)
    figure.subplots_adjust(0, 0, 1, 1)
    above_cells = axes_in_inches(figure)
    for j, image in enumerate(pixels):
        left, bottom, side = beside + j * cell + 0.02, margin + rows * cell + 0.04, cell - 0.04
        place = (left, left + side, bottom, bottom + side)
        above_cells.imshow(image, interpolation="nearest", aspect="auto", extent=place)
    axes = figure.add_axes((beside / width, margin / height, columns * cell / width, rows * cell / height))
    axes.imshow(cells, cmap="Blues", aspect="auto", interpolation="nearest")
    for (i, j), value in np.ndenumerate(cells):
        colour = "white" if value > (cells.min() + cells.max()) / 2 else INK
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(rows), texts, fontsize=8, parse_math=False, color=INK)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if title:
        figure.text(0.5, 1 - 0.2 / height, title, ha="center", va="center", fontsize=11, color=INK)
    write(path, figure)


def sheet(
    path: str | os.PathLike,
    queries: Sequence[str],
    images: Sequence[Any],
    labels: Sequence[Sequence[str]],
    right: Sequence[Sequence[bool | None]] | None = None,
    title: str = "",
    side: float = 1.25,
) -> None:
    """A row per query: its text, and the images it finds, best first.

    Args:
        images: of each query (count, channels, height, width) of bytes, or in [0, 1].
        labels: a line below each image.
        right: True for a green frame, False for an orange one, None for none.
        side: width of an image in inches.
    """
    queries = [query if len(query) <= LONGEST else query[: LONGEST - 3] + "..." for query in queries]
    most, above, head = max(map(len, images)), 0.35 * bool(title), 0.26
    width, cell = most * (side + 0.1) + 0.1, side + 0.2 + head
    width = max(width, 0.2 + 0.08 * max([*map(len, queries), len(title)]))
    height = above + len(queries) * cell
    figure = new_figure(width, height)
    for row, (query, own) in enumerate(zip(queries, images, strict=True)):
        top = height - above - row * cell
        figure.text(0.1 / width, (top - 0.15) / height, query, fontsize=9, color=INK, va="center", parse_math=False)
        for column, image in enumerate(_pixels(own)):
            left, bottom = 0.1 + column * (side + 0.1), top - head - side
            axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(labels[row][column], fontsize=7, color=INK, labelpad=2, parse_math=False)
            fits = right[row][column] if right else None
            axes.spines[:].set(visible=fits is not None, color=RIGHT if fits else WRONG, linewidth=2.5)
    if title:
        figure.text(0.5, 1 - 0.18 / height, title, ha="center", va="center", fontsize=11, color=INK)
    write(path, figure)


def _pixels(images: Any) -> np.ndarray:
    """(count, height, width, 3) in [0, 1]."""
    pixels = array(images)
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"images have shape {pixels.shape}, expected (count, 1 or 3, height, width)")
    pixels = pixels / 255 if pixels.dtype == np.uint8 else pixels.clip(0, 1)
    return (pixels.repeat(3, 1) if pixels.shape[1] == 1 else pixels).transpose(0, 2, 3, 1)
