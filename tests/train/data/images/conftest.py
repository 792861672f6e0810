"""Fixtures of the tests of images."""

from pathlib import Path

import pytest

from tests.train.data.images.image_files import write_pictures
from train.data.images.files import Decoder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three classes of six pictures, undivided."""
    return write_pictures(tmp_path_factory.mktemp("pictures"), "abc")


@pytest.fixture
def decoder():
    with Decoder(0) as decoder:
        yield decoder
