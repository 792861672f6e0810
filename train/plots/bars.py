"""Horizontal bars: figures of several methods beside a baseline's, or side by side for each of some names."""

import os
from collections.abc import Mapping

import numpy as np

from train.plots.figures import COLOURS, INK, axes_for, panels, write


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


def grouped_bars(
    path: str | os.PathLike,
    values: Mapping[str, Mapping[str, float]],
    xlabel: str = "",
    title: str = "",
) -> None:
    """Horizontal bars, the names below each other in the order of the first series.

    Args:
        values: {series: {name: value}}; a series may lack a name.
    """
    names = list(next(iter(values.values())))
    figure, axes = axes_for(path, 6.4, 1.2 + 0.17 * len(names) * (1 + len(values)), xlabel, "", title)
    thick = 0.8 / len(values)
    for i, (series, heights) in enumerate(values.items()):
        rows = np.arange(len(names)) - 0.4 + (i + 0.5) * thick
        lengths = [heights.get(name, np.nan) for name in names]
        bar = axes.barh(rows, lengths, 0.92 * thick, color=COLOURS[i % len(COLOURS)], label=series)
        axes.bar_label(bar, ["" if np.isnan(x) else f"{x:.2f}" for x in lengths], padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=9, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.margins(x=0.08)
    if len(values) > 1:
        figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=len(values))
    write(path, figure)
