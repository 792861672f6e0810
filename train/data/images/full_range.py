"""A picture from a file with all that it holds, and back: 8 or 16 bits or floating point, grey or colour, alpha, the
colour profile. By Pillow, which keeps 16 bits of grey pictures only."""

import io
import os
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from train.data.images.picture import TWELVE_BITS, has_deep_colours, opened
from train.files import replacing


class FullRange(NamedTuple):
    """pixels (height, width, channels) uint8, uint16 or float32, of 1 (grey), 2 (with alpha), 3 or 4 channels; `white`
    is the value of white. `note`: what the file had and this has not."""

    pixels: np.ndarray
    white: float
    profile: bytes | None = None
    note: str = ""

    @property
    def alpha(self) -> bool:
        """True if the last channel is an alpha channel."""
        return self.pixels.shape[2] in (2, 4)

    @property
    def suffix(self) -> str:
        """Suffix of the file that `write` can keep it in without loss."""
        return ".tiff" if self.pixels.dtype == np.float32 else ".png"


def read(path: str | os.PathLike | BinaryIO, white: float | None = None) -> FullRange:
    """The picture of a file, upright.

    Args:
        white: the value of white in pictures of 16 bits or floating point, by default 65535 and 1.

    Raises DataError: it cannot be read; 16-bit values of 12 bits or fewer, floating-point values outside of 0 to white
    or integers of 32 bits, unless `white` is given.
    """
    with opened(path) as image:
        with Image.open(path) as undecoded:
            notes = ["has 16 bits per colour, of which the upper 8 are read"] if has_deep_colours(undecoded) else []
        if (frames := getattr(image, "n_frames", 1)) > 1:
            notes.append(f"has {frames} frames, of which the first is read")
        note = "; ".join(notes)
        profile = image.info.get("icc_profile")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            return FullRange(*_deep(np.asarray(image), image, white), profile, note)
        grey = image.mode in ("1", "L", "LA", "La")
        mode = ("L" if grey else "RGB") + ("A" if image.has_transparency_data else "")
        profile = profile if image.mode != "CMYK" else None  # the profile of inks does not fit R'G'B'
        pixels = np.asarray(image.convert(mode))
        return FullRange(pixels if pixels.ndim == 3 else pixels[..., None], 255.0, profile, note)


def _deep(values: np.ndarray, image: Image.Image, white: float | None) -> tuple[np.ndarray, float]:
    """(pixels (height, width, 1), white) of 16 bits or floating point."""
    low, high = (float(f(values)) for f in (np.min, np.max))
    if image.mode == "F":
        white = 1.0 if white is None else white
        if not (low >= 0 and high <= white):
            raise ValueError(f"its floating-point values go from {low:.4g} to {high:.4g}, expected 0 to {white:g}")
        return values.astype(np.float32)[..., None], white
    if image.mode == "I" and image.format not in ("PNG", "PPM") and white is None:
        raise ValueError(f"its 32-bit integers ({low:.0f} to {high:.0f}) have no known range; expected that of white")
    if white is None and 0 < high <= TWELVE_BITS:
        raise ValueError(f"its 16-bit values end at {high:.0f} of 65535, as if white were less; expected that of white")
    white = 65535.0 if white is None else white
    if low < 0 or high > min(white, 65535):
        raise ValueError(f"its values go from {low:.0f} to {high:.0f}, expected 0 to {min(white, 65535):g}")
    return values.astype(np.uint16)[..., None], white


def encoded(picture: FullRange) -> bytes:
    """The contents of the file that `write` writes: PNG or, of floating point, TIFF."""
    pixels = np.ascontiguousarray(picture.pixels[..., 0] if picture.pixels.shape[2] == 1 else picture.pixels)
    options = {} if picture.profile is None else {"icc_profile": picture.profile}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format={".png": "PNG", ".tiff": "TIFF"}[picture.suffix], **options)
    return file.getvalue()


def write(path: str | os.PathLike, picture: FullRange) -> None:
    """Write a picture of `read`, as PNG or, of floating point, as TIFF, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(encoded(picture))
