"""The arithmetic of random rectangles, for tensors and for arrays: worker processes do without torch."""

from types import ModuleType
from typing import Any


def rectangles(
    library: ModuleType, share: Any, quotient: Any, place: Any, height: Any, width: Any, ratio: tuple[float, float]
) -> tuple[Any, Any]:
    """The first of the drawn rectangles that fits into each image.

    Args:
        library: torch or numpy, to which all the rest belongs (single precision); both give the same bits.
        share: (..., attempts), of the image's area.
        quotient: (..., attempts), width / height.
        place: (..., 2) in [0, 1), of the room that there is from top and left.
        height, width: (...) of the images.
        ratio: range of width / height, for the case that none fits.

    Returns:
        (..., 4) top, left, height, width in whole pixels, and (...) whether one fits; where none does, it is the
        largest one of an allowed ratio in the middle.
    """
    area = (height * width)[..., None] * share
    tall, wide = _side(library, area / quotient), _side(library, area * quotient)
    fits = (tall > 0) & (wide > 0) & (tall <= height[..., None]) & (wide <= width[..., None])
    found, first = fits.any(-1), fits & (fits.cumsum(-1) == 1)
    whole_tall = library.minimum(height, library.round(width / ratio[0]))
    whole_wide = library.minimum(width, library.round(height * ratio[1]))
    tall = library.where(found, (tall * first).sum(-1), whole_tall)
    wide = library.where(found, (wide * first).sum(-1), whole_wide)
    room = library.stack([height - tall, width - wide], -1)
    start = library.where(found[..., None], library.floor(place * (room + 1)), library.floor(room / 2))
    top, left = library.minimum(start[..., 0], room[..., 0]), library.minimum(start[..., 1], room[..., 1])
    return library.stack([top, left, tall, wide], -1), found


def _side(library: ModuleType, square: Any) -> Any:
    """The whole number nearest to the root. A root's last bit is not the same everywhere (with torch it depends on the
    machine), so the number is put right by what is: sums and products."""
    side = library.round(square**0.5)
    side = library.where((side + 0.5) * (side + 0.5) <= square, side + 1, side)
    return library.where((side - 0.5) * (side - 0.5) > square, side - 1, side)
