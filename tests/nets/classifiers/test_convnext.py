"""ConvNeXt: stochastic depth, and the norm before its head."""

import pytest
import torch

from core import random, spec, tree
from core.layers import global_average_pool, layer_norm
from nets.classifiers import convnext

TINY = convnext.Config((1, 2, 1), (4, 6, 8), 0.5, layer_scale=0.1, classes=7)


def images(n=4, size=32):
    return random.normal(random.key(0), (n, 3, size, size))


@pytest.mark.parametrize("name", convnext.PRESETS)
def test_stochastic_depth_is_that_of_torchvision(name):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    with torch.device("meta"):
        module = getattr(models, name)()
    rates = [block.stochastic_depth.p for block in module.modules() if isinstance(block, models.convnext.CNBlock)]
    assert rates[0] == 0 and rates[-1] == convnext.PRESETS[name].stochastic_depth


def test_stochastic_depth_drops_the_branches_of_whole_examples():
    """The last block's branch is dropped or doubled, the first one's never touched."""
    cfg = convnext.Config((2,), (4,), 0.5, layer_scale=0.1)
    params = spec.init(random.key(0), convnext.spec(cfg))
    keys = random.split(random.key(1), 16)
    trained = convnext.feature_maps(params, images(16, 8), cfg, key=keys, train=True)[0]
    (full,) = convnext.feature_maps(params, images(16, 8), cfg)
    first = params | {"stages": [{"blocks": params["stages"][0]["blocks"][:1]}]}
    (without,) = convnext.feature_maps(first, images(16, 8), cfg)
    dropped = (trained == without).flatten(1).all(1)
    assert 2 <= dropped.sum() <= 14
    doubled = without + 2 * (full - without)
    torch.testing.assert_close(trained[~dropped], doubled[~dropped])


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_features_are_normalised(eps):
    cfg = convnext.Config((1, 2, 1), (4, 6, 8), layer_scale=0.1, eps=eps)
    params = spec.init(random.key(0), convnext.spec(cfg))
    pooled = global_average_pool(convnext.feature_maps(params, images(), cfg)[-1])
    expected = layer_norm(params["norm"], pooled, eps=eps)
    torch.testing.assert_close(convnext.features(params, images(), cfg), expected)


def test_from_pretrained_reads_the_file_of_torchvision(tmp_path):
    params = spec.init(random.key(0), convnext.spec(TINY))
    table = convnext.rename_table(TINY)
    torch.save({table[name].theirs: leaf for name, leaf in tree.items(params)}, tmp_path / "convnext.pth")
    loaded = convnext.from_pretrained(str(tmp_path / "convnext.pth"), TINY)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(loaded), tree.leaves(params), strict=True))
