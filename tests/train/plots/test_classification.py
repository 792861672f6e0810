"""Pictures of a classifier: they are written, and hold the parts that belong to them."""

import numpy as np
import pytest
import torch

from tests.train.metrics.test_classification import LONG, NAMES, assert_picture, case, pixels_of
from train.plots import classification as pictures


def test_long_names_keep_both_ends():
    assert pictures.short("short", 5) == "short"
    assert [pictures.short("abcdefghij", most) for most in (9, 8, 3)] == ["abcd…ghij", "abcd…hij", "a…j"]


@pytest.mark.parametrize("shape", [(1, 3, 5, 5), (4, 2, 3, 3)])
def test_filters(shape, tmp_path):
    filters = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    pictures.filters(tmp_path / "f.png", filters)
    assert_picture(tmp_path / "f.png")


def test_the_first_of_many_filters(tmp_path):
    filters = torch.rand(9, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    pictures.filters(tmp_path / "some.png", filters, most=4)
    pictures.filters(tmp_path / "four.png", filters[:4])
    some, four = (pixels_of(tmp_path / name) for name in ("some.png", "four.png"))
    assert np.array_equal(some[60:], four[60:]) and not np.array_equal(some, four)  # below the title, which counts all


@pytest.mark.parametrize(
    ("classes", "channels", "kind"),
    [(NAMES, 1, torch.float32), (LONG, 3, torch.uint8), (("yes", "no"), 3, torch.float32)],
    ids=["grey", "long", "two"],
)
def test_predictions(classes, channels, kind, tmp_path):
    images = torch.rand(2, channels, 12, 10, generator=torch.Generator().manual_seed(0))
    images = (images * 255).to(kind) if kind == torch.uint8 else images
    log_probs, _ = case(2, len(classes))
    names = ["a.png", "/a/very/long/path/to/somewhere/deep/in/the/tree/picture-0001.jpg"]
    pictures.predictions(tmp_path / "p.png", list(images), log_probs, classes, names)
    assert_picture(tmp_path / "p.png")


def test_predictions_up_to_a_number(tmp_path):
    log_probs, _ = case(5, 7)
    images = list(torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    for name, count in (("all", 5), ("two", 2)):
        pictures.predictions(
            tmp_path / f"{name}.png", images[:count], log_probs[:count], NAMES, list("abcde")[:count], 2
        )
    assert np.array_equal(pixels_of(tmp_path / "all.png"), pixels_of(tmp_path / "two.png"))
