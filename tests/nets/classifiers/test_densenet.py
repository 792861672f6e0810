"""DenseNet: the names in published files, and its dropout."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from core import random, spec, tree
from nets.classifiers import densenet
from nets.weights import WeightsError
from tests.nets.parity import assert_same, randomise
from tests.registry.classifier_modules import DENSENET, small_densenet


@pytest.mark.parametrize("names", ["as published", "module", "another module"])
def test_from_pretrained_reads_the_names_of_published_files(names, tmp_path):
    """Torchvision's files have `norm.1` and no counts of batches."""
    module = randomise(small_densenet()).eval()
    state = {name: x.contiguous() for name, x in module.state_dict().items()}
    if names == "as published":
        state = {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")}
        for kind in ("norm1", "norm2", "conv1", "conv2"):
            state = {name.replace(f".{kind}.", f".{kind[:-1]}.{kind[-1]}."): x for name, x in state.items()}
    if names == "another module":
        del state["features.norm5.running_mean"]
    save_file(state, tmp_path / "model.safetensors")
    if names == "another module":
        with pytest.raises(WeightsError, match=r"'features.norm5.running_mean' is missing"):
            densenet.from_pretrained(str(tmp_path), DENSENET)
    else:
        x = random.normal(random.key(0), (2, 3, 32, 32))
        actual = densenet.apply(densenet.from_pretrained(str(tmp_path), DENSENET), x, DENSENET)
        assert_same(actual, module(x).detach(), "eval")


def test_dropout_is_on_the_channels_that_a_layer_adds():
    """Where the output of each layer is one constant, nothing but dropout makes zeros of it."""
    cfg = dataclasses.replace(DENSENET, depths=(3,), growth=32, dropout=0.25)

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
