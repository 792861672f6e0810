"""Inception v3 against torchvision."""

import dataclasses
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from core import random, spec, tree
from nets.classifiers import inception
from tests.nets.parity import assert_same, check_parity, randomise

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
theirs = pytest.importorskip("torchvision.models.inception")

BY = 16
CFG = inception.Config(32 // BY, (2, 4, 4), (8, 10, 10, 12), dropout=0.0, classes=7)


def small(aux=True, aux_kernel=5, **options):
    """Torchvision's net with a sixteenth of the channels everywhere."""

    def conv(d_in, d_out, **kwargs):
        return theirs.BasicConv2d(d_in if d_in == 3 else d_in // BY, d_out // BY, **kwargs)

    def head(d_in, classes):
        made = theirs.InceptionAux(d_in, classes, conv)
        made.conv1 = conv(128, 768, kernel_size=aux_kernel)
        made.fc = nn.Linear(768 // BY, classes)
        return made

    kinds = "InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE"
    blocks = [conv, *(partial(getattr(theirs, kind), conv_block=conv) for kind in kinds), head]
    options = {"inception_blocks": blocks, "init_weights": False, "dropout": 0.0} | options
    module = theirs.Inception3(7, aux_logits=aux, **options)
    module.fc = nn.Linear(2048 // BY, 7)
    return randomise(module)


@pytest.mark.parametrize("aux", [True, False])
def test_size_is_that_of_torchvision(aux):
    with torch.device("meta"):
        module = models.inception_v3(init_weights=False, aux_logits=aux)
    cfg = dataclasses.replace(inception.PRESETS["inception_v3"], aux=aux)
    expected = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    table = inception.rename_table(cfg)
    assert {table[key].theirs: tuple(leaf.shape) for key, leaf in tree.items(inception.spec(cfg))} == expected


@pytest.mark.parametrize(
    ("aux", "aux_kernel", "side"), [(True, 5, 299), (True, 1, 128), (False, 5, 128)], ids=["aux", "1x1", "no aux"]
)
def test_parity(aux, aux_kernel, side):
    cfg = dataclasses.replace(CFG, aux=aux, aux_kernel=aux_kernel)
    check_parity(inception, cfg, small(aux, aux_kernel), random.normal(random.key(0), (4, 3, side, side)))


def test_from_pretrained_can_leave_the_auxiliary_head_out(tmp_path):
    """And the pixels that the published weights want are those of torchvision's transform_input."""
    module = small(transform_input=True).eval()
    save_file({name: x.contiguous() for name, x in module.state_dict().items()}, tmp_path / "model.safetensors")
    cfg = dataclasses.replace(CFG, aux=False)
    params = inception.from_pretrained(str(tmp_path), cfg)
    assert "aux" not in params and "aux" in inception.from_pretrained(str(tmp_path), CFG)
    pixels = random.uniform(random.key(0), (2, 3, 75, 80))
    mean, deviation = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = inception.apply(params, (pixels - 0.5) / 0.5, cfg)
    assert_same(found, module((pixels - mean) / deviation).detach(), "eval")


def test_initial_values_have_the_spread_of_torchvision():
    values, module = spec.init(random.key(0), inception.spec(CFG)), small(init_weights=True).state_dict()
    table = inception.rename_table(CFG)
    convs = [(name, x) for name, x in tree.items(values) if x.ndim == 4 and x.numel() > 1000]
    assert convs
    for name, x in convs:
        assert float(x.std()) == pytest.approx(float(module[table[name].theirs].std()), rel=0.15), name


def test_feature_maps():
    """The sizes of table 1 of the paper."""
    cfg = inception.PRESETS["inception_v3"]
    params = spec.abstract(inception.spec(cfg))
    maps = inception.feature_maps(params, torch.empty(1, 3, 299, 299, device="meta"), cfg)
    sizes = [(64, 147, 147), (192, 71, 71), (288, 35, 35), (768, 17, 17), (2048, 8, 8)]
    assert [tuple(m.shape[1:]) for m in maps] == sizes


def test_dropout_is_before_the_head_alone():
    cfg = dataclasses.replace(CFG, dropout=0.5, aux_kernel=1)
    params, x = spec.init(random.key(0), inception.spec(cfg)), random.normal(random.key(1), (4, 3, 107, 107))
    first, again, other = (inception.apply(params, x, cfg, key=random.key(i), train=True) for i in (2, 2, 3))
    assert torch.equal(first.logits, again.logits) and not torch.equal(first.logits, other.logits)
    assert torch.equal(first.aux, other.aux)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 33}, "width 33; expected an even number of channels"),
        ({"width": 0}, "width 0; expected an even number of channels"),
        ({"pooled": ()}, r"pooled \(\), inside .*; expected positive channels and at least one block in the first"),
        ({"inside": (128, 0)}, r"inside \(128, 0\), last 2; expected positive channels"),
        ({"aux_kernel": 7}, "aux_kernel 7; expected 1, 3 or 5"),
        ({"dropout": 1.0}, r"dropout 1.0 is outside \[0, 1\)"),
    ],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(inception.PRESETS["inception_v3"], **change)


@pytest.mark.parametrize(
    ("shape", "train", "message"),
    [
        ((2, 1, 299, 299), False, r"expected images \(batch, 3, height, width\)"),
        ((2, 3, 74, 299), False, "74 x 299; expected at least 75"),
        ((2, 3, 299, 298), True, "299 x 298; expected at least 299"),
    ],
)
def test_wrong_images(shape, train, message):
    with pytest.raises(ValueError, match=message):
        inception.apply(
            spec.abstract(inception.spec(CFG)), torch.empty(shape, device="meta"), CFG, key=random.key(0), train=train
        )


@pytest.mark.parametrize(
    ("side", "aux_kernel", "train"), [(75, 5, False), (107, 1, True), (203, 3, True), (299, 5, True)]
)
def test_smallest_images(side, aux_kernel, train):
    """One pixel is left to the third stage, or to the auxiliary head."""
    cfg = dataclasses.replace(CFG, aux_kernel=aux_kernel)
    params, x = spec.abstract(inception.spec(cfg)), torch.empty(2, 3, side, side, device="meta")
    out = inception.apply(params, x, cfg, key=random.key(0), train=train)
    assert [tuple(logits.shape) for logits in tree.leaves(out)] == [(2, 7)] * (2 if train else 1)
    if not train:
        assert inception.feature_maps(params, x, cfg)[-1].shape[2:] == (1, 1)
