"""Average precision of detectors, by COCO's own evaluation (pycocotools), and curves of precision over recall.

Lin et al. 2014 (arXiv:1405.0312): AP is the mean over IoU thresholds 0.5, 0.55 ... 0.95 and over classes; AP50 is that
of 0.5 alone. Boxes are given to it in double precision: in single, an IoU of exactly 0.8 may fall to either side.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Frames(NamedTuple):
    """Boxes of one image, (count, 4) left, top, right, bottom in pixels, and labels (count,); of detections scores
    (count,); of the truth crowd (count,), True for boxes around groups, which count neither way, None for none."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor | None = None
    crowd: Tensor | None = None


class Precision(NamedTuple):
    """Figures in [0, 1]; NaN of a class without a box in the truth, which does not count in the means.

    Attributes:
        ap: mean over classes and IoU thresholds.
        ap50: mean over classes for an IoU of 0.5.
        ap75: mean over classes for an IoU of 0.75.
        per_class: (classes,) AP50.
        curves: (101, classes) precision at recall 0, 0.01 ... 1, for an IoU of 0.5.
    """

    ap: float
    ap50: float
    ap75: float
    per_class: np.ndarray
    curves: np.ndarray


def average_precision(
    detections: Sequence[Frames], truths: Sequence[Frames], classes: int, most: int = 100
) -> Precision:
    """Average precision of the detections of each image.

    Args:
        most: best detections of an image that count.

    Raises ValueError: other numbers of images, or detections without scores.
    """
    if len(detections) != len(truths) or any(one.scores is None for one in detections):
        numbers = f"{len(detections)} and {len(truths)}"
        raise ValueError(
            f"average_precision: expected detections with scores and truths of each image, found {numbers}"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth = COCO()
        truth.dataset = {
            "annotations": _records(truths),
            "categories": [{"id": i} for i in range(classes)],
            "images": [{"id": i} for i in range(len(truths))],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, _detections(truth, detections), "bbox")
        evaluation.params.maxDets = [most]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, 101, classes), -1 where there is no truth
    precision = np.where(precision < 0, np.nan, precision)
    per_class = precision[0].mean(0)
    return Precision(_mean(precision), _mean(precision[0]), _mean(precision[5]), per_class, precision[0])


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _records(frames: Sequence[Frames]) -> list[dict]:
    records = []
    for image, one in enumerate(frames):
        crowd = [False] * len(one.labels) if one.crowd is None else one.crowd.tolist()
        scores = [None] * len(one.labels) if one.scores is None else one.scores.double().tolist()
        rows = zip(one.boxes.double().tolist(), one.labels.tolist(), scores, crowd, strict=True)
        for (left, top, right, bottom), label, score, group in rows:
            size = (right - left, bottom - top)
            record = {"id": len(records) + 1, "image_id": image, "category_id": label, "area": size[0] * size[1]}
            record |= {"bbox": [left, top, *size], "iscrowd": int(group)}
            records.append(record if score is None else record | {"score": score})
    return records


def _detections(truth, detections: Sequence[Frames]):
    from pycocotools.coco import COCO

    out = COCO()
    out.dataset = truth.dataset | {"annotations": _records(detections)}
    out.createIndex()
    return out
