"""Many small pictures in a few large ones, which a web page shows tile by tile."""

import base64
import io
from typing import NamedTuple

import numpy as np
from PIL import Image

PER_SHEET = 1024
COLUMNS = 32
STEPS = ((64, 85), (48, 80), (32, 85), (32, 65), (24, 60), (16, 60))
"""(pixels per side, JPEG quality), from fine to coarse."""


class Sheets(NamedTuple):
    """Pictures as data URLs of sheets with 1024 tiles, 32 per row; `side` is that of a tile in pixels."""

    urls: list[str]
    side: int


def sheets(pictures: np.ndarray, budget: int) -> Sheets:
    """Sheets of all pictures, as fine as `budget` bytes allow, but not below 16 pixels per side.

    Args:
        pictures: bytes (N, height, width, 1 or 3); those that are not square are padded.
        budget: of all sheets as text.
    """
    largest = max(pictures.shape[1:3])
    if largest <= 16:  # tiny ones as they are
        return Sheets([_url(sheet, largest, None) for sheet in _parts(pictures)], largest)
    largest = -(-largest // 8) * 8  # so that no block of a JPEG has two tiles
    sample = pictures[:: max(1, len(pictures) // 256)][:256]
    for side, quality in STEPS:
        size = len(_url(sample, min(side, largest), quality)) * len(pictures) / len(sample)
        if size <= 0.9 * budget:
            break
    side = min(side, largest)
    return Sheets([_url(part, side, quality) for part in _parts(pictures)], side)


def _parts(pictures: np.ndarray) -> list[np.ndarray]:
    return [pictures[start : start + PER_SHEET] for start in range(0, len(pictures), PER_SHEET)]


def _url(pictures: np.ndarray, side: int, quality: int | None) -> str:
    """A sheet as a data URL: a JPEG without chroma subsampling, which would mix tiles; a PNG without a quality."""
    channels = pictures.shape[3]
    rows = -(-len(pictures) // COLUMNS)
    sheet = np.full((rows * side, COLUMNS * side, channels), 255, np.uint8)
    for i, picture in enumerate(pictures):
        tile = _tile(picture, side)
        row, column = divmod(i, COLUMNS)
        sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = tile
    image = Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)
    file = io.BytesIO()
    if quality is None:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=quality, subsampling=0, optimize=True)
    kind = "png" if quality is None else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _tile(picture: np.ndarray, side: int) -> np.ndarray:
    """(side, side, channels): the picture scaled to fit, in the middle of white."""
    height, width, channels = picture.shape
    if (height, width) == (side, side):
        return picture
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.fromarray(picture[:, :, 0] if channels == 1 else picture)
    image = image.resize(size, Image.Resampling.BOX) if scale < 1.0 else image
    out = np.full((side, side, channels), 255, np.uint8)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    out[top : top + size[1], left : left + size[0]] = np.asarray(image).reshape(size[1], size[0], channels)
    return out
