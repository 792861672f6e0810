"""Average precision against torchmetrics' definition written out, and its edges."""

import math

import numpy as np
import pytest
import torch

from core import boxes, random
from train.metrics.detection import Frames, average_precision


def some(key, count, classes=3, scored=True):
    k = random.split(key, 4).unbind(0)
    corner, size = random.randint(k[0], (count, 2), 0, 12), random.randint(k[1], (count, 2), 1, 9)
    scores = random.randint(k[3], (count,), 0, 8) / 7 if scored else None  # with ties
    frames = torch.cat([corner, corner + size], 1).double()
    return Frames(frames, random.randint(k[2], (count,), 0, classes).long(), scores)


def by_definition(detections, truths, label, threshold):
    """Interpolated precision at 101 recalls: greedy by score over all images, each box once."""
    total = sum(int((one.labels == label).sum()) for one in truths)
    if not total:
        return math.nan
    ranked = [
        (float(score), image, i)
        for image, one in enumerate(detections)
        for i, score in enumerate(one.scores)
        if one.labels[i] == label
    ]
    order = sorted(range(len(ranked)), key=lambda n: -ranked[n][0])
    taken, hits = set(), []
    for n in order:
        _, image, i = ranked[n]
        truth, best, row = truths[image], threshold, None
        for j in (truth.labels == label).nonzero()[:, 0].tolist():
            overlap = float(boxes.iou(detections[image].boxes[i], truth.boxes[j]))
            if (image, j) not in taken and overlap >= best - 1e-12:
                best, row = overlap, j
        hits.append(row is not None)
        if row is not None:
            taken.add((image, row))
    right = np.cumsum(hits) if hits else np.zeros(0)
    recall, precision = right / total, right / np.arange(1, len(hits) + 1)
    levels = [max(precision[recall >= r - 1e-9], default=0.0) for r in np.linspace(0, 1, 101)]
    return float(np.mean(levels))


def test_equals_the_definition():
    for case in range(20):
        key = random.split(random.key(case), 12).unbind(0)
        counts = random.randint(random.key(1000 + case), (12,), 0, 5).tolist()
        detections = [some(key[i], counts[i]) for i in range(6)]
        truths = [some(key[6 + i], counts[6 + i], scored=False) for i in range(6)]
        # Half of the detections are where something is.
        detections = [
            one._replace(boxes=torch.cat([truth.boxes[: len(one.labels) // 2 + 1], one.boxes])[: len(one.labels)])
            for one, truth in zip(detections, truths, strict=True)
        ]
        out = average_precision(detections, truths, 3)
        for threshold, actual in ((0.5, out.ap50), (0.75, out.ap75)):
            each = [by_definition(detections, truths, label, threshold) for label in range(3)]
            mean = np.nanmean(each) if np.isfinite(each).any() else math.nan
            np.testing.assert_allclose(actual, mean, atol=1e-6, equal_nan=True, err_msg=f"{case} at {threshold}")
            if threshold == 0.5:
                np.testing.assert_allclose(out.per_class, each, atol=1e-6, equal_nan=True)


def test_perfect_detections_and_none():
    truth = [some(random.key(1), 4, scored=False), some(random.key(2), 0, scored=False)]
    same = [one._replace(scores=torch.ones(len(one.labels))) for one in truth]
    assert average_precision(same, truth, 3).ap == pytest.approx(1.0)
    nothing = [some(random.key(3), 0)] * 2
    assert average_precision(nothing, truth, 3).ap50 == 0.0
    assert math.isnan(average_precision(nothing, [some(random.key(3), 0, scored=False)] * 2, 3).ap)


def test_a_crowd_counts_neither_way():
    box = torch.tensor([[0.0, 0, 4, 4]])
    crowd = Frames(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([0]), crowd=torch.tensor([True]))
    detection = Frames(box, torch.tensor([0]), torch.tensor([0.9]))
    alone = Frames(box + 20, torch.tensor([0]))
    hit = Frames(box + 20, torch.tensor([0]), torch.tensor([0.5]))
    assert average_precision([detection, hit], [crowd, alone], 1).ap50 == pytest.approx(1.0)


def test_errors():
    with pytest.raises(ValueError, match="found 1 and 0"):
        average_precision([some(random.key(0), 1)], [], 3)
