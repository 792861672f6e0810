"""SqueezeNet against torchvision."""

import dataclasses

import pytest
import torch

from core import random, spec, tree
from nets.classifiers import squeezenet
from tests.nets.parity import check_initial, check_parity, randomise

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
every_preset = pytest.mark.parametrize("name", squeezenet.PRESETS)


@every_preset
def test_size_is_that_of_torchvision(name):
    with torch.device("meta"):
        expected = {key: tuple(x.shape) for key, x in getattr(models, name)().state_dict().items()}
    cfg = squeezenet.PRESETS[name]
    table = squeezenet.rename_table(cfg)
    assert {table[key].theirs: tuple(leaf.shape) for key, leaf in tree.items(squeezenet.spec(cfg))} == expected


@every_preset
def test_parity(name):
    torch.manual_seed(0)
    module = models.SqueezeNet(name.removeprefix("squeezenet"), num_classes=7, dropout=0.0)
    cfg = dataclasses.replace(squeezenet.PRESETS[name], classes=7, dropout=0.0)
    check_initial(squeezenet, cfg, module)
    check_parity(squeezenet, cfg, randomise(module), random.normal(random.key(0), (2, 3, 40, 53)))


def test_maps():
    cfg = squeezenet.PRESETS["squeezenet1_0"]
    params, x = spec.abstract(squeezenet.spec(cfg)), torch.empty(2, 3, 224, 224, device="meta")
    sizes = [(96, 109), (256, 54), (512, 27), (512, 13)]
    maps = squeezenet.feature_maps(params, x, cfg)
    assert [tuple(x.shape) for x in maps] == [(2, width, size, size) for width, size in sizes]
    assert squeezenet.features(params, x, cfg).shape == (2, 512)


@pytest.mark.parametrize(("name", "least"), [("squeezenet1_0", 21), ("squeezenet1_1", 17)])
def test_smallest_images(name, least):
    cfg = squeezenet.PRESETS[name]
    params = spec.abstract(squeezenet.spec(cfg))
    assert squeezenet.apply(params, torch.empty(2, 3, least, least, device="meta"), cfg).shape == (2, 1000)
    with pytest.raises(ValueError, match=f"{least - 1} x 64; expected at least {least}"):
        squeezenet.apply(params, torch.empty(2, 3, least - 1, 64, device="meta"), cfg)
    with pytest.raises(ValueError, match=r"squeezenet: expected images \(batch, 3, height, width\)"):
        squeezenet.apply(params, torch.empty(2, 4, 64, 64, device="meta"), cfg)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"stages": ((), ((8, 8),))}, "expected at least one fire module"), ({"dropout": 1.5}, "dropout 1.5 is outside")],
    ids=["stages", "dropout"],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(squeezenet.PRESETS["squeezenet1_1"], **change)


def test_training_without_a_key():
    cfg = squeezenet.PRESETS["squeezenet1_1"]
    params, x = spec.abstract(squeezenet.spec(cfg)), torch.empty(2, 3, 64, 64, device="meta")
    with pytest.raises(ValueError, match="squeezenet: training with dropout 0.5 draws random numbers; pass key="):
        squeezenet.apply(params, x, cfg, train=True)
