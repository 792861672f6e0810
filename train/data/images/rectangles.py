"""The arithmetic of random rectangles, for tensors and for arrays: worker processes do without torch."""

from types import ModuleType
from typing import Any


def rectangles(
    library: ModuleType, share: Any, quotient: Any, position: Any, height: Any, width: Any, ratio: tuple[float, float]
) -> tuple[Any, Any]:
    """The first of several random rectangles that fits into each image.

    Args:
        library: torch or numpy, to which all other arguments belong (single precision); both give the same bits.
        share: (..., attempts), the rectangle's part of the image's area.
        quotient: (..., attempts), width / height.
        position: (..., 2) in [0, 1), within the room that is left above and beside the rectangle.
        height, width: (...), the images' sizes.
        ratio: range of width / height, for the case that none fits.

    Returns:
        (..., 4) top, left, height, width in whole pixels, and (...) True where one fits; where none does, it is the
        largest one of an allowed ratio in the middle.
    """
    area = (height * width)[..., None] * share  # (..., attempts)
    tall, wide = _side(library, area / quotient), _side(library, area * quotient)
    fits = (tall > 0) & (wide > 0) & (tall <= height[..., None]) & (wide <= width[..., None])
    any_fits, first = fits.any(-1), fits & (fits.cumsum(-1) == 1)
    whole_tall = library.minimum(height, library.round(width / ratio[0]))
    whole_wide = library.minimum(width, library.round(height * ratio[1]))
    tall = library.where(any_fits, (tall * first).sum(-1), whole_tall)  # (...)
    wide = library.where(any_fits, (wide * first).sum(-1), whole_wide)
    room = library.stack([height - tall, width - wide], -1)  # (..., 2)
    start = library.where(any_fits[..., None], library.floor(position * (room + 1)), library.floor(room / 2))
    top, left = library.minimum(start[..., 0], room[..., 0]), library.minimum(start[..., 1], room[..., 1])
    return library.stack([top, left, tall, wide], -1), any_fits  # (..., 4), (...)


def _side(library: ModuleType, square: Any) -> Any:
    """The whole number nearest to the square root. A root's last bit depends on the machine (with torch), so the number
    is corrected by sums and products, whose bits do not."""
    side = library.round(square**0.5)
    side = library.where((side + 0.5) * (side + 0.5) <= square, side + 1, side)
    return library.where((side - 0.5) * (side - 0.5) > square, side - 1, side)
