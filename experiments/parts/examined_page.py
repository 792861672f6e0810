"""The page and the tables of `experiments/examine.py`."""

import csv
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core import random, scores
from experiments.parts.examined_data import unit
from experiments.parts.examined_subject import Subject
from train import report
from train.files import replacing, shown
from train.gradients.examination import Examination
from train.report import Column, Report

MOST_CLASSES = 40  # of a matrix on the page

ABOUT = {
    "suspicion": "1 minus the mean support of the label: its probability to the model, the share of the ten examples "
    "with the most similar logits that have it, and its probability to nets that have not learned from the example, "
    "where there are any (--folds). Above 0.5 a label deserves a look.",
    "held_out": "-log of the label's probability, in nats, to the net that has not learned from the example.",
    "loss": "Loss of the example at the examined model, in nats (of a text per token).",
    "norm": "GraNd: the norm |g| of the gradient of the example's loss. Exact.",
    "cosine": "Cosine of the example's gradient with the mean gradient. Exact. Below 0, a step along the mean raises "
    "the example's loss.",
    "self_influence": "gᵀ (F + λ)⁻¹ g, with the empirical Fisher matrix F and the gradient g in a random projection: "
    "how much the model's fit of the example rests on the example itself.",
    "el2n": "EL2N: the norm of softmax(logits) - onehot(label).",
}
TITLES = {"suspicion": "suspicion", "held_out": "held-out loss", "loss": "loss", "norm": "gradient norm"}
TITLES |= {"cosine": "cosine with mean", "self_influence": "self-influence", "el2n": "EL2N"}


def write(
    folder: Path,
    args: Any,
    subject: Subject,
    out: Examination,
    suspicion: np.ndarray | None,
    held_out: Tensor | None,
    wrong: Tensor | None,
    figures: dict[str, Any],
    memory: float,
) -> int:
    """Write report.html, scores.csv and, where pyarrow is installed, scores.parquet; returns the page's bytes.

    Args:
        suspicion, held_out, wrong: of the examples; None where there are none.
        memory: peak memory so far, MiB.
    """
    values = columns_of(subject, out, suspicion, held_out)
    table(folder, subject, out, values, wrong)
    count = len(subject.examples.names)
    rank = "suspicion" if suspicion is not None else "self_influence"
    rows = shown_rows(values[rank], out, args.rows)
    place = np.full(count, -1)
    place[rows] = np.arange(len(rows))
    labels = None if subject.labels is None else subject.labels.numpy()
    classes = subject.examples.classes
    predicted = None if out.log_probs is None else out.log_probs.argmax(1).numpy()
    neighbours = place[out.neighbours.indices.numpy()[rows]].astype(object)
    neighbours[neighbours == -1] = None  # not on the page
    pairs = {
        kind: [(int(place[pair.first]), int(place[pair.second]), pair.cosine) for pair in getattr(out, kind)]
        for kind in ("redundant", "conflicting")
    }
    page = Report(
        title=f"{args.model} on {shown(args.data)}",
        facts=facts(figures, out),
        names=[subject.examples.names[i] for i in rows],
        columns={key: Column(TITLES[key], value[rows], ABOUT[key]) for key, value in values.items()},
        rank=rank,
        scatter=(("norm", "loss"), ("norm", "self_influence")),
        classes=classes,
        labels=None if labels is None else labels[rows],
        predicted=None if predicted is None else predicted[rows],
        pictures=None if subject.pictures is None else as_bytes(subject.pictures, rows),
        texts=None if subject.texts is None else [subject.texts[i] for i in rows],
        known=None if wrong is None else wrong.numpy()[rows],
        neighbours=neighbours,
        cosines=out.neighbours.cosines.numpy()[rows],
        layers={name: out.layers[:, i] for i, name in enumerate(out.names)},
        layer_facts=layer_rows(out),
        class_rows=[] if labels is None else class_rows(classes, labels, predicted, values, wrong),
        class_cosines=class_cosines(labels, len(classes), out),
        numbers=rows,
        notes=notes(args, count, len(rows), out, memory),
        **pairs,
    )
    report.write(folder / "report.html", page)
    return (folder / "report.html").stat().st_size


