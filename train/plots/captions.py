"""Pictures with captions below them, and where each word of a caption looks."""

import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.plots.figures import INK, array, new_figure, write


def _show(panel: Any, image: Any) -> None:
    pixels = array(image)
    pixels = pixels.repeat(3, 0) if len(pixels) == 1 else pixels
    panel.imshow(pixels.transpose(1, 2, 0))


def captioned(
    path: str | os.PathLike,
    images: Any,
    captions: Sequence[Sequence[tuple[str, str]]],
    columns: int = 4,
    title: str = "",
    side: float = 2.3,
) -> None:
    """Images, row after row, each above its captions.

    Args:
        images: (count, channels, height, width) in [0, 1], or bytes, or a list of such in sizes of their own.
        captions: (text, colour) of each image, one below the other; long texts are wrapped.
        side: size of an image in inches.
    """
    count, columns = len(images), min(columns, max(1, len(images)))
    texts = [[(p, ink) for text, ink in rows for p in textwrap.wrap(text, int(15 * side))[:4]] for rows in captions]
    lines, rows = max(map(len, texts), default=0), max(1, -(-count // columns))
    row_height, head = side + 0.15 * lines + 0.25, 0.35 * bool(title)
    width, height = columns * (side + 0.2), rows * row_height + head  # inches
    figure = new_figure(width, height)
    for i in range(count):
        row, column = divmod(i, columns)
        left, bottom = column * (side + 0.2) + 0.1, height - head - row * row_height - side - 0.1
        panel = figure.add_axes((left / width, bottom / height, side / width, side / height))
        panel.set_axis_off()
        _show(panel, images[i])
        for line, (text, ink) in enumerate(texts[i]):
            place = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top", "ha": "left"}
            shift = (0, -3 - 10.8 * line)
            panel.annotate(text, (0, 0), shift, fontsize=7.5, color=ink, parse_math=False, **place)
    if title:
        figure.suptitle(title, y=1 - 0.12 / height, color=INK, fontsize=11)
    write(path, figure)


def words(path: str | os.PathLike, image: Any, maps: Any, names: Sequence[str], columns: int = 6) -> None:
    """An image, and once more for each word, dark where the word does not look.

    Args:
        image: (channels, height, width) in [0, 1], or bytes.
        maps: (words, rows, columns) of weights, each drawn up to its largest.
        names: the words.
    """
    pixels, weights = array(image), array(maps)
    count, columns = 1 + len(weights), min(columns, 1 + len(weights))
    rows = -(-count // columns)
    figure = new_figure(1.7 * columns, 1.95 * rows)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    extent = (-0.5, pixels.shape[2] - 0.5, pixels.shape[1] - 0.5, -0.5)
    for i, panel in enumerate(axes):
        panel.set_axis_off()
        if i < count:
            _show(panel, image)
        if 0 < i < count:
            own = weights[i - 1]
            shade = np.zeros((*own.shape, 4))  # black, the more opaque the less is seen there
            shade[..., 3] = 0.85 * (1 - own / max(float(own.max()), 1e-12))
            panel.imshow(shade, extent=extent, interpolation="bilinear")
            panel.set_title(names[i - 1], fontsize=9, color=INK, parse_math=False)
    write(path, figure)
