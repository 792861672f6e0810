"""Figures and pictures of a labelled set of texts, and classes printed line by line: for any classifier of texts."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from train import plots
from train.data.text.files import lines_of
from train.files import replacing, shown
from train.metrics import classification
from train.metrics.calibration import reliability_bins
from train.plots import classification as pictures


def study(
    folder: Path, log_probs: Tensor, labels: Tensor, texts: Sequence[str], classes: Sequence[str]
) -> dict[str, float]:
    """`train.metrics.classification.figures`; writes confusion.png, calibration.png, report.txt and mistakes.txt.

    Args:
        log_probs: (texts, classes).
        labels: (texts,) integers.
    """
    pictures.confusion(folder / "confusion.png", classification.confusion(log_probs, labels), classes)
    bins = reliability_bins(log_probs.exp(), labels, classification.BINS)
    plots.reliability(folder / "calibration.png", *bins, "Calibration")
    with replacing(folder / "report.txt") as path:
        path.write_text(classification.report(log_probs, labels, classes), encoding="utf-8")
    lines = ["class\tprobability\tpredicted\ttext"]
    for i in classification.worst_mistakes(log_probs, labels, 50).tolist():
        label, best = int(labels[i]), int(log_probs[i].argmax())
        cells = [classes[label], f"{log_probs[i, label].exp():.4f}", classes[best], texts[i]]
        lines.append("\t".join(map(shown, cells)))
    with replacing(folder / "mistakes.txt") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return classification.figures(log_probs, labels)


def parts_of(texts: Sequence[str], file: Path | None) -> Iterator[list[str]]:
    """The texts of `lines_of`: those of standard input one by one as they come, others together.

    Empty ones are left out, and counted on standard error.
    """
    lines = lines_of(texts, file)
    empty = 0
    for part in [list(lines)] if texts or file else ([line] for line in lines):
        whole = [text.strip() for text in part if text.strip()]
        empty += len(part) - len(whole)
        if whole:
            yield whole
    if empty:
        print(f"{empty} empty line{'s are' if empty > 1 else ' is'} left out", file=sys.stderr)


def print_classes(
    classify: Callable[[list[str]], Tensor],
    classes: Sequence[str],
    texts: Sequence[str],
    file: Path | None,
    count: int = 1,
) -> None:
    """A line `class<TAB>probability<TAB>text` for each text of `parts_of`, with the `count` most probable classes.

    Args:
        classify: texts -> log probabilities (texts, classes).
    """
    for part in parts_of(texts, file):
        for text, row in zip(part, classify(part), strict=True):
            best = row.topk(min(count, len(classes))).indices.tolist()
            cells = [cell for i in best for cell in (shown(classes[i]), f"{row[i].exp():.4f}")]
            print("\t".join([*cells, shown(text)]), flush=True)
