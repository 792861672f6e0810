"""Shapes of the classifiers' feature maps, penultimate features and outputs, and the smallest images that they take.

All on the meta device: shapes without values. The sizes are those of the papers' tables, or of torchvision.
"""

from dataclasses import replace

import pytest
import torch

from core import spec, tree
from nets.classifiers import by_name, convnext, densenet, inception

DENSENET = densenet.Config((2, 1, 2), growth=4, width=8, expansion=2, classes=7)
CONVNEXT = convnext.Config((1, 2, 1), (4, 6, 8), classes=7)

# preset or (net, Config), pixels per side, (channels, pixels per side) of each feature map, penultimate features
MAPS = [
    ("alexnet", 224, [(64, 55), (192, 27), (384, 13), (256, 13), (256, 13)], 4096),
    ((convnext, CONVNEXT), 32, [(4, 8), (6, 4), (8, 2)], 8),
    ((densenet, DENSENET), 32, [(8, 16), (16, 8), (12, 4), (14, 2)], 14),
    ("googlenet", 64, [(64, 32), (192, 16), (480, 8), (832, 4), (1024, 2)], 1024),
    ("inception_v3", 299, [(64, 147), (192, 71), (288, 35), (768, 17), (2048, 8)], 2048),
    ("lenet5", 28, [(6, 28), (16, 10)], 84),
    ("mobilenet_v1", 224, [(32, 112), (64, 112), (128, 56), (256, 28), (512, 14), (1024, 7)], 1024),
    (
        "mobilenet_v2",
        224,
        [(32, 112), (16, 112), (24, 56), (32, 28), (64, 14), (96, 14), (160, 7), (320, 7), (1280, 7)],
        1280,
    ),
    ("mobilenet_v3_small", 224, [(16, 112), (16, 56), (24, 28), (48, 14), (96, 7), (576, 7)], 1024),
    ("resnet50", 224, [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)], 2048),
    ("squeezenet1_0", 224, [(96, 109), (256, 54), (512, 27), (512, 13)], 512),
    ("vgg16_bn", 224, [(64, 224), (128, 112), (256, 56), (512, 28), (512, 14)], 4096),
    ("vit_ti_16", 224, [(192, 14)] * 13, 192),
]


def name_of(net):
    return net if isinstance(net, str) else net[0].__name__.rpartition(".")[2]


def inputs(net, size):
    """(module, Config, abstract parameters, abstract images)."""
    net, cfg = by_name.find(net) if isinstance(net, str) else net
    return net, cfg, spec.abstract(net.spec(cfg)), torch.empty(2, cfg.channels, size, size, device="meta")


@pytest.mark.parametrize(("net", "size", "maps", "features"), MAPS, ids=[name_of(net) for net, *_ in MAPS])
def test_feature_maps(net, size, maps, features):
    net, cfg, params, x = inputs(net, size)
    actual = [tuple(x.shape) for x in net.feature_maps(params, x, cfg)]
    assert actual == [(2, channels, side, side) for channels, side in maps]
    assert net.features(params, x, cfg).shape == (2, features)


# preset or (net, Config), pixels per side, outputs in training
SMALLEST = [
    ("alexnet", 63, 1),
    *(((densenet, replace(DENSENET, depths=(1,) * n)), 2 ** (n + 1) - 3, 1) for n in (1, 2, 4)),
    ("googlenet", 15, 3),
    ((inception, replace(inception.PRESETS["inception_v3"], aux=False)), 75, 1),
    *(
        ((inception, replace(inception.PRESETS["inception_v3"], aux_kernel=kernel)), size, 2)
        for size, kernel in ((107, 1), (203, 3), (299, 5))
    ),
    ("mobilenet_v1", 1, 1),
    ((by_name.FAMILIES["mobilenet_v1"], replace(by_name.find("mobilenet_v1")[1], padding="tensorflow")), 1, 1),
    ("mobilenet_v2", 1, 1),
    ("mobilenet_v3_small", 1, 1),
    ("squeezenet1_0", 21, 1),
    ("squeezenet1_1", 17, 1),
    ("vgg11", 32, 1),
]


@pytest.mark.parametrize(
    ("net", "size", "outputs"), SMALLEST, ids=[f"{name_of(net)}, {size}, {n}" for net, size, n in SMALLEST]
)
def test_smallest_images(net, size, outputs):
    """Images of one pixel less are refused in `test_arguments.py`."""
    net, cfg, params, x = inputs(net, size)
    assert net.apply(params, x, cfg).shape == (2, cfg.classes)
    if size > 1:  # batch norm refuses a single value per channel in training
        cfg = replace(cfg, **{rate: 0.0 for rate in ("aux_dropout", "dropout") if hasattr(cfg, rate)})
        out = net.apply(params, x, cfg, train=True)
        assert [tuple(logits.shape) for logits in tree.leaves(out)] == [(2, cfg.classes)] * outputs
    if net in (densenet, inception) and outputs == 1:
        assert net.feature_maps(params, x, cfg)[-1].shape[2:] == (1, 1)
