"""MobileNet v3 against torchvision."""

import pytest
import torch

from core import random, spec, tree
from nets.classifiers import mobilenet_v3
from nets.classifiers.mobilenet_v3 import Block
from tests.nets.parity import check_initial, check_parity, randomise

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
CFG = mobilenet_v3.PRESETS["mobilenet_v3_small"]
STAGES = (
    (Block(3, 16, 16, False, "relu"),),
    (Block(3, 40, 24, True, "relu", 2), Block(5, 72, 24, True, "hard_swish")),
    (Block(5, 96, 40, False, "hard_swish", 2),),
)


@pytest.mark.parametrize("name", mobilenet_v3.PRESETS)
def test_size_is_that_of_torchvision(name):
    cfg = mobilenet_v3.PRESETS[name]
    with torch.device("meta"):
        module = getattr(models, name)()
    expected = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    table = mobilenet_v3.rename_table(cfg)
    assert {table[key].theirs: tuple(leaf.shape) for key, leaf in tree.items(mobilenet_v3.spec(cfg))} == expected


@pytest.mark.parametrize(
    "stages",
    [STAGES, mobilenet_v3.SMALL[:1] + mobilenet_v3.SMALL[2:3]],
    ids=["large", "small"],
)
@pytest.mark.parametrize("width", [1.0, 0.75])
def test_parity(stages, width):
    torch.manual_seed(0)
    rows, d_in = [], 16
    for block in (block for blocks in stages for block in blocks):
        act = {"relu": "RE", "hard_swish": "HS"}[block.act]
        rows.append(
            models.mobilenetv3.InvertedResidualConfig(
                d_in, block.kernel, block.inside, block.channels, block.squeeze, act, block.stride, 1, width
            )
        )
        d_in = block.channels
    hidden = rows[0].adjust_channels(64, width)
    module = models.MobileNetV3(rows, hidden, num_classes=7, dropout=0.0)
    cfg = mobilenet_v3.Config(stages, 64, width, dropout=0.0, classes=7)
    check_initial(mobilenet_v3, cfg, module)
    check_parity(mobilenet_v3, cfg, randomise(module), random.normal(random.key(0), (4, 3, 32, 39)))


def test_maps():
    params, x = spec.abstract(mobilenet_v3.spec(CFG)), torch.empty(2, 3, 224, 224, device="meta")
    sizes = [(16, 112), (16, 56), (24, 28), (48, 14), (96, 7), (576, 7)]
    maps = mobilenet_v3.feature_maps(params, x, CFG)
    assert [tuple(x.shape) for x in maps] == [(2, width, size, size) for width, size in sizes]
    assert mobilenet_v3.features(params, x, CFG).shape == (2, 1024)
    assert mobilenet_v3.apply(params, x[..., :1, :1], CFG).shape == (2, 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": -1.0}, "width -1.0; expected a factor above 0"),
        ({"stages": ((),)}, "expected at least one block"),
        ({"stages": ((Block(4, 16, 16, False, "relu"),),)}, "kernel=4.*expected an odd kernel"),
        ({"stages": ((Block(3, 16, 16, False, "gelu"),),)}, "act='gelu'.*relu or hard_swish"),
        ({"dropout": 1.0}, "dropout 1.0 is outside"),
    ],
    ids=["width", "stages", "kernel", "activation", "dropout"],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        mobilenet_v3.Config(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 64, 64), r"mobilenet_v3: expected images \(batch, 3, height, width\)"),
        ((2, 3, 64, 0), "64 x 0; expected at least 1"),
    ],
    ids=["channels", "size"],
)
def test_wrong_images(shape, message):
    with pytest.raises(ValueError, match=message):
        mobilenet_v3.apply(spec.abstract(mobilenet_v3.spec(CFG)), torch.empty(shape, device="meta"), CFG)


def test_training_without_a_key():
    params, x = spec.abstract(mobilenet_v3.spec(CFG)), torch.empty(2, 3, 32, 32, device="meta")
    with pytest.raises(ValueError, match="mobilenet_v3: training with dropout 0.2 draws random numbers; pass key="):
        mobilenet_v3.apply(params, x, CFG, train=True)
