"""PSNR and SSIM against their formulas written out, window by window, and Set5's published bicubic figures."""

import math

import numpy as np
import pytest
import torch

from core import random
from tests.real_pictures import needs_pictures, unpacked
from train.data.images import originals, resize
from train.metrics.image_quality import psnr, ssim


def pair(*shape):
    x, noise = (random.uniform(key, shape, torch.float64) for key in random.split(random.key(0)).unbind(0))
    return x, (x + 0.2 * (noise - 0.5)).clamp(0, 1)


def numpy(*tensors):
    return [x.numpy() for x in tensors]


def test_psnr():
    x, y = pair(2, 3, 9, 8)
    expected = [
        20 * math.log10(255) - 10 * math.log10(np.mean((a - b) ** 2)) for a, b in zip(*numpy(x, y), strict=True)
    ]
    torch.testing.assert_close(psnr(x, y, peak=255.0), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(psnr(x, y, border=2), psnr(x[..., 2:-2, 2:-2], y[..., 2:-2, 2:-2]))
    assert psnr(x, x).tolist() == [math.inf, math.inf]


def ssim_of_windows(x, y, peak):
    """Wang et al. 2004, eq. 13, one window after the other, of (height, width)."""
    positions = np.arange(11) - 5
    window = np.exp(-(positions[:, None] ** 2 + positions[None] ** 2) / (2 * 1.5**2))
    window, values = window / window.sum(), []
    c_1, c_2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            m_a, m_b = (window * a).sum(), (window * b).sum()
            s_a, s_b = (window * (a - m_a) ** 2).sum(), (window * (b - m_b) ** 2).sum()
            s_ab = (window * (a - m_a) * (b - m_b)).sum()
            above = (2 * m_a * m_b + c_1) * (2 * s_ab + c_2)
            values.append(above / ((m_a**2 + m_b**2 + c_1) * (s_a + s_b + c_2)))
    return np.mean(values)


def test_ssim():
    x, y = (255 * v for v in pair(2, 2, 14, 17))
    images = zip(*numpy(x, y), strict=True)
    expected = [np.mean([ssim_of_windows(*channels, 255.0) for channels in zip(*ab, strict=True)]) for ab in images]
    torch.testing.assert_close(ssim(x, y, peak=255.0), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(ssim(x, y, peak=255.0), ssim(x / 255, y / 255))
    torch.testing.assert_close(ssim(x, x, peak=255.0), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_wrong_images(metric):
    x, y = pair(1, 1, 12, 12)
    with pytest.raises(ValueError, match=r"one shape .*, found \(1, 1, 12, 12\) and \(1, 1, 12, 11\)"):
        metric(x, y[..., :-1])
    with pytest.raises(ValueError, match="12 x 12 pixels without a border of 6"):
        metric(x, y, border=6)


@needs_pictures
@pytest.mark.parametrize(
    ("scale", "expected_psnr", "expected_ssim"), [(2, 33.66, 0.9299), (3, 30.39, 0.8682), (4, 28.42, 0.8104)]
)
def test_published_figures_of_bicubic_interpolation(scale, expected_psnr, expected_ssim, tmp_path):
    figures = []
    for picture in originals.open_originals(str(unpacked(tmp_path)), 1, 32).pictures:
        y = resize.cropped(picture[None].double(), scale)
        large = resize.enlarged(resize.lowered(y, scale), scale).clamp(0, 255).round()
        figures.append([float(f(large, y, peak=255.0, border=scale)) for f in (psnr, ssim)])
    mean_psnr, mean_ssim = np.mean(figures, 0)
    assert abs(mean_psnr - expected_psnr) < 0.01 and abs(mean_ssim - expected_ssim) < 1e-4
