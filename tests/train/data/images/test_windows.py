"""Random windows: functions of key and step, the same change for a picture and its mask, void outside."""

import pytest
import torch

from core import random
from train.data.images.mask_sets import Segmented
from train.data.images.masks import VOID
from train.data.images.windows import Changes, windows

KEY = random.key(3)


def part(sizes: tuple[tuple[int, int], ...] = ((30, 40), (25, 33), (40, 28))) -> Segmented:
    """Pictures whose three channels are row, column and number, and whose mask is (row + column) % 5."""
    images, masks = [], []
    for i, (height, width) in enumerate(sizes):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        images.append(torch.stack([rows, columns, torch.full_like(rows, i)]).byte())
        masks.append(((rows + columns) % 5).byte())
    return Segmented(tuple(images), tuple(masks), ())


def test_a_batch_is_a_function_of_key_and_step():
    for changes in (Changes(), Changes(0.5, True, True, 0.3)):
        first, again, later = (windows(KEY, step, 3, 16, part(), changes) for step in (4, 4, 5))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], later[0])
        assert first[0].shape == (3, 3, 16, 16) and first[1].shape == (3, 16, 16) and first[1].dtype == torch.uint8


def test_an_epoch_has_every_picture_and_a_large_batch_some_twice():
    numbers = [int(windows(KEY, step, 1, 8, part())[0][0, 2, 0, 0]) for step in range(3)]
    assert sorted(numbers) == [0, 1, 2]
    images, _ = windows(KEY, 0, 6, 8, part())
    assert sorted(images[:, 2, 0, 0].tolist()) == [0, 0, 1, 1, 2, 2]
    assert len({tuple(image[:2, 0, 0].tolist()) for image in images}) > 3  # other windows of the same picture


@pytest.mark.parametrize("changes", [Changes(), Changes(flip=True), Changes(turn=True)])
def test_a_mask_moves_with_its_picture(changes):
    for step in range(8):
        images, masks = windows(KEY, step, 3, 16, part(), changes)
        assert torch.equal(masks.long(), (images[:, 0].long() + images[:, 1].long()) % 5)


def test_flips_and_turns_are_all_that_there_are():
    """The corner with the smallest row and column tells which of the eight it was."""
    seen = {name: set() for name in ("none", "flip", "turn")}
    for name, changes in (("none", Changes()), ("flip", Changes(flip=True)), ("turn", Changes(turn=True))):
        for step in range(30):
            images, _ = windows(KEY, step, 3, 8, part(), changes)
            for image in images.long():
                right = image[:2, 0, 1] - image[:2, 0, 0]
                down = image[:2, 1, 0] - image[:2, 0, 0]
                seen[name].add((*right.tolist(), *down.tolist()))
    assert seen["none"] == {(0, 1, 1, 0)}
    assert seen["flip"] == {(0, 1, 1, 0), (0, -1, 1, 0)}
    assert len(seen["turn"]) == 8


def test_outside_of_a_small_picture_is_black_and_void():
    images, masks = windows(KEY, 0, 1, 16, part(((10, 40),)))
    assert (masks[0, 10:] == VOID).all() and not images[0, :, 10:].any()
    assert (masks[0, :10] < 5).all()
    whole, masks = windows(KEY, 0, 1, 16, part(((16, 16),)))
    assert torch.equal(whole[0], part(((16, 16),)).images[0]) and not (masks == VOID).any()


def test_zoom_keeps_classes_and_shows_more_or_less():
    """Across a window of 16 pixels the row rises by 16 / zoom."""
    rises, reach = [], 1.5
    for step in range(40):
        images, masks = windows(KEY, step, 1, 16, part(((60, 60),)), Changes(zoom=reach - 1))
        rises.append(float(images[0, 0, -1, 0].int() - images[0, 0, 0, 0].int()) / 15)
        assert set(masks.unique().tolist()) <= set(range(5))
    assert 1 / reach - 0.1 < min(rises) < 0.85 and 1.2 < max(rises) < reach + 0.1


def test_colours_change_and_the_mask_does_not():
    plain, jittered = (windows(KEY, 2, 3, 16, part(), Changes(colour_jitter=x)) for x in (0.0, 0.4))
    assert torch.equal(plain[1], jittered[1]) and jittered[0].dtype == torch.float32
    assert 0 <= jittered[0].min() and jittered[0].max() <= 1
    assert not torch.allclose(plain[0] / 255, jittered[0])
