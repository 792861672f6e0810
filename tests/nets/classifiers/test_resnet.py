"""ResNet: the paper's counts for CIFAR, shortcuts without parameters, and the start as the identity."""

import pytest
import torch

from core import random, spec, tree
from nets.classifiers import resnet


def test_cifar_sizes():
    """Table 6 of the paper, in millions."""
    for depth, millions in ((20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)):
        params, _ = spec.split(*(2 * [resnet.spec(resnet.PRESETS[f"cifar-resnet{depth}"])]))
        assert tree.count(params) / 1e6 == pytest.approx(millions, rel=0.02)


def test_padding_shortcut_has_every_second_pixel():
    """With all convolutions at zero what remains is the shortcut."""
    cfg = resnet.Config((1, 1), width=4, stem="cifar", shortcut="padding", classes=3)
    params = spec.init(random.key(0), resnet.spec(cfg))
    params = tree.map_with_names(lambda name, x: 0 * x if "convs" in name and "weight" in name else x, params)
    stem, first, second = resnet.feature_maps(params, random.normal(random.key(1), (2, 3, 8, 8)), cfg)
    torch.testing.assert_close(first, stem)
    torch.testing.assert_close(second, torch.cat([stem[:, :, ::2, ::2], torch.zeros(2, 4, 4, 4)], 1))


def test_zero_init_starts_as_the_identity():
    cfg = resnet.Config((2,), width=4, stem="cifar", zero_init=True)
    stem, out = resnet.feature_maps(
        spec.init(random.key(0), resnet.spec(cfg)), random.normal(random.key(1), (2, 3, 8, 8)), cfg
    )
    torch.testing.assert_close(out, stem)
