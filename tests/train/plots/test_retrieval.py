"""Pictures of retrieval: sizes, frames, what does not fit."""

import numpy as np
import pytest
from PIL import Image

from train.plots import retrieval

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), np.uint8)


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def has(picture, colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(picture - rgb).sum(2) < 12).any())


def test_similarities(tmp_path):
    values = np.array([[0.9, 0.1, -0.2], [0.0, 1.0, 0.3]])
    retrieval.similarities(tmp_path / "a.png", IMAGES / 255, ["a red seven", "$x_1$ {}"], values, "Cosines")
    picture = pixels(tmp_path / "a.png")
    assert picture.shape[1] > 120 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    with pytest.raises(ValueError, match=r"\(2, 3\) similarities of 1 texts and 3 images"):
        retrieval.similarities(tmp_path / "b.png", IMAGES, ["one"], values)


def test_sheet(tmp_path):
    queries, labels = ["first", "a long query " * 4], [["0.9", "0.8", "0.1"], ["0.5"]]
    retrieval.sheet(tmp_path / "a.png", queries, [IMAGES, IMAGES[:1, :1]], labels, [[True, False, True], [False]])
    picture = pixels(tmp_path / "a.png")
    assert has(picture, retrieval.RIGHT) and has(picture, retrieval.WRONG)
    retrieval.sheet(tmp_path / "b.png", queries, [IMAGES * 0, IMAGES[:1] * 0], labels)
    assert not has(pixels(tmp_path / "b.png"), retrieval.RIGHT)
    with pytest.raises(ValueError, match="expected \\(count, 1 or 3, height, width\\)"):
        retrieval.sheet(tmp_path / "c.png", ["x"], [IMAGES[0]], [["1"] * 3])
