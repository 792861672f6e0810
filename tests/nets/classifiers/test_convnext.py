"""ConvNeXt against torchvision."""

import dataclasses

import pytest
import torch

from core import random, spec, tree
from core.layers import global_average_pool, layer_norm
from nets.classifiers import convnext
from tests.nets.parity import check_parity, randomise

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
TINY = convnext.Config((1, 2, 1), (4, 6, 8), 0.5, layer_scale=0.1, classes=7)


def images(n=4, size=32):
    return random.normal(random.key(0), (n, 3, size, size))


@pytest.mark.parametrize("name", convnext.PRESETS)
def test_size_is_that_of_torchvision(name):
    with torch.device("meta"):
        module = getattr(models, name)()
    cfg = convnext.PRESETS[name]
    expected = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    table = convnext.rename_table(cfg)
    assert {table[key].theirs: tuple(leaf.shape) for key, leaf in tree.items(convnext.spec(cfg))} == expected
    rates = [block.stochastic_depth.p for block in module.modules() if isinstance(block, models.convnext.CNBlock)]
    assert rates[0] == 0 and rates[-1] == cfg.stochastic_depth


@pytest.mark.parametrize("size", [32, 39])
def test_parity(size):
    stages = [(4, 6, 1), (6, 8, 2), (8, None, 1)]
    module = models.ConvNeXt([models.convnext.CNBlockConfig(*s) for s in stages], layer_scale=0.1, num_classes=7)
    for p in randomise(module).parameters():
        p.data *= 10 if p.ndim > 1 else 1  # off the start, where the branches hardly count
    check_parity(convnext, dataclasses.replace(TINY, stochastic_depth=0.0), module, images(size=size))


def test_stochastic_depth_drops_the_branches_of_whole_examples():
    """The last block's branch is gone or doubled, the first one's never touched."""
    cfg = convnext.Config((2,), (4,), 0.5, layer_scale=0.1)
    params = spec.init(random.key(0), convnext.spec(cfg))
    keys = random.split(random.key(1), 16)
    trained = convnext.feature_maps(params, images(16, 8), cfg, key=keys, train=True)[0]
    (full,) = convnext.feature_maps(params, images(16, 8), cfg)
    first = params | {"stages": [{"blocks": params["stages"][0]["blocks"][:1]}]}
    (without,) = convnext.feature_maps(first, images(16, 8), cfg)
    dropped = (trained == without).flatten(1).all(1)
    assert 2 <= dropped.sum() <= 14
    kept = without + 2 * (full - without)
    torch.testing.assert_close(trained[~dropped], kept[~dropped])


def test_feature_maps_are_one_a_stage():
    params = spec.init(random.key(0), convnext.spec(TINY))
    maps = convnext.feature_maps(params, images(), TINY)
    assert [tuple(x.shape) for x in maps] == [(4, 4, 8, 8), (4, 6, 4, 4), (4, 8, 2, 2)]
    pooled = layer_norm(params["norm"], global_average_pool(maps[-1]), eps=1e-6)
    torch.testing.assert_close(convnext.features(params, images(), TINY), pooled)


def test_from_pretrained_reads_the_file_of_torchvision(tmp_path):
    params = spec.init(random.key(0), convnext.spec(TINY))
    table = convnext.rename_table(TINY)
    torch.save({table[name].theirs: leaf for name, leaf in tree.items(params)}, tmp_path / "convnext.pth")
    found = convnext.from_pretrained(str(tmp_path / "convnext.pth"), TINY)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(found), tree.leaves(params), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (3, 3)}, r"depths \(3, 3\), widths \(4, 6, 8\); expected one of each a stage"),
        ({"depths": (3, 0, 3)}, "all at least 1"),
        ({"stochastic_depth": 1.0}, r"stochastic_depth 1.0 is outside \[0, 1\)"),
    ],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 64, 64), r"expected images \(batch, 3, height, width\)"),
        ((2, 3, 31, 64), "31 x 64; expected at least 32"),
    ],
)
def test_wrong_images(shape, message):
    cfg = convnext.PRESETS["convnext_tiny"]
    params = spec.abstract(convnext.spec(cfg))
    with pytest.raises(ValueError, match=message):
        convnext.apply(params, torch.empty(shape, device="meta"), cfg)
