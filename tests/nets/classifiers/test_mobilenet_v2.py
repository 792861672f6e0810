"""MobileNet v2 against torchvision."""

import pytest
import torch

from core import random, spec, tree
from nets.classifiers import mobilenet_v2
from tests.nets.parity import check_initial, check_parity, randomise

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
CFG = mobilenet_v2.PRESETS["mobilenet_v2"]


@pytest.mark.parametrize("name", mobilenet_v2.PRESETS)
def test_size_is_that_of_torchvision(name):
    cfg = mobilenet_v2.PRESETS[name]
    with torch.device("meta"):
        expected = {key: tuple(x.shape) for key, x in models.MobileNetV2(width_mult=cfg.width).state_dict().items()}
    table = mobilenet_v2.rename_table(cfg)
    assert {table[key].theirs: tuple(leaf.shape) for key, leaf in tree.items(mobilenet_v2.spec(cfg))} == expected


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_parity(width):
    torch.manual_seed(0)
    table = [(1, 16, 1, 1), (6, 24, 2, 2), (4, 32, 1, 1), (4, 40, 1, 2)]
    module = models.MobileNetV2(num_classes=7, width_mult=width, inverted_residual_setting=table, dropout=0.0)
    stages = tuple(mobilenet_v2.Stage(*row) for row in table)
    cfg = mobilenet_v2.Config(width, stages, dropout=0.0, classes=7)
    check_initial(mobilenet_v2, cfg, module)
    check_parity(mobilenet_v2, cfg, randomise(module), random.normal(random.key(0), (4, 3, 32, 23)))


def test_maps():
    params, x = spec.abstract(mobilenet_v2.spec(CFG)), torch.empty(2, 3, 224, 224, device="meta")
    sizes = [(32, 112), (16, 112), (24, 56), (32, 28), (64, 14), (96, 14), (160, 7), (320, 7), (1280, 7)]
    maps = mobilenet_v2.feature_maps(params, x, CFG)
    assert [tuple(x.shape) for x in maps] == [(2, width, size, size) for width, size in sizes]
    assert mobilenet_v2.features(params, x, CFG).shape == (2, 1280)
    assert mobilenet_v2.apply(params, x[..., :1, :1], CFG).shape == (2, 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0.0}, "width 0.0; expected a factor above 0"),
        ({"stages": (mobilenet_v2.Stage(6, 16, 0, 1),)}, "all of them at least 1"),
        ({"padding": "same"}, "padding 'same'; expected symmetric or tensorflow"),
        ({"dropout": 1.0}, "dropout 1.0 is outside"),
    ],
    ids=["width", "stages", "padding", "dropout"],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        mobilenet_v2.Config(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 64, 64), r"mobilenet_v2: expected images \(batch, 3, height, width\)"),
        ((2, 3, 0, 64), "0 x 64; expected at least 1"),
    ],
    ids=["channels", "size"],
)
def test_wrong_images(shape, message):
    with pytest.raises(ValueError, match=message):
        mobilenet_v2.apply(spec.abstract(mobilenet_v2.spec(CFG)), torch.empty(shape, device="meta"), CFG)


def test_training_without_a_key():
    params, x = spec.abstract(mobilenet_v2.spec(CFG)), torch.empty(2, 3, 32, 32, device="meta")
    with pytest.raises(ValueError, match="mobilenet_v2: training with dropout 0.2 draws random numbers; pass key="):
        mobilenet_v2.apply(params, x, CFG, train=True)
