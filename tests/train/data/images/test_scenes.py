"""Generated scenes of digits."""

import pytest
import torch

from core import random
from train.data.images import scenes as parts
from train.data.images.arrays import digits


@pytest.fixture(scope="module")
def pool():
    return digits()[0]


@pytest.fixture(scope="module")
def some(pool):
    return parts.scenes(random.key(1), 200, pool)


def test_a_scene_is_a_function_of_its_key(pool, some):
    again, other = (parts.scenes(random.key(seed), 200, pool) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(some, again, strict=True))
    assert not torch.equal(some.images, other.images)


def test_pixels_boxes_and_labels_agree(some):
    assert some.images.shape == (200, 3, 64, 64) and 0 <= some.images.min() and some.images.max() <= 1
    live = some.labels >= 0
    assert live[:, 0].all() and set(live.sum(1).tolist()) == {1, 2, 3, 4}
    for i in range(200):
        for slot in range(4):
            mine = some.instances[i] == slot + 1
            if not live[i, slot]:
                assert not mine.any() and some.boxes[i, slot].tolist() == [0, 0, 0, 0]
                continue
            assert set(some.masks[i][mine].tolist()) == {int(some.labels[i, slot]) + 1}
            rows, columns = mine.nonzero().T
            left, top, right, bottom = some.boxes[i, slot].tolist()
            assert left <= columns.min() and columns.max() < right <= 64
            assert top <= rows.min() and rows.max() < bottom <= 64
    assert torch.equal(some.masks > 0, some.instances > 0)


def test_boxes_of_single_digits_are_tight(pool):
    single = parts.scenes(random.key(3), 50, pool, most=1)
    for mask, (left, top, right, bottom) in zip(single.masks, single.boxes[:, 0].tolist(), strict=True):
        rows, columns = (mask > 0).nonzero().T
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [left, top, right, bottom]


def test_the_ink_has_its_colour(pool):
    single = parts.scenes(random.key(3), 50, pool, most=1)
    for image, mask, colour in zip(single.images, single.masks, single.colours[:, 0].tolist(), strict=True):
        ink = image[:, mask > 0].quantile(0.75, 1)
        distances = [float((ink - torch.tensor(rgb)).norm()) for rgb in parts.COLOURS.values()]
        assert distances.index(min(distances)) == colour


def test_captions(some):
    out = parts.captions(some)
    for text, boxes, labels in zip(out, some.boxes, some.labels, strict=True):
        live = [slot for slot in range(4) if labels[slot] >= 0]
        live.sort(key=lambda slot, boxes=boxes: float(boxes[slot, 0] + boxes[slot, 2]))
        assert [part.split()[-1] for part in text.split(" left of ")] == [parts.NUMBERS[labels[slot]] for slot in live]
    assert parts.captions(parts.scenes(random.key(0), 1, digits()[0], least=0, most=1))[0]


def test_pairs_that_are_held_out(pool):
    without = [("red", 7), *(("blue", digit) for digit in range(10))]
    many = parts.scenes(random.key(5), 500, pool, without=without)
    pairs = set(zip(many.colours.flatten().tolist(), many.labels.flatten().tolist(), strict=True))
    assert (0, 7) not in pairs and (0, 6) in pairs and (1, 7) in pairs and not any(colour == 2 for colour, _ in pairs)


def test_errors(pool):
    for options, message in (
        ({"sizes": (10, 65)}, "up to the canvas of 64"),
        ({"least": 3, "most": 2}, "from 3 to 2 digits"),
        ({"without": [("pink", 7)]}, "no pair"),
    ):
        with pytest.raises(ValueError, match=message):
            parts.scenes(random.key(0), 1, pool, **options)
