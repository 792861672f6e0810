"""Difficulty per example: gradient norm (GraNd), error norm (EL2N), variance of gradients (VoG), forgetting events."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from core.per_example import reports
from core.scores.checks import check_labels, check_logits, membership
from core.transforms import grad
from core.tree import Tree


def grand(loss: Callable[[Tree, Tree], Tensor], params: Tree, batch: Tree, *, ensemble: bool = False) -> Tensor:
    """GraNd, the norm of each example's gradient (Paul et al. 2021, "Deep Learning on a Data Diet", arXiv:2107.07075):

    GraNd(n) = E |g_n|   over networks, early in training; at initialisation it does not beat random (Kirsch 2023,
    arXiv:2303.14753)

    Args:
        loss, params, batch: as in `core.per_example.reports`.
        ensemble: the leaves of `params` have a leading axis, one entry per network (`core.tree.stack`); the score is
            the mean over them.

    Returns:
        (N,).

    Raises:
        PerExampleError: as in `reports`.
    """

    def norms(p: Tree) -> Tensor:
        return reports(loss, p, batch).total_norm

    return torch.func.vmap(norms)(params).mean(0) if ensemble else norms(params)


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """EL2N, the norm of each example's error (Paul et al. 2021, arXiv:2107.07075, definition 2.3):

    EL2N(n) = E |softmax(z_n) - onehot(y_n)|

    Args:
        logits: (N, classes), or (networks, N, classes): then the score is the mean over the networks.
        labels: (N,) integers in [0, classes).

    Returns:
        (N,).

    Raises:
        TypeError, ValueError: logits or labels of another kind or shape.
    """
    several = isinstance(logits, Tensor) and logits.ndim == 3
    check_logits("el2n", logits, 3 if several else 2)
    check_labels("el2n", labels, logits.shape[-2])
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    errors = torch.linalg.vector_norm(p - membership(labels, p.shape[-1], p.dtype), dim=-1)
    return errors.mean(0) if several else errors


def vog(logits: Callable[[Tree, Tensor], Tensor], checkpoints: Sequence[Tree], x: Tensor, labels: Tensor) -> Tensor:
    """VoG, the variance over checkpoints of the gradient of the label's logit by the input (Agarwal et al. 2022,
    "Estimating Example Difficulty Using Variance of Gradients", arXiv:2008.11600).

    S_k = d z_y / d x at checkpoint k,   VoG(n) = mean over x's entries of 1/K sum_k (S_k - mean_k S_k)²

    The paper writes sqrt(1/K) for 1/K, which multiplies all scores by sqrt(K), and then normalises them within each
    class: `normalised_within_class`.

    Args:
        logits: `logits(params, x) -> (N, classes)`, before the softmax; no example may change another's.
        checkpoints: parameters of at least two moments of training.
        x: (N, ...), floating-point.
        labels: (N,) integers in [0, classes).

    Returns:
        (N,).

    Raises:
        TypeError, ValueError: fewer than two checkpoints, logits or labels of another kind or shape.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"vog: {len(checkpoints)} checkpoints; a variance needs at least 2")
    check_labels("vog", labels, len(x))

    def of_label(x: Tensor, params: Tree) -> Tensor:
        z = logits(params, x)
        check_logits("vog", z)
        return z.gather(-1, labels.long()[:, None]).sum()

    mean, squares = torch.zeros_like(x), torch.zeros_like(x)
    for k, params in enumerate(checkpoints, 1):  # Welford's update: memory does not grow with the checkpoints
        slope = grad(of_label)(x, params)
        before = slope - mean
        mean = mean + before / k
        squares = squares + before * (slope - mean)
    return squares.flatten(1).mean(1) / len(checkpoints)


def normalised_within_class(scores: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(score - mean of its class) / standard deviation of its class, the last step of VoG; 0 where that is 0.

    Args:
        scores: (N,).
        labels: (N,) integers in [0, classes).

    Returns:
        (N,).

    Raises:
        TypeError, ValueError: scores or labels of another kind or shape.
    """
    if scores.ndim != 1:
        raise ValueError(f"normalised_within_class: the scores have shape {tuple(scores.shape)}; expected (N,)")
    check_labels("normalised_within_class", labels, len(scores))
    member = membership(labels, classes, scores.dtype)  # (N, classes)
    counts = member.sum(0).clamp(min=1)
    centred = scores - member @ (scores @ member / counts)  # (N,)
    std = (member @ (centred.square() @ member / counts)).sqrt()  # (N,)
    # A class of one, or of equal scores: what is left over is rounding.
    flat = std <= 8 * torch.finfo(scores.dtype).eps * scores.abs()
    return torch.where(flat, 0.0, centred / torch.where(flat, 1.0, std))


def forgetting_events(right: Tensor) -> Tensor:
    """Forgetting events per example: classified right and, the next time, wrong (Toneva et al. 2019, arXiv:1812.05159).

    Args:
        right: (evaluations, N) of bool: whether the net classified the example correctly.

    Returns:
        (N,) float: the number of events, infinite for an example that was never right.

    Raises:
        ValueError: `right` of another dtype or rank.
    """
    if right.ndim != 2 or right.dtype != torch.bool:
        raise ValueError(f"forgetting_events: expected bool (evaluations, N), got {right.dtype} {tuple(right.shape)}")
    events = (right[:-1] & ~right[1:]).sum(0).to(torch.get_default_dtype())
    return torch.where(right.any(0), events, float("inf"))
