"""Nearest neighbours against torch's."""

import pytest
import torch
from torch.nn import functional as F

from core import random
from core.layers import upsample_nearest


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_equals_torch(factor):
    x, weights = (
        random.normal(random.key(0), (2, 3, 4, 5)),
        random.normal(random.key(1), (2, 3, 4 * factor, 5 * factor)),
    )

    def ours(x):
        return (upsample_nearest(x, factor) * weights).sum()

    def theirs(x):
        return (F.interpolate(x, scale_factor=factor, mode="nearest") * weights).sum()

    assert torch.equal(upsample_nearest(x, factor), F.interpolate(x, scale_factor=factor, mode="nearest"))
    torch.testing.assert_close(torch.func.grad(ours)(x), torch.func.grad(theirs)(x))


@pytest.mark.parametrize(("large", "small"), [(25, 13), (24, 12), (7, 4), (1, 1)])
def test_cut_to_an_odd_size_equals_torch(large, small):
    x = random.normal(random.key(0), (1, 2, small, small))
    assert torch.equal(upsample_nearest(x)[:, :, :large, :large], F.interpolate(x, size=(large, large), mode="nearest"))


def test_names_a_wrong_shape():
    with pytest.raises(
        ValueError, match=r"upsample_nearest: expected \(batch, channels, height, width\), found \(2, 3, 4\)"
    ):
        upsample_nearest(torch.zeros(2, 3, 4))
