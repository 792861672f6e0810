"""Horizontal bars: figures of several methods beside a baseline's."""

import os
from collections.abc import Mapping

from train.plots.figures import COLOURS, INK, panels


def bars(
    path: str | os.PathLike,
    figures: Mapping[str, Mapping[str, float]],
    baseline: str,
    highlight: str = "",
    title: str = "",
) -> None:
    """A panel per figure, a bar per method with its value; the bars begin at the baseline's value.

    Args:
        figures: {figure: {method: value}}, the baseline among the methods of each.
        highlight: the method in another colour.
    """
    longest = max(len(values) for values in figures.values())
    with panels(path, 1, len(figures), 4.6, 0.8 + 0.28 * longest) as axes:
        for plot, (figure, values) in zip(axes, figures.items(), strict=True):
            names, numbers = list(values), list(values.values())
            low, high = min(numbers), max(numbers)
            spread = high - low or abs(high) or 1.0
            colours = [COLOURS[1] if name == highlight else COLOURS[0] for name in names]
            start = values[baseline]
            plot.barh(range(len(names)), [n - start for n in numbers], left=start, color=colours, height=0.7)
            plot.axvline(start, color=INK, lw=0.8)
            for row, number in enumerate(numbers):
                plot.text(max(number, start), row, f" {number:.4g}", va="center", fontsize=8, color=INK)
            plot.set_yticks(range(len(names)), names, fontsize=8)
            plot.invert_yaxis()
            plot.set_xlim(low - 0.05 * spread, high + 0.25 * spread)
            plot.set_title(f"{title}: {figure}" if title else figure, fontsize=10, color=INK)
            plot.spines[["top", "right"]].set_visible(False)
            plot.tick_params(labelsize=8, colors=INK)
