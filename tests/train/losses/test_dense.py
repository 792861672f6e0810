"""Losses per pixel and region, against torch, sums written out, and the definition of the Lovász extension."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core import random
from train.losses import dense

VOID = 255


def example(classes: int = 4, batch: int = 3, void: bool = True, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Logits (batch, classes, 5, 6) and labels; the last image has pixels of two classes, the first two void ones."""
    logits = random.normal(random.key(0), (batch, classes, 5, 6)).to(dtype) * 2
    labels = random.randint(random.key(1), (batch, 5, 6), 0, classes).long()
    labels = torch.cat([labels[:-1], labels[-1:] % 2])
    return logits, labels.where(random.uniform(random.key(2), labels.shape) > 0.2, VOID) if void else labels


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)])
def test_cross_entropy_is_torchs(weight):
    logits, labels = example()
    out = dense.pixel_cross_entropy(logits, labels, weight=weight, ignore_id=VOID)
    torch.testing.assert_close(out.mean, F.cross_entropy(logits, labels, weight, ignore_index=VOID))
    each = [F.cross_entropy(x[None], y[None], weight, ignore_index=VOID) for x, y in zip(logits, labels, strict=True)]
    torch.testing.assert_close(out.values / out.weights, torch.stack(each))


def test_focal_is_its_formula():
    logits, labels = example()
    p = logits.softmax(1)
    terms = [
        -((1 - p[n, y, i, j]) ** 1.5) * p[n, y, i, j].log()
        for (n, i, j), y in zip(itertools.product(range(3), range(5), range(6)), labels.flatten().tolist(), strict=True)
        if y != VOID
    ]
    out = dense.focal(logits, labels, gamma=1.5, ignore_id=VOID)
    torch.testing.assert_close(out.mean, torch.stack(terms).mean())
    plain = dense.focal(logits, labels, gamma=0.0, ignore_id=VOID)
    torch.testing.assert_close(plain.mean, dense.pixel_cross_entropy(logits, labels, ignore_id=VOID).mean)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_dice_is_its_formula(squared, pooled):
    logits, labels = example()
    power = 2 if squared else 1

    def region(rows: list[int]) -> Tensor:
        p, y = (x[rows] for x in (logits.softmax(1).movedim(1, -1), labels))
        p, y = p[y != VOID], y[y != VOID]  # without void pixels
        terms = []
        for c in y.unique():
            g = (y == c).double()
            terms.append(1 - (2 * (p[:, c] * g).sum() + 0.5) / ((p[:, c] ** power + g).sum() + 0.5))
        return torch.stack(terms).mean()

    out = dense.dice(logits, labels, squared=squared, smooth=0.5, pooled=pooled, ignore_id=VOID)
    expected = region([0, 1, 2]) if pooled else torch.stack([region([i]) for i in range(3)])
    torch.testing.assert_close(out, expected)


def jaccard_loss(wrong: tuple[int, ...], truth: Tensor) -> float:
    """1 - IoU of a class, where the prediction is wrong at these pixels and right at all others."""
    predicted = truth.clone()
    predicted[list(wrong)] = 1 - predicted[list(wrong)]
    return 1 - float((predicted * truth).sum() / torch.maximum(predicted, truth).sum().clamp(min=1))


@pytest.mark.parametrize("pooled", [False, True])
def test_lovasz_is_the_convex_closure_of_the_jaccard_loss(pooled):
    """The extension of a set function at m is its mean over the level sets of m, {i: m_i > t}, t uniform in [0, 1]."""
    logits, labels = example(classes=3)

    def region(rows: list[int]) -> Tensor:
        p, y = (x[rows] for x in (logits.softmax(1).movedim(1, -1), labels))
        p, y = p[y != VOID], y[y != VOID]
        terms = []
        for c in y.unique():
            g = (y == c).double()
            m = (g - p[:, c]).abs()
            levels = torch.cat([torch.zeros(1, dtype=m.dtype), m.sort().values])
            sets = [jaccard_loss(tuple((m > t).nonzero()[:, 0].tolist()), g) for t in levels[:-1].tolist()]
            terms.append((levels.diff() * torch.tensor(sets, dtype=m.dtype)).sum())
        return torch.stack(terms).mean()

    out = dense.lovasz(logits, labels, pooled=pooled, ignore_id=VOID)
    expected = region([0, 1, 2]) if pooled else torch.stack([region([i]) for i in range(3)])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("pooled", [False, True])
