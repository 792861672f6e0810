"""Pictures of codes: examples as points of the plane, coloured by their class."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from train.plots import _array, _axes, _write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def scatter(
    path: "str | os.PathLike | Axes",
    points: Any,
    labels: Any,
    classes: Sequence[str],
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
) -> None:
    """Points with the colour of their class; a class whose name is one letter is drawn as this letter.

    Args:
        path: or one of the axes of `train.plots.panels`.
        points: (count, 2).
        labels: (count,) integers.
        classes: their names. Those of more letters are in a legend, if they are at most 20.
    """
    from matplotlib import colormaps

    places, numbers = _array(points).astype(float), _array(labels)
    if places.ndim != 2 or places.shape[1] != 2 or not len(places):
        raise ValueError(f"points have shape {places.shape}, expected (count, 2)")
    if numbers.shape != places.shape[:1]:
        raise ValueError(f"{len(places)} points have labels of shape {numbers.shape}, expected ({len(places)},)")
    if numbers.min() < 0 or numbers.max() >= len(classes):
        raise ValueError(f"labels go from {numbers.min()} to {numbers.max()}, but there are {len(classes)} classes")
    figure, axes = _axes(path, 5.2, 4.6, xlabel, ylabel, title)
    map_ = colormaps["tab10" if len(classes) <= 10 else "tab20"]
    # Two different letters are told apart by whoever does not see the colours.
    letters = all(len(name) == 1 and name.isalnum() for name in classes)
    for i, name in enumerate(classes):
        mine = places[numbers == i]
        marker, size = (f"${name}$", 26) if letters else ("o", 12)
        axes.scatter(*mine.T, s=size, color=map_(i % map_.N), marker=marker, lw=0, alpha=0.85, label=name)
    if not letters and len(classes) <= 20:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.5)
    spread = np.ptp(places, axis=0)
    if spread.min() > 0 and spread.max() / spread.min() < 5:
        axes.set_aspect("equal", "datalim")
    _write(path, figure)
