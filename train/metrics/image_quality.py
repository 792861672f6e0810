"""Quality of images beside the originals: PSNR and SSIM, per image.

The protocol of super-resolution papers: luminance of 8-bit pictures, `border` pixels left out on each side (the scale),
the mean over the pictures of a test set.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5
"""Taps and standard deviation of SSIM's Gaussian window."""


def psnr(images: Tensor, originals: Tensor, *, peak: float = 1.0, border: int = 0) -> Tensor:
    """10 log10(peak² / mean squared error) in dB: (batch, channels, height, width) both -> (batch,).

    Args:
        peak: the largest possible value, 1 or 255.
        border: pixels on each side that do not count.

    Raises:
        ValueError: different shapes, or nothing within the border.
    """
    a, b = _inner(images, originals, border, 1)
    error = (a - b).square().mean((1, 2, 3))
    return 10 * torch.log10(peak**2 / error)  # 10 log10(peak² / MSE), infinite for equal images


def ssim(images: Tensor, originals: Tensor, *, peak: float = 1.0, border: int = 0) -> Tensor:
    """Structural similarity, the mean over all windows and channels: (batch, channels, height, width) both -> (batch,).

        (2 m_x m_y + c_1) (2 s_xy + c_2) / ((m_x² + m_y² + c_1) (s_x² + s_y² + c_2))

    with means, variances and covariance under a Gaussian of 11 x 11 pixels, c_1 = (0.01 peak)², c_2 = (0.03 peak)².
    Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", eq. 13.

    Arguments and errors as in `psnr`; within the border there must be one window.
    """
    x, y = _inner(images, originals, border, WINDOW)
    taps = torch.exp(-(torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2).square() / (2 * SIGMA**2))
    taps = taps / taps.sum()
    batch, channels = x.shape[:2]
    together = torch.cat([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]  # (5 batch channels, 1, height, width)
    smooth = F.conv2d(F.conv2d(together, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
    mean_x, mean_y, xx, yy, xy = smooth.unflatten(0, (5, batch, channels))[:, :, :, 0]  # each (batch, channels, h, w)
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c_1, c_2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    above = (2 * mean_x * mean_y + c_1) * (2 * covariance + c_2)
    below = (mean_x**2 + mean_y**2 + c_1) * (variance_x + variance_y + c_2)
    return (above / below).mean((1, 2, 3))


def _inner(images: Tensor, originals: Tensor, border: int, least: int) -> tuple[Tensor, Tensor]:
    """Both without the border, in float64: differences of nearly equal images are small."""
    if images.shape != originals.shape or images.ndim != 4:
        shapes = f"{tuple(images.shape)} and {tuple(originals.shape)}"
        raise ValueError(f"expected images and originals of one shape (batch, channels, height, width), found {shapes}")
    if border < 0 or min(images.shape[2:]) - 2 * border < least:
        height, width = images.shape[2:]
        raise ValueError(
            f"images of {height} x {width} pixels without a border of {border}; expected {least} or more a side"
        )
    window = (..., slice(border, images.shape[2] - border), slice(border, images.shape[3] - border))
    return images[window].double(), originals[window].double()
