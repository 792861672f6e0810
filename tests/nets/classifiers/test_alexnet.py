"""AlexNet against torchvision."""

import pytest
import torch
from torch import nn

from core import random, spec, tree
from nets.classifiers import alexnet
from tests.nets.parity import check_initial, check_parity, randomise

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
CFG = alexnet.PRESETS["alexnet"]


@pytest.fixture(scope="module")
def module():
    """Torchvision's, but for smaller linear layers, whose size is no argument of its class."""
    with torch.device("meta"):
        module = models.AlexNet(dropout=0.0)
    for place, sizes in ((1, (9216, 16)), (4, (16, 16)), (6, (16, 7))):
        module.classifier[place] = nn.Linear(*sizes)
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    return module.apply(lambda layer: layer.reset_parameters() if hasattr(layer, "reset_parameters") else None)


def test_size_is_that_of_torchvision():
    with torch.device("meta"):
        expected = {key: tuple(x.shape) for key, x in models.alexnet().state_dict().items()}
    table = alexnet.rename_table(CFG)
    assert {table[key].theirs: tuple(leaf.shape) for key, leaf in tree.items(alexnet.spec(CFG))} == expected


def test_parity(module):
    cfg = alexnet.Config(hidden=16, dropout=0.0, classes=7)
    check_initial(alexnet, cfg, module)
    check_parity(alexnet, cfg, randomise(module), random.normal(random.key(0), (2, 3, 95, 127)))


def test_maps():
    maps = alexnet.feature_maps(spec.abstract(alexnet.spec(CFG)), torch.empty(2, 3, 224, 224, device="meta"), CFG)
    sizes = [(64, 55), (192, 27), (384, 13), (256, 13), (256, 13)]
    assert [tuple(x.shape) for x in maps] == [(2, width, size, size) for width, size in sizes]


def test_smallest_images():
    out = alexnet.apply(spec.abstract(alexnet.spec(CFG)), torch.empty(2, 3, 63, 63, device="meta"), CFG)
    assert out.shape == (2, 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (8, 8)}, r"widths \(8, 8\); expected the channels of 5 convolutions"),
        ({"dropout": -0.1}, "dropout -0.1 is outside"),
    ],
    ids=["widths", "dropout"],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        alexnet.Config(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 64, 64), r"alexnet: expected images \(batch, 3, height, width\)"),
        ((2, 3, 64, 62), "64 x 62; expected at least 63"),
    ],
    ids=["channels", "size"],
)
def test_wrong_images(shape, message):
    with pytest.raises(ValueError, match=message):
        alexnet.apply(spec.abstract(alexnet.spec(CFG)), torch.empty(shape, device="meta"), CFG)


def test_training_without_a_key():
    with pytest.raises(ValueError, match="alexnet: training with dropout 0.5 draws random numbers; pass key="):
        alexnet.apply(spec.abstract(alexnet.spec(CFG)), torch.empty(2, 3, 63, 63, device="meta"), CFG, train=True)
