"""Explanations of single predictions: what the tokens contribute, and which training texts speak for and against it.

Files: `explanation.txt`, `.html` and `.png` of the strongest; `report.html` has all training texts, to sort and search.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.parts import attributions, encoder_classifier
from experiments.parts import encoder as encoders
from experiments.parts.attributions import Attributed
from experiments.parts.encoder_classifier import Classifier
from train import report
from train.data.text.labelled import Records
from train.data.text.ragged import Ragged
from train.files import replacing, shown
from train.metrics.classification import worst_mistakes
from train.plots import coloured_text
from train.plots.classification import short
from train.plots.coloured_text import Passage

POINTS = 32  # of integrated gradients
LONGEST = 300  # characters of a training text that are shown
ROWS = 10_000  # training texts on a page


class Explained(NamedTuple):
    """A text, what it is taken for with which probability, and its class, None if that is unknown.

    support: (training texts,) of each for the prediction, above 0 if it speaks for it.
    """

    text: str
    predicted: str
    probability: float
    label: str | None
    attributed: Attributed
    support: Tensor

    @property
    def title(self) -> str:
        known = {None: "", self.predicted: ", right"}.get(self.label, f"; it is {self.label}")
        return f"{shown(self.predicted)} {self.probability:.1%}{shown(known)}"


def explain(
    model: Classifier, text: str, label: str | None, support: Callable[[Ragged], Tensor] | None, points: int
) -> Explained:
    """The explanation of one prediction.

    Args:
        support: as `influences.supporter` gives it; None for attributions alone.
        points: as in `attributions.attribute`.

    Raises ValueError: the text has no tokens.
    """
    encoder, classes, longest = model
    log_probs = encoder_classifier.classify(model, [text])[0]  # (classes,)
    best = int(log_probs.argmax())
    attributed = attributions.attribute(encoder, text, best, longest, points)
    alone = Ragged(*encoders.tokens_of(encoder, [text], longest), torch.tensor([best]))
    supports = torch.empty(0) if support is None else support(alone)
    return Explained(text, classes[best], float(log_probs[best].exp()), label, attributed, supports)


def write_attributions(
    folder: Path, model: Classifier, texts: Sequence[str], labels: Sequence[int], log_probs: Tensor, count: int = 3
) -> float:
    """`attributions.png` and `.html` of the worst mistakes and of the first texts that are classified right.

    Args:
        labels, log_probs: (texts,) and (texts, classes).

    Returns:
        the largest of the errors of their sums.
    """
    worst = worst_mistakes(log_probs, labels, count).tolist()
    right = (log_probs.argmax(-1) == labels).nonzero()[:count, 0].tolist()
    outs = [explain(model, texts[i], model.classes[labels[i]], None, POINTS) for i in (*worst, *right)]
    passages = [attributions.passage(out.title, out.attributed) for out in outs]
    coloured_text.page(folder / "attributions.html", passages, "What speaks for the predicted class, and against it")
    coloured_text.picture(folder / "attributions.png", passages)
    return max(out.attributed.error for out in outs)


def ranked(support: Tensor, count: int) -> tuple[list[int], list[int]]:
    """(indices of the training texts that speak most for the prediction, and of those that speak most against it)."""
    order = support.argsort(descending=True, stable=True).tolist()
    return [i for i in order[:count] if support[i] > 0], [i for i in order[::-1][:count] if support[i] < 0]


def lines_of(out: Explained, train: Records, count: int, score: str) -> list[str]:
    """The explanation as text."""
    pairs = zip(out.attributed.pieces, out.attributed.values, strict=True)
    tokens = sorted(((p, v) for p, v in pairs if v and not math.isnan(v)), key=lambda pair: -abs(pair[1]))
    strongest = ", ".join(f"{shown(piece)} {value:+.2f}" for piece, value in tokens[:6])
    check = f"sum {out.attributed.difference:+.4f} of the logit, within {out.attributed.error:.1g}"
    lines = [f"{out.title}: {shown(out.text)}", f"    tokens: {strongest} ({check})"]
    for side, rows in zip(("for", "against"), ranked(out.support, count), strict=True):
        lines.append(f"    {side} it, by {score}:")
        for i in rows:
            value, label, text = float(out.support[i]), shown(train.labels[i]), shown(short(train.texts[i], LONGEST))
            lines.append(f"        {value:+.3g}  {label}  {text}")
    return lines


def write(folder: Path, explained: Sequence[Explained], train: Records, count: int, score: str) -> list[str]:
    """Write `explanation.txt`, `.html` and `.png`; returns the lines of the first."""
    lines = [line for out in explained for line in lines_of(out, train, count, score)]
    with replacing(folder / "explanation.txt") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    passages = []
    for out in explained:
        passages.append(attributions.passage(out.title, out.attributed))
        top = float(out.support.abs().max()) or 1.0
        for side, rows in zip(("for", "against"), ranked(out.support, count), strict=True):
            for i in rows:
                value, text = float(out.support[i]), short(train.texts[i], LONGEST)
                title = f"    {side} it: {shown(train.labels[i])} {value:+.3g}"
                passages.append(Passage(title, [text], [value / top]))
    coloured_text.page(folder / "explanation.html", passages, "Predictions and the training texts that they rest on")
    coloured_text.picture(folder / "explanation.png", passages)
    return lines


def write_report(
    folder: Path,
    explained: Sequence[Explained],
    train: Records,
    labels: Tensor,
    model: Classifier,
    log_probs: Tensor,
) -> None:
    """`report.html`: a page of training texts, by what they support of each prediction and by their own loss.

    Args:
        labels, log_probs: (training texts,) and (training texts, classes) by the model.
    """
    supports = torch.stack([out.support for out in explained])  # (predictions, training texts)
    rows = supports.abs().amax(0).argsort(descending=True, stable=True)[:ROWS].sort().values.numpy()
    columns, several = {}, len(explained) > 1
    for i, out in enumerate(explained):
        about = f"Support of the training text for the prediction {out.title}, of: {shown(short(out.text, LONGEST))}"
        title = f"for {i + 1}" if several else "support"
        columns[f"support_{i + 1}"] = report.Column(title, supports[i].numpy()[rows], about)
    losses = F.nll_loss(log_probs, labels, reduction="none").numpy()
    columns["loss"] = report.Column("loss", losses[rows], "Loss of the training text itself at the model, in nats.")
    page = report.Report(
        title="Training texts that predictions rest on",
        facts={f"{i + 1}" if several else "prediction": out.title for i, out in enumerate(explained)},
        names=[f"training text {i + 1}" for i in rows.tolist()],
        columns=columns,
        rank="support_1",
        scatter=(("support_1", "loss"), ("support_1", "support_2"))[: 1 + several],
        classes=model.classes,
        labels=labels.numpy()[rows],
        predicted=np.asarray(log_probs.argmax(1))[rows],
        texts=[train.texts[i] for i in rows.tolist()],
        numbers=rows,
        cards=f"Texts that speak most for {'the first prediction' if several else 'it'}",
        notes=[f"{i + 1}: {out.title}: {shown(short(out.text, LONGEST))}" for i, out in enumerate(explained)],
    )
    report.write(folder / "report.html", page)
