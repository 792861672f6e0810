"""Pictures with more than 8 bits: scaled by a rule, or refused by name, and never black in silence."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data import DataError
from train.data.images.pairs import picture
from train.data.images.picture import Cut, decode
from train.data.images.sets import image

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def save(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


def png16(path: Path, values: np.ndarray) -> Path:
    """(height, width, 2, 3 or 4) uint16, which Pillow cannot write."""
    height, width, channels = values.shape

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    return path


def colour(scale: float, channels: int = 3) -> np.ndarray:
    values = np.repeat((RAMP * scale).astype(np.uint16)[:, :, None], channels, 2)
    if channels in (2, 4):
        values[..., -1] = 65535  # opaque
    return values


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("float.tiff", RAMP.astype(np.float32)),
        ("16.png", np.round(RAMP * 65535).astype(np.uint16)),
        ("16.tiff", np.round(RAMP * 65535).astype(np.uint16)),
        ("13.png", np.round(RAMP * 65535).astype(np.uint16) // 8),
    ],
)
def test_more_than_8_bits_are_scaled(name, values, tmp_path):
    path = save(tmp_path / name, values)
    expected = np.round((values if values.dtype == np.float32 else values / 65535) * 255)
    pixels = picture(path, size=8, channels=1)[0].numpy()
    assert np.abs(pixels - expected).max() <= 1 and pixels.max() > 20
    assert np.array_equal(decode(path, Cut(8, 1, 8))[0], pixels)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits(channels, tmp_path):
    pixels = picture(png16(tmp_path / "a.png", colour(65535, channels)), size=8, channels=1)[0].numpy()
    assert np.abs(pixels - RAMP * 255).max() <= 1.5  # the lower 8 bits are cut off
    assert picture(png16(tmp_path / "black.png", colour(0, channels)), size=8, channels=3).max() == 0


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda d: save(d / "a.png", (RAMP * 4095).astype("u2")), "16-bit values end at 4095 of 65535, as if they had"),
        (lambda d: save(d / "a.png", (RAMP * 255).astype("u2")), "16-bit values end at 255 of 65535"),
        (lambda d: save(d / "a.tiff", (RAMP * 1023).astype("u2")), "16-bit values end at 1023 of 65535"),
        (lambda d: save(d / "a.tiff", (RAMP * 255).astype("i4")), r"32-bit integers \(0 to 255\) have no known range"),
        (lambda d: save(d / "a.tiff", (RAMP * 70_000).astype("i4")), r"32-bit integers \(0 to 70000\)"),
        (lambda d: save(d / "a.tiff", (RAMP * 255).astype("f4")), "floating-point values go from 0 to 255, expected 0"),
        (lambda d: save(d / "a.tiff", (RAMP - 0.5).astype("f4")), "floating-point values go from -0.5 to 0.5"),
        (lambda d: save(d / "a.tiff", np.full((8, 8), np.nan, "f4")), "floating-point values go from nan to nan"),
        (lambda d: png16(d / "a.png", colour(4095)), "16-bit values end at about 3840 of 65535"),
        (lambda d: png16(d / "a.png", colour(4095, 4)), "16-bit values end at about 3840 of 65535"),
    ],
)
def test_an_unknown_range_is_refused_by_name(write, reason, tmp_path):
    path = write(tmp_path)
    for read in (
        lambda: picture(path, size=8, channels=3),
        lambda: image(path, 8, 8),
        lambda: decode(path, Cut(4, 3, None, (1.0, 1.0)), np.array([0.5, 1, 0, 0], np.float32)),
    ):
        with pytest.raises(DataError, match=f"{path.name} cannot be read as a picture: its {reason}") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_maps_of_16_bits_with_their_own_maximum(tmp_path):
    """A PGM states its largest value; a bitmap of 16 bits has three channels in them."""
    values = (RAMP * 4095).astype(np.uint16)
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 4095\n" + values.astype(">u2").tobytes())
    assert np.abs(picture(tmp_path / "a.pgm", size=8, channels=1)[0].numpy() - RAMP * 255).max() <= 1
    three = np.repeat(values[:, :, None], 3, 2).astype(">u2").tobytes()
    (tmp_path / "a.ppm").write_bytes(b"P6 8 8 4095\n" + three)
    assert np.abs(picture(tmp_path / "a.ppm", size=8, channels=1)[0].numpy() - RAMP * 255).max() <= 1
    (tmp_path / "b.ppm").write_bytes(b"P6 8 8 65535\n" + three)
    with pytest.raises(DataError, match="16-bit values end at about"):
        picture(tmp_path / "b.ppm", size=8, channels=3)
