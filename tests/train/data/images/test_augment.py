"""Augmentation: each change of an image against torchvision's, and that an image's fate is a function of its key."""

import math

import pytest
import torch

from core import random
from train.data.images import augment, colours

N, HEIGHT, WIDTH = 4, 17, 21
BYTES = torch.randint(0, 256, (N, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
BYTES[1] //= 3
BYTES[2, :, :5] = 7
IMAGES = BYTES.float() / 255
KEYS = random.split(random.key(0), N)
CHANGES = {
    "flip": augment.flip,
    "crop": lambda keys, images: augment.crop(keys, images, 4),
    "resized_crop": lambda keys, images: augment.resized_crop(keys, images, (8, 9)),
    "erase": lambda keys, images: augment.erase(keys, images, 0.7),
    "colour_jitter": colours.colour_jitter,
    "rand_augment": lambda keys, images: augment.rand_augment(keys, images, 3, 20),
}


@pytest.fixture(scope="module")
def functional():
    return pytest.importorskip("torchvision.transforms.functional", reason="torchvision is not installed")


def one_by_one(f, amounts, images=IMAGES):
    return torch.stack([f(image, amount) for image, amount in zip(images, amounts.tolist(), strict=True)])


@pytest.mark.parametrize("name", CHANGES)
def test_an_image_does_not_see_its_batch(name):
    before, keys = IMAGES.clone(), KEYS.clone()
    actual = CHANGES[name](KEYS, IMAGES)
    alone = [CHANGES[name](KEYS[i : i + 1], IMAGES[i : i + 1]) for i in range(N)]
    # Means, products and interpolation of values up to 1, in kernels of another shape.
    torch.testing.assert_close(actual, torch.cat(alone), rtol=0, atol=2**-23 * (HEIGHT + WIDTH))
    assert torch.equal(IMAGES, before) and torch.equal(KEYS, keys)
    assert 0 <= actual.min() and actual.max() <= 1 and not torch.equal(actual, CHANGES[name](KEYS.flip(0), IMAGES))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "sharpness"])
def test_colours(name, functional):
    factors = torch.tensor([0.3, 1.0, 1.4, 0.0])
    expected = one_by_one(getattr(functional, f"adjust_{name}"), factors)
    # torchvision rounds the weight of red to 0.2989.
    torch.testing.assert_close(getattr(colours, name)(IMAGES, factors), expected, rtol=0, atol=1.1e-4)


def test_hue(functional):
    turns = torch.tensor([0.1, -0.3, 0.5, 0.0])
    torch.testing.assert_close(colours.hue(IMAGES, turns), one_by_one(functional.adjust_hue, turns), rtol=0, atol=2e-6)


