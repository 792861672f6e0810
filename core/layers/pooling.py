"""Pooling over the one to three spatial axes of x: (batch, channels, *space)."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from core.layers.checks import check_tensor

Sizes = int | tuple[int, ...]
ByDims = dict[int, Callable[..., Tensor]]  # a function per number of spatial axes

_MAX: ByDims = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE: ByDims = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE_MAX: ByDims = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
_ADAPTIVE_AVERAGE: ByDims = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def max_pool(
    x: Tensor,
    kernel: Sizes,
    *,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The largest value of each window, as torch.nn.MaxPool1d, 2d and 3d.

    Args:
        stride: by default the kernel.
        padding: positions of minus infinity on both sides; up to half the kernel.
        ceil_mode: include the last, incomplete window.
    """
    return _MAX[_dims("max_pool", x)](x, kernel, stride, padding, dilation, ceil_mode)


def average_pool(
    x: Tensor,
    kernel: Sizes,
    *,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """The mean of each window, as torch.nn.AvgPool1d, 2d and 3d.

    Args:
        stride: by default the kernel.
        padding: zeros on both sides; up to half the kernel.
        ceil_mode: include the last, incomplete window.
        count_include_pad: whether the padding's zeros count in the mean.
    """
    return _AVERAGE[_dims("average_pool", x)](x, kernel, stride, padding, ceil_mode, count_include_pad)


def adaptive_max_pool(x: Tensor, size: int | tuple[int | None, ...]) -> Tensor:
    """The largest value of each of `size` windows per axis (None keeps the axis): (batch, channels, *size)."""
    return _ADAPTIVE_MAX[_dims("adaptive_max_pool", x)](x, size)


def adaptive_average_pool(x: Tensor, size: int | tuple[int | None, ...]) -> Tensor:
    """The mean of each of `size` windows per axis (None keeps the axis): (batch, channels, *size)."""
    return _ADAPTIVE_AVERAGE[_dims("adaptive_average_pool", x)](x, size)


def global_average_pool(x: Tensor) -> Tensor:
    """The mean over all spatial axes. x: (batch, channels, *space) -> (batch, channels)."""
    return x.mean(tuple(range(2, 2 + _dims("global_average_pool", x))))  # (batch, channels)


def _dims(name: str, x: Tensor) -> int:
    """The number of spatial axes of x."""
    check_tensor(name, x)
    if x.ndim not in (3, 4, 5):
        raise ValueError(f"{name}: expected (batch, channels, *space) with 1 to 3 spatial axes, found {tuple(x.shape)}")
    return x.ndim - 2
