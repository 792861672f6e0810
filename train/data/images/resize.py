"""Bicubic resizing, and the low-resolution pictures of super-resolution.

The kernel is Keys' with a = -1/2 (1981, "Cubic convolution interpolation for digital image processing"), widened where
the picture shrinks: that of MATLAB's imresize, by which the figures of papers are computed, apart from the outermost
pixels (the weights are renormalised at a border, where MATLAB mirrors the picture). Bicubic PSNR of Set5 agrees with
the published figures to 0.003 dB. Without `antialias` torch's kernel is another one, a = -3/4.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

REACH = 2
"""Pixels on each side that a pixel of an enlarged picture depends on."""


def bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images of another (height, width): floats (batch, channels, height, width), not clipped to any range."""
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def lowered(images: Tensor, scale: int) -> Tensor:
    """The low-resolution version of images whose sides are multiples of the scale."""
    height, width = images.shape[-2:]
    if scale < 1 or height % scale or width % scale:
        raise ValueError(f"images of {height} x {width} pixels cannot be lowered by {scale}; crop them to multiples")
    return bicubic(images, (height // scale, width // scale))


def enlarged(images: Tensor, scale: int) -> Tensor:
    """Images with `scale` times the height and width, by the same kernel.

    As a convolution, whose weights recur from pixel to pixel: torch's own are those of positions in single precision,
    so that a part of a picture would differ from the same part of the whole in the fifth digit.
    """
    batch, channels, height, width = images.shape
    # Positions of the new pixels in an old one, from its middle.
    positions = (torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5
    distances = (positions[:, None] - torch.arange(-REACH, REACH + 1)).abs()  # (scale, taps)
    taps = _keys(distances).to(images)
    x = images.reshape(batch * channels, 1, height, width)
    for axis in (2, 3):
        shape, padding = [(scale, 1, -1, 1), (scale, 1, 1, -1)][axis - 2], [(REACH, 0), (0, REACH)][axis - 2]
        sums = F.conv2d(torch.ones_like(x[:1]), taps.view(shape), padding=padding)  # 1 but at the border
        y = F.conv2d(x, taps.view(shape), padding=padding) / sums  # (images, scale, rows, columns)
        x = y.movedim(1, axis).flatten(axis - 1, axis)[:, None]  # (images, 1, scale rows, columns), then the columns
    return x.view(batch, channels, scale * height, scale * width)


def _keys(x: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2 at distances x: 3/2 x³ - 5/2 x² + 1 up to 1, -1/2 x³ + 5/2 x² - 4 x + 2 up to 2."""
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def cropped(images: Tensor, multiple: int) -> Tensor:
    """The upper left part of images (..., height, width) whose sides are the largest multiples."""
    height, width = (n // multiple * multiple for n in images.shape[-2:])
    return images[..., :height, :width]


def luminance(images: Tensor) -> Tensor:
    """Y of R'G'B' in the studio range of ITU-R BT.601: 16/255 for black, 235/255 for white.

    Y = (16 + 65.481 R + 128.553 G + 24.966 B) / 255

    images: (batch, 3, height, width) in [0, 1], or grey with one channel -> (batch, 1, height, width).
    """
    return ycbcr(images.expand(-1, 3, -1, -1))[:, :1]


FORWARD = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
OFFSET = (16.0, 128.0, 128.0)


def ycbcr(images: Tensor) -> Tensor:
    """Y, Cb and Cr of R'G'B', as MATLAB's rgb2ycbcr: (batch, 3, height, width) in [0, 1] -> the same shape."""
    matrix, offset = _colour(images)
    return torch.einsum("ij,bjhw->bihw", matrix, images) + offset


def rgb(images: Tensor) -> Tensor:
    """The inverse of `ycbcr`; not clipped."""
    matrix, offset = _colour(images)
    return torch.einsum("ij,bjhw->bihw", matrix.double().inverse().to(images.dtype), images - offset)


def _colour(images: Tensor) -> tuple[Tensor, Tensor]:
    """(the matrix (3, 3), the offset (3, 1, 1)) of Y, Cb and Cr."""
    options = {"dtype": images.dtype, "device": images.device}
    return torch.tensor(FORWARD, **options) / 255, torch.tensor(OFFSET, **options)[:, None, None] / 255
