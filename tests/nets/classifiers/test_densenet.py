"""DenseNet against torchvision."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from core import random, spec, tree
from nets.classifiers import densenet
from nets.weights import WeightsError
from tests.nets.parity import assert_same, check_parity, randomise

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")

SMALL = {"block_config": (2, 1, 2), "growth_rate": 4, "num_init_features": 8, "bn_size": 2, "num_classes": 7}
CFG = densenet.Config((2, 1, 2), growth=4, width=8, expansion=2, classes=7)


@pytest.mark.parametrize("name", densenet.PRESETS)
def test_size_is_that_of_torchvision(name):
    with torch.device("meta"):
        module = getattr(models, name)()
    cfg = densenet.PRESETS[name]
    expected = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    table = densenet.rename_table(cfg)
    assert {table[key].theirs: tuple(leaf.shape) for key, leaf in tree.items(densenet.spec(cfg))} == expected


def test_parity():
    module = randomise(models.DenseNet(**SMALL))
    check_parity(densenet, CFG, module, random.normal(random.key(0), (4, 3, 40, 32)))


@pytest.mark.parametrize("changed", ["as published", "module", "another module"])
def test_from_pretrained_reads_the_names_of_published_files(changed, tmp_path):
    """Torchvision's files have `norm.1` and no counts of batches."""
    module = randomise(models.DenseNet(**SMALL)).eval()
    state = {name: x.contiguous() for name, x in module.state_dict().items()}
    if changed == "as published":
        state = {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}
        for kind in ("norm1", "norm2", "conv1", "conv2"):
            state = {name.replace(f".{kind}.", f".{kind[:-1]}.{kind[-1]}."): x for name, x in state.items()}
    if changed == "another module":
        del state["features.norm5.running_mean"]
    save_file(state, tmp_path / "model.safetensors")
    if changed == "another module":
        with pytest.raises(WeightsError, match=r"'features.norm5.running_mean' is missing"):
            densenet.from_pretrained(str(tmp_path), CFG)
    else:
        x = random.normal(random.key(0), (2, 3, 32, 32))
        found = densenet.apply(densenet.from_pretrained(str(tmp_path), CFG), x, CFG)
        assert_same(found, module(x).detach(), "eval")


def test_initial_values_have_the_spread_of_torchvision():
    cfg = dataclasses.replace(CFG, growth=24, width=32, classes=100)
    module = models.DenseNet(**SMALL | {"growth_rate": 24, "num_init_features": 32, "num_classes": 100}).state_dict()
    table, values = densenet.rename_table(cfg), spec.init(random.key(0), densenet.spec(cfg))
    large = [(name, x) for name, x in tree.items(values) if x.numel() > 1000]
    assert {name.split(".")[0] for name, _ in large} == {"head", "stages", "stem", "transitions"}
    for name, x in large:
        assert float(x.std()) == pytest.approx(float(module[table[name].theirs].std()), rel=0.15), name


def test_feature_maps_are_one_a_stage():
    params = spec.init(random.key(0), densenet.spec(CFG))
    maps = densenet.feature_maps(params, random.normal(random.key(1), (2, 3, 32, 32)), CFG)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 12, 4, 4), (2, 14, 2, 2)]


def test_dropout_is_on_what_a_layer_adds():
    """Where the layers give out one constant, nothing but dropout makes zeros of it."""
    cfg = dataclasses.replace(CFG, depths=(3,), growth=32, dropout=0.25)

    def constant(name, x):
        fills = {"norm.weight": 0.0, "norm.bias": 1.0, "conv.weight": 0.01}
        end = ".".join(name.split(".")[-2:])
        return torch.full_like(x, fills[end]) if name.startswith("stages.") and end in fills else x

    params = tree.map_with_names(constant, spec.init(random.key(0), densenet.spec(cfg)))
    x = random.normal(random.key(1), (4, 3, 32, 32))

    def last(key):
        return densenet.feature_maps(params, x, cfg, key=key, train=True)[-1]

    # The last norm leaves the zeros below the mean, and so its relu makes zeros of them again; the border has others.
    share = (last(random.split(random.key(2), 4))[:, cfg.width :, 1:-1, 1:-1] == 0).float().mean()
    assert float(share) == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(last(random.key(2)), last(random.key(3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (2, 0)}, r"depths \(2, 0\); expected at least one layer"),
        ({"depths": ()}, r"depths \(\); expected at least one layer"),
        ({"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
    ],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(densenet.PRESETS["densenet121"], **change)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 64, 64), r"expected images \(batch, 3, height, width\)"),
        ((2, 3, 28, 64), "28 x 64; expected at least 29"),
    ],
)
def test_wrong_images(shape, message):
    cfg = densenet.PRESETS["densenet121"]
    with pytest.raises(ValueError, match=message):
        densenet.apply(spec.abstract(densenet.spec(cfg)), torch.empty(shape, device="meta"), cfg)


@pytest.mark.parametrize("depths", [(1,), (1, 1), (1, 1, 1, 1)])
def test_smallest_images(depths):
    cfg = dataclasses.replace(CFG, depths=depths)
    least = 2 ** (len(depths) + 1) - 3
    params = spec.abstract(densenet.spec(cfg))
    assert densenet.feature_maps(params, torch.empty(2, 3, least, least, device="meta"), cfg)[-1].shape[2:] == (1, 1)
