"""MobileNet v1 against transformers."""

import dataclasses

import pytest
import torch
from torch import nn

from core import random, spec, tree
from nets.classifiers import mobilenet_v1
from tests.nets.parity import check_parity, randomise

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
CFG = mobilenet_v1.PRESETS["mobilenet_v1"]


class Logits(transformers.MobileNetV1ForImageClassification):
    def forward(self, x):
        return super().forward(x).logits


def reference(width, classes, **options):
    cfg = transformers.MobileNetV1Config(
        depth_multiplier=width, num_labels=classes, classifier_dropout_prob=0.0, **options
    )
    return Logits(cfg)


@pytest.mark.parametrize("name", mobilenet_v1.PRESETS)
def test_size_is_that_of_transformers(name):
    cfg = mobilenet_v1.PRESETS[name]
    with torch.device("meta"):
        expected = {key: tuple(x.shape) for key, x in reference(cfg.width, 1000).state_dict().items()}
    table = mobilenet_v1.rename_table(cfg)
    assert {table[key].theirs: tuple(leaf.shape) for key, leaf in tree.items(mobilenet_v1.spec(cfg))} == expected


@pytest.mark.parametrize("size", [(64, 64), (63, 50)], ids=["even", "odd"])
@pytest.mark.parametrize("padding", ["symmetric", "tensorflow"])
def test_parity(padding, size):
    module = randomise(reference(0.25, 7, tf_padding=padding == "tensorflow"))
    for norm in (layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)):
        norm.momentum = 0.1  # not 0.9997, TensorFlow's weight of the old statistics: torch's is that of the new
    cfg = mobilenet_v1.Config(0.25, padding=padding, dropout=0.0, classes=7)
    check_parity(mobilenet_v1, cfg, module, random.normal(random.key(0), (4, 3, *size)))


def test_maps():
    params, x = spec.abstract(mobilenet_v1.spec(CFG)), torch.empty(2, 3, 224, 224, device="meta")
    sizes = [(32, 112), (64, 112), (128, 56), (256, 28), (512, 14), (1024, 7)]
    maps = mobilenet_v1.feature_maps(params, x, CFG)
    assert [tuple(x.shape) for x in maps] == [(2, width, size, size) for width, size in sizes]
    assert mobilenet_v1.features(params, x, CFG).shape == (2, 1024)
    for padding in ("symmetric", "tensorflow"):
        cfg = dataclasses.replace(CFG, padding=padding)
        assert mobilenet_v1.apply(params, x[..., :1, :1], cfg).shape == (2, 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0.0}, "width 0.0; expected a factor above 0"),
        ({"stages": ((64,), ())}, "expected at least one pair of convolutions"),
        ({"padding": "same"}, "padding 'same'; expected symmetric or tensorflow"),
        ({"dropout": 1.0}, "dropout 1.0 is outside"),
    ],
    ids=["width", "stages", "padding", "dropout"],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        mobilenet_v1.Config(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 64, 64), r"mobilenet_v1: expected images \(batch, 3, height, width\)"),
        ((2, 3, 0, 64), "0 x 64; expected at least 1"),
    ],
    ids=["channels", "size"],
)
def test_wrong_images(shape, message):
    with pytest.raises(ValueError, match=message):
        mobilenet_v1.apply(spec.abstract(mobilenet_v1.spec(CFG)), torch.empty(shape, device="meta"), CFG)


def test_training_without_a_key():
    params, x = spec.abstract(mobilenet_v1.spec(CFG)), torch.empty(2, 3, 32, 32, device="meta")
    with pytest.raises(ValueError, match="mobilenet_v1: training with dropout 0.001 draws random numbers; pass key="):
        mobilenet_v1.apply(params, x, CFG, train=True)
