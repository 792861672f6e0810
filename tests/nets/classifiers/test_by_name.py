"""Finding image classifiers by name, fitting them to other images, and giving them new heads."""

import dataclasses
import inspect

import pytest
import torch

from core import random, spec, tree
from nets.classifiers import alexnet, by_name, googlenet, inception, lenet, mlp, resnet, vit

PRESETS = [(family, name) for family, net in by_name.FAMILIES.items() for name in net.PRESETS]
TINY = resnet.Config((1, 1), width=4, stem="cifar", classes=5)


def side(family, name):
    """Side of the images that a preset is tried on: small, and not that of the published ones."""
    return {"alexnet": 64, "inception": 107, "lenet": 20, "mlp": 5, "vit": 42 if name == "vit_h_14" else 64}.get(
        family, 40
    )


# Names.


def test_every_family_is_there_and_no_two_presets_share_a_name(request):
    paths = (request.config.rootpath / "nets" / "classifiers").glob("*.py")
    texts = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    assert set(by_name.FAMILIES) == {name for name, text in texts.items() if "\ndef feature_maps(" in text}
    names = [name for _, name in PRESETS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("family", "name"), PRESETS, ids=[name for _, name in PRESETS])
def test_every_preset_takes_other_images_and_classes(family, name, monkeypatch):
    """All on the meta device, in the pass by which `configured` tries the images."""
    net, size, shapes = by_name.FAMILIES[family], side(family, name), []
    apply = net.apply

    def recorded(params, x, cfg):
        out = apply(params, x, cfg)
        shapes.append((tuple(x.shape), tuple(out.shape)))
        return out

    monkeypatch.setattr(net, "apply", recorded)
    module, cfg = by_name.configured(name, channels=1, classes=7, size=size)
    assert (module, type(cfg)) == (net, type(by_name.find(name)[1]))
    assert shapes == [((1, 1, size, size), (1, 7))]


@pytest.mark.parametrize("family", by_name.FAMILIES)
def test_features(family):
    name = next(iter(by_name.FAMILIES[family].PRESETS))
    size = side(family, name)
    net, cfg = by_name.configured(name, channels=1, classes=7, size=size)
    params, x = spec.abstract(net.spec(cfg)), torch.empty(2, 1, size, size, device="meta")
    maps = net.feature_maps(params, x, cfg)
    assert len(maps) > 1 and all(m.shape[0] == 2 and m.ndim == (2 if net is mlp else 4) for m in maps)
    head = params["layers"][-1] if net is mlp else params["head"]
    assert net.features(params, x, cfg).shape == (2, head["weight"].shape[1])


@pytest.mark.parametrize("family", by_name.FAMILIES)
def test_faces_are_alike(family):
    net = by_name.FAMILIES[family]
    for f in (net.apply, net.features, net.feature_maps):
        first, options = list(inspect.signature(f).parameters.values())[:3], inspect.signature(f).parameters
        assert [p.name for p in first] == ["params", "x", "cfg"]
        assert options["train"].default is False and options["train"].kind == inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "no net is named 'resnet19'; close to it: resnet18, .*; families: alexnet, .*, vit$"),
        ("lenet", "close to it: lenet5, lenet5-relu, lenet-digits; families"),
        ("perceptron", "no net is named 'perceptron'; families"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        by_name.find(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"classes": 0}, "channels 3, classes 0, size 64; expected at least 1 of each"),
        ("alexnet", {"size": 32}, "alexnet: the images are 32 x 32; expected at least 63 a side"),
        ("vit_b_16", {"size": 40}, "vit: image 40 is not divisible by patch 16"),
        ("lenet5", {"size": 8}, "lenet: nothing is left of images of 8 x 8"),
        ("inception_v3", {"size": 74}, "inception: the images are 74 x 74; expected at least 75 a side"),
    ],
    ids=["classes", "alexnet", "vit", "lenet", "inception"],
)
def test_images_that_do_not_fit(name, options, message):
    with pytest.raises(ValueError, match=message):
        by_name.configured(name, **{"channels": 3, "classes": 5, "size": 64} | options)


# Heads.


@pytest.mark.parametrize(("size", "kernel"), [(299, 5), (298, 3), (203, 3), (202, 1), (107, 1), (106, None)])
def test_inception_takes_small_images_in_training_too(size, kernel):
    _, cfg = by_name.configured("inception_v3", channels=3, classes=5, size=size)
    assert (cfg.aux, cfg.aux_kernel if cfg.aux else None) == (kernel is not None, kernel)
    cfg = dataclasses.replace(cfg, dropout=0.0)
    params = spec.abstract(inception.spec(cfg))
    out = inception.apply(params, torch.empty(2, 3, size, size, device="meta"), cfg, train=True)
    assert [x.shape for x in ([out] if kernel is None else out)] == [(2, 5)] * (1 if kernel is None else 2)


