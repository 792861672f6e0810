"""Published weights: torchvision's facts, the preparation of images, and the download."""

import hashlib
from dataclasses import replace

import pooch
import pytest
import torch

from core import random, spec, tree
from nets.blocks.conv_norm import fill_published
from nets.classifiers import by_name, resnet, torchvision_weights, vit
from nets.classifiers.torchvision_weights import Published, download, from_pretrained, preprocess
from nets.weights import WeightsError
from tests.local_server import serve
from tests.nets.parity import assert_same, randomise

RESNET = resnet.Config((1, 1), width=4, classes=7)
VIT = vit.Config(image=12, patch=4, layers=2, heads=2, width=12, hidden=20, classes=7)


def images(n=2, size=64):
    return random.uniform(random.key(0), (n, 3, size, size))


# Facts.


@pytest.mark.parametrize("name", torchvision_weights.PUBLISHED)
def test_facts_are_torchvisions(name):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    facts, weights = torchvision_weights.PUBLISHED[name], models.get_model_weights(name).DEFAULT
    assert torchvision_weights.URL + facts.source == weights.url
    assert facts.accuracy == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    theirs = weights.transforms()
    assert ([facts.resize], [facts.crop]) == (theirs.resize_size, theirs.crop_size)
    assert facts.interpolation == theirs.interpolation.value
    if name not in ("googlenet", "inception_v3"):
        assert (list(facts.mean), list(facts.std)) == (theirs.mean, theirs.std)
    net, cfg = by_name.find(name)
    cfg = replace(cfg, image=facts.crop) if net is vit else replace(cfg, aux=False) if name == "googlenet" else cfg
    params, _ = spec.split(*2 * [net.spec(cfg)])
    assert tree.count(params) == weights.meta["num_params"]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_half_is_what_transform_input_makes_of_imagenets_constants(name):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    kind = {"googlenet": models.GoogLeNet, "inception_v3": models.Inception3}[name]
    module = randomise(kind(num_classes=7, aux_logits=False, transform_input=True, init_weights=False)).eval()
    net, cfg = by_name.find(name)
    cfg = replace(cfg, aux=False, classes=7)
    params = fill_published(net.spec(cfg), module.state_dict(), net.rename_table(cfg), name)
    x = images(size=80)
    assert torchvision_weights.PUBLISHED[name].mean == (0.5, 0.5, 0.5)
    with torch.no_grad():
        expected = module(preprocess(x, Published("")))  # ImageNet's constants
        assert_same(net.apply(params, preprocess(x, torchvision_weights.PUBLISHED[name]), cfg), expected, name)


def test_preprocess():
    x = images()
    y = preprocess(x, Published("", mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0)))
    torch.testing.assert_close(y[:, 1], (x[:, 1] - 0.25) / 0.25)
    torch.testing.assert_close(y[:, 2], x[:, 2])
    with pytest.raises(ValueError, match=r"expected images \(..., 3, height, width\), found \(2, 1, 64, 64\)"):
        preprocess(x[:, :1], Published(""))


# Download.


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder that is served, with a file of a tiny net as what is published for "resnet18"."""
    folder = tmp_path / "served"
    folder.mkdir()
    values = spec.init(random.key(0), resnet.spec(RESNET))
    names = resnet.rename_table(RESNET)
    torch.save({names[name].theirs: x for name, x in tree.items(values)}, folder / "file")
    digest = hashlib.sha256((folder / "file").read_bytes()).hexdigest()
    (folder / "file").rename(folder / f"tiny-{digest[:8]}.pth")
    monkeypatch.setitem(resnet.PRESETS, "resnet18", RESNET)
    monkeypatch.setitem(torchvision_weights.PUBLISHED, "resnet18", Published(f"tiny-{digest[:8]}.pth", 12.5, 232))
    monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "cache")
    return folder


def test_download_once(served):
    with serve(served) as url:
        params, cfg, facts = from_pretrained("resnet18", base_url=url)
    assert (cfg, facts) == (RESNET, torchvision_weights.PUBLISHED["resnet18"])
    assert_same(params, spec.init(random.key(0), resnet.spec(RESNET)), "", 0.0)
    again, _, _ = from_pretrained("resnet18", base_url="http://127.0.0.1:9")  # nothing to fetch
    assert_same(again, params, "", 0.0)


def test_file_with_another_checksum_is_removed(served, tmp_path):
    (file,) = served.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with serve(served) as url, pytest.raises(WeightsError, match=r"tiny-\w{8}.pth is not the published file: its SHA"):
        download("resnet18", tmp_path / "kept", url)
    assert not list((tmp_path / "kept").iterdir())


def test_no_connection(served, tmp_path):
    with pytest.raises(WeightsError, match=r"cannot fetch http://127.0.0.1:9/tiny-\w{8}.pth: "):
        download("resnet18", tmp_path, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, "no net is named 'resnet19'; close to it: resnet18"),
        ("cifar-resnet8", {}, "no weights of 'cifar-resnet8' are published that are known here; give a source"),
        ("resnet18", {"source": "/nowhere/net.pth"}, "'/nowhere/net.pth' is no local file or directory"),
    ],
    ids=["name", "unpublished", "file"],
)
def test_what_cannot_be_had(name, options, message):
    with pytest.raises(ValueError, match=message):
        from_pretrained(name, **options)


def test_download_of_what_torchvision_does_not_have(tmp_path):
    with pytest.raises(WeightsError, match="torchvision publishes no weights of 'lenet5'; it does of alexnet, "):
        download("lenet5", tmp_path)
