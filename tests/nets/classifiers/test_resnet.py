"""ResNet: the paper's counts for CIFAR, shortcuts without parameters, and the start as the identity."""

import pytest
import torch

from core import random, spec, tree
from nets.blocks import conv_norm
from nets.classifiers import resnet
from tests.registry import NETS


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


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2"])
def test_folded_batch_norm_gives_the_same_outputs(name):
    net = NETS[name]
    params, running = spec.split(net.spec, spec.init(random.key(0), net.spec, torch.float64))
    keys = iter(random.split(random.key(1), 400))
    moved = tree.map(lambda s: s + 0.5 * random.uniform(next(keys), s.shape, dtype=s.dtype), running)  # not 0 and 1
    values = tree.merge(tree.map(lambda p: p + 0.1 * random.normal(next(keys), p.shape, dtype=p.dtype), params), moved)
    x = tree.cast(net.batch(random.key(2), 2), torch.float64)
    folded = conv_norm.folded(values, eps=1e-5)
    assert not [path for path in tree.names(folded) if ".norm." in path or path.endswith(".mean")]
    torch.testing.assert_close(net.apply(folded, x, None, False), net.apply(values, x, None, False))
    with pytest.raises(ValueError, match="folded into the convolution cannot be trained"):
        net.apply(folded, x, random.key(0), True)
    with pytest.raises(ValueError, match="folded: there is no block of a convolution and its batch norm"):
        conv_norm.folded(folded, eps=1e-5)
