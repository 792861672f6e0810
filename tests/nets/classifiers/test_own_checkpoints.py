"""Checkpoints of one's own training load whatever wraps their names and whatever their head; other nets do not."""

import argparse
from dataclasses import replace

import pytest
import torch

from core import random, spec, tree
from nets.classifiers import by_name, googlenet, inception, resnet
from nets.classifiers.torchvision_weights import Published, from_pretrained
from nets.weights import WeightsError
from tests.nets.parity import assert_same
from tests.registry.classifier_modules import GOOGLENET, INCEPTION

RESNET = resnet.Config((1, 1), width=4, classes=7)


def tensors_of(net=resnet, cfg=RESNET):
    """A file of a small net, in torchvision's names."""
    table = net.rename_table(cfg)
    return {table[name].theirs: x for name, x in tree.items(spec.init(random.key(0), net.spec(cfg)))}


def without(state, prefix):
    return {name: x for name, x in state.items() if not name.startswith(prefix)}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Write a file and load it as "resnet18", whose preset is the small net with 1000 classes."""
    monkeypatch.setitem(resnet.PRESETS, "resnet18", replace(RESNET, classes=1000))

    def load(content, file="net.pth", name="resnet18", **options):
        torch.save(content, tmp_path / file)
        return from_pretrained(name, str(tmp_path / file), **options)

    return load


HEADS = {
    "other classes": (lambda state: state, "its head is for 7 classes"),
    "no head": (lambda state: without(state, "fc."), "it has no head"),
    "a deeper head": (
        lambda state: without(state, "fc.") | {"fc.0.weight": torch.zeros(3, 8), "fc.2.weight": torch.zeros(2, 3)},
        "left out its head: 'fc.0.weight', 'fc.2.weight'",
    ),
}


@pytest.mark.parametrize("head", HEADS)
def test_head(head, load, tmp_path):
    change, note = HEADS[head]
    values, cfg, facts = load(change(tensors_of()))
    assert facts == Published(str(tmp_path / "net.pth"), None, 256, notes=(note,))
    expected = spec.init(random.key(0), resnet.spec(RESNET))
    if head != "other classes":
        expected, _ = tree.partition(expected, lambda name, _: not name.startswith("head."))
    assert cfg.classes == (7 if head == "other classes" else 1000)
    assert_same(values, expected, "", 0.0)
    # Fine-tuning goes on with a new head for its own classes.
    model = resnet.spec(by_name.fitted(resnet, cfg, channels=3, classes=3, size=64))
    params, new_names = by_name.adopt(model, values, random.key(1))
    spec.check(model, params)
    assert new_names == ["head.bias", "head.weight"]


PREFIXES = {
    "module.": "net.pth",
    "_orig_mod.": "net.pt",
    "model.": "net.ckpt",
    "module._orig_mod.": "net.pth.tar",
    "model.backbone.": "net.bin",
}


@pytest.mark.parametrize("entry", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers(prefix, entry, load):
    state = {prefix + name: x for name, x in tensors_of().items()}
    args = argparse.Namespace(lr=0.1, data="images")
    content = state if entry is None else {entry: state, "epoch": 3, "args": args, "optimizer": {"lr": 0.1}}
    values, cfg, facts = load(content, PREFIXES[prefix])
    assert_same(values, spec.init(random.key(0), resnet.spec(RESNET)), "", 0.0)
    assert cfg == RESNET
    assert facts.notes == (f"stripped '{prefix}' from all names", "its head is for 7 classes")


def test_a_prefix_of_only_some_names_is_not_stripped(load):
    state = {"module." + name: x for name, x in tensors_of().items()} | {"step": torch.zeros(())}
    message = (
        r"'layer1.0.conv1.weight' is missing; expected for .*; the file has 'module.layer1.0.conv1.weight', .* more"
    )
    with pytest.raises(WeightsError, match=message):
        load(state)


AUX = {"googlenet": (googlenet, GOOGLENET), "inception_v3": (inception, INCEPTION)}


@pytest.mark.parametrize(
    ("rows", "note"),
    [(0, "it has no auxiliary heads"), (5, "left out its auxiliary heads for 5 classes")],
    ids=["none", "other classes"],
)
@pytest.mark.parametrize("name", AUX)
def test_auxiliary_heads(name, rows, note, load, monkeypatch):
    net, cfg = AUX[name]
    monkeypatch.setitem(net.PRESETS, name, replace(cfg, classes=1000))
    state = tensors_of(net, cfg)
    heads = {rename.theirs: ours for ours, rename in net.rename_table(cfg).items() if ours.startswith("aux.")}
    for theirs, ours in heads.items():
        if not rows:
            del state[theirs]
        elif ".head." in ours:
            state[theirs] = state[theirs][:rows]
    values, loaded, facts = load(state, name=name)
    assert loaded == replace(cfg, aux=False) and facts.notes == ("its head is for 7 classes", note)
    spec.check(net.spec(loaded), values)


def test_classes_that_are_required(load):
    assert load(tensors_of(), classes=7)[1] == RESNET
    with pytest.raises(WeightsError, match=r"'fc.bias' has shape \(7,\), expected \(5,\) for 'head.bias'"):
        load(tensors_of(), classes=5)
    with pytest.raises(WeightsError, match="'fc.bias' is missing; expected for 'head.bias'"):
        load(without(tensors_of(), "fc."), classes=7)


@pytest.mark.parametrize("shape", [(), (0, 8), (7, 8, 1, 1)], ids=str)
def test_a_misshapen_head_is_named(shape, load):
    state = tensors_of() | {"fc.weight": torch.zeros(shape)}
    message = r"'fc.(weight|bias)' has shape \(.*\), expected \(.*\) for 'head.(weight|bias)'"
    with pytest.raises(WeightsError, match=message):
        load(state)


def test_file_of_another_net(load):
    message = r"pth: 'features.norm5.bias' is missing; expected .*; the file has 'fc.bias', .* and \d+ more"
    with pytest.raises(WeightsError, match=message):
        load(tensors_of(), name="densenet121")
    with pytest.raises(WeightsError, match="'digits': files of an mlp cannot be read"):
        load(tensors_of(), name="digits")