def test_values_in_steps(functional):
    bits = torch.tensor([4, 6, 8, 5])
    expected = one_by_one(functional.posterize, bits, BYTES).float() / 255
    torch.testing.assert_close(colours.posterize(IMAGES, bits), expected, rtol=0, atol=1e-7)
    threshold = torch.tensor([0.3, 1.0, 0.0, 0.5])
    torch.testing.assert_close(
        colours.solarize(IMAGES, threshold), one_by_one(functional.solarize, threshold), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(colours.autocontrast(IMAGES, threshold), functional.autocontrast(IMAGES))
    expected = functional.equalize(BYTES).float() / 255
    torch.testing.assert_close(colours.equalize(IMAGES, threshold), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_geometry(name, functional):
    """The same pixels as torchvision's, but for places half-way between two."""
    f, amount, _ = augment.OPERATIONS[name]
    amounts = amount(1.0) * torch.tensor([0.6, -1.0, 0.3, 0.0])

    def theirs(image, value):
        slant = -math.degrees(math.atan(value))
        if name == "rotate":
            return functional.rotate(image, value)
        shift = {"translate_x": [int(value * WIDTH), 0], "translate_y": [0, int(value * HEIGHT)]}.get(name, [0, 0])
        shear = {"shear_x": [slant, 0.0], "shear_y": [0.0, slant]}.get(name, [0.0, 0.0])
        return functional.affine(image, 0.0, shift, 1.0, shear)

    expected, actual = one_by_one(theirs, amounts), f(IMAGES, amounts)
    assert (actual != expected).float().mean() < 0.01
    assert torch.equal(actual[3], IMAGES[3])


def test_boxes_have_the_asked_size_and_place():
    keys = random.split(random.key(1), 4000)
    actual, fits = augment.boxes(keys, 40, 60, scale=(0.1, 0.5), ratio=(0.5, 2.0))
    top, left, height, width = actual.unbind(1)
    assert fits.all() and torch.equal(actual, actual.round())
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 40).all() and (left + width <= 60).all()
    area, ratio = height * width / 2400, width / height
    assert 0.09 < area.min() and area.max() < 0.53 and 0.45 < ratio.min() and ratio.max() < 2.2
    assert area.mean() == pytest.approx(0.28, abs=0.02)  # small ones fit more often than 0.3 would have it
    assert ratio.log().mean().abs() < 0.1
    assert {0.0, 40.0 - 10} & set(top.tolist())


def test_boxes_that_do_not_fit_are_the_middle():
    actual, fits = augment.boxes(KEYS, torch.tensor([10, 10, 8, 8]), torch.tensor([100, 100, 8, 8]), scale=(1.0, 1.0))
    assert fits.tolist() == [False, False, False, False] or fits[:2].tolist() == [False, False]
    assert actual[0].tolist() == [0, 43, 10, 13]


def test_resized_crop_is_torchvisions(functional):
    boxes, _ = augment.boxes(KEYS, HEIGHT, WIDTH)
    expected = [
        functional.resized_crop(image, *map(int, box), [8, 9], antialias=False)
        for image, box in zip(IMAGES, boxes, strict=True)
    ]
    actual = augment.resized_crop(KEYS, IMAGES, (8, 9))
    # Coordinates are rounded to an eps of the image's sides, and neighbouring pixels differ by 1 at most.
    torch.testing.assert_close(actual, torch.stack(expected), rtol=0, atol=2**-23 * (HEIGHT + WIDTH))


def test_chances():
    keys = random.split(random.key(2), 4000)
    ramp = torch.arange(12.0).reshape(1, 1, 3, 4).expand(4000, 1, 3, 4) / 12
    flipped = (augment.flip(keys, ramp, 0.3) != ramp).flatten(1).any(1)
    assert flipped.float().mean() == pytest.approx(0.3, abs=0.03)
    painted = (augment.erase(keys, ramp.repeat(1, 1, 4, 4) + 0.01, 0.25) == 0).flatten(1).any(1)
    assert painted.float().mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("mix", [augment.mixup, augment.cutmix])
def test_mixtures(mix):
    targets = torch.eye(N)
    images = torch.arange(float(N)).reshape(N, 1, 1, 1).expand(N, 1, 10, 10) / N
    shares = []
    for i in range(200):
        mixed, soft = mix(random.key(i), images, targets, 1.0)
        torch.testing.assert_close(soft.sum(1), torch.ones(N))
        share = soft.diagonal()
        torch.testing.assert_close(soft - torch.diag(share), torch.diag(1 - share).roll(-1, 1))
        # The mean of an image is mixed as the targets are.
        expected = share * images.mean((1, 2, 3)) + (1 - share) * images.mean((1, 2, 3)).roll(1)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)
        shares.append(float(share[0]))
    assert torch.tensor(shares).mean() == pytest.approx(0.5 if mix is augment.mixup else 0.62, abs=0.08)


def test_beta():
    draws = torch.stack([augment.beta(random.key(i), 0.4) for i in range(2000)])
    assert draws.mean() == pytest.approx(0.5, abs=0.03)
    assert draws.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)
    with pytest.raises(ValueError, match="alpha is 0; expected a positive number"):
        augment.beta(random.key(0), 0)


def test_magnitude_out_of_range():
    with pytest.raises(ValueError, match="magnitude is 31; expected 0 to 30"):
        augment.rand_augment(KEYS, IMAGES, magnitude=31)


# All changes of a batch.

LABELS = torch.tensor([2, 0, 4, 1])
MEAN = (0.5, 0.25, 0.75)
ALL = augment.Changes(crop=2, flip=True, colour_jitter=0.3, rand_augment=9, erase=0.5, mixup=0.4, cutmix=1.0)


def change(changes, key=0, images=BYTES):
    return augment.changed(random.key(key), images, LABELS, changes, 5, MEAN[: images.shape[1]])


