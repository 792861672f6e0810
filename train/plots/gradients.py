"""Pictures of per-example gradients: their norms over time, and the gradient noise scale."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from train.plots.figures import array, curves, heat_map, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def norms_over_time(path: "str | os.PathLike | Axes", steps: Any, counts: Any, edges: Any) -> None:
    """Histogram of the per-example norms over time.

    Args:
        path: or one of the axes of `panels`.
        steps: (columns + 1,), first and last step of each column.
        counts: (columns, bins).
        edges: (bins + 1,) of the norms.
    """
    values, bounds = array(counts), array(edges)
    used = np.flatnonzero(values.sum(0))
    first, last = (used[0], used[-1] + 1) if len(used) else (0, values.shape[1])
    cells, title = values.T[first:last], "Norms of per-example gradients"  # (used bins, columns)
    options = {"log_y": True, "log_colour": True}
    heat_map(path, cells, steps, bounds[first : last + 1], "step", "gradient norm", title, "examples", **options)


def norms_and_noise_scale(path: str | os.PathLike, steps: Any, counts: Any, edges: Any, scale: tuple[Any, Any]) -> None:
    """`norms_over_time` beside the gradient noise scale.

    Args:
        scale: (steps, values); values that are not above 0 leave a gap.
    """
    at, values = (array(x).astype(float) for x in scale)
    with panels(path, 1, 2, 5.8, 4.0) as (left, right):
        norms_over_time(left, steps, counts, edges)
        positive = np.where(values > 0, values, np.nan)
        curves(right, {"": (at, positive)}, "step", "examples", "Gradient noise scale", log=True)
