"""Pictures of a classifier: confusion, its worst mistakes, the filters of its first layer, its predictions."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.plots.figures import COLOURS, array, matrix, panels
from train.plots.image_grids import image_grid


def confusion(path: str | os.PathLike, counts: Any, classes: Sequence[str]) -> None:
    """A confusion matrix; with more than 15 classes as shares of each row.

    Args:
        counts: (classes, classes), examples of the class of the row that were taken for that of the column.
    """
    cells = array(counts)
    names = [short(name, 24) for name in classes] if len(classes) <= 50 else None
    title = f"{np.trace(cells)} of {cells.sum()} right"
    # Too many cells for numbers; as shares of its row, a rare class is as visible as a frequent one.
    shares = cells / cells.sum(1, keepdims=True).clip(min=1)
    matrix(path, shares if len(classes) > 15 else cells, names, names, "predicted", "class", title)


def mistakes(path: str | os.PathLike, images: Any, log_probs: Any, labels: Any, classes: Sequence[str]) -> None:
    """Images with the predicted class, its probability and the true class.

    Args:
        images: (count, 1 or 3, height, width) in [0, 1], or bytes.
        log_probs: (count, classes).
        labels: (count,) integers.
    """
    probabilities = np.exp(array(log_probs))  # (count, classes)
    predicted = probabilities.argmax(1)
    titles = [
        f"{short(classes[p], 14)} {row[p]:.0%}\nis {short(classes[y], 14)}"
        for p, row, y in zip(predicted.tolist(), probabilities, array(labels).tolist(), strict=True)
    ]
    image_grid(path, images, titles=titles, title="Worst mistakes", scale=1.1)


def filters(path: str | os.PathLike, weights: Any, most: int = 64) -> None:
    """The first layer's weights (filters, channels, height, width) as images, up to `most` of them.

    Where there are neither 1 nor 3 channels, the first channel of each.
    """
    images = array(weights)[:most]
    images = images if images.shape[1] in (1, 3) else images[:, :1]
    image_grid(path, images, title=f"First layer ({len(weights)} filters)", scale=0.6)


def predictions(
    path: str | os.PathLike,
    images: Sequence[Any],
    log_probs: Any,
    classes: Sequence[str],
    names: Sequence[str],
    most: int = 32,
) -> None:
    """Each image beside the probabilities of its most likely classes, up to five.

    Args:
        images: each (1 or 3, height, width), floats in [0, 1] or bytes.
        log_probs: (images, classes).
        names: one per image.
        most: images that are drawn; the others are left out.
    """
    probabilities = np.exp(array(log_probs))[:most]  # (images, classes)
    best = np.argsort(-probabilities, 1, kind="stable")[:, :5]  # (images, up to 5)
    with panels(path, len(probabilities), 2, width=3.6, height=2.4) as axes:
        for row, (image, name) in enumerate(zip(images[:most], names[:most], strict=True)):
            left, right = axes[2 * row : 2 * row + 2]
            pixels = array(image)
            pixels = pixels.transpose(1, 2, 0).squeeze(-1) if len(pixels) == 1 else pixels.transpose(1, 2, 0)
            left.imshow(pixels, cmap="gray", vmin=0, vmax=1 if pixels.dtype.kind == "f" else 255)
            left.set_title(short(name, 40), fontsize=9, parse_math=False)
            left.set_axis_off()
            labels = [short(classes[c], 24) for c in best[row].tolist()]
            right.barh(range(len(labels)), probabilities[row, best[row]].tolist(), color=COLOURS[0])
            right.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
            right.set(xlim=(0, 1), xlabel="probability")
            right.invert_yaxis()
            right.spines[["top", "right"]].set_visible(False)


def short(name: str, most: int) -> str:
    """A name cut in the middle to `most` letters: names that differ at the end, as paths do, still differ."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[len(name) - (most - 1) // 2 :]}"
