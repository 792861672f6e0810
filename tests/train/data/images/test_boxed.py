"""Pictures with boxes that move with them."""

import numpy as np
import pytest
import torch
from PIL import Image

from core import random
from train.data import DataError
from train.data.images import boxed
from train.data.images.annotations import Annotated


def painted(boxes, labels, side=40):
    """(1, 1, side, side): 0.45, and 1 inside the boxes."""
    image = torch.full((1, 1, side, side), 0.45)
    for (left, top, right, bottom), label in zip(boxes[0].tolist(), labels[0].tolist(), strict=True):
        if label >= 0:
            image[0, 0, round(top) : round(bottom), round(left) : round(right)] = 1.0
    return image


def around(image):
    """The box around the bright pixels."""
    rows, columns = (image[0] > 0.72).nonzero().T
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


BOXES, LABELS = torch.tensor([[[5.0, 8, 25, 18], [0, 0, 0, 0]]]), torch.tensor([[2, -1]])


@pytest.mark.parametrize("change", [boxed.flip, boxed.zoom])
def test_boxes_move_with_the_pixels(change):
    image, moved = painted(BOXES, LABELS), set()
    for seed in range(30):
        keys = random.split(random.key(seed), 1)
        out, boxes, labels = change(keys, image, BOXES, LABELS)
        assert labels[0, 1] == -1 and boxes[0, 1].tolist() == [0, 0, 0, 0]
        if labels[0, 0] == 2:
            expected = torch.tensor(around(out[0]), dtype=torch.float32)
            assert (boxes[0, 0] - expected).abs().max() <= 1.0, seed
        moved.add(tuple(boxes[0, 0].round().tolist()))
    assert len(moved) > 1


def test_zoom_drops_what_is_outside():
    corner, label = torch.tensor([[[0.0, 0, 6, 6]]]), torch.tensor([[1]])
    image, kept = painted(corner, label), set()
    for seed in range(40):
        _, boxes, labels = boxed.zoom(random.split(random.key(seed), 1), image, corner, label, least=1.5, greatest=2.0)
        kept.add(int(labels[0, 0]))
        assert boxes.min() >= 0 and boxes.max() <= 40 and (labels[0, 0] == 1 or not boxes.any())
    assert kept == {1, -1}


def test_mosaic():
    boxes = torch.tensor([[[4.0, 4, 16, 12]], [[20, 20, 36, 36]], [[0, 0, 0, 0]], [[2, 30, 30, 38]]])
    labels = torch.tensor([[0], [1], [-1], [3]])
    images = torch.cat([painted(boxes[[i]], labels[[i]]) for i in range(4)])
    out, frames, kinds = boxed.mosaic(images, boxes, labels)
    assert out.shape == images.shape and kinds[0].tolist() == [0, 1, -1, 3] and kinds[1].tolist() == [1, -1, 3, 0]
    assert frames[0].tolist() == [[2, 2, 8, 6], [30, 10, 38, 18], [0, 0, 0, 0], [21, 35, 35, 39]]
    for (left, top, right, bottom), label in zip(frames[0].int().tolist(), kinds[0].tolist(), strict=True):
        assert label < 0 or out[0, 0, top + 1 : bottom - 1, left + 1 : right - 1].min() > 0.9


def test_reading(tmp_path):
    pixels = np.zeros((50, 100, 3), np.uint8)
    pixels[10:30, 20:60] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("no picture")
    box = ((20.0, 10.0, 60.0, 30.0),)
    entries = [
        Annotated(tmp_path / "a.png", (100, 50), ("cat",), box, (False,)),
        Annotated(tmp_path / "b.png", (50, 100), ("cat",), box, (False,)),
        Annotated(tmp_path / "c.png", None, (), (), ()),
        Annotated(tmp_path / "a.png", None, (), (), ()),
    ]
    out, skipped = boxed.read(entries, ("dog", "cat"), 40)
    assert out.images.shape == (2, 3, 40, 40) and out.images.dtype == torch.uint8
    assert out.boxes[0, 0].tolist() == [8, 4, 24, 12] and out.labels.tolist() == [[1], [-1]]
    assert around(out.images[0, :1] / 255) == [8, 4, 24, 12] and int(out.images[0, 0, -1, 0]) == 114
    inside = boxed.unfilled(out.images[0])
    assert torch.equal(inside, out.images[0, :, :20])
    assert boxed.unfilled(out.images[0, :, 20:]).shape == (3, 20, 40)  # nothing but grey stays whole
    assert [path.name for path, _ in skipped] == ["b.png", "c.png"]
    assert skipped[0][1] == "is 100 x 50, its annotation says 50 x 100"
    with pytest.raises(DataError, match="no picture with boxes can be used"):
        boxed.read(entries[1:3], ("cat",), 40)