def test_region_losses_are_0_for_what_is_right_and_1_for_what_is_wrong(pooled):
    labels = example(void=False)[1]
    right = 1e3 * F.one_hot(labels, 4).movedim(-1, 1).double()
    for loss, options in ((dense.dice, {"smooth": 0.0}), (dense.lovasz, {})):
        zero = loss(right, labels, pooled=pooled, **options)
        one = loss(right.roll(1, 1), labels, pooled=pooled, **options)
        torch.testing.assert_close(zero, torch.zeros_like(zero))
        torch.testing.assert_close(one, torch.ones_like(one))


LOSSES = {
    "cross-entropy": lambda x, y: dense.pixel_cross_entropy(x, y, ignore_id=VOID).mean,
    "focal": lambda x, y: dense.focal(x, y, ignore_id=VOID).mean,
    "dice": lambda x, y: dense.dice(x, y, ignore_id=VOID).mean(),
    "lovasz": lambda x, y: dense.lovasz(x, y, ignore_id=VOID).mean(),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@every_loss
def test_void_pixels_have_no_gradient_and_others_a_finite_one(loss):
    logits, labels = example()
    gradient = torch.func.grad(loss)(logits, labels)
    void = (labels == VOID)[:, None].expand_as(logits)
    assert gradient.isfinite().all() and (gradient[void] == 0).all() and (gradient[~void] != 0).any()
    for target in (torch.full_like(labels, VOID), labels):  # nothing but void; and logits that are sure
        gradient = torch.func.grad(loss)(1e3 * logits, target)
        assert gradient.isfinite().all() and loss(1e3 * logits, target).isfinite()
    assert float(loss(logits, torch.full_like(labels, VOID))) == 0


@every_loss
def test_derivatives_are_those_of_finite_differences(loss):
    logits, labels = example(batch=2)
    direction = random.normal(random.key(3), logits.shape).double()
    slope = (torch.func.grad(loss)(logits, labels) * direction).sum()
    ahead, back = (loss(logits + h * direction, labels) for h in (1e-6, -1e-6))
    torch.testing.assert_close(slope, (ahead - back) / 2e-6, rtol=1e-6, atol=1e-8)


@every_loss
def test_under_vmap_each_is_as_alone(loss):
    logits, labels = example()
    logits = torch.stack([logits, logits.flip(0)])
    together = torch.vmap(torch.func.grad_and_value(loss), (0, None))(logits, labels)
    for i in range(2):
        torch.testing.assert_close([x[i] for x in together], list(torch.func.grad_and_value(loss)(logits[i], labels)))


def test_half_precision_is_computed_in_single():
    logits, labels = example()
    half = logits.bfloat16()
    for loss in LOSSES.values():
        assert loss(half, labels).dtype == torch.float32
        torch.testing.assert_close(loss(half, labels), loss(half.float(), labels))


def test_wrong_arguments_are_refused():
    logits, labels = example()
    with pytest.raises(ValueError, match="labels must have the shape of the logits"):
        dense.dice(logits, labels[:, :-1])
    with pytest.raises(TypeError, match="class labels must be integers"):
        dense.lovasz(logits, labels.double())
    with pytest.raises(ValueError, match=r"expected logits \(batch, classes, \*space\)"):
        dense.focal(logits[0, 0], labels[0])
    with pytest.raises(ValueError, match="gamma is -1; expected at least 0"):
        dense.focal(logits, labels, gamma=-1)
