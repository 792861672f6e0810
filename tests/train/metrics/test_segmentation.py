"""Figures of segmentations, against scikit-learn and counts by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score

from core import random
from train.metrics import segmentation

VOID = 255


def maps(classes: int = 5, images: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(predicted, labels), each (images, 7, 9): the last class is predicted, but no pixel truly has it."""
    labels = random.randint(random.key(0), (images, 7, 9), 0, classes - 1).long()
    predicted = labels.where(
        random.uniform(random.key(1), labels.shape) < 0.6,
        random.randint(random.key(2), labels.shape, 0, classes).long(),
    )
    return predicted, labels.where(random.uniform(random.key(3), labels.shape) > 0.2, VOID)


def test_confusion_iou_and_dice_are_scikit_learns():
    predicted, labels = maps()
    counts = segmentation.confusion(predicted, labels, 5, VOID)
    y, x = (values[labels != VOID].numpy() for values in (labels, predicted))
    np.testing.assert_array_equal(counts, confusion_matrix(y, x, labels=range(5)))
    options = {"labels": range(4), "average": None}
    np.testing.assert_allclose(segmentation.iou(counts)[:4], jaccard_score(y, x, **options))
    np.testing.assert_allclose(segmentation.dice(counts)[:4], f1_score(y, x, **options))
    assert counts[:, 4].sum() > 0 and segmentation.iou(counts)[4].isnan() and segmentation.dice(counts)[4].isnan()


def test_means_leave_out_absent_classes_and_name_both_kinds_of_dice():
    """Two images: in the first 8 of 10 pixels of the object are met, in the second 1 of 2, and none of class 2."""
    counts = torch.tensor([[[88, 2, 0], [2, 8, 0], [0, 0, 0]], [[98, 0, 0], [1, 1, 0], [0, 0, 0]]])
    out = segmentation.figures(counts, background=True)
    assert out["dice_per_image"] == pytest.approx((16 / 20 + 2 / 3) / 2)
    assert out["dice_pooled"] == pytest.approx(18 / 23)
    assert out["mean_iou"] == pytest.approx((186 / 191 + 9 / 14) / 2)
    assert out["pixel_accuracy"] == pytest.approx(195 / 200)
    assert segmentation.figures(counts, background=False)["dice_pooled"] > out["dice_pooled"]


def test_pooled_counts_are_those_of_all_pixels_at_once():
    predicted, labels = maps()
    each = torch.stack([segmentation.confusion(*pair, 5, VOID) for pair in zip(predicted, labels, strict=True)])
    assert torch.equal(each.sum(0), segmentation.confusion(predicted, labels, 5, VOID))


def test_nothing_but_void_has_no_figure():
    empty = segmentation.confusion(torch.zeros(4, 4), torch.full((4, 4), VOID), 3, VOID)
    assert not empty.any() and segmentation.iou(empty).isnan().all()
    assert math.isnan(segmentation.figures(empty[None], True)["mean_iou"])


def test_objects_meet_by_their_overlap():
    true, predicted = torch.zeros(10, 12, dtype=torch.int64), torch.zeros(10, 12, dtype=torch.int64)
    true[0:4, 0:4], predicted[0:4, 1:4] = 1, 7  # IoU 12 / 16
    true[5:9, 0:4], predicted[5:7, 0:4] = 3, 2  # exactly 1/2: not above it
    predicted[0:3, 8:11] = 4
    true[8:10, 10:12] = 9
    out = segmentation.match_objects(predicted, true)
    assert out == (1, 2, 2) and out.f1 == pytest.approx(2 / 6)
    assert segmentation.match_objects(predicted, true, 0.75) == (0, 3, 3)
    assert segmentation.match_objects(true, true) == (3, 0, 0)
    empty = torch.zeros(10, 12, dtype=torch.int64)
    assert segmentation.match_objects(empty, true) == (0, 3, 0)
    assert math.isnan(segmentation.match_objects(empty, empty).f1)


def test_wrong_arguments_are_refused():
    predicted, labels = maps()
    with pytest.raises(ValueError, match=r"predicted \(3, 7, 9\) and labels \(3, 7, 8\)"):
        segmentation.confusion(predicted, labels[..., 1:], 5)
    with pytest.raises(ValueError, match="label values from 0 to 255; expected 0 to 4"):
        segmentation.confusion(predicted, labels, 5)
    with pytest.raises(ValueError, match="predicted values from 0 to 4; expected 0 to 3"):
        segmentation.confusion(predicted, labels, 4, VOID)
    with pytest.raises(ValueError, match=r"threshold is 0.3; expected at least 0.5"):
        segmentation.match_objects(predicted[0], predicted[0], 0.3)
