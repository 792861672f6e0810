"""Boxes: overlaps against torchvision's and counted pixels, suppression against a brute force."""

import pytest
import torch

from core import boxes, random


def some(key, count, side=20.0):
    """(count, 4) boxes with an area."""
    a, b = random.uniform(random.key(key), (2, count, 2), maxval=side).unbind(0)
    return torch.cat([torch.minimum(a, b), torch.maximum(a, b) + 0.1], -1)


def test_iou_counts_common_pixels():
    whole = some(0, 30).round()
    grid = torch.arange(25) + 0.5

    def pixels(box):
        left, top, right, bottom = box
        return ((grid > left) & (grid < right))[None] & ((grid > top) & (grid < bottom))[:, None]

    expected = torch.zeros(30, 30)
    for i in range(30):
        for j in range(30):
            a, b = pixels(whole[i]), pixels(whole[j])
            expected[i, j] = (a & b).sum() / (a | b).sum().clamp(min=1)
    torch.testing.assert_close(boxes.iou(whole[:, None], whole), expected)


def test_generalized_iou_equals_torchvision():
    ops = pytest.importorskip("torchvision.ops.boxes", exc_type=ImportError)
    a, b = some(1, 40).double(), some(2, 50).double()
    torch.testing.assert_close(boxes.generalized_iou(a[:, None], b), ops.generalized_box_iou(a, b), rtol=0, atol=1e-14)
    torch.testing.assert_close(boxes.iou(a[:, None], b), ops.box_iou(a, b), rtol=0, atol=1e-14)


def test_boxes_without_area():
    flat, inverted, box = torch.tensor([[1.0, 1, 1, 5], [4, 4, 2, 2], [0, 0, 4, 4]]).unbind(0)
    for other in (flat, inverted):
        assert boxes.iou(other, box) == 0 and boxes.iou(other, other) == 0 and boxes.area(other) == 0
    assert boxes.generalized_iou(flat, flat) == 0
    grads = torch.func.grad(lambda b: boxes.generalized_iou(b, flat).sum())(flat)
    assert grads.isfinite().all()


def test_centres_and_clipping():
    a = some(3, 9)
    torch.testing.assert_close(boxes.from_centres(boxes.to_centres(a)), a)
    clipped = boxes.clip(a - 5, 10, 8)
    assert clipped.min() >= 0 and clipped[:, [0, 2]].max() <= 8 and clipped[:, [1, 3]].max() <= 10


def brute_force(all_boxes, scores, labels, threshold):
    overlaps = boxes.iou(all_boxes[:, None], all_boxes).tolist()
    left, out = sorted(range(len(scores)), key=lambda i: -scores[i]), []
    while left:
        best, *rest = left
        out.append(best)
        left = [i for i in rest if labels[i] != labels[best] or overlaps[i][best] <= threshold]
    return out


def test_suppression_equals_a_brute_force():
    for case in range(500):
        key = random.split(random.key(case), 4).unbind(0)
        count = int(random.randint(key[0], (), 0, 12))
        all_boxes = some(1000 + case, count, side=8.0)
        scores = random.randint(key[1], (count,), 0, 6) / 5  # with ties
        labels = random.randint(key[2], (count,), 0, 2)
        threshold = float(random.uniform(key[3], ()))
        out = boxes.suppress(all_boxes, scores, labels, threshold)
        assert out.tolist() == brute_force(all_boxes, scores.tolist(), labels.tolist(), threshold), case


def test_suppression_takes_boxes_and_scores():
    with pytest.raises(ValueError, match=r"found boxes \(3, 4\) and scores \(2,\)"):
        boxes.suppress(torch.zeros(3, 4), torch.zeros(2))
    assert boxes.suppress(torch.zeros(0, 4), torch.zeros(0)).tolist() == []
