"""VGG against torchvision."""

import dataclasses

import pytest
import torch
from torch import nn

from core import random, spec, tree
from nets.classifiers import vgg
from tests.nets.parity import check_parity, randomise

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")


@pytest.mark.parametrize("name", vgg.PRESETS)
def test_size_is_that_of_torchvision(name):
    with torch.device("meta"):
        module = getattr(models, name)()
    cfg = vgg.PRESETS[name]
    expected = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    table = vgg.rename_table(cfg)
    assert {table[key].theirs: tuple(leaf.shape) for key, leaf in tree.items(vgg.spec(cfg))} == expected


@pytest.mark.parametrize("size", [64, 32], ids=["averaged", "spread"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_parity(norm, size):
    """With 64 pixels a place of the last maps is a mean, with 32 they are fewer than the places."""
    with torch.device("meta"):  # the linear layers of torchvision's class are of one size
        module = models.VGG(nn.Identity(), dropout=0.0)
    module.features = models.vgg.make_layers([8, "M", 8, 12, "M", 12, "M"], norm)
    linear = nn.Linear(12 * 49, 16), nn.Linear(16, 16), nn.Linear(16, 7)
    for place, layer in zip((0, 3, 6), linear, strict=True):
        module.classifier[place] = layer
    cfg = vgg.Config(((8,), (8, 12), (12,)), norm, hidden=16, dropout=0.0, classes=7)
    check_parity(vgg, cfg, randomise(module), random.normal(random.key(0), (3, 3, size, size)))


def test_published_files_may_lack_the_counts_of_batch_norm(tmp_path):
    cfg = vgg.Config(((4,), (5,)), True, pooled=1, hidden=6, classes=3)
    table, made = vgg.rename_table(cfg), spec.init(random.key(0), vgg.spec(cfg))
    state = {table[name].theirs: x for name, x in tree.items(made) if not name.endswith("count")}
    torch.save(state, tmp_path / "vgg.pth")
    loaded = vgg.from_pretrained(str(tmp_path / "vgg.pth"), cfg)
    assert tree.names(loaded) == tree.names(made)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(loaded), tree.leaves(made), strict=True))


def test_initial_values():
    """As in torchvision: He et al. 2015 by the fan-out for convolutions, 0.01 for linear layers."""
    cfg = vgg.Config(((32,), (64,)), hidden=64, pooled=2, classes=40)
    made = spec.init(random.key(0), vgg.spec(cfg))
    assert float(made["stages"][1][0]["conv"]["weight"].std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    for p in (*made["hidden"], made["head"]):
        assert float(p["weight"].std()) == pytest.approx(0.01, rel=0.05) and not p["bias"].any()


def test_maps():
    cfg = vgg.PRESETS["vgg16_bn"]
    maps = vgg.feature_maps(spec.abstract(vgg.spec(cfg)), torch.empty(2, 3, 224, 224, device="meta"), cfg)
    sizes = [(64, 224), (128, 112), (256, 56), (512, 28), (512, 14)]
    assert [tuple(x.shape) for x in maps] == [(2, width, size, size) for width, size in sizes]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ((64,), ())}, r"stages \(\(64,\), \(\)\); expected at least one convolution"),
        ({"dropout": 1.0}, "dropout 1.0 is outside"),
    ],
    ids=["stages", "dropout"],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(vgg.PRESETS["vgg11"], **change)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 64, 64), r"vgg: expected images \(batch, 3, height, width\)"),
        ((2, 3, 31, 64), "31 x 64; expected at least 32"),
    ],
    ids=["channels", "size"],
)
def test_wrong_images(shape, message):
    cfg = vgg.PRESETS["vgg11"]
    params = spec.abstract(vgg.spec(cfg))
    with pytest.raises(ValueError, match=message):
        vgg.apply(params, torch.empty(shape, device="meta"), cfg)


def test_smallest_images():
    cfg = vgg.PRESETS["vgg11"]
    out = vgg.apply(spec.abstract(vgg.spec(cfg)), torch.empty(2, 3, 32, 32, device="meta"), cfg)
    assert out.shape == (2, 1000)


def test_training_without_a_key():
    cfg = vgg.PRESETS["vgg11"]
    with pytest.raises(ValueError, match="vgg: training with dropout 0.5 draws random numbers; pass key="):
        vgg.apply(spec.abstract(vgg.spec(cfg)), torch.empty(2, 3, 32, 32, device="meta"), cfg, train=True)
