"""One picture from a file or a member of a tar, by Pillow: read, turned upright, in grey or colour, cut and scaled.

Worker processes import this, so it does without torch.
"""

import contextlib
import io
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from train.data import DataError
from train.data.images.rectangles import rectangles

REDUCING_GAP = 2.0
"""A JPEG decoded at a fraction of its size is still this many times larger than the result, which hardly differs."""
TWELVE_BITS = 4095
"""The largest value of 12 bits: a 16-bit picture that stays below it holds 12 bits or fewer, and would be black."""

UNREADABLE = ("BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF")
"""Formats that Pillow only writes or only recognises."""


@dataclass(frozen=True, slots=True)
class Member(os.PathLike):
    """A picture inside a tar: `size` bytes from byte `offset` on. Its path, to be shown, is the tar's and its name."""

    tar: str
    offset: int
    size: int
    name: str

    def __fspath__(self) -> str:
        return f"{self.tar}/{self.name}"

    __str__ = __fspath__

    @property
    def parent(self) -> Path:
        """Folder of the path, the archive's or one within it."""
        return Path(self).parent

    def read(self) -> bytes:
        """Its bytes. Raises OSError, or EOFError if the tar ends before it does."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise EOFError(f"the tar has {len(content)} of its {self.size} bytes")
        return content


class Cut(NamedTuple):
    """The part of a picture to decode: a square of `size` pixels per side with `channels` 1 or 3, smoothed.

    With `resize` it is the middle of the picture scaled by `interpolation`, a name of Pillow's `Resampling` in lower
    case, so that its shorter side has `resize` pixels. With `ratio` it is a random rectangle (see `rectangles`),
    bilinear, and with `reduce` a JPEG may be decoded at a half, a fourth or an eighth of its size where it would be
    scaled down anyway.
    """

    size: int
    channels: int = 3
    resize: int | None = None
    ratio: tuple[float, float] | None = None
    reduce: bool = False
    interpolation: str = "bilinear"


def is_picture(name: str) -> bool:
    """True for a suffix of a format that Pillow reads, unless the file is hidden."""
    kind = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return kind is not None and kind not in UNREADABLE and not name.startswith(".")


@contextlib.contextmanager
def opened(path: str | os.PathLike | BinaryIO, formats: Sequence[str] | None = None) -> Iterator[Image.Image]:
    """The file, opened but not decoded yet. Raises DataError, also for any exception within the block.

    path: of a file, or a file in memory.
    formats: Pillow's names of the formats that are read; all that it knows if None.
    """
    name = path if isinstance(path, (str, os.PathLike)) else "the picture"
    try:
        with warnings.catch_warnings():
            # Warnings about files that can be read are of no interest; an absurd size is.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            file = io.BytesIO(path.read()) if isinstance(path, Member) else path
            with Image.open(file, formats=formats) as image:
                _check_range(image)
                yield image
    except FileNotFoundError:
        raise DataError(f"{name} does not exist, expected a picture") from None
    except UnidentifiedImageError:
        reason = "its format is unknown" if _size(path) else "it is empty"
        raise DataError(f"{name} cannot be read as a picture: {reason}") from None
    except Exception as error:  # decoders raise anything on a garbled file
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{name} cannot be read as a picture: {reason}") from None


def _size(path: str | os.PathLike | BinaryIO) -> int:
    if isinstance(path, Member):
        return path.size
    return os.path.getsize(path) if isinstance(path, (str, os.PathLike)) else path.seek(0, os.SEEK_END)


def converted(image: Image.Image, channels: int) -> Image.Image:
    """Upright, mode L or RGB, transparent parts white. `image` itself may change.

    8 bits stay as they are. 16 bits are divided by 257 (65535 -> 255), floating-point values times 255 (1 -> 255).

    Raises ValueError where this would give a black picture: 16 bits with values of 12 bits or fewer (for coloured ones
    `opened` does), floating-point values outside 0 to 1, and integers of 32 bits, whose range no file states.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_bytes(image))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB" if channels == 3 else "L")


def has_deep_colours(image: Image.Image) -> bool:
    """True for several channels of 16 bits, of which Pillow keeps the upper 8; of an image that is not decoded yet."""
    return any(
        (codec == "ppm" and image.mode == "RGB" and options[1] > 255)
        or re.search(r"\b(LA|RGB|RGBA|RGBX);16[BLN]\b", str(options))
        for codec, _, _, options in image.tile
    )