def columns_of(subject: Subject, out: Examination, suspicion: np.ndarray | None, held_out: Tensor | None) -> dict:
    """{key: (N,)} in the order of the page."""
    values = {}
    if suspicion is not None:
        values["suspicion"] = suspicion
    if held_out is not None:
        tiny = torch.finfo(held_out.dtype).tiny
        values["held_out"] = -scores.label_probability(held_out, subject.labels).clamp(min=tiny).log().numpy()
    order = ("loss", "norm", "cosine", "self_influence", "el2n")
    return values | {key: out.scores[key] for key in order if key in out.scores}


def shown_rows(rank: np.ndarray, out: Examination, most: int) -> np.ndarray:
    """Examples on the page, ascending: all, or those of pairs, of highest rank, and a random choice of the others."""
    count = len(rank)
    if count <= most:
        return np.arange(count)
    paired = [i for pair in (*out.redundant, *out.conflicting) for i in (pair.first, pair.second)]
    ranked = np.argsort(-rank, kind="stable")[: most // 2]
    shuffled = random.permutation(random.key(0), count).numpy()
    return np.sort(
        np.array(list(dict.fromkeys([*paired, *ranked.tolist(), *shuffled.tolist()]))[: max(most, len(paired))])
    )


def as_bytes(pictures: Tensor, rows: np.ndarray) -> np.ndarray:
    """(rows, height, width, channels) uint8; numbers outside of [0, 1] are scaled to their range."""
    x = pictures[torch.from_numpy(rows)]
    if x.dtype != torch.uint8:
        x = x.float()
        low, high = float(x.min()), float(x.max())
        x = x if 0.0 <= low and high <= 1.0 else (x - low) / max(high - low, 1e-12)
        x = (unit(x) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(x.movedim(1, -1).numpy())


def facts(figures: dict[str, Any], out: Examination) -> dict[str, str]:
    """Figures above the page."""
    rows = {"examples": f"{figures['examples']:,}", "parameters": f"{figures['parameters']:,}"}
    rows["mean loss"] = f"{figures['loss']:.4g} nats"
    shares = {"accuracy": "classified as labelled", "test_accuracy": "test accuracy"}
    rows |= {title: f"{figures[name]:.1%}" for name, title in shares.items() if name in figures}
    scale = figures["noise_scale"]
    rows["noise scale"] = scale_of(scale)
    rows["|mean gradient|"] = f"{out.mean_norm:.3g}"
    if "wrong" in figures:
        rows["labels made wrong"] = f"{figures['wrong']:,}"
        rows["of the first as many"] = f"{figures['wrong_among_first']:.1%} wrong"
        rows["average precision"] = f"{figures['suspicion_average_precision']:.3f}"
    if figures["skipped"]:
        rows["skipped"] = f"{figures['skipped']:,} unreadable"
    return rows


def scale_of(scale: float) -> str:
    """A noise scale in words; the mean gradient of a net that has learned its examples is lost in the noise."""
    if not np.isfinite(scale):
        return "beyond the data"
    return f"{scale:,.0f} examples" if scale >= 10 else f"{scale:.2g} examples"


def layer_rows(out: Examination) -> dict[str, dict[str, str]]:
    """Figures of each parameter."""
    square = (out.layers.astype(np.float64) ** 2).mean(0)
    whole = max(float(square.sum()), 1e-300)
    return {
        name: {
            "mean norm": f"{out.layers[:, i].mean():.3g}",
            "share of |g|²": f"{square[i] / whole:.1%}",
            "noise scale": scale_of(out.layer_noise[i]),
        }
        for i, name in enumerate(out.names)
    }


def class_rows(
    classes: tuple[str, ...], labels: np.ndarray, predicted: np.ndarray | None, values: dict, wrong: Tensor | None
) -> list[dict[str, str]]:
    """Figures of each class that has examples."""
    rows = []
    for number, name in enumerate(classes):
        own = labels == number
        if not own.any():
            continue
        row = {"class": shown(name), "examples": f"{own.sum():,}"}
        if predicted is not None:
            row["classified as labelled"] = f"{(predicted[own] == number).mean():.1%}"
        for key in ("loss", "norm", "cosine", "self_influence"):
            row[f"mean {TITLES[key]}"] = f"{values[key][own].mean():.3g}"
        if "suspicion" in values:
            row["suspicion above 0.5"] = f"{(values['suspicion'][own] > 0.5).sum():,}"
        if wrong is not None:
            row["made wrong"] = f"{wrong.numpy()[own].sum():,}"
        rows.append(row)
    return rows


def class_cosines(labels: np.ndarray | None, count: int, out: Examination) -> np.ndarray | None:
    """Cosines of the mean gradients of classes, by sketches; None for too many classes."""
    if labels is None or not 1 < count <= MOST_CLASSES:
        return None
    rows = np.asarray(out.sketches)
    means = np.stack(
        [rows[labels == c].mean(0) if (labels == c).any() else np.zeros(rows.shape[1]) for c in range(count)]
    )
    means = torch.from_numpy(means.astype(np.float64))
    return scores.cosine_matrix(means @ means.T).numpy()


def notes(args: Any, count: int, on_page: int, out: Examination, memory: float) -> list[str]:
    lines = [
        f"Neighbours are by sketches of size {args.sketch}: a cosine is off by about {args.sketch**-0.5:.2f}; those of "
        "pairs are exact. Noise scale: tr Σ / |G|², the batch size from which more examples gain little.",
        f"Peak memory {memory:,.0f} MiB. Gradients of {count:,} examples were never held at once: sketches and norms "
        "are in files, beside this page in the folder gradients.",
    ]
    if args.only:
        lines.append(f"Only the gradients of {', '.join(args.only)} count.")
    if on_page < count:
        lines.append(
            f"This page has {on_page:,} of {count:,} examples: the first, and a random choice of the others; "
            "scores.csv has all."
        )
    return lines


def table(folder: Path, subject: Subject, out: Examination, values: dict, wrong: Tensor | None) -> None:
    """scores.csv, and scores.parquet where pyarrow is installed: a row per example."""
    names = subject.examples.names
    columns: dict[str, list] = {"example": [shown(name) for name in names]}
    if subject.labels is not None:
        columns["label"] = [subject.examples.classes[i] for i in subject.labels.tolist()]
    if out.log_probs is not None:
        columns["predicted"] = [subject.examples.classes[i] for i in out.log_probs.argmax(1).tolist()]
    columns |= {key: np.asarray(value, np.float64).tolist() for key, value in values.items()}
    columns["nearest"] = [shown(names[i]) for i in out.neighbours.indices[:, 0].tolist()]
    columns["nearest_cosine"] = out.neighbours.cosines[:, 0].tolist()
    if wrong is not None:
        columns["made_wrong"] = wrong.tolist()
    columns |= {f"norm/{name}": out.layers[:, i].tolist() for i, name in enumerate(out.names)}
    if subject.texts is not None:
        columns["text"] = list(subject.texts)
    with (
        replacing(folder / "scores.csv") as path,
        open(path, "w", newline="", encoding="utf-8", errors="replace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    if importlib.util.find_spec("pyarrow"):
        import pyarrow
        from pyarrow import parquet

        with replacing(folder / "scores.parquet") as path:
            parquet.write_table(pyarrow.table(columns), path)


def summary(figures: dict[str, Any]) -> str:
    """The figures in a line or two."""
    scale = figures["noise_scale"]
    line = f"{figures['examples']:,} examples, mean loss {figures['loss']:.4g}, noise scale "
    line += scale_of(scale)
    if "accuracy" in figures:
        line += f", {figures['accuracy']:.1%} classified as labelled"
    if "test_accuracy" in figures:
        line += f"; {figures['test_accuracy']:.1%} of the test examples right "
        line += f"(commonest class: {figures['commonest_class_accuracy']:.1%})"
    if figures["skipped"]:
        line += f"; {figures['skipped']:,} could not be used, and were skipped"
    if "wrong" in figures:
        names = [name for name in figures if name.endswith("_average_precision")]
        cells = ", ".join(f"{name.removesuffix('_average_precision')} {figures[name]:.3f}" for name in names)
        line += f"\naverage precision of the labels made wrong: {cells}"
        line += f"\n{figures['wrong_among_first']:.1%} of the {figures['wrong']} most suspicious labels are wrong"
    return line
