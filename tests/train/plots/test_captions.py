"""Pictures with captions below them, and where words look."""

import numpy as np
import pytest
from PIL import Image

from train.plots import COLOURS, captions


def colours(path):
    with Image.open(path) as picture:
        return np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_captions_are_drawn_in_their_colours(tmp_path, channels):
    images = [np.full((channels, 8, 9 + i), 80 * i, np.uint8) for i in range(3)]
    texts = [[("a caption that is so long that it is wrapped, and wrapped again", COLOURS[2])], [], [("b", "#ff0000")]]
    captions.captioned(tmp_path / "a.png", images, texts, title="title")
    there = colours(tmp_path / "a.png").astype(int)
    assert [160, 160, 160] in there.tolist() and ((there[:, 0] - there[:, 1]) > 150).any()


def test_a_word_darkens_what_it_does_not_look_at(tmp_path):
    image, maps = np.full((3, 8, 8), 250, np.uint8), np.zeros((1, 2, 2))
    maps[0, 0, 0] = 0.5
    captions.words(tmp_path / "a.png", image, maps, ["$word$"])
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("L")).astype(int)
    height, width = pixels.shape
    own, shaded = pixels[height // 4 :, : width // 2], pixels[height // 4 :, width // 2 :]
    assert (own >= 249).all() and shaded.max() >= 240 and (shaded < 60).mean() > 0.2
    half = shaded.shape[1] // 2
    assert (shaded[-20:, half:-8] < 150).mean() > (shaded[:20, :half] < 150).mean()
    captions.words(tmp_path / "b.png", image[:1], np.zeros((0, 2, 2)), [])
    captions.words(tmp_path / "c.png", image, np.zeros((9, 2, 2)), list("abcdefghi"))
    assert len(colours(tmp_path / "c.png")) > 1
