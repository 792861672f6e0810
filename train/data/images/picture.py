"""One picture from a file, by Pillow: read, turned upright, in grey or colour, cut and scaled.

Worker processes import this, so it does without torch.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from train.data import DataError
from train.data.images.rectangles import rectangles

REDUCING_GAP = 2.0
"""How many times larger than what is made of it a reduced JPEG still is: the result is hardly to be told apart."""


class Cut(NamedTuple):
    """What is made of a picture: a square of `size` pixels a side with `channels` 1 or 3, bilinear and smoothed.

    With `resize` it is the middle of the picture scaled so that its shorter side has `resize` pixels. With `ratio` it
    is a drawn rectangle (see `rectangles`), and `reduce` says that a JPEG may be decoded at a half, a fourth or an
    eighth of its size where it would be scaled down anyway.
    """

    size: int
    channels: int = 3
    resize: int | None = None
    ratio: tuple[float, float] | None = None
    reduce: bool = False


def is_picture(name: str) -> bool:
    """Whether the suffix is one of a format that Pillow knows, and the file is not hidden."""
    return os.path.splitext(name)[1].lower() in Image.registered_extensions() and not name.startswith(".")


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """The file, opened but not decoded yet. Raises DataError, for what goes wrong within the block too."""
    try:
        with warnings.catch_warnings():
            # What a decoder deplores but can read is of no interest; an absurd size is.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    except FileNotFoundError:
        raise DataError(f"{path} does not exist, expected a picture") from None
    except UnidentifiedImageError:
        reason = "its format is unknown" if os.path.getsize(path) else "it is empty"
        raise DataError(f"{path} cannot be read as a picture: {reason}") from None
    except Exception as error:  # decoders raise whatever they like on a garbled file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{path} cannot be read as a picture: {reason}") from None


def converted(image: Image.Image, channels: int) -> Image.Image:
    """Upright, mode L or RGB, transparent parts white, 16-bit grey scaled down. `image` itself may change."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        # Pillow's own conversion would clip 16 bits to 8.
        values = np.asarray(image).astype(np.float64) / 65535
        image = Image.fromarray(np.round(values.clip(0, 1) * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB" if channels == 3 else "L")


def decode(path: str | os.PathLike, cut: Cut, draws: np.ndarray | None = None) -> np.ndarray:
    """The picture of a file as (channels, size, size) uint8.

    Args:
        draws: with `cut.ratio`, float32 (2 attempts + 2,): share, quotient and place of `rectangles`, end to end.

    Raises DataError: it cannot be read.
    """
    with opened(path) as image:
        square = _middle(image, cut) if cut.ratio is None else _drawn(image, cut, draws)
        # Pillow takes the channels apart faster than numpy changes the order of the axes.
        return np.stack([np.asarray(channel) for channel in square.split()])


def _middle(image: Image.Image, cut: Cut) -> Image.Image:
    image = converted(image, cut.channels)
    width, height = image.size
    short, size = min(width, height), cut.size
    # The longer side is rounded down and a half of a pixel to even, as torchvision has it.
    wide, tall = int(cut.resize * width / short), int(cut.resize * height / short)
    if wide * tall > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"its {width}x{height} pixels are too narrow a strip")
    left, top = round((wide - size) / 2), round((tall - size) / 2)
    return image.resize((wide, tall), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def _drawn(image: Image.Image, cut: Cut, draws: np.ndarray) -> Image.Image:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    turned = orientation >= 5
    width, height = image.size[::-1] if turned else image.size
    attempts = len(draws) // 2 - 1
    share, quotient, place = np.split(draws, [attempts, 2 * attempts])
    box, _ = rectangles(np, share, quotient, place, np.float32(height), np.float32(width), cut.ratio)
    top, left, tall, wide = box.tolist()
    times = 1.0
    if cut.reduce:
        least = (REDUCING_GAP * cut.size * width / wide, REDUCING_GAP * cut.size * height / tall)
        drafted = image.draft(None, tuple(int(x + 1) for x in (least[::-1] if turned else least)))
        times = (image.size[0] if drafted is None else drafted[1][2]) / (height if turned else width)
    image = converted(image, cut.channels)
    # A reduced picture has whole pixels: the last, of which a part is left over, is the first where it was mirrored.
    left = left * times + (image.width - width * times if orientation in (2, 3, 6, 7) else 0)
    top = top * times + (image.height - height * times if orientation in (3, 4, 7, 8) else 0)
    right, bottom = left + wide * times, top + tall * times
    # Cut first: pixels beside the rectangle have no part in it.
    x, y = math.floor(left), math.floor(top)
    image = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    box = (left - x, top - y, right - x, bottom - y)
    return image.resize((cut.size, cut.size), Image.Resampling.BILINEAR, box)
