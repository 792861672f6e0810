"""Bicubic resizing, and the low-resolution pictures of super-resolution.

The kernel is Keys' with a = -1/2 (1981, "Cubic convolution interpolation for digital image processing"), widened where
the picture shrinks: that of MATLAB's imresize, by which the figures of papers are computed, apart from the outermost
pixels (the weights are renormalised at a border, where MATLAB mirrors the picture). Bicubic PSNR of Set5 agrees with
the published figures to 0.003 dB. Without `antialias` torch's kernel is another one, a = -3/4.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


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
    """Images with `scale` times the height and width."""
    height, width = images.shape[-2:]
    return bicubic(images, (height * scale, width * scale))


def cropped(images: Tensor, multiple: int) -> Tensor:
    """The upper left part of images (..., height, width) whose sides are the largest multiples."""
    height, width = (n // multiple * multiple for n in images.shape[-2:])
    return images[..., :height, :width]


REACH = 2
"""Pixels on each side that a pixel of an enlarged picture depends on."""


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
