"""Losses of classification and regression. Classes are on the last axis: logits (..., classes) go with labels (...).

`reduction` is "mean", "sum" or "none". Half precision is taken to float32 first. Shapes are checked. The values of
integer labels cannot be, without a look at the data that a compiled function may not take: a label outside [0, classes)
that is not `ignore_id` is an error on CPU, and undefined elsewhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.layers.checks import check_tensor


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return values.mean()
    if reduction == "sum":
        return values.sum()
    if reduction == "none":
        return values
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _same_shape(a: Tensor, b: Tensor, names: str) -> None:
    for x, name in zip((a, b), names.split(" and "), strict=True):
        check_tensor("loss", x, name)
    if a.shape != b.shape:
        raise ValueError(f"{names} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def check_class_labels(scores: Tensor, labels: Tensor) -> None:
    """Raise ValueError or TypeError unless labels (...) are integers for scores (..., classes)."""
    check_tensor("loss", scores, "logits")
    check_tensor("loss", labels, "labels")
    if scores.ndim == 0 or labels.shape != scores.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of the logits without the classes on the last axis: "
            f"got logits {tuple(scores.shape)} and labels {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"class labels must be integers, got {labels.dtype}; labels.long() converts them")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _reduce_valid(values: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    """Reduce over the valid positions; without any, the mean is 0."""
    if valid is None:
        return _reduce(values, reduction)
    values = torch.where(valid, values, 0.0)
    return values.sum() / valid.sum().clamp(min=1) if reduction == "mean" else _reduce(values, reduction)


def nll(log_probs: Tensor, labels: Tensor, *, ignore_id: int | None = None, reduction: str = "mean") -> Tensor:
    """-log p(label).

    Args:
        log_probs: (..., classes).
        labels: (...) integers in [0, classes), or `ignore_id`.
        ignore_id: positions with this label give 0 and do not count in the mean; if there is no other, the mean is 0
            (torch's is nan).
    """
    check_class_labels(log_probs, labels)
    skipped = -(2**31) if ignore_id is None else ignore_id  # torch's own default, -100, would hide a wrong label
    flat = _wide(log_probs).reshape(-1, log_probs.shape[-1]), labels.reshape(-1).long()
    values = F.nll_loss(*flat, ignore_index=skipped, reduction="none").reshape(labels.shape)
    return _reduce_valid(values, None if ignore_id is None else labels != ignore_id, reduction)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_id: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-sum_c q_c log softmax(logits)_c, where q is the label, smoothed: (1 - s) * label + s / classes.

    Args:
        logits: (..., classes).
        labels: (...) integers, or probabilities (..., classes).
        label_smoothing: s in [0, 1] (Szegedy et al. 2016, arXiv:1512.00567, section 7).
        ignore_id: positions with this integer label give 0 and do not count in the mean; if there is no other, the mean
            is 0 (torch's is nan).
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    check_tensor("loss", logits, "logits")
    check_tensor("loss", labels, "labels")
    log_probs = torch.log_softmax(_wide(logits), -1)
    if labels.is_floating_point():
        if labels.shape == logits.shape[:-1]:
            check_class_labels(logits, labels)
        _same_shape(logits, labels, "logits and label probabilities")
        if ignore_id is not None:
            raise ValueError("ignore_id needs integer labels, but the labels are probabilities")
        values = -(labels * log_probs).sum(-1)
        valid = None
    else:
        values = nll(log_probs, labels, ignore_id=ignore_id, reduction="none")
        valid = None if ignore_id is None else labels != ignore_id
    if label_smoothing:
        # -(1 - s) log p(label) - s / classes sum_c log p_c
        values = (1.0 - label_smoothing) * values - label_smoothing * log_probs.mean(-1)
    return _reduce_valid(values, valid, reduction)


def binary_cross_entropy_with_logits(
    logits: Tensor, labels: Tensor, *, positive_weight: float | Tensor = 1.0, reduction: str = "mean"
) -> Tensor:
    """-(w y log sigmoid(x) + (1 - y) log sigmoid(-x)).

    Args:
        logits: any shape.
        labels: the same shape, numbers in [0, 1].
        positive_weight: w, broadcast against the labels.
    """
    _same_shape(logits, labels, "logits and labels")
    x, y = _wide(logits), labels
    # -(w y log sigmoid(x) + (1 - y) log(1 - sigmoid(x)))
    return _reduce(-(positive_weight * y * F.logsigmoid(x) + (1.0 - y) * F.logsigmoid(-x)), reduction)


def mse(predictions: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """(prediction - target)^2, any one shape."""
    _same_shape(predictions, targets, "predictions and targets")
    return _reduce((_wide(predictions) - targets).square(), reduction)


def l1(predictions: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """|prediction - target|, any one shape."""
    _same_shape(predictions, targets, "predictions and targets")
    return _reduce((_wide(predictions) - targets).abs(), reduction)


def charbonnier(predictions: Tensor, targets: Tensor, *, eps: float = 1e-3, reduction: str = "mean") -> Tensor:
    """sqrt((prediction - target)^2 + eps^2), any one shape: an L1 that is smooth at 0.

    Charbonnier et al. 1994; of images in [0, 1], Lai et al. 2017 (arXiv:1704.03915) take eps = 1e-3.
    """
    _same_shape(predictions, targets, "predictions and targets")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    return _reduce(((_wide(predictions) - targets).square() + eps**2).sqrt(), reduction)


def huber(predictions: Tensor, targets: Tensor, *, delta: float = 1.0, reduction: str = "mean") -> Tensor:
    """e^2 / 2 where |e| < delta, else delta * (|e| - delta / 2), e = prediction - target (Huber 1964)."""
    _same_shape(predictions, targets, "predictions and targets")
    if not delta > 0:
        raise ValueError(f"delta must be positive, got {delta}")
    error = (_wide(predictions) - targets).abs()
    # e^2 / 2 where e < delta, else delta (e - delta / 2)
    return _reduce(torch.where(error < delta, 0.5 * error.square(), delta * (error - 0.5 * delta)), reduction)


def smooth_l1(predictions: Tensor, targets: Tensor, *, beta: float = 1.0, reduction: str = "mean") -> Tensor:
    """`huber` with delta = beta, divided by beta: slope 1 far from zero (Girshick 2015, arXiv:1504.08083)."""
    return huber(predictions, targets, delta=beta, reduction=reduction) / beta


def kl_divergence(log_p: Tensor, log_q: Tensor, *, reduction: str = "mean") -> Tensor:
    """KL(p || q) = sum_c p_c (log p_c - log q_c) from log probabilities (..., classes) both; p_c = 0 adds nothing.

    The mean is over positions: torch's "batchmean" for two axes. Note torch's order, `kl_div(log_q, log_p)`.
    """
    _same_shape(log_p, log_q, "log_p and log_q")
    log_p, log_q = _wide(log_p), _wide(log_q)
    impossible = log_p == -torch.inf
    safe_p, safe_q = torch.where(impossible, 0.0, log_p), torch.where(impossible, 0.0, log_q)
    return _reduce(torch.where(impossible, 0.0, safe_p.exp() * (safe_p - safe_q)).sum(-1), reduction)


def soft_targets(
    logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0, reduction: str = "mean"
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits (..., classes).

    Hinton et al. 2015, arXiv:1503.02531. The T^2 keeps the size of the gradient, which falls as 1 / T^2.
    """
    _same_shape(logits, teacher_logits, "logits and teacher_logits")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    teacher, student = (torch.log_softmax(_wide(x) / temperature, -1) for x in (teacher_logits, logits))
    return temperature**2 * kl_divergence(teacher, student, reduction=reduction)


def gaussian_kl(mean: Tensor, log_variance: Tensor, *, reduction: str = "mean") -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) = sum (mean^2 + variance - 1 - log variance) / 2 over the last axis.

    Kingma and Welling 2014, arXiv:1312.6114, appendix B. Both arguments are (..., dimensions); the mean is over
    positions.
    """
    _same_shape(mean, log_variance, "mean and log_variance")
    mean, log_variance = _wide(mean), _wide(log_variance)
    # (mean^2 + variance - 1 - log variance) / 2
    return _reduce(0.5 * (mean.square() + torch.expm1(log_variance) - log_variance).sum(-1), reduction)


def hinge(scores: Tensor, labels: Tensor, *, margin: float = 1.0, reduction: str = "mean") -> Tensor:
    """max(0, margin - label * score), one shape, with labels -1 and 1."""
    _same_shape(scores, labels, "scores and labels")
    return _reduce((margin - labels * _wide(scores)).clamp(min=0), reduction)  # max(0, m - y s)


def multiclass_hinge(scores: Tensor, labels: Tensor, *, margin: float = 1.0, reduction: str = "mean") -> Tensor:
    """sum over the wrong classes of max(0, margin - score of the label + score), divided by the number of classes.

    Weston & Watkins' form, torch's multi_margin_loss. scores: (..., classes); labels: (...) integers.
    """
    check_class_labels(scores, labels)
    scores, label = _wide(scores), labels.long().unsqueeze(-1)  # (..., 1)
    excess = (margin - scores.gather(-1, label) + scores).clamp(min=0)  # max(0, m - s_y + s_c), (..., classes)
    wrong = torch.arange(scores.shape[-1], device=scores.device) != label
    return _reduce(torch.where(wrong, excess, 0.0).mean(-1), reduction)


def cosine_distance(a: Tensor, b: Tensor, *, eps: float = 1e-8, reduction: str = "mean") -> Tensor:
    """1 - cos(a, b) of vectors (..., dimensions)."""
    _same_shape(a, b, "a and b")
    return _reduce(1.0 - F.cosine_similarity(_wide(a), _wide(b), dim=-1, eps=eps), reduction)
