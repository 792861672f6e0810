"""Grids of images, and the axes that many images share."""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from train.plots import fonts
from train.plots.figures import INK, array, new_figure, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def image_grid(
    path: str | os.PathLike,
    images: Any,
    columns: int | None = None,
    titles: Sequence[str] | None = None,
    title: str = "",
    scale: float = 1.2,
) -> None:
    """Images side by side, row after row.

    Args:
        images: (count, channels, height, width) with 1 or 3 channels, or (count, height, width); bytes, or floats in
            [0, 1] (clipped).
        columns: about as many as rows if None.
        titles: one per image.
        scale: the width of one image in inches.
    """
    pixels = array(images)
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not len(pixels):
        raise ValueError(f"images have shape {array(images).shape}, expected (count, 1 or 3, height, width)")
    if titles is not None and len(titles) != len(pixels):
        raise ValueError(f"{len(titles)} titles for {len(pixels)} images")
    pixels = pixels / 255 if pixels.dtype == np.uint8 else np.nan_to_num(pixels.astype(float))
    count, _, height, width = pixels.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    # Letters are about 0.6 times as wide as high: the longest line gives the size of all titles.
    longest = max((fonts.width(line) for t in titles or () for line in t.split("\n")), default=1)
    font = min(9.0, max(4.0, 72 * scale * 1.05 / (0.62 * max(longest, 1))))
    lines = max((t.count("\n") + 1 for t in titles), default=0) if titles else 0
    gap, head = 0.06, lines * font * 1.25 / 72 + (0.05 if titles else 0)
    cell = (scale + gap, scale * height / width + gap + head)
    top = 0.35 if title else 0.0
    inches = columns * cell[0] + gap
    size = (max(inches, 11 * 0.62 / 72 * fonts.width(title)), rows * cell[1] + gap + top)
    figure = new_figure(*size)
    axes = axes_in_inches(figure)
    options = {"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest", "aspect": "auto"}
    for i, image in enumerate(pixels):
        row, column = divmod(i, columns)
        left, bottom = (size[0] - inches) / 2 + gap + column * cell[0], gap + (rows - 1 - row) * cell[1]
        right, high = left + scale, bottom + cell[1] - gap - head
        image = (image[0] if len(image) == 1 else image.transpose(1, 2, 0)).clip(0, 1)
        axes.imshow(image, extent=(left, right, bottom, high), **options)
        if titles:
            words = {"fontsize": font, "color": INK, "ha": "center", "parse_math": False}
            axes.text((left + right) / 2, high + 2 / 72, titles[i], **words)
    if title:
        figure.text(0.5, 1 - 0.17 / size[1], title, ha="center", va="center", fontsize=11, color=INK)
    write(path, figure)


def axes_in_inches(figure: "Figure") -> "Axes":
    """Axes without marks over the whole figure, in inches from its lower left corner: for many images, which take
    several times as long with axes for each."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    return axes
