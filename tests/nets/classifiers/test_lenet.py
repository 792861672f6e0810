"""LeNet-5 against the same net written with torch.nn."""

import pytest
import torch
from torch import nn

from core import random, spec, tree
from nets.classifiers import lenet
from tests.nets.parity import check_initial, check_parity


class LeNet(nn.Module):
    def __init__(self, act, pool):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)
        self.act, self.pool = act, pool

    def forward(self, x):
        x = self.pool(self.act(self.conv1(x)))
        x = self.pool(self.act(self.conv2(x)))
        x = self.act(self.fc1(x.flatten(1)))
        return self.fc3(self.act(self.fc2(x)))


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(128, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        for conv in (self.conv1, self.conv2):
            x = nn.functional.max_pool2d(conv(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("lenet5", lambda: LeNet(torch.tanh, nn.AvgPool2d(2))),
        ("lenet5-relu", lambda: LeNet(torch.relu, nn.MaxPool2d(2))),
        ("lenet-digits", Digits),
    ],
)
def test_parity(name, make):
    torch.manual_seed(0)
    module, cfg = make(), lenet.PRESETS[name]
    check_initial(lenet, cfg, module)
    check_parity(lenet, cfg, module, random.normal(random.key(0), (3, 1, cfg.size, cfg.size)))


def test_maps():
    cfg = lenet.PRESETS["lenet5"]
    params, x = spec.abstract(lenet.spec(cfg)), torch.empty(2, 1, 28, 28, device="meta")
    assert [tuple(x.shape) for x in lenet.feature_maps(params, x, cfg)] == [(2, 6, 28, 28), (2, 16, 10, 10)]
    assert lenet.features(params, x, cfg).shape == (2, 84)


def test_without_hidden_layers():
    cfg = lenet.Config((3,), (), size=6, kernel=3, padding=(0,), classes=4)
    made = spec.init(random.key(0), lenet.spec(cfg))
    assert "hidden.0.weight" not in tree.names(made) and made["head"]["weight"].shape == (4, 12)
    assert lenet.apply(made, random.normal(random.key(1), (2, 1, 6, 6)), cfg).shape == (2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "sum"}, "pool 'sum'; expected one of average, max"),
        ({"padding": (2,)}, r"widths \(6, 16\) and padding \(2,\); expected one a convolution"),
        ({"size": 11}, "nothing is left of images of 11 x 11"),
        ({"activation": "step"}, "no activation 'step'"),
    ],
    ids=["pool", "padding", "size", "activation"],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        lenet.Config(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 28, 28), r"lenet: expected images \(batch, 1, height, width\)"),
        ((2, 1, 32, 28), "32 x 28; expected 28 x 28"),
    ],
    ids=["channels", "size"],
)
def test_wrong_images(shape, message):
    cfg = lenet.PRESETS["lenet5"]
    with pytest.raises(ValueError, match=message):
        lenet.apply(spec.abstract(lenet.spec(cfg)), torch.empty(shape, device="meta"), cfg)
