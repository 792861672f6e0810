"""Patches at two resolutions: a function of key and step, that fit each other, anywhere in every picture."""

import pytest
import torch

from core import random
from train.data import DataError
from train.data.images import patches, resize

SIZES = ((30, 41), (26, 25), (12, 60))


def pictures(channels=1):
    keys = random.split(random.key(0), len(SIZES))
    return [random.randint(k, (channels, *size), 0, 256).to(torch.uint8) for k, size in zip(keys, SIZES, strict=True)]


def test_lowered_pictures():
    high = pictures(3)
    low = patches.lowered_all(high, 4)
    assert [tuple(x.shape) for x in low] == [(3, 7, 10), (3, 6, 6), (3, 3, 15)]
    expected = resize.lowered(high[0][None, :, :28, :40] / 255, 4)[0]
    torch.testing.assert_close(low[0], expected)


def test_batches():
    high = pictures()
    low, key = patches.lowered_all(high, 3), random.key(1)
    first, again, other = (patches.batch_at(key, step, 50, 12, 3, high, low) for step in (0, 0, 1))
    for a, b, c, size in zip(first, again, other, (4, 12), strict=True):
        assert a.shape == (50, 1, size, size) and torch.equal(a, b) and not torch.equal(a, c)


def test_small_and_large_patches_show_the_same():
    """Pictures of blocks of 3 x 3 equal pixels, lowered by taking one of each."""
    blocks = [x[:, ::3, ::3][:, : n // 3, : m // 3] for x, (n, m) in zip(pictures(), SIZES, strict=True)]
    high = [x.repeat_interleave(3, 1).repeat_interleave(3, 2) for x in blocks]
    small, large = patches.batch_at(random.key(1), 0, 200, 12, 3, high, [x / 255 for x in blocks])
    assert torch.equal(small.repeat_interleave(3, 2).repeat_interleave(3, 3), large)


def test_each_position_of_each_picture_is_equally_likely():
    """Pictures whose pixels are all different: the least of a patch tells its position."""
    low = [torch.arange(20.0).reshape(1, 4, 5), 100 + torch.arange(12.0).reshape(1, 3, 4)]
    high = [torch.zeros(1, 2 * x.shape[1], 2 * x.shape[2], dtype=torch.uint8) for x in low]
    n = 8000
    small, _ = patches.batch_at(random.key(1), 0, n, 4, 2, high, low)  # 3 * 4 and 2 * 3 positions of 2 x 2 pixels
    counts = small.flatten(1).amin(1).long().bincount(minlength=112)
    expected = {r * 5 + c for r in range(3) for c in range(4)} | {100 + r * 4 + c for r in range(2) for c in range(3)}
    assert set(counts.nonzero()[:, 0].tolist()) == expected
    assert ((counts[counts > 0] - n / 18).abs() < 5 * (n / 18) ** 0.5).all()
    kinds = {tuple((x - x.min()).flatten().tolist()) for x in small if x.min() < 100}
    assert len(kinds) == 8  # the symmetries of a square


def test_symmetries():
    x = torch.arange(6.0).reshape(1, 2, 3)
    turned = [patches.turned(x, *symmetry) for symmetry in patches.SYMMETRIES]
    assert len({(tuple(y.shape), tuple(y.flatten().tolist())) for y in turned}) == 8 and torch.equal(turned[0], x)
    for y, symmetry in zip(turned, patches.SYMMETRIES, strict=True):
        assert torch.equal(patches.returned(y, *symmetry), x)


def test_wrong_sizes():
    high = pictures()
    low = patches.lowered_all(high, 3)
    with pytest.raises(DataError, match="a patch of 10 pixels cannot be lowered by 3; expected a multiple"):
        patches.batch_at(random.key(0), 0, 2, 10, 3, high, low)
    with pytest.raises(DataError, match="no picture has a patch of 33 x 33 pixels"):
        patches.batch_at(random.key(0), 0, 2, 33, 3, high, low)
    small, _ = patches.batch_at(random.key(0), 0, 100, 27, 3, high, low)  # the first has room for it, the others not
    assert small.shape == (100, 1, 9, 9)
