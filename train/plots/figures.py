"""Pictures of a run as PNG files: curves, grids of images, matrices, histograms, calibration, points by class.

Each function draws one figure of its own (no pyplot, no global state) and writes it atomically. Instead of a path,
`curves`, `matrix`, `heat_map`, `reliability`, `histogram` and `scatter` also take axes of `panels`, and draw there.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from train.files import replacing
from train.plots import fonts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
INK, GRID = "#333333", "#DDDDDD"


@contextmanager
def panels(
    path: str | os.PathLike, rows: int, columns: int, width: float = 4.4, height: float = 4.0
) -> Iterator[list["Axes"]]:
    """Several plots in one file: yields rows * columns axes, row after row, and writes when the block ends.

        with panels("figure.png", 1, 2) as (left, right):
            curves(left, ...)

    Args:
        width, height: size of one plot in inches.
    """
    figure = new_figure(columns * width, rows * height)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    yield list(figure.subplots(rows, columns, squeeze=False).flat)
    write(path, figure)


def curves(
    path: "str | os.PathLike | Axes",
    lines: Mapping[str, tuple[Any, Any]],
    xlabel: str = "step",
    ylabel: str = "",
    title: str = "",
    log: bool = False,
) -> None:
    """Lines through points.

    Args:
        lines: {name: (xs, ys)}; values that are not finite leave a gap, a single point is drawn as a dot.
        log: a logarithmic y axis, if a value is above 0.
    """
    figure, axes = axes_for(path, 6.4, 4.0, xlabel, ylabel, title)
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        x, y = array(xs).astype(float), array(ys).astype(float)
        if x.shape != y.shape or x.ndim != 1:
            raise ValueError(f"curve '{name}' has xs {x.shape} and ys {y.shape}, expected two lists of one length")
        y = np.where(np.isfinite(y), y, np.nan)
        style = ("-", "--", "-.", ":")[i // len(COLOURS) % 4]
        axes.plot(x, y, style, color=COLOURS[i % len(COLOURS)], label=name, marker="o" if len(x) < 2 else None, lw=1.6)
    if log and any(np.nanmax(line.get_ydata(), initial=0.0) > 0 for line in axes.lines):
        axes.set_yscale("log", nonpositive="mask")
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9, ncols=1 if len(lines) <= 8 else 2)
    write(path, figure)


def matrix(
    path: "str | os.PathLike | Axes",
    values: Any,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    numbers: bool | None = None,
) -> None:
    """A matrix as coloured cells: attention, confusion.

    Args:
        values: (rows, columns).
        rows, columns: labels, one per row, one per column.
        numbers: write the values into the cells; None: up to 15 x 15 cells.
    """
    cells = array(values).astype(float)
    if cells.ndim != 2 or not cells.size:
        raise ValueError(f"a matrix has shape {cells.shape}, expected (rows, columns)")
    for what, labels, length in (("row", rows, len(cells)), ("column", columns, cells.shape[1])):
        if labels is not None and len(labels) != length:
            raise ValueError(f"{len(labels)} {what} labels for {length} {what}s")
    height, width = cells.shape
    numbers = max(cells.shape) <= 15 if numbers is None else numbers
    step = 0.42 if numbers else 0.26 if rows is not None or columns is not None else 4.0 / max(height, width)
    # What labels need beside the cells; those of columns stand upright if they are longer than two letters.
    beside, below = (0.07 * max(map(fonts.width, names), default=0) for names in (rows or (), columns or ()))
    size = max(2.6, width * step + max(1.4, 0.8 + beside)), max(2.2, height * step + max(1.0, 0.7 + below))
    figure, axes = axes_for(path, *size, xlabel, ylabel, title)
    axes.grid(False)
    image = axes.imshow(cells, cmap="Blues", aspect="equal" if height * 4 > width else "auto", interpolation="nearest")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    axes.locator_params(integer=True, min_n_ticks=1)
    if columns is not None:
        turned = max(map(len, columns), default=0) > 2
        axes.set_xticks(range(width), columns, rotation=90 if turned else 0, fontsize=8, parse_math=False)
    if rows is not None:
        axes.set_yticks(range(height), rows, fontsize=8, parse_math=False)
    if numbers:
        low, high = np.nanmin(cells), np.nanmax(cells)
        whole = np.all(cells == np.round(cells))
        for (i, j), value in np.ndenumerate(cells):
            dark = value > (low + high) / 2
            text = f"{value:.0f}" if whole else f"{value:.2f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else INK)
    else:
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8, color=GRID, labelcolor=INK)
    write(path, figure)


def heat_map(
    path: "str | os.PathLike | Axes",
    values: Any,
    xs: Any,
    ys: Any,
    xlabel: str = "step",
    ylabel: str = "",
    title: str = "",
    label: str = "",
    log_y: bool = False,
    log_colour: bool = False,
) -> None:
    """A function of two variables as colours, such as a histogram over time.

    Args:
        values: (rows, columns); what is not finite, or with `log_colour` not above 0, stays white.
        xs: the columns' edges (columns + 1,).
        ys: the rows' edges (rows + 1,), or a name each.
        label: of the colours.
    """
    from matplotlib.colors import LogNorm

    cells, x = np.ma.masked_invalid(array(values).astype(float)), array(xs).astype(float)
    names = list(ys) if len(ys) and isinstance(ys[0], str) else None
    y = np.arange(len(names) + 1) if names else array(ys).astype(float)
    if cells.shape != (len(y) - 1, len(x) - 1):
        shapes = f"{cells.shape} values between {len(y)} and {len(x)} edges"
        raise ValueError(f"a heat map has {shapes}, expected (rows, columns) with one edge more each")
    cells = np.ma.masked_less_equal(cells, 0) if log_colour else cells
    norm = LogNorm() if log_colour and cells.count() else None
    figure, axes = axes_for(path, 6.4, max(3.6, 0.18 * len(names) + 1.2) if names else 4.0, xlabel, ylabel, title)
    axes.grid(False)
    mesh = axes.pcolormesh(x, y, cells, cmap="viridis", norm=norm, rasterized=True)
    if log_y:
        axes.set_yscale("log")
    if names:
        axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7, parse_math=False)
        axes.set_ylim(len(names), 0)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(which="both", labelsize=8, color=GRID, labelcolor=INK)
    bar.set_label(label, color=INK, fontsize=9)
    write(path, figure)


def reliability(path: "str | os.PathLike | Axes", confidence: Any, accuracy: Any, counts: Any, title: str = "") -> None:
    """A reliability diagram (Guo et al. 2017, fig. 1): per bin the accuracy against the mean confidence.

    The expected calibration error sum(count / total |accuracy - confidence|) is written into it.

    Args:
        confidence, accuracy, counts: one value per bin; bins without examples (count 0) are left out.
    """
    values = [array(x).astype(float) for x in (confidence, accuracy, counts)]
    if len({x.shape for x in values}) > 1 or values[0].ndim != 1:
        raise ValueError(
            f"confidence, accuracy and counts have shapes {[x.shape for x in values]}, expected one length"
        )
    p, a, n = (x[values[2] > 0] for x in values)
    figure, axes = axes_for(path, 4.4, 4.4, "confidence", "accuracy", title)
    axes.plot([0, 1], [0, 1], "--", color="#888888", lw=1, label="perfect")
    axes.vlines(p, np.minimum(p, a), np.maximum(p, a), color=COLOURS[1], lw=1.6, alpha=0.6, label="gap")
    area = 20 + 180 * n / n.max() if len(n) else n
    axes.plot(p, a, color=COLOURS[0], lw=1.2)
    axes.scatter(p, a, s=area, color=COLOURS[0], zorder=3, alpha=0.85, edgecolors="white", label="bin (area: examples)")
    error = float((n * np.abs(p - a)).sum() / n.sum()) if len(n) else float("nan")
    axes.text(0.97, 0.04, f"ECE {100 * error:.1f} %", ha="right", transform=axes.transAxes, color=INK)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    legend = axes.legend(frameon=False, fontsize=9, loc="upper left")
    legend.legend_handles[-1].set_sizes([40])
    write(path, figure)


def histogram(
    path: "str | os.PathLike | Axes",
    values: Mapping[str, Any],
    bins: int = 40,
    xlabel: str = "",
    title: str = "",
    log: bool = False,
) -> None:
    """Histograms of one or several sets of values on common bins; values that are not finite are left out.

    Args:
        values: {name: numbers of any shape}.
        log: a logarithmic count axis.
    """
    sets = {name: array(x).astype(float).ravel() for name, x in values.items()}
    sets = {name: x[np.isfinite(x)] for name, x in sets.items()}
    everything = np.concatenate(list(sets.values())) if sets else np.empty(0)
    if not everything.size:
        raise ValueError("no finite value to make a histogram of")
    edges = np.histogram_bin_edges(everything, bins)
    figure, axes = axes_for(path, 6.0, 3.6, xlabel, "count", title)
    for i, (name, x) in enumerate(sets.items()):
        colour = COLOURS[i % len(COLOURS)]
        axes.hist(x, edges, color=colour, alpha=0.45 if len(sets) > 1 else 0.85, label=name)
        if len(sets) > 1:
            axes.hist(x, edges, histtype="step", color=colour, lw=1.2)
    if log:
        axes.set_yscale("log")
    if len(sets) > 1:
        axes.legend(frameon=False, fontsize=9)
    write(path, figure)


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
        path: or one of the axes of `panels`.
        points: (count, 2).
        labels: (count,) integers.
        classes: their names. Names of more letters are in a legend, up to 20 of them.
    """
    from matplotlib import colormaps

    coordinates, numbers = array(points).astype(float), array(labels)
    if coordinates.ndim != 2 or coordinates.shape[1] != 2 or not len(coordinates):
        raise ValueError(f"points have shape {coordinates.shape}, expected (count, 2)")
    if numbers.shape != coordinates.shape[:1]:
        raise ValueError(
            f"{len(coordinates)} points have labels of shape {numbers.shape}, expected ({len(coordinates)},)"
        )
    if numbers.min() < 0 or numbers.max() >= len(classes):
        raise ValueError(f"labels go from {numbers.min()} to {numbers.max()}, but there are {len(classes)} classes")
    figure, axes = axes_for(path, 5.2, 4.6, xlabel, ylabel, title)
    map_ = colormaps["tab10" if len(classes) <= 10 else "tab20"]
    # Two different letters are told apart by whoever does not see the colours. Markers have the default font alone.
    letters = all(len(name) == 1 and name.isalnum() and not fonts.lacking(name) for name in classes)
    for i, name in enumerate(classes):
        mine = coordinates[numbers == i]
        marker, size = (f"${name}$", 26) if letters else ("o", 12)
        # Not the name itself: matplotlib leaves those with an underscore first out of a legend.
        axes.scatter(*mine.T, s=size, color=map_(i % map_.N), marker=marker, lw=0, alpha=0.85, label=str(i))
    if not letters and len(classes) <= 20:
        legend = axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.5)
        for text, name in zip(legend.get_texts(), classes, strict=True):
            text.set(text=name, parse_math=False)
    spread = np.ptp(coordinates, axis=0)
    if spread.min() > 0 and spread.max() / spread.min() < 5:
        axes.set_aspect("equal", "datalim")
    write(path, figure)


