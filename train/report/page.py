"""The page about the examples of a data set: a table, linked scatter plots, histograms, suspicious labels and pairs.

One file, with plotly.js, the pictures and the data inside, which needs no network. plotly draws; `page.js` is the glue
between its plots and the table. What looks like markup in names and texts stays text.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from train.files import replacing, shown
from train.report.sheets import COLUMNS, PER_SHEET, sheets

PICTURES = 9_000_000
"""Bytes of all pictures; with plotly.js and 10,000 rows a page stays below 20 MB."""
LONGEST = 400
"""Characters of a text that are shown."""
BINS = 40


class Column(NamedTuple):
    """A score of every example: (N,), a title, and a sentence that says what it is."""

    title: str
    values: np.ndarray
    about: str


class Report(NamedTuple):
    """Content of a page about N examples.

    Attributes:
        title: the heading.
        facts: facts about the model and the data, by name.
        names: of the examples.
        columns: scores by key; `rank` is the key of the one by which the page begins.
        scatter: pairs of keys, one for each plot.
        classes: names of the classes; None without labels.
        labels: numbers of the classes (N,), or None.
        predicted: the same of the predictions.
        pictures: bytes (N, height, width, 1 or 3), or None.
        texts: or None.
        known: (N,) of bool, examples whose label is known to be wrong; None if nothing is known.
        neighbours: (N, k), of each example.
        cosines: (N, k), with these neighbours.
        redundant: pairs of examples whose gradients are alike, with their cosine.
        conflicting: pairs whose gradients oppose each other.
        layers: {name of a parameter: (N,) norms}; `layer_facts` are tables of further columns by the name.
        class_rows: a row of figures per class, by name.
        class_cosines: (classes, classes) between the mean gradients of classes, or None.
        numbers: of the examples in the whole data set, (N,): a page may have some of them only.
        cards: heading of the examples of highest rank, which are shown as cards where there are labels.
        notes: lines below the page.
    """

    title: str
    facts: Mapping[str, str]
    names: Sequence[str]
    columns: Mapping[str, Column]
    rank: str
    scatter: Sequence[tuple[str, str]]
    classes: Sequence[str] = ()
    labels: np.ndarray | None = None
    predicted: np.ndarray | None = None
    pictures: np.ndarray | None = None
    texts: Sequence[str] | None = None
    known: np.ndarray | None = None
    neighbours: np.ndarray | None = None
    cosines: np.ndarray | None = None
    redundant: Sequence[tuple[int, int, float]] = ()
    conflicting: Sequence[tuple[int, int, float]] = ()
    layers: Mapping[str, np.ndarray] | None = None
    layer_facts: Mapping[str, Mapping[str, str]] | None = None
    class_rows: Sequence[Mapping[str, str]] = ()
    class_cosines: np.ndarray | None = None
    numbers: np.ndarray | None = None
    cards: str = "Most suspicious labels"
    notes: Sequence[str] = ()


def write(path: str | os.PathLike, report: Report) -> None:
    """Write the page. Raises OSError: it cannot be written."""
    from plotly.offline import get_plotlyjs  # half a second

    folder = Path(__file__).parent
    loader = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )
    pictures = None if report.pictures is None else sheets(report.pictures, PICTURES)
    text = loader.get_template("page.html").render(
        report=report,
        data=_script(_data(report, pictures)),
        sheets=[] if pictures is None else pictures.urls,
        plotly=jinja2.utils.markupsafe.Markup(get_plotlyjs()),
        style=jinja2.utils.markupsafe.Markup((folder / "page.css").read_text(encoding="utf-8")),
        glue=jinja2.utils.markupsafe.Markup((folder / "page.js").read_text(encoding="utf-8")),
    )
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _script(value: Any) -> jinja2.utils.markupsafe.Markup:
    """JSON inside a script element, which no `</script>` in it can end."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return jinja2.utils.markupsafe.Markup(text)


def _data(report: Report, pictures: Any) -> dict[str, Any]:
    """The data of the page for `page.js`."""
    count = len(report.names)
    data: dict[str, Any] = {
        "count": count,
        "names": [shown(name) for name in report.names],
        "numbers": (np.arange(count) if report.numbers is None else report.numbers).tolist(),
        "rank": report.rank,
        "scatter": list(report.scatter),
        "classes": [shown(name) for name in report.classes],
        "columns": [
            {"key": key, "title": column.title, "about": column.about, "values": rounded(column.values)}
            for key, column in report.columns.items()
        ],
        "redundant": [[*pair[:2], round(pair[2], 4)] for pair in report.redundant],
        "conflicting": [[*pair[:2], round(pair[2], 4)] for pair in report.conflicting],
    }
    for name in ("labels", "predicted", "known"):
        values = getattr(report, name)
        data[name] = None if values is None else values.astype(int).tolist()
    data["texts"] = None if report.texts is None else [cut(text) for text in report.texts]
    data["neighbours"] = None if report.neighbours is None else report.neighbours.tolist()
    data["cosines"] = None if report.cosines is None else [rounded(row, 3) for row in report.cosines]
    data["sheets"] = None if pictures is None else {"side": pictures.side, "columns": COLUMNS, "per": PER_SHEET}
    data["layers"] = None if report.layers is None else layer_histograms(report.layers)
    data["class_cosines"] = None if report.class_cosines is None else [rounded(row, 3) for row in report.class_cosines]
    return data


def cut(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def rounded(values: np.ndarray, digits: int = 5) -> list[float | None]:
    """Numbers with some significant digits; None for those that are not finite."""
    return [float(f"{x:.{digits}g}") if np.isfinite(x) else None for x in np.asarray(values, np.float64).tolist()]


def layer_histograms(layers: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Shares of the examples by log10 of the norm, a row per parameter: {"names", "centres", "shares"}."""
    logs = {name: np.log10(values[values > 0]) for name, values in layers.items()}
    everything = np.concatenate([*logs.values()])
    low, high = np.quantile(everything, [0.001, 1.0]) if len(everything) else (-1.0, 0.0)
    edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
    counts = [
        np.histogram(x.clip(edges[0], edges[-1]), edges)[0] / max(1, len(layers[name])) for name, x in logs.items()
    ]
    return {
        "names": list(layers),
        "centres": rounded((edges[1:] + edges[:-1]) / 2, 4),
        "shares": [rounded(row, 3) for row in counts],
    }
