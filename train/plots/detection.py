"""Pictures of detections: boxes over images, and precision over recall."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.plots.figures import COLOURS, INK, array, axes_for, new_figure, write


class Box(NamedTuple):
    """left, top, right, bottom in pixels of the image; `text` above it; `colour` one of `COLOURS`."""

    corners: tuple[float, float, float, float]
    text: str = ""
    colour: str = COLOURS[2]
    dashed: bool = False


RIGHT, WRONG, MISSED = COLOURS[2], COLOURS[1], COLOURS[7]
"""Colours of boxes that fit the truth, that do not, and of the truth that no box fits."""


def boxes(
    path: str | os.PathLike,
    images: Any,
    frames: Sequence[Sequence[Box]],
    columns: int = 4,
    titles: Sequence[str] | None = None,
    title: str = "",
    side: float = 2.6,
) -> None:
    """Images with boxes, row after row.

    Args:
        images: (count, channels, height, width) in [0, 1], or bytes, or a list of such in sizes of their own.
        frames: the boxes of each image.
        side: width of an image in inches.
    """
    count, columns = len(images), min(columns, max(1, len(images)))
    rows = -(-count // columns)
    tallest = max((image.shape[-2] / image.shape[-1] for image in images), default=1.0)
    height = side * min(1.0, tallest) + 0.15 + 0.15 * bool(titles)
    figure = new_figure(columns * side, rows * height + 0.3 * bool(title))
    figure.set_layout_engine("constrained")
    from matplotlib.patches import Rectangle

    axes = figure.subplots(rows, columns, squeeze=False)
    for i, panel in enumerate(axes.flat):
        panel.set_axis_off()
        if i >= count:
            continue
        pixels = array(images[i])
        pixels = pixels / 255 if pixels.dtype == np.uint8 else pixels
        panel.imshow(pixels.repeat(3, 0).transpose(1, 2, 0) if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        for (left, top, right, bottom), text, colour, dashed in frames[i]:
            style = {"fill": False, "ec": colour, "lw": 1.6, "ls": "--" if dashed else "-"}
            panel.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, **style))
            if text:
                back = {"boxstyle": "square,pad=0.15", "fc": colour, "ec": "none", "alpha": 0.85}
                place = {"va": "bottom", "ha": "left", "clip_on": True}
                ink = INK if colour == MISSED else "white"
                panel.text(left, top, text, fontsize=7, color=ink, bbox=back, **place)
        if titles:
            panel.set_title(titles[i], fontsize=8, color=INK)
    if title:
        figure.suptitle(title, color=INK, fontsize=11)
    write(path, figure)


def precision_recall(path: str | os.PathLike, curves: Mapping[str, Any], title: str = "") -> None:
    """Precision at recall 0, 0.01 ... 1 of each class: {"name, AP50": (101,)}; classes without a value are left out."""
    figure, axes = axes_for(path, 6.4, 4.6, "recall", "precision", title)
    recall = np.linspace(0, 1, 101)
    for i, (name, values) in enumerate(curves.items()):
        if np.isfinite(array(values)).any():
            style = ("-", "--", "-.", ":")[i // len(COLOURS) % 4]
            axes.plot(recall, array(values), style, color=COLOURS[i % len(COLOURS)], label=name, lw=1.6)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, loc="lower left", ncols=1 if len(axes.lines) <= 10 else 2)
    write(path, figure)