def array(values: Any) -> np.ndarray:
    """A tensor, on whatever device, or anything else as numpy holds it; half precision as float32."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    return figure


def _is_axes(path: Any) -> bool:
    from matplotlib.axes import Axes

    return isinstance(path, Axes)


def axes_for(path: Any, width: float, height: float, xlabel: str, ylabel: str, title: str) -> tuple["Figure", "Axes"]:
    """A new figure of this size in inches with axes, or the given axes with their figure; both get labels and style."""
    if _is_axes(path):
        figure, axes = path.figure, path
    else:
        figure = new_figure(width, height)
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, color=INK, fontsize=10)
    axes.set_ylabel(ylabel, color=INK, fontsize=10)
    axes.set_title(title, color=INK, fontsize=11)
    return figure, axes


@contextmanager
def _plain_text(figure: "Figure") -> Iterator[None]:
    """Text without LaTeX, whatever matplotlibrc says. Letters that no font has are boxes, of which `fonts.use` has
    warned; matplotlib need not do so for each."""
    from matplotlib import rc_context

    for text in fonts.texts(figure):
        text.set_usetex(False)
    with warnings.catch_warnings(), rc_context({"text.usetex": False}):  # ticks are made while drawing
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def write(path: Any, figure: "Figure") -> None:
    """Write a figure as PNG; nothing if given axes instead of a path: `panels` writes theirs."""
    if _is_axes(path):
        return
    fonts.use(figure)
    with replacing(path) as temporary, _plain_text(figure):
        figure.savefig(temporary, format="png", facecolor="white")
