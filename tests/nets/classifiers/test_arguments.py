"""Configurations, images and missing keys that the classifiers refuse, each in a line that names what is wrong."""

from dataclasses import replace

import pytest
import torch

from core import random, spec
from nets.classifiers import (
    alexnet,
    by_name,
    convnext,
    densenet,
    googlenet,
    inception,
    lenet,
    mlp,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    resnet,
    squeezenet,
    vgg,
    vit,
)
from nets.classifiers.mobilenet_v3 import Block

CONFIGURATIONS = [
    (alexnet, {"widths": (8, 8)}, r"widths \(8, 8\); expected the channels of 5 convolutions"),
    (alexnet, {"dropout": -0.1}, r"dropout -0.1 is outside \[0, 1\)"),
    (convnext, {"depths": (3, 3)}, r"depths \(3, 3\), widths \(96, 192, 384, 768\); expected one of each per stage"),
    (convnext, {"depths": (3, 0, 3, 1)}, "all at least 1"),
    (convnext, {"stochastic_depth": 1.0}, r"stochastic_depth 1.0 is outside \[0, 1\)"),
    (densenet, {"depths": (2, 0)}, r"depths \(2, 0\); expected at least one layer"),
    (densenet, {"depths": ()}, r"depths \(\); expected at least one layer"),
    (densenet, {"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
    (googlenet, {"stages": googlenet.STAGES[:2]}, r"stages of \[2, 5\] blocks; expected three"),
    (googlenet, {"stages": (((1,) * 6,),) * 3}, r"stages of \[1, 1, 1\] blocks; expected .* two blocks in the second"),
    (googlenet, {"stages": (((1,) * 6,) * 2, ((1,) * 6,) * 2, ((1,) * 5,))}, "expected six numbers of channels per"),
    (googlenet, {"dropout": -0.1}, r" dropout -0.1 is outside \[0, 1\)"),
    (googlenet, {"aux_dropout": 1.0}, r"aux_dropout 1.0 is outside \[0, 1\)"),
    (inception, {"width": 33}, "width 33; expected an even number of channels"),
    (inception, {"width": 0}, "width 0; expected an even number of channels"),
    (inception, {"pooled": ()}, r"pooled \(\), channels_7x7 .*; expected positive channels and at least one block in"),
    (inception, {"channels_7x7": (128, 0)}, r"channels_7x7 \(128, 0\), last 2; expected positive channels"),
    (inception, {"aux_kernel": 7}, "aux_kernel 7; expected 1, 3 or 5"),
    (inception, {"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
    (lenet, {"pool": "sum"}, "pool 'sum'; expected one of average, max"),
    (lenet, {"padding": (2,)}, r"widths \(6, 16\) and padding \(2,\); expected one per convolution"),
    (lenet, {"size": 11}, "nothing is left of images of 11 x 11"),
    (lenet, {"activation": "step"}, "no activation 'step'"),
    (mlp, {"widths": (3,)}, "need at least an input and an output"),
    (mlp, {"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
    (mlp, {"dropout": -0.1}, r"dropout -0.1 is outside \[0, 1\)"),
    (mobilenet_v1, {"width": 0.0}, "width 0.0; expected a factor above 0"),
    (mobilenet_v1, {"stages": ((64,), ())}, "expected at least one pair of convolutions"),
    (mobilenet_v1, {"padding": "same"}, "padding 'same'; expected symmetric or tensorflow"),
    (mobilenet_v1, {"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
    (mobilenet_v2, {"width": 0.0}, "width 0.0; expected a factor above 0"),
    (mobilenet_v2, {"stages": (mobilenet_v2.Stage(6, 16, 0, 1),)}, "all of them at least 1"),
    (mobilenet_v2, {"padding": "same"}, "padding 'same'; expected symmetric or tensorflow"),
    (mobilenet_v2, {"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
    (mobilenet_v3, {"width": -1.0}, "width -1.0; expected a factor above 0"),
    (mobilenet_v3, {"stages": ((),)}, "expected at least one block"),
    (mobilenet_v3, {"stages": ((Block(4, 16, 16, False, "relu"),),)}, "kernel=4.*expected an odd kernel"),
    (mobilenet_v3, {"stages": ((Block(3, 16, 16, False, "gelu"),),)}, "act='gelu'.*relu or hard_swish"),
    (mobilenet_v3, {"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
    (resnet, {"block": "wide"}, "block 'wide' is unknown; expected one of basic, bottleneck"),
    (resnet, {"stem": "small"}, "stem 'small', shortcut 'projection'; expected imagenet or cifar"),
    (resnet, {"depths": (2, 0)}, r"depths \(2, 0\); expected at least one block"),
    (resnet, {"groups": 4}, "groups are for bottleneck blocks"),
    (squeezenet, {"stages": ((), ((8, 8),))}, "expected at least one fire module"),
    (squeezenet, {"dropout": 1.5}, r"dropout 1.5 is outside \[0, 1\)"),
    (vgg, {"stages": ((64,), ())}, r"stages \(\(64,\), \(\)\); expected at least one convolution"),
    (vgg, {"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
    (vit, {"layers": 0}, "layers is 0; expected at least 1"),
    (vit, {"image": 13}, "image 13 is not divisible by patch 16"),
    (vit, {"heads": 5}, "width 192 is not divisible by 5 heads"),
    (vit, {"stochastic_depth": 1.0}, r"stochastic_depth 1.0 is outside \[0, 1\)"),
    (vit, {"pool": "max"}, "pool 'max' is unknown; expected token or mean"),
]


def name_of(net):
    return net.__name__.rpartition(".")[2]


def row_ids(rows):
    return [f"{name_of(net)}-{i}" for i, (net, *_) in enumerate(rows)]


@pytest.mark.parametrize(("net", "change", "message"), CONFIGURATIONS, ids=row_ids(CONFIGURATIONS))
def test_wrong_configurations(net, change, message):
    with pytest.raises(ValueError, match=message):
        replace(next(iter(net.PRESETS.values())), **change)


# Of the first preset of each net: images (batch, channels, height, width), and the error beside the name of the net.
CHANNELS = r"expected images \(batch, 3, height, width\), found"
IMAGES = [
    (alexnet, (2, 1, 64, 64), CHANNELS),
    (alexnet, (2, 3, 64, 62), "64 x 62; expected at least 63"),
    (convnext, (2, 1, 64, 64), CHANNELS),
    (convnext, (2, 3, 31, 64), "31 x 64; expected at least 32"),
    (densenet, (2, 1, 64, 64), CHANNELS),
    (densenet, (2, 3, 28, 64), "28 x 64; expected at least 29"),
    (googlenet, (2, 1, 64, 64), CHANNELS),
    (googlenet, (2, 3, 14, 64), "14 x 64; expected at least 15"),
    (inception, (2, 1, 299, 299), CHANNELS),
    (inception, (2, 3, 74, 299), "74 x 299; expected at least 75"),
    (lenet, (2, 3, 28, 28), r"expected images \(batch, 1, height, width\), found"),
    (lenet, (2, 1, 32, 28), "32 x 28; expected 28 x 28"),
    (mobilenet_v1, (2, 1, 64, 64), CHANNELS),
    (mobilenet_v1, (2, 3, 0, 64), "0 x 64; expected at least 1"),
    (mobilenet_v2, (2, 1, 64, 64), CHANNELS),
    (mobilenet_v2, (2, 3, 0, 64), "0 x 64; expected at least 1"),
    (mobilenet_v3, (2, 1, 64, 64), CHANNELS),
    (mobilenet_v3, (2, 3, 64, 0), "64 x 0; expected at least 1"),
    (resnet, (2, 1, 64, 64), CHANNELS),
    (resnet, (2, 3, 16, 64), "16 x 64; expected at least 32"),
    (squeezenet, (2, 4, 64, 64), CHANNELS),
    (squeezenet, (2, 3, 20, 64), "20 x 64; expected at least 21"),
    (vgg, (2, 1, 64, 64), CHANNELS),
    (vgg, (2, 3, 31, 64), "31 x 64; expected at least 32"),
    (vit, (2, 1, 224, 224), CHANNELS),
    (vit, (2, 3, 224, 240), "224 x 240; expected 224 x 224"),
    (vit, (2, 3, 8, 8), "8 x 8; expected at least 16 a side"),
]


def refused(net, cfg, shape, message, **options):
    with pytest.raises(ValueError, match=f"^{name_of(net)}: .*{message}"):
        net.apply(spec.abstract(net.spec(cfg)), torch.empty(shape, device="meta"), cfg, **options)


@pytest.mark.parametrize(("net", "shape", "message"), IMAGES, ids=row_ids(IMAGES))
def test_wrong_images(net, shape, message):
    refused(net, next(iter(net.PRESETS.values())), shape, message)


def test_images_too_small_for_another_preset_or_head():
    refused(squeezenet, squeezenet.PRESETS["squeezenet1_1"], (2, 3, 16, 64), "16 x 64; expected at least 17")
    message = "299 x 298; expected at least 299"
    refused(inception, inception.PRESETS["inception_v3"], (2, 3, 299, 298), message, key=random.key(0), train=True)


DRAWING = [name for name, net in by_name.FAMILIES.items() if net not in (lenet, resnet)]


@pytest.mark.parametrize("family", DRAWING)
def test_training_without_a_key(family):
    net = by_name.FAMILIES[family]
    cfg = next(iter(net.PRESETS.values()))
    rate = "stochastic_depth" if net is convnext else "dropout"
    cfg = replace(cfg, **{rate: 0.25}) if net in (densenet, mlp, vit) else cfg
    kind = "(dropout|stochastic depth) [0-9.]+ draws random numbers; pass key="
    size = cfg.image if net is vit else 8 if net is mlp else 299 if net is inception else 64
    refused(net, cfg, (2, 1 if net is mlp else 3, size, size), f"training with {kind}", train=True)