def test_weighted_logits():
    a, b, c = torch.ones(3, 2, 5).unbind(0)
    assert by_name.weighted_logits(resnet, a) == [(1.0, a)]
    assert by_name.weighted_logits(googlenet, googlenet.Outputs(a, b, c)) == [(1.0, a), (0.3, b), (0.3, c)]
    assert by_name.weighted_logits(inception, inception.Outputs(a, b)) == [(1.0, a), (0.4, b)]


def test_head_names():
    assert by_name.head_names(resnet.spec(TINY)) == {"head.bias", "head.weight"}
    assert by_name.head_names(mlp.spec(mlp.Config((4, 3, 2)))) == {"layers.1.bias", "layers.1.weight"}
    names = by_name.head_names(inception.spec(inception.PRESETS["inception_v3"]))
    assert {"head.weight", "aux.head.weight", "aux.convs.0.conv.weight"} < names
    assert not any(name.startswith(("stem", "stages")) for name in names)


@pytest.mark.parametrize(
    ("net", "cfg"),
    [
        (resnet, TINY),
        (lenet, lenet.PRESETS["lenet-digits"]),
        (vit, vit.Config(image=8, patch=4, layers=1, heads=2, width=8, hidden=12, zero_head=False, classes=5)),
    ],
    ids=["resnet", "lenet", "vit"],
)
def test_only_the_head_is_drawn(net, cfg):
    old = spec.init(random.key(0), net.spec(cfg))
    model = net.spec(dataclasses.replace(cfg, classes=3))
    params, new_names = by_name.adopt(model, old, random.key(1))
    spec.check(model, params)
    assert new_names == ["head.bias", "head.weight"]
    fresh = tree.flatten(spec.init(random.key(1), model))
    for name, x in tree.items(params):
        assert torch.equal(x, fresh[name] if name in new_names else tree.get(old, name)), name
    again, new_names = by_name.adopt(net.spec(cfg), old, random.key(1))
    assert not new_names and tree.names(again) == tree.names(old)


def test_adopt_draws_auxiliary_heads_that_are_missing_and_drops_those_that_are_left_over():
    block = (4, 2, 4, 2, 4, 4)
    sizes = {"stem": (4, 6), "stages": ((block,), (block,) * 2, (block,)), "aux_sizes": (4, 8), "classes": 5}
    bare, full = googlenet.Config(**sizes, aux=False), googlenet.Config(**sizes)
    old = spec.init(random.key(0), googlenet.spec(bare))
    params, new_names = by_name.adopt(googlenet.spec(full), old, random.key(1))
    spec.check(googlenet.spec(full), params)
    assert new_names and all(name.startswith("aux.") for name in new_names)
    back, new_names = by_name.adopt(googlenet.spec(bare), params, random.key(1))
    assert not new_names and all(torch.equal(x, y) for x, y in zip(tree.leaves(back), tree.leaves(old), strict=True))


def test_adopt_draws_the_head_of_a_net_without_one():
    old, _ = tree.partition(spec.init(random.key(0), resnet.spec(TINY)), lambda name, _: not name.startswith("head."))
    params, new_names = by_name.adopt(resnet.spec(TINY), old, random.key(1))
    spec.check(resnet.spec(TINY), params)
    assert new_names == ["head.bias", "head.weight"]


def test_adopt_for_an_mlp():
    old = spec.init(random.key(0), mlp.spec(mlp.Config((4, 3, 2))))
    params, new_names = by_name.adopt(mlp.spec(mlp.Config((4, 3, 6))), old, random.key(1))
    assert new_names == ["layers.1.bias", "layers.1.weight"] and params["layers"][1]["weight"].shape == (6, 3)
    assert torch.equal(params["layers"][0]["weight"], old["layers"][0]["weight"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (resnet.spec(dataclasses.replace(TINY, channels=1)), r"'stem.conv.weight' has shape \(4, 3, 3, 3\), expected"),
        (resnet.spec(dataclasses.replace(TINY, depths=(1, 2))), "'stages.1.1.convs.0.conv.weight' is missing"),
        (resnet.spec(dataclasses.replace(TINY, depths=(1,))), "'stages.1.0.convs.0.conv.weight' is left over"),
        (alexnet.spec(alexnet.PRESETS["alexnet"]), "'convs.0.bias' is missing; .*; only the head may differ"),
    ],
    ids=["channels", "deeper", "shallower", "another family"],
)
def test_adopt_refuses_another_net(model, message):
    with pytest.raises(ValueError, match=f"run.pt: {message}"):
        by_name.adopt(model, spec.init(random.key(0), resnet.spec(TINY)), random.key(1), "run.pt")
