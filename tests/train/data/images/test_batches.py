"""Batches of an image set: functions of key and step, with their labels, without what cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from core import random
from tests.train.data.images.image_files import write_pictures
from train.data import DataError
from train.data.images import sets as image_sets
from train.data.images.arrays import Labelled
from train.data.images.files import Files

KEY = random.key(5)


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_training_batches_are_functions_of_key_and_step(kind, pictures, decoder):
    data = image_sets.open_images("digits" if kind == "digits" else str(pictures)).train
    size = 8 if kind == "digits" else 16

    def batches(key, steps):
        return list(image_sets.train_batches(data, key, steps, 7, size, decoder))

    actual = batches(KEY, range(5))
    assert len(actual) == 5
    for pixels, labels in actual:
        assert pixels.shape == (7, data.images.shape[1] if kind == "digits" else 3, size, size)
        assert pixels.dtype == (torch.float32 if kind == "digits" else torch.uint8)
        assert labels.shape == (7,) and labels.dtype == torch.int64
    for (pixels, labels), (expected, targets) in zip(batches(KEY, range(3, 5)), actual[3:], strict=True):
        assert torch.equal(pixels, expected) and torch.equal(labels, targets)
    assert not torch.equal(batches(random.key(6), range(1))[0][0], actual[0][0])


def test_the_least_area_of_a_crop(tmp_path, decoder):
    """With 1 a square picture comes whole; with less, crops of it."""
    for i, name in enumerate("ab" * 4):
        (tmp_path / name).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    data = image_sets.open_images(str(tmp_path)).train

    def first(**options):
        return next(image_sets.train_batches(data, KEY, range(1), 7, 16, decoder, **options))[0]

    assert torch.equal(first(), first(least_area=0.08)) and not torch.equal(first(), first(least_area=0.9))
    whole = next(decoder.train_batches(data, KEY, range(1), 7, 16, scale=None))[0]
    assert torch.equal(first(least_area=1.0), whole)


def test_images_in_memory_come_with_their_labels():
    ramp = Labelled(torch.arange(600.0).reshape(600, 1, 1, 1), torch.arange(600))
    for pixels, labels in image_sets.train_batches(ramp, KEY, range(2), 300, 1, None):
        assert torch.equal(pixels.flatten(), labels.float())
    batches = list(image_sets.test_batches(ramp, 1, 1))
    assert [len(labels) for _, labels in batches] == [256, 256, 88]
    assert torch.equal(torch.cat([labels for _, labels in batches]), ramp.labels)
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), ramp.images)
    indices = torch.tensor([599, 0, 300])
    assert torch.equal(image_sets.some(ramp, indices, 1, 1), ramp.images[indices])


def test_files_to_test_on(tmp_path, decoder):
    """Those that cannot be read are left out, and `some` and `image` give what `test_batches` gave."""
    write_pictures(tmp_path, "ab", 5)
    for path in (tmp_path / "a" / "0.png", tmp_path / "b" / "1.png"):
        path.write_bytes(b"no picture")
    paths = tuple(sorted(tmp_path.rglob("*.png")))
    files = Files(paths, torch.tensor([0] * 5 + [1] * 5), ("a", "b"))
    batches = list(image_sets.test_batches(files, 12, 16, decoder))
    pixels, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    assert pixels.shape == (8, 3, 12, 12) and pixels.dtype == torch.uint8
    assert labels.tolist() == [0] * 4 + [1] * 4
    indices = torch.tensor([7, 0, 3, 4])
    assert torch.equal(image_sets.some(files, indices, 12, 16, decoder), pixels[indices])
    readable = [path for number, path in enumerate(paths) if number not in (0, 6)]
    for number in (0, 4, 5, 7):
        assert torch.equal(image_sets.image(readable[number], 12, 16), pixels[number])
    with pytest.raises(DataError, match="0.png cannot be read as a picture"):
        image_sets.image(paths[0], 12, 16)
