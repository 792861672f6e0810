"""ResNet, ResNeXt and Wide ResNet against torchvision; the CIFAR form against the paper's counts."""

import dataclasses

import pytest
import torch

from core import random, spec, tree
from nets.classifiers import resnet
from tests.nets.parity import check_parity, randomise

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
PUBLISHED = [name for name in resnet.PRESETS if not name.startswith("cifar")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_is_that_of_torchvision(name):
    with torch.device("meta"):
        module = getattr(models, name)()
    cfg = resnet.PRESETS[name]
    expected = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    table = resnet.rename_table(cfg)
    assert {table[key].theirs: tuple(leaf.shape) for key, leaf in tree.items(resnet.spec(cfg))} == expected


@pytest.mark.parametrize(
    ("block", "options"),
    [
        ("basic", {}),
        ("bottleneck", {}),
        ("bottleneck", {"groups": 4, "width_per_group": 8}),
        ("bottleneck", {"width_per_group": 128}),
    ],
    ids=["basic", "bottleneck", "groups", "wide"],
)
def test_parity(block, options):
    made = {"basic": models.resnet.BasicBlock, "bottleneck": models.resnet.Bottleneck}[block]
    module = randomise(models.ResNet(made, [2, 1, 1, 1], num_classes=7, **options))
    ours = {name.replace("width_per_group", "group_width"): value for name, value in options.items()}
    cfg = resnet.Config((2, 1, 1, 1), block, classes=7, **ours)
    check_parity(resnet, cfg, module, random.normal(random.key(0), (4, 3, 64, 64)))


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": "wide"}, "block 'wide' is unknown; expected one of basic, bottleneck"),
        ({"stem": "small"}, "stem 'small', shortcut 'projection'; expected imagenet or cifar"),
        ({"depths": (2, 0)}, r"depths \(2, 0\); expected at least one block"),
        ({"groups": 4}, "groups are for bottleneck blocks"),
    ],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(resnet.PRESETS["resnet18"], **change)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 64, 64), r"expected images \(batch, 3, height, width\)"),
        ((2, 3, 16, 64), "16 x 64; expected at least 32"),
    ],
)
def test_wrong_images(shape, message):
    cfg = resnet.PRESETS["resnet18"]
    params = spec.abstract(resnet.spec(cfg))
    with pytest.raises(ValueError, match=message):
        resnet.apply(params, torch.empty(shape, device="meta"), cfg)
