"""Losses against torch.nn.functional, value and gradient, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from train import losses

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(4, 5, 7, generator=GENERATOR, dtype=torch.float64)
OTHER = 3 * torch.randn(4, 5, 7, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(0, 7, (4, 5), generator=GENERATOR)
SOME_IGNORED = torch.where(LABELS < 3, -100, LABELS)
PROBABILITIES = OTHER.softmax(-1)
SIGNS = OTHER.sign()
BITS = (OTHER > 0).double()


def classes_second(f):
    """torch has the classes on axis 1."""
    return lambda x, y, **options: f(x.movedim(-1, 1), y.movedim(-1, 1) if y.ndim == x.ndim else y, **options)


def rows(f):
    """Functions that torch has for (batch, classes) only."""

    def call(x, y, reduction):
        values = f(x.flatten(0, 1), y.flatten(), reduction=reduction)
        return values.unflatten(0, y.shape) if reduction == "none" else values

    return call


def kl_of_torch(log_p, log_q, reduction):
    values = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return {"none": values, "sum": values.sum(), "mean": values.mean()}[reduction]


def charbonnier_as_a_norm(predictions, targets, reduction):
    """The length of (error, eps)."""
    values = torch.hypot(predictions - targets, torch.full_like(targets, 0.3))
    return {"none": values, "sum": values.sum(), "mean": values.mean()}[reduction]


def soft_of_torch(logits, teacher, reduction):
    # "batchmean" divides the sum over all classes by the number of rows
    parts = (F.log_softmax(logits / 3, -1).flatten(0, 1), F.softmax(teacher / 3, -1).flatten(0, 1))
    values = 9 * F.kl_div(*parts, reduction="batchmean" if reduction == "mean" else reduction)
    return values.sum(-1).unflatten(0, (4, 5)) if reduction == "none" else values


def gaussian_of_torch(mean, log_variance, reduction):
    normal = torch.distributions.Normal
    values = torch.distributions.kl_divergence(
        normal(mean, (0.5 * log_variance).exp(), validate_args=False), normal(0.0, 1.0, validate_args=False)
    ).sum(-1)
    return {"none": values, "sum": values.sum(), "mean": values.mean()}[reduction]


def cosine_of_torch(a, b, reduction):
    values = F.cosine_embedding_loss(a.flatten(0, 1), b.flatten(0, 1), torch.ones(20), reduction=reduction)
    return values.unflatten(0, (4, 5)) if reduction == "none" else values


def with_options(f, **options):
    return lambda x, y, reduction: f(x, y, reduction=reduction, **options)


CROSS = classes_second(F.cross_entropy)
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 1.0, 3.0, 1.0, 1.0])
CASES = {
    "cross entropy": (losses.cross_entropy, CROSS, LOGITS, LABELS),
    "smoothed": (
        with_options(losses.cross_entropy, label_smoothing=0.1),
        with_options(CROSS, label_smoothing=0.1),
        LOGITS,
        LABELS,
    ),
    "ignored": (
        with_options(losses.cross_entropy, ignore_id=-100),
        with_options(CROSS, ignore_index=-100),
        LOGITS,
        SOME_IGNORED,
    ),
    "ignored, smoothed": (
        with_options(losses.cross_entropy, ignore_id=2, label_smoothing=0.2),
        with_options(CROSS, ignore_index=2, label_smoothing=0.2),
        LOGITS,
        LABELS,
    ),
    "probabilities": (losses.cross_entropy, CROSS, LOGITS, PROBABILITIES),
    "probabilities, smoothed": (
        with_options(losses.cross_entropy, label_smoothing=0.3),
        with_options(CROSS, label_smoothing=0.3),
        LOGITS,
        PROBABILITIES,
    ),
    "nll": (losses.nll, classes_second(F.nll_loss), LOGITS, LABELS),
    "nll, ignored": (
        with_options(losses.nll, ignore_id=-100),
        with_options(classes_second(F.nll_loss), ignore_index=-100),
        LOGITS,
        SOME_IGNORED,
    ),
    "binary": (losses.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, 30 * LOGITS, PROBABILITIES),
    "binary, weighted": (
        with_options(losses.binary_cross_entropy_with_logits, positive_weight=WEIGHT),
        with_options(F.binary_cross_entropy_with_logits, pos_weight=WEIGHT),
        LOGITS,
        BITS,
    ),
    "mse": (losses.mse, F.mse_loss, LOGITS, OTHER),
    "l1": (losses.l1, F.l1_loss, LOGITS, OTHER),
    "charbonnier": (with_options(losses.charbonnier, eps=0.3), charbonnier_as_a_norm, LOGITS, OTHER),
    "huber": (with_options(losses.huber, delta=1.7), with_options(F.huber_loss, delta=1.7), LOGITS, OTHER),
    "smooth l1": (with_options(losses.smooth_l1, beta=0.6), with_options(F.smooth_l1_loss, beta=0.6), LOGITS, OTHER),
    "kl": (losses.kl_divergence, kl_of_torch, LOGITS.log_softmax(-1), OTHER.log_softmax(-1)),
    "soft targets": (with_options(losses.soft_targets, temperature=3.0), soft_of_torch, LOGITS, OTHER),
    "gaussian kl": (losses.gaussian_kl, gaussian_of_torch, LOGITS, OTHER),
    "hinge": (losses.hinge, lambda x, y, reduction: rows_hinge(x, y, reduction), LOGITS, SIGNS),
    "multiclass hinge": (losses.multiclass_hinge, rows(F.multi_margin_loss), LOGITS, LABELS),
    "multiclass hinge, margin": (
        with_options(losses.multiclass_hinge, margin=2.5),
        rows(lambda x, y, reduction: F.multi_margin_loss(x, y, margin=2.5, reduction=reduction)),
        LOGITS,
        LABELS,
    ),
    "cosine": (losses.cosine_distance, cosine_of_torch, LOGITS, OTHER),
}


def rows_hinge(x, y, reduction):
    # hinge_embedding_loss with target -1 is max(0, margin - input)
    return F.hinge_embedding_loss(x * y, -torch.ones_like(x), margin=1.0, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name, reduction):
    ours, theirs, x, y = CASES[name]
    torch.testing.assert_close(ours(x, y, reduction=reduction), theirs(x, y, reduction=reduction))

    def weighted(f):
        def total(x):
            values = f(x, y, reduction=reduction)
            return (values * torch.arange(1, values.numel() + 1).reshape(values.shape)).sum()

        return total

    torch.testing.assert_close(grad(weighted(ours))(x), grad(weighted(theirs))(x))


@pytest.mark.parametrize("name", CASES)
def test_vmap_gives_each_example_alone(name):
    ours, _, x, y = CASES[name]

    def mean(x, y):
        return ours(x, y, reduction="mean")

    torch.testing.assert_close(vmap(mean)(x, y), torch.stack([mean(a, b) for a, b in zip(x, y, strict=True)]))
    torch.testing.assert_close(
        vmap(grad(mean))(x, y), torch.stack([grad(mean)(a, b) for a, b in zip(x, y, strict=True)])
    )


@pytest.mark.parametrize("name", CASES)
def test_forward_over_reverse(name):
    ours, _, x, y = CASES[name]

    def total(x):
        return ours(x, y, reduction="sum")

    tangent = torch.ones_like(x)
    _, forward = torch.func.jvp(total, (x,), (tangent,))
    torch.testing.assert_close(forward, (grad(total)(x) * tangent).sum())
    _, curvature = torch.func.jvp(grad(total), (x,), (tangent,))
    assert curvature.isfinite().all()


def test_compiles():
    torch._dynamo.reset()

    def all_of_them():
        return [ours(x, y, reduction="mean") for ours, _, x, y in CASES.values()]

    actual = torch.compile(all_of_them, fullgraph=True, dynamic=False, backend="aot_eager")()
    torch.testing.assert_close(actual, all_of_them())
    torch._dynamo.reset()


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.nll])
def test_the_mean_of_nothing_is_zero(loss):
    labels = torch.full((4, 5), -1)
    value, gradient = torch.func.grad_and_value(lambda x: loss(x, labels, ignore_id=-1))(LOGITS)[::-1]
    assert value == 0 and (gradient == 0).all()


def test_ignored_positions_do_not_let_nan_through():
    logits = torch.where(SOME_IGNORED.unsqueeze(-1) == -100, torch.nan, LOGITS)
    assert losses.cross_entropy(logits, SOME_IGNORED, ignore_id=-100).isfinite()


@pytest.mark.parametrize("label", [7, -1, -100])
def test_labels_outside_of_the_classes_fail_on_cpu(label):
    with pytest.raises(IndexError, match="out of bounds"):
        losses.cross_entropy(LOGITS, torch.full((4, 5), label))


def test_half_precision_logits_are_widened():
    assert losses.cross_entropy(LOGITS.bfloat16(), LABELS).dtype == torch.float32


def test_impossible_classes_add_nothing_to_the_divergence():
    p, q = torch.tensor([0.0, 0.25, 0.75]), torch.tensor([0.0, 0.5, 0.5])
    value, gradient = torch.func.grad_and_value(losses.kl_divergence)(p.log(), q.log())[::-1]
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(p[1:]), torch.distributions.Categorical(q[1:])
    )
    torch.testing.assert_close(value, expected)
    assert gradient.isfinite().all()
    assert losses.kl_divergence(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0]).log()) == torch.inf


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: losses.cross_entropy(LOGITS, LABELS[0]), ValueError, r"logits \(4, 5, 7\) and labels \(5,\)"),
        (lambda: losses.cross_entropy(LOGITS, PROBABILITIES[0]), ValueError, "one shape"),
        (lambda: losses.cross_entropy(LOGITS, LABELS > 1), TypeError, "integers, got torch.bool"),
        (lambda: losses.cross_entropy(LOGITS, LABELS, label_smoothing=1.5), ValueError, "label_smoothing"),
        (lambda: losses.cross_entropy(LOGITS, PROBABILITIES, ignore_id=1), ValueError, "integer labels"),
        (lambda: losses.mse(LOGITS, OTHER[:1]), ValueError, "predictions and targets must have one shape"),
        (lambda: losses.mse(LOGITS, OTHER, reduction="batchmean"), ValueError, "'none', got 'batchmean'"),
        (lambda: losses.huber(LOGITS, OTHER, delta=0.0), ValueError, "delta must be positive"),
        (lambda: losses.charbonnier(LOGITS, OTHER, eps=0.0), ValueError, "eps must be positive"),
        (lambda: losses.soft_targets(LOGITS, OTHER, temperature=0.0), ValueError, "temperature must be positive"),
        (lambda: losses.soft_targets(LOGITS, OTHER[:1]), ValueError, "logits and teacher_logits must have one shape"),
        (lambda: losses.nll(LOGITS, LABELS.unsqueeze(-1)), ValueError, "labels must have the shape"),
    ],
)
def test_errors_name_the_fault(call, error, message):
    with pytest.raises(error, match=message):
        call()