@pytest.mark.parametrize("images", [BYTES, IMAGES], ids=["bytes", "floats"])
def test_without_changes_images_are_as_they_were(images):
    actual, labels = change(augment.Changes(), images=images)
    assert torch.equal(actual, images) and actual.dtype == images.dtype
    assert torch.equal(labels, LABELS) and labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "stay_bytes"),
    [
        (augment.Changes(crop=3), True),
        (augment.Changes(flip=True), True),
        (augment.Changes(colour_jitter=0.3), False),
        (augment.Changes(rand_augment=12), False),
        (augment.Changes(erase=0.9), False),
        (augment.Changes(mixup=0.4), False),
        (augment.Changes(cutmix=1.0), False),
        (ALL, False),
    ],
    ids=["crop", "flip", "colour_jitter", "rand_augment", "erase", "mixup", "cutmix", "all"],
)
def test_changes_are_functions_of_the_key(changes, stay_bytes):
    before = BYTES.clone()
    actual, labels = change(changes)
    again, repeated = change(changes)
    assert torch.equal(actual, again) and torch.equal(labels, repeated) and torch.equal(BYTES, before)
    assert actual.dtype == (torch.uint8 if stay_bytes else torch.float32) and actual.shape == BYTES.shape
    assert not torch.equal(augment.unit(actual), IMAGES) and not torch.equal(actual, change(changes, 1)[0])
    before = IMAGES.clone()
    of_floats, same = change(changes, images=IMAGES)
    assert torch.equal(of_floats, augment.unit(actual)) and torch.equal(same, labels) and torch.equal(IMAGES, before)
    assert 0 <= of_floats.min() and of_floats.max() <= 1
    if changes.mixup or changes.cutmix:
        assert labels.shape == (N, 5) and labels.dtype == torch.float32 and (labels >= 0).all()
        torch.testing.assert_close(labels.sum(1), torch.ones(N))
        share = labels.gather(1, LABELS[:, None])[:, 0]
        torch.testing.assert_close(labels.gather(1, LABELS.roll(1)[:, None])[:, 0], 1 - share)
    else:
        assert torch.equal(labels, LABELS)


def test_each_change_has_a_key_of_its_own():
    """One more change leaves the probabilities of the others as they were."""
    flipped = (change(augment.Changes(flip=True))[0] != BYTES).flatten(1).any(1)
    assert 0 < flipped.sum() < N
    images = torch.where(flipped[:, None, None, None], IMAGES.flip(-1), IMAGES)
    expected = change(augment.Changes(erase=0.9), images=images)[0]
    assert torch.equal(change(augment.Changes(flip=True, erase=0.9))[0], expected)


def test_images_are_padded_with_black_and_erased_with_their_mean():
    white = torch.ones_like(IMAGES)
    for images in (white, torch.full_like(BYTES, 255)):
        cropped = torch.cat([change(augment.Changes(crop=4), key, images)[0] for key in range(5)])
        assert cropped.unique().tolist() == [0, images.max()]
    actual, _ = change(augment.Changes(erase=1.0), images=white)
    for channel, mean in enumerate(MEAN):
        assert actual[:, channel].unique().tolist() == [mean, 1]
    # The same rectangle in all channels, in every image.
    erased = actual < 1
    assert torch.equal(erased, erased[:, :1].expand_as(erased)) and erased.flatten(1).any(1).all()


def test_a_batch_is_mixed_one_way_or_the_other():
    both = augment.Changes(mixup=0.4, cutmix=1.0)
    ramp = torch.arange(float(N)).reshape(N, 1, 1, 1).expand(N, 1, 12, 12) / N
    pasted = 0
    for key in range(60):
        actual, labels = change(both, key, ramp)
        alone = [change(augment.Changes(**way), key, ramp) for way in ({"mixup": 0.4}, {"cutmix": 1.0})]
        same = [torch.equal(actual, images) and torch.equal(labels, targets) for images, targets in alone]
        assert sum(same) == 1
        pasted += same[1]
    assert 15 < pasted < 45


@pytest.mark.parametrize("changes", [augment.Changes(0, False, 0.4, 9, 0.25), ALL], ids=["single", "all"])
def test_images_with_one_channel(changes):
    actual, _ = change(changes, images=BYTES[:, :1])
    assert actual.shape == (N, 1, HEIGHT, WIDTH) and 0 <= actual.min() and actual.max() <= 1


def test_unit():
    assert torch.equal(augment.unit(BYTES), IMAGES) and augment.unit(BYTES).dtype == torch.float32
    assert augment.unit(IMAGES) is IMAGES
    assert augment.unit(IMAGES.double()).dtype == torch.float64