def _check_range(image: Image.Image) -> None:
    """Refuse several channels of 16 bits where the upper 8 are nearly all 0."""
    if has_deep_colours(image):
        brightest = max(high for _, high in image.convert("RGB").getextrema())
        if 0 < brightest <= (TWELVE_BITS + 1) >> 8:
            raise ValueError(_too_dark(f"about {brightest << 8}"))


def _bytes(image: Image.Image) -> np.ndarray:
    """(height, width) uint8, of a grey picture with more than 8 bits. Pillow's own conversion would clip."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise ValueError(f"its floating-point values go from {low:.4g} to {high:.4g}, expected 0 to 1")
        return np.round(values * 255).astype(np.uint8)
    # 16 bits of a PNG or PGM are mode I where Pillow is older; a TIFF of mode I has integers of 32 bits.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError(f"its 32-bit integers ({low:.0f} to {high:.0f}) have no known range: convert it to 8 bits")
    if 0 < high <= TWELVE_BITS:
        raise ValueError(_too_dark(f"{high:.0f}"))
    return np.round(values.clip(0, 65535) / 257).astype(np.uint8)


def _too_dark(brightest: str) -> str:
    return f"its 16-bit values end at {brightest} of 65535, as if they had 12 bits or fewer: convert it to 8 bits"


def decode(path: str | os.PathLike | BinaryIO, cut: Cut, draws: np.ndarray | None = None) -> np.ndarray:
    """The picture of a file as (channels, size, size) uint8.

    Args:
        draws: with `cut.ratio`, float32 (2 attempts + 2,): share, quotient and position of `rectangles`, concatenated.

    Raises DataError: it cannot be read.
    """
    with opened(path) as image:
        square = _middle(image, cut) if cut.ratio is None else _rectangle(image, cut, draws)
        # Pillow takes the channels apart faster than numpy changes the order of the axes.
        return np.stack([np.asarray(channel) for channel in square.split()])


def _middle(image: Image.Image, cut: Cut) -> Image.Image:
    image = converted(image, cut.channels)
    width, height = image.size
    short, size = min(width, height), cut.size
    # The longer side is rounded down, and half a pixel to even, as in torchvision.
    wide, tall = int(cut.resize * width / short), int(cut.resize * height / short)
    if wide * tall > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"its {width}x{height} pixels are too narrow a strip")
    left, top = round((wide - size) / 2), round((tall - size) / 2)
    resampling = Image.Resampling[cut.interpolation.upper()]
    return image.resize((wide, tall), resampling).crop((left, top, left + size, top + size))


def _rectangle(image: Image.Image, cut: Cut, draws: np.ndarray) -> Image.Image:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    turned = orientation >= 5
    width, height = image.size[::-1] if turned else image.size
    attempts = len(draws) // 2 - 1
    share, quotient, position = np.split(draws, [attempts, 2 * attempts])
    box, _ = rectangles(np, share, quotient, position, np.float32(height), np.float32(width), cut.ratio)
    top, left, tall, wide = box.tolist()
    times = 1.0
    if cut.reduce:
        least = (REDUCING_GAP * cut.size * width / wide, REDUCING_GAP * cut.size * height / tall)
        drafted = image.draft(None, tuple(int(x + 1) for x in (least[::-1] if turned else least)))
        times = (image.size[0] if drafted is None else drafted[1][2]) / (height if turned else width)
    image = converted(image, cut.channels)
    # A reduced picture has whole pixels: its last, of which only a part is picture, comes first where it is mirrored.
    left = left * times + (image.width - width * times if orientation in (2, 3, 6, 7) else 0)
    top = top * times + (image.height - height * times if orientation in (3, 4, 7, 8) else 0)
    right, bottom = left + wide * times, top + tall * times
    # Cut first, so that pixels outside the rectangle do not bleed into it.
    x, y = math.floor(left), math.floor(top)
    image = image.crop((x, y, math.ceil(right), math.ceil(bottom)))
    box = (left - x, top - y, right - x, bottom - y)
    return image.resize((cut.size, cut.size), Image.Resampling.BILINEAR, box)
