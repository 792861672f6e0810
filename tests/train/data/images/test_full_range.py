"""Pictures read and written with all that the file holds."""

import re

import numpy as np
import pytest
from PIL import Image, ImageCms

from train.data import DataError
from train.data.images import full_range


def noise(*shape, dtype=np.uint8, top=255):
    return np.random.default_rng(0).integers(0, top + 1, shape).astype(dtype)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_eight_bits(tmp_path, channels):
    pixels = noise(9, 7, channels)
    Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels).save(tmp_path / "a.png")
    picture = full_range.read(tmp_path / "a.png")
    assert np.array_equal(picture.pixels, pixels) and picture.white == 255 and not picture.note
    assert picture.alpha == (channels in (2, 4)) and picture.suffix == ".png"
    full_range.write(tmp_path / "b.png", picture)
    with Image.open(tmp_path / "b.png") as image:
        assert image.mode == ["L", "LA", "RGB", "RGBA"][channels - 1] and np.array_equal(
            np.asarray(image), pixels.squeeze()
        )


def test_sixteen_bits_of_grey(tmp_path):
    pixels = noise(9, 7, dtype=np.uint16, top=65535)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = full_range.read(tmp_path / "a.png")
    assert (
        np.array_equal(picture.pixels[..., 0], pixels) and picture.pixels.dtype == np.uint16 and picture.white == 65535
    )
    full_range.write(tmp_path / "b.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), pixels)


def test_twelve_bits_need_the_value_of_white(tmp_path):
    pixels = noise(9, 7, dtype=np.uint16, top=4095)
    Image.fromarray(pixels).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"16-bit values end at 4\d+ of 65535, as if white were less; expected that of"):
        full_range.read(tmp_path / "a.tiff")
    assert full_range.read(tmp_path / "a.tiff", 4095.0).white == 4095
    with pytest.raises(DataError, match="its values go from .* expected 0 to 1000"):
        full_range.read(tmp_path / "a.tiff", 1000.0)
    Image.fromarray(pixels.astype(np.int32)).save(tmp_path / "b.tiff")
    with pytest.raises(DataError, match="its 32-bit integers .* have no known range; expected that of white"):
        full_range.read(tmp_path / "b.tiff")
    assert np.array_equal(full_range.read(tmp_path / "b.tiff", 4095.0).pixels[..., 0], pixels)


def test_floating_point(tmp_path):
    pixels = noise(9, 7).astype(np.float32) / 255
    Image.fromarray(pixels).save(tmp_path / "a.tiff")
    picture = full_range.read(tmp_path / "a.tiff")
    assert np.array_equal(picture.pixels[..., 0], pixels) and picture.white == 1 and picture.suffix == ".tiff"
    full_range.write(tmp_path / "b.tiff", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.tiff")), pixels)
    Image.fromarray(2 * pixels).save(tmp_path / "c.tiff")
    with pytest.raises(DataError, match=r"floating-point values go from 0 to .*, expected 0 to 1"):
        full_range.read(tmp_path / "c.tiff")
    assert full_range.read(tmp_path / "c.tiff", 2.0).white == 2
    pixels[0, 0] = np.nan
    Image.fromarray(pixels).save(tmp_path / "d.tiff")
    with pytest.raises(DataError, match="go from nan to nan"):
        full_range.read(tmp_path / "d.tiff")


def test_palettes_inks_and_transparent_colours(tmp_path):
    image = Image.fromarray(noise(9, 7, 3))
    image.quantize(16).save(tmp_path / "palette.png")
    image.quantize(16).save(tmp_path / "transparent.png", transparency=3)
    image.convert("CMYK").save(tmp_path / "inks.tiff")
    image.convert("1").save(tmp_path / "bits.png")
    channels = {path.stem: full_range.read(path).pixels.shape[2] for path in tmp_path.iterdir()}
    assert channels == {"palette": 3, "transparent": 4, "inks": 3, "bits": 1}


def test_upright_with_its_colour_profile(tmp_path):
    exif, profile = Image.Exif(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(noise(8, 16, 3)).save(tmp_path / "a.jpg", exif=exif, icc_profile=profile)
    picture = full_range.read(tmp_path / "a.jpg")
    assert picture.pixels.shape == (16, 8, 3)
    full_range.write(tmp_path / "b.png", picture)
    with Image.open(tmp_path / "b.png") as image:
        assert image.info["icc_profile"] == profile and not image.getexif().get(0x0112)


def test_sixteen_bits_of_colours_lose_the_lower_eight(tmp_path):
    """A PPM, as Pillow writes no such file."""
    pixels = noise(5, 6, 3, dtype=">u2", top=65535)
    (tmp_path / "a.ppm").write_bytes(b"P6 6 5 65535\n" + pixels.tobytes())
    picture = full_range.read(tmp_path / "a.ppm")
    assert picture.note == "has 16 bits per colour, of which the upper 8 are read" and picture.pixels.dtype == np.uint8
    assert np.abs(picture.pixels * 257.0 - pixels).max() <= 257


def test_animations_are_their_first_frame(tmp_path):
    frames = [Image.fromarray(noise(9, 7)) for _ in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=[frames[1].rotate(90), frames[2].rotate(180)])
    assert full_range.read(tmp_path / "a.gif").note == "has 3 frames, of which the first is read"


def test_unreadable_files(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=f"{re.escape(str(tmp_path))}/a.png cannot be read as a picture: its format is"):
        full_range.read(tmp_path / "a.png")
