"""Bicubic resizing against Keys' kernel written out; luminance and back."""

import numpy as np
import pytest
import torch
from PIL import Image

from core import random
from train.data.images import resize


def keys(x):
    """Keys 1981, eq. 15, a = -1/2."""
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def matrix(n, m):
    """The weights (m, n) of m pixels made of n, the kernel widened where the picture shrinks."""
    step = n / m
    width = max(1.0, step)
    weights = np.array([[keys((step * (i + 0.5) - 0.5 - j) / width) for j in range(n)] for i in range(m)])
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(4, 3), (24, 27), (12, 9), (7, 20)])
def test_bicubic(size):
    x = random.normal(random.key(0), (2, 3, 12, 9), torch.float64)
    expected = torch.einsum(
        "ip,jq,bcpq->bcij", *(torch.tensor(matrix(n, m)) for n, m in zip((12, 9), size, strict=True)), x
    )
    torch.testing.assert_close(resize.bicubic(x, size), expected)


@pytest.mark.parametrize("scale", [2, 3, 4, 5])
def test_enlarged(scale):
    x = random.normal(random.key(0), (2, 3, 7, 5), torch.float64)
    torch.testing.assert_close(resize.enlarged(x, scale), resize.bicubic(x, (7 * scale, 5 * scale)))


def test_enlarged_parts_are_those_of_the_whole():
    """In single precision: to the last digit, far from the corner too."""
    x = random.uniform(random.key(0), (1, 1, 300, 40))
    whole = resize.enlarged(x, 3)
    part = resize.enlarged(x[:, :, 250:290], 3)[:, :, 6:-6]
    torch.testing.assert_close(part, whole[:, :, 756:864], rtol=0, atol=2.4e-7)


def test_bicubic_equals_pillow():
    x = random.uniform(random.key(0), (30, 24))
    expected = np.asarray(Image.fromarray(x.numpy()).resize((8, 10), Image.Resampling.BICUBIC))
    torch.testing.assert_close(resize.lowered(x[None, None], 3)[0, 0], torch.tensor(expected))


def test_an_enlarged_pixel_depends_on_its_neighbours():
    x = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    for scale in (2, 3, 4):
        rows = resize.enlarged(x.index_fill(2, torch.tensor([4]), 1.0), scale)[0, 0, :, 0].nonzero()
        assert rows.min() // scale >= 4 - resize.REACH and rows.max() // scale <= 4 + resize.REACH


def test_sizes():
    x = torch.zeros(1, 1, 11, 13)
    assert resize.cropped(x, 3).shape == (1, 1, 9, 12) and resize.enlarged(x, 3).shape == (1, 1, 33, 39)
    with pytest.raises(ValueError, match="11 x 13 pixels cannot be lowered by 3; crop them to multiples"):
        resize.lowered(x, 3)


def test_luminance():
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).T[None, :, :, None]
    expected = torch.tensor([16, 235, 16 + 65.481, 16 + 128.553, 16 + 24.966]) / 255
    torch.testing.assert_close(resize.luminance(corners)[0, 0, :, 0], expected)
    grey = torch.tensor([[[[0.0, 0.5, 1.0]]]])
    torch.testing.assert_close(resize.luminance(grey)[0, 0, 0], torch.tensor([16, 125.5, 235]) / 255)
    x = random.uniform(random.key(0), (2, 3, 5, 4), torch.float64)
    torch.testing.assert_close(resize.rgb(resize.ycbcr(x)), x)
    # Pillow's is in the full range, without the offset and the factors 219/255 and 224/255, and rounds down.
    image = Image.fromarray((255 * x[0]).round().byte().permute(1, 2, 0).numpy())
    theirs = torch.tensor(np.asarray(image.convert("YCbCr"))).permute(2, 0, 1).double()
    ours = 255 * resize.ycbcr((255 * x[:1]).round() / 255)[0]
    torch.testing.assert_close((ours[0] - 16) * 255 / 219, theirs[0], atol=1.1, rtol=0)
    torch.testing.assert_close((ours[1:] - 128) * 255 / 224 + 128, theirs[1:], atol=1.1, rtol=0)
