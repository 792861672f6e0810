"""Tiles: they cover the picture, weigh to one, leave no seam, and keep memory bounded."""

import pytest
import torch
from torch.nn import functional as F

from core import random
from train.data import DataError
from train.data.images.blended_tiles import blended, ramp, starts


def joined(predict, picture, tile, overlap, **options):
    rows, values = zip(*blended(predict, picture, tile, overlap, **options), strict=True)
    assert [r.start for r in rows] == [0, *(r.stop for r in rows[:-1])] and rows[-1].stop == picture.shape[1]
    return torch.cat(values, 1)


@pytest.mark.parametrize(("tile", "overlap"), [(32, 8), (33, 0), (64, 32), (200, 20), (16, 8)])
def test_a_prediction_of_each_pixel_alone_is_that_of_the_whole(tile, overlap):
    picture = random.normal(random.key(0), (3, 100, 75))
    out = joined(lambda x: 2 * x[:, :2] + 1, picture, tile, overlap)
    torch.testing.assert_close(out, 2 * picture[:2] + 1)


def test_tiles_overlap_by_at_least_as_much_as_is_asked_for():
    for length, tile, overlap in ((100, 32, 8), (33, 32, 8), (1000, 64, 31), (64, 64, 20), (10, 64, 20)):
        first = starts(length, tile, overlap)
        assert first[0] == 0 and first[-1] == max(0, length - tile)
        gaps = [b - a for a, b in zip(first, first[1:], strict=False)]
        assert all(0 < gap <= tile - overlap for gap in gaps)
    assert starts(100, 32, 0) == [0, 23, 45, 68]


def test_ramps_of_neighbours_change_smoothly():
    weights = ramp(12, 4)
    torch.testing.assert_close(weights[:6], torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 1.0]))
    assert torch.equal(weights, weights.flip(0))
    assert (ramp(5, 0) == 1).all()


def test_seams_are_blended():
    """Each tile gives its own mean: without overlap the result jumps, with one it is smooth."""
    picture = torch.linspace(0, 1, 128).expand(1, 128, 128)

    def mean(x):
        return x.mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[2:])

    hard, soft = (joined(mean, picture, 32, overlap)[0, 0].diff().abs().max() for overlap in (0, 16))
    assert hard > 0.2 and soft < 0.02


def test_a_smoothing_net_is_exact_away_from_the_borders_of_tiles():
    picture = random.normal(random.key(1), (1, 90, 70))
    kernel = torch.ones(1, 1, 5, 5) / 25

    def smooth(x):
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), kernel)

    out, whole = joined(smooth, picture, 40, 20), smooth(picture[None])[0]
    assert starts(90, 40, 20)[1] == 17 and starts(70, 40, 20)[1] == 15  # before these one tile covers a pixel
    torch.testing.assert_close(out[:, :17, :15], whole[:, :17, :15])
    assert float((out - whole).abs().mean()) < 0.03


def test_nets_of_one_size_get_it():
    shapes = []

    def square(x):
        shapes.append(tuple(x.shape[2:]))
        return x

    picture = random.normal(random.key(2), (3, 20, 50))
    torch.testing.assert_close(joined(square, picture, 32, 8, square=True), picture)
    assert set(shapes) == {(32, 32)} and len(shapes) == 2
    small = (255 * random.uniform(random.key(3), (3, 5, 7))).byte()
    assert torch.equal(joined(lambda x: x.float(), small, 16, 0, square=True), small.float())


def test_no_more_than_a_band_is_held():
    """Values are kept for the height of a tile, not for that of the picture, which has ten of them."""
    picture, largest = torch.zeros(1, 800, 60), 0
    for _, values in blended(lambda x: x.expand(-1, 50, -1, -1), picture, 100, 20):
        largest = max(largest, values.untyped_storage().nbytes() // (4 * 50 * 60))
    assert largest <= 100


@pytest.mark.parametrize(("tile", "overlap"), [(10, 6), (0, 0), (8, -1)])
def test_tiles_that_are_too_small_are_refused(tile, overlap):
    with pytest.raises(DataError, match="expected at least twice the overlap"):
        next(blended(lambda x: x, torch.zeros(1, 30, 30), tile, overlap))
