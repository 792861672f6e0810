"""Feature maps at another size."""

from torch import Tensor

from core.layers.checks import check_tensor


def upsample_nearest(x: Tensor, factor: int = 2) -> Tensor:
    """Nearest neighbours at `factor` times the size: (batch, channels, height, width) -> (..., factor * height,
    factor * width).

    The same numbers as `F.interpolate(mode="nearest")`. That one's gradient is wrong where inductor (torch 2.13, CPU)
    fuses it with certain neighbours: a pyramid of three levels got a fourth of it, without a word.

    Raises ValueError: x without four axes.
    """
    check_tensor("upsample_nearest", x)
    if x.ndim != 4:
        raise ValueError(f"upsample_nearest: expected (batch, channels, height, width), found {tuple(x.shape)}")
    batch, channels, height, width = x.shape
    x = x[:, :, :, None, :, None].expand(-1, -1, -1, factor, -1, factor)  # (batch, channels, height, f, width, f)
    return x.reshape(batch, channels, factor * height, factor * width)
