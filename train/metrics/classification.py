"""What a trained classifier gets right and wrong, in figures and pictures."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from core import tree
from core.tree import Tree
from train import plots
from train.files import replacing
from train.losses.basic import accuracy, nll
from train.metrics.calibration import expected_calibration_error, reliability_bins

BINS = 15  # of confidence


def figures(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """accuracy, top5_accuracy (with more than five classes), nll in nats, calibration_error with 15 bins.

    Args:
        log_probs: (examples, classes).
        labels: (examples,) integers.
    """
    found = {"accuracy": accuracy(log_probs, labels)}
    if log_probs.shape[-1] > 5:
        found["top5_accuracy"] = accuracy(log_probs, labels, top=5)
    found["nll"] = nll(log_probs, labels)
    found["calibration_error"] = expected_calibration_error(log_probs.exp(), labels, BINS)
    return {name: float(value) for name, value in found.items()}


def confusion(log_probs: Tensor, labels: Tensor) -> Tensor:
    """(classes, classes): how many examples of the class of the row were taken for that of the column."""
    classes = log_probs.shape[-1]
    pairs = labels.long() * classes + log_probs.argmax(-1)
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def report(log_probs: Tensor, labels: Tensor, classes: Sequence[str]) -> str:
    """Precision, recall, F1 and number of examples of each class, as scikit-learn writes them."""
    from sklearn.metrics import classification_report

    options = {"labels": range(len(classes)), "target_names": list(classes), "digits": 4, "zero_division": 0.0}
    return classification_report(labels.cpu().numpy(), log_probs.argmax(-1).cpu().numpy(), **options)


def worst_mistakes(log_probs: Tensor, labels: Tensor, count: int) -> Tensor:
    """Numbers of the wrong predictions whose label has the least probability, the worst first; `count` at most."""
    wrong = (log_probs.argmax(-1) != labels).nonzero()[:, 0]
    of_label = log_probs[wrong].gather(1, labels[wrong, None])[:, 0]
    return wrong[of_label.argsort(stable=True)][:count]


def study(
    folder: Path, params: Tree, log_probs: Tensor, labels: Tensor, classes: Sequence[str], pixels: Callable
) -> dict[str, float]:
    """`figures`; writes `report.txt`, and pictures of confusion, calibration, the worst mistakes and the first filters.

    Args:
        pixels: (count,) numbers of examples -> their images (count, channels, size, size) in [0, 1], or bytes.
    """
    draw(folder, log_probs, labels, classes)
    with replacing(folder / "report.txt") as path:
        path.write_text(report(log_probs, labels, classes), encoding="utf-8")
    worst = worst_mistakes(log_probs, labels, 25)
    (folder / "mistakes.png").unlink(missing_ok=True)  # those of an earlier look
    if len(worst):
        draw_mistakes(folder / "mistakes.png", pixels(worst), log_probs[worst], labels[worst], classes)
    _, channels, size, _ = pixels(torch.zeros(1, dtype=torch.int64)).shape
    filters = first_filters(params, channels, size)
    if filters is not None:
        draw_filters(folder / "filters.png", filters)
    return figures(log_probs, labels)


def draw(folder: Path, log_probs: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """`confusion.png` and `calibration.png`."""
    counts = confusion(log_probs, labels)
    names = [_short(name, 24) for name in classes] if len(classes) <= 50 else None
    title = f"{counts.trace()} of {len(labels)} right"
    # Too many cells for numbers; as shares of its row, a rare class is as visible as a frequent one.
    shown = counts.double() / counts.sum(1, keepdim=True).clamp(min=1) if len(classes) > 15 else counts
    plots.matrix(folder / "confusion.png", shown, names, names, "predicted", "class", title)
    plots.reliability(folder / "calibration.png", *reliability_bins(log_probs.exp(), labels, BINS), "Calibration")


def draw_mistakes(
    path: str | os.PathLike, images: Tensor, log_probs: Tensor, labels: Tensor, classes: Sequence[str]
) -> None:
    """Images with what they were taken for, how surely, and what they are.

    Args:
        images: (count, 1 or 3, height, width) in [0, 1], or bytes; the others belong to them.
    """
    confidence, predicted = log_probs.exp().max(-1)
    titles = [
        f"{_short(classes[p], 14)} {c:.0%}\nis {_short(classes[y], 14)}"
        for p, c, y in zip(predicted.tolist(), confidence.tolist(), labels.tolist(), strict=True)
    ]
    plots.image_grid(path, images, titles=titles, title="Worst mistakes", scale=1.1)


def first_filters(params: Tree, channels: int, pixels: int) -> Tensor | None:
    """(filters, channels, height, width): the weights that meet the pixels first, each stretched to [0, 1].

    They are found by name and shape: a convolution of that many channels, of the stem if there is one; or else linear
    weights of square images with that many pixels a side. None where there are none.
    """
    found = {name: leaf for name, leaf in tree.items(params) if leaf.ndim == 4 and leaf.shape[1] == channels}
    if found:
        filters = found[min(found, key=lambda name: (not name.startswith(("stem", "patches")), name))]
    else:
        linear = [leaf for leaf in tree.leaves(params) if leaf.ndim == 2 and leaf.shape[1] == channels * pixels**2]
        if not linear:
            return None
        filters = linear[0].reshape(-1, channels, pixels, pixels)
    low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
    return (filters - low) / (high - low).clamp(min=1e-12)


def draw_filters(path: str | os.PathLike, filters: Tensor, most: int = 64) -> None:
    """The first layer's weights as images; where there are neither 1 nor 3 channels, the first of them."""
    shown = filters[:most] if filters.shape[1] in (1, 3) else filters[:most, :1]
    plots.image_grid(path, shown, title=f"First layer ({len(filters)} filters)", scale=0.6)


def draw_predictions(
    path: str | os.PathLike, images: Sequence[Tensor], log_probs: Tensor, classes: Sequence[str], names: Sequence[str]
) -> None:
    """Each image beside the probabilities of its most likely classes, five at most."""
    probabilities, best = log_probs.exp().topk(min(5, len(classes)), -1)
    with plots.panels(path, len(images), 2, width=3.6, height=2.4) as axes:
        for row, (image, name) in enumerate(zip(images, names, strict=True)):
            left, right = axes[2 * row : 2 * row + 2]
            highest = 1 if image.is_floating_point() else 255
            left.imshow(image.permute(1, 2, 0).squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=highest)
            left.set_title(_short(name, 40), fontsize=9)
            left.set_axis_off()
            labels = [_short(classes[c], 24) for c in best[row].tolist()]
            right.barh(range(len(labels)), probabilities[row].tolist(), color=plots.COLOURS[0])
            right.set_yticks(range(len(labels)), labels, fontsize=8)
            right.set(xlim=(0, 1), xlabel="probability")
            right.invert_yaxis()
            right.spines[["top", "right"]].set_visible(False)


def _short(name: str, most: int) -> str:
    """Names that differ at the end, as paths do, still differ."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - (most - 1) // 2 :]}"
