"""GoogLeNet against torchvision."""

import dataclasses
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from core import random, spec, tree
from nets.classifiers import googlenet
from tests.nets.parity import assert_same, check_parity, randomise

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
theirs = pytest.importorskip("torchvision.models.googlenet")

BY = 8
CFG = googlenet.Config(
    (64 // BY, 192 // BY),
    tuple(tuple(tuple(n // BY for n in block) for block in blocks) for blocks in googlenet.STAGES),
    aux_sizes=(128 // BY, 1024 // BY),
    dropout=0.0,
    aux_dropout=0.0,
    classes=7,
)


class InOrder(theirs.GoogLeNet):
    """Torchvision gives out its second auxiliary head before its first."""

    def eager_outputs(self, x, aux2, aux1):
        return (x, aux1, aux2) if self.training and self.aux_logits else x


def small(aux=True, **options):
    """Torchvision's net with an eighth of the channels everywhere."""

    def conv(d_in, d_out, **kwargs):
        return theirs.BasicConv2d(d_in if d_in == 3 else d_in // BY, d_out // BY, **kwargs)

    def head(d_in, classes, dropout):
        made = theirs.InceptionAux(d_in, classes, conv, dropout=dropout)
        made.fc1, made.fc2 = nn.Linear(2048 // BY, 1024 // BY), nn.Linear(1024 // BY, classes)
        return made

    blocks = [conv, partial(theirs.Inception, conv_block=conv), head]
    options = {"blocks": blocks, "init_weights": False, "dropout": 0.0, "dropout_aux": 0.0} | options
    module = InOrder(7, aux_logits=aux, **options)
    module.fc = nn.Linear(1024 // BY, 7)
    return randomise(module)


@pytest.mark.parametrize("aux", [True, False])
def test_size_is_that_of_torchvision(aux):
    with torch.device("meta"):
        module = models.googlenet(init_weights=False, aux_logits=aux)
    cfg = dataclasses.replace(googlenet.PRESETS["googlenet"], aux=aux)
    expected = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    table = googlenet.rename_table(cfg)
    assert {table[key].theirs: tuple(leaf.shape) for key, leaf in tree.items(googlenet.spec(cfg))} == expected


@pytest.mark.parametrize(("aux", "side"), [(True, 64), (True, 75), (False, 64)])
def test_parity(aux, side):
    cfg = dataclasses.replace(CFG, aux=aux)
    check_parity(googlenet, cfg, small(aux), random.normal(random.key(0), (4, 3, side, 64)))


def test_from_pretrained_can_leave_the_auxiliary_heads_out(tmp_path):
    """And the pixels that the published weights want are those of torchvision's transform_input."""
    module = small(transform_input=True).eval()
    save_file({name: x.contiguous() for name, x in module.state_dict().items()}, tmp_path / "model.safetensors")
    cfg = dataclasses.replace(CFG, aux=False)
    params = googlenet.from_pretrained(str(tmp_path), cfg)
    assert "aux" not in params and "aux" in googlenet.from_pretrained(str(tmp_path), CFG)
    pixels = random.uniform(random.key(0), (2, 3, 32, 32))
    mean, deviation = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = googlenet.apply(params, (pixels - 0.5) / 0.5, cfg)
    assert_same(found, module((pixels - mean) / deviation).detach(), "eval")


def test_initial_values_have_the_spread_of_torchvision():
    values, module = spec.init(random.key(0), googlenet.spec(CFG)), small(init_weights=True).state_dict()
    table = googlenet.rename_table(CFG)
    convs = [(name, x) for name, x in tree.items(values) if x.ndim == 4 and x.numel() > 1000]
    assert convs
    for name, x in convs:
        assert float(x.std()) == pytest.approx(float(module[table[name].theirs].std()), rel=0.15), name


def test_feature_maps():
    params = spec.init(random.key(0), googlenet.spec(CFG))
    maps = googlenet.feature_maps(params, random.normal(random.key(1), (2, 3, 64, 64)), CFG)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 32, 32), (24, 16, 16), (60, 8, 8), (104, 4, 4), (128, 2, 2)]


@pytest.mark.parametrize(
    ("rates", "changed"),
    [((0.5, 0.0), ["logits"]), ((0.0, 0.5), ["aux1", "aux2"])],
    ids=["head", "auxiliary"],
)
def test_each_head_has_its_dropout(rates, changed):
    cfg = dataclasses.replace(CFG, dropout=rates[0], aux_dropout=rates[1])
    params, x = spec.init(random.key(0), googlenet.spec(cfg)), random.normal(random.key(1), (4, 3, 32, 32))
    first, again, other = (googlenet.apply(params, x, cfg, key=random.key(i), train=True) for i in (2, 2, 3))
    assert [name for name in first._fields if not torch.equal(getattr(first, name), getattr(other, name))] == changed
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_without_auxiliary_heads_their_dropout_needs_no_key():
    cfg = dataclasses.replace(CFG, aux=False, aux_dropout=0.5)
    params = spec.init(random.key(0), googlenet.spec(cfg))
    out = googlenet.apply(params, random.normal(random.key(1), (2, 3, 32, 32)), cfg, train=True)
    assert out.shape == (2, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": googlenet.STAGES[:2]}, r"stages of \[2, 5\] blocks; expected three"),
        ({"stages": (((1,) * 6,),) * 3}, r"stages of \[1, 1, 1\] blocks; expected three, and two blocks in the second"),
        ({"stages": (((1,) * 6,) * 2, ((1,) * 6,) * 2, ((1,) * 5,))}, "a block has six numbers of channels"),
        ({"dropout": -0.1}, r"googlenet: dropout -0.1 is outside \[0, 1\)"),
        ({"aux_dropout": 1.0}, r"aux_dropout 1.0 is outside \[0, 1\)"),
    ],
    ids=["stages", "second stage", "channels", "dropout", "aux_dropout"],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(googlenet.PRESETS["googlenet"], **change)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 64, 64), r"expected images \(batch, 3, height, width\)"),
        ((2, 3, 14, 64), "14 x 64; expected at least 15"),
    ],
)
def test_wrong_images(shape, message):
    with pytest.raises(ValueError, match=message):
        googlenet.apply(spec.abstract(googlenet.spec(CFG)), torch.empty(shape, device="meta"), CFG)


def test_smallest_images():
    params = spec.abstract(googlenet.spec(CFG))
    out = googlenet.apply(params, torch.empty(2, 3, 15, 15, device="meta"), CFG, train=True)
    assert [tuple(logits.shape) for logits in out] == [(2, 7)] * 3
