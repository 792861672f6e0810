"""Figures of a trained classifier: accuracy, calibration, confusion, its worst mistakes and its first filters."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from core import tree
from core.tree import Tree
from train import plots
from train.files import replacing
from train.losses.basic import check_class_labels, nll
from train.metrics.calibration import expected_calibration_error, reliability_bins
from train.plots import classification as pictures

BINS = 15  # of confidence


def accuracy(logits: Tensor, labels: Tensor, *, top: int = 1, ignore_id: int | None = None) -> Tensor:
    """The fraction of positions whose label is among the `top` greatest logits; float32, 0-D.

    Args:
        logits: (..., classes).
        labels: (...) integers.
        ignore_id: positions with this label do not count; if there is no other, the accuracy is 0.
    """
    check_class_labels(logits, labels)
    if not 1 <= top <= logits.shape[-1]:
        raise ValueError(f"top must be in [1, {logits.shape[-1]}], the number of classes, got {top}")
    best = logits.argmax(-1, keepdim=True) if top == 1 else logits.topk(top, -1).indices  # (..., top)
    hits = (best == labels.unsqueeze(-1)).any(-1).float()  # (...)
    if ignore_id is None:
        return hits.mean()
    valid = (labels != ignore_id).float()
    return (hits * valid).sum() / valid.sum().clamp(min=1)


def linear_probe(train: Tensor, test: Tensor, train_labels: Tensor, test_labels: Tensor) -> float:
    """Test accuracy of a logistic regression on features (examples, width) of a net that is not trained further.

    The features are standardised by the training part; scikit-learn's own penalty.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, std = train.mean(0), train.std(0, correction=0).clamp(min=1e-6)
    learn, look = (((part - mean) / std).double().numpy() for part in (train, test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of the weights do not matter
        model = LogisticRegression(max_iter=300).fit(learn, train_labels.numpy())
    return float(model.score(look, test_labels.numpy()))


def figures(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """accuracy, top5_accuracy (with more than five classes), nll in nats, calibration_error with 15 bins.

    Args:
        log_probs: (examples, classes).
        labels: (examples,) integers.
    """
    values = {"accuracy": accuracy(log_probs, labels)}
    if log_probs.shape[-1] > 5:
        values["top5_accuracy"] = accuracy(log_probs, labels, top=5)
    values["nll"] = nll(log_probs, labels)
    values["calibration_error"] = expected_calibration_error(log_probs.exp(), labels, BINS)
    return {name: float(value) for name, value in values.items()}


def confusion(log_probs: Tensor, labels: Tensor) -> Tensor:
    """(classes, classes): number of examples of the class of the row that were taken for that of the column."""
    classes = log_probs.shape[-1]
    pairs = labels.long() * classes + log_probs.argmax(-1)  # (examples,)
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)  # (classes, classes)


def report(log_probs: Tensor, labels: Tensor, classes: Sequence[str]) -> str:
    """Precision, recall, F1 and number of examples of each class, as scikit-learn writes them."""
    from sklearn.metrics import classification_report

    options = {"labels": range(len(classes)), "target_names": list(classes), "digits": 4, "zero_division": 0.0}
    return classification_report(labels.cpu().numpy(), log_probs.argmax(-1).cpu().numpy(), **options)


def worst_mistakes(log_probs: Tensor, labels: Tensor, count: int) -> Tensor:
    """Indices of the wrong predictions whose label has the least probability, the worst first; up to `count`."""
    wrong = (log_probs.argmax(-1) != labels).nonzero()[:, 0]
    of_label = log_probs[wrong].gather(1, labels[wrong, None])[:, 0]
    return wrong[of_label.argsort(stable=True)][:count]


def first_filters(params: Tree, channels: int, pixels: int) -> Tensor | None:
    """Weights of the first layer, each filter stretched to [0, 1]: (filters, channels, height, width).

    It is told by name and shape: a convolution with that many channels, of the stem if there is one; else linear
    weights of square images with that many pixels per side. None where there are none.
    """
    convolutions = {name: leaf for name, leaf in tree.items(params) if leaf.ndim == 4 and leaf.shape[1] == channels}
    if convolutions:
        filters = convolutions[min(convolutions, key=lambda name: (not name.startswith(("stem", "patches")), name))]
    else:
        linear = [leaf for leaf in tree.leaves(params) if leaf.ndim == 2 and leaf.shape[1] == channels * pixels**2]
        if not linear:
            return None
        filters = linear[0].reshape(-1, channels, pixels, pixels)  # (filters, channels, height, width)
    low, high = filters.amin((1, 2, 3), keepdim=True), filters.amax((1, 2, 3), keepdim=True)
    return (filters - low) / (high - low).clamp(min=1e-12)


def study(
    folder: Path, params: Tree, log_probs: Tensor, labels: Tensor, classes: Sequence[str], pixels: Callable
) -> dict[str, float]:
    """`figures`; writes `report.txt`, and pictures of confusion, calibration, the worst mistakes and the first filters.

    Args:
        pixels: (count,) indices of examples -> their images (count, channels, size, size) in [0, 1], or bytes.
    """
    pictures.confusion(folder / "confusion.png", confusion(log_probs, labels), classes)
    bins = reliability_bins(log_probs.exp(), labels, BINS)
    plots.reliability(folder / "calibration.png", *bins, "Calibration")
    with replacing(folder / "report.txt") as path:
        path.write_text(report(log_probs, labels, classes), encoding="utf-8")
    worst = worst_mistakes(log_probs, labels, 25)
    (folder / "mistakes.png").unlink(missing_ok=True)  # those of an earlier evaluation
    if len(worst):
        pictures.mistakes(folder / "mistakes.png", pixels(worst), log_probs[worst], labels[worst], classes)
    _, channels, size, _ = pixels(torch.zeros(1, dtype=torch.int64)).shape
    filters = first_filters(params, channels, size)
    if filters is not None:
        pictures.filters(folder / "filters.png", filters)
    return figures(log_probs, labels)
