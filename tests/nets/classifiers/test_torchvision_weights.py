"""Published weights: torchvision's facts and files, those of transformers and timm, and the download."""

import contextlib
import functools
import hashlib
import http.server
import json
import threading
from dataclasses import replace
from pathlib import Path

import pooch
import pytest
import torch

from core import random, spec, tree
from nets.blocks.conv_norm import fill_published
from nets.classifiers import by_name, convnext, mobilenet_v1, mobilenet_v2, resnet, torchvision_weights, vit
from nets.classifiers.torchvision_weights import Published, download, from_pretrained, preprocess
from nets.weights import WeightsError
from tests.nets.parity import assert_same, randomise

RESNET = resnet.Config((1, 1), width=4, classes=7)
VIT = vit.Config(image=12, patch=4, layers=2, heads=2, width=12, hidden=20, classes=7)


def images(n=2, size=64):
    return random.uniform(random.key(0), (n, 3, size, size))


# Facts.


@pytest.mark.parametrize("name", torchvision_weights.PUBLISHED)
def test_facts_are_torchvisions(name):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    found, weights = torchvision_weights.PUBLISHED[name], models.get_model_weights(name).DEFAULT
    assert torchvision_weights.URL + found.source == weights.url
    assert found.accuracy == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    theirs = weights.transforms()
    assert ([found.resize], [found.crop]) == (theirs.resize_size, theirs.crop_size)
    assert found.interpolation == theirs.interpolation.value
    if name not in ("googlenet", "inception_v3"):
        assert (list(found.mean), list(found.std)) == (theirs.mean, theirs.std)
    net, cfg = by_name.find(name)
    cfg = replace(cfg, image=found.crop) if net is vit else replace(cfg, aux=False) if name == "googlenet" else cfg
    params, _ = spec.split(*2 * [net.spec(cfg)])
    assert tree.count(params) == weights.meta["num_params"]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_half_is_what_transform_input_makes_of_imagenets_constants(name):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    made = {"googlenet": models.GoogLeNet, "inception_v3": models.Inception3}[name]
    module = randomise(made(num_classes=7, aux_logits=False, transform_input=True, init_weights=False)).eval()
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


@contextlib.contextmanager
def serve(folder: Path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


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


# Files of torchvision, transformers and timm.


def test_file_with_another_head(served, monkeypatch):
    file = str(next(served.iterdir()))
    monkeypatch.setitem(resnet.PRESETS, "resnet18", replace(RESNET, classes=1000))
    with pytest.raises(WeightsError, match=r"'fc.bias' has shape \(7,\), expected \(1000,\) for 'head.bias'"):
        from_pretrained("resnet18", file)
    _, cfg, facts = from_pretrained("resnet18", file, classes=7)
    assert cfg == RESNET and facts == Published(file, None, 232)


def test_file_of_another_net(served):
    with pytest.raises(WeightsError, match=r"pth: 'classifier.bias' is missing; expected for 'head.bias'"):
        from_pretrained("densenet121", str(next(served.iterdir())))


# As transformers writes it, and as we do.
CROPPED = (
    {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}, "do_center_crop": True},
    (72, 64, "bilinear"),
)
PORTION = ({"size": {"shortest_edge": 64}, "crop_pct": 0.875}, (73, 64, "bilinear"))
WHOLE = ({"size": 12, "resample": 3}, (12, 12, "bicubic"))

TRANSFORMERS = {
    "resnet18": (
        replace(RESNET, depths=(1, 2)),
        ("ResNet", {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 2], "layer_type": "basic"}),
        PORTION,
    ),
    "resnet50": (
        resnet.Config((2, 1), "bottleneck", width=4, classes=7),
        ("ResNet", {"embedding_size": 4, "hidden_sizes": [16, 32], "depths": [2, 1]}),
        PORTION,
    ),
    "convnext_tiny": (
        convnext.Config((1, 2), (4, 6), classes=7),
        ("ConvNext", {"hidden_sizes": [4, 6], "depths": [1, 2], "num_stages": 2, "layer_scale_init_value": 0.5}),
        PORTION,
    ),
    "mobilenet_v1-0.25": (
        replace(mobilenet_v1.PRESETS["mobilenet_v1-0.25"], padding="tensorflow", classes=7),
        ("MobileNetV1", {"depth_multiplier": 0.25}),
        CROPPED,
    ),
    "mobilenet_v2-0.35": (
        replace(mobilenet_v2.PRESETS["mobilenet_v2-0.35"], padding="tensorflow", eps=1e-3, classes=7),
        ("MobileNetV2", {"depth_multiplier": 0.35}),
        CROPPED,
    ),
    "mobilenet_v2-0.5": (
        replace(mobilenet_v2.PRESETS["mobilenet_v2-0.5"], eps=1e-2, classes=7),
        ("MobileNetV2", {"depth_multiplier": 0.5, "tf_padding": False, "layer_norm_eps": 1e-2}),
        CROPPED,
    ),
    "vit_b_16": (
        replace(VIT, eps=1e-12),
        (
            "ViT",
            {"image_size": 12, "patch_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2}
            | {"hidden_size": 12, "intermediate_size": 20},
        ),
        WHOLE,
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_files_of_transformers(name, tmp_path, monkeypatch):
    """Their config.json says what ours must be; the preset has 1000 classes and the usual padding and norms."""
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    cfg, (kind, options), (preparation, prepared) = TRANSFORMERS[name]
    net, usual = by_name.find(name)
    plain = {field: getattr(usual, field) for field in ("eps", "padding") if hasattr(usual, field)}
    monkeypatch.setitem(net.PRESETS, name, replace(cfg, classes=1000, **plain))

    config = getattr(library, f"{kind}Config")(num_labels=7, **options)
    module = randomise(getattr(library, f"{kind}ForImageClassification")(config)).eval()
    module.save_pretrained(tmp_path)
    constants = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preparation | constants))

    params, found, facts = from_pretrained(name, str(tmp_path))
    assert found == cfg
    assert facts == Published(str(tmp_path), None, *prepared, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    for side in [facts.crop] if net is vit else [64, 55]:  # TensorFlow's padding differs for odd sizes
        x = preprocess(images(size=side), facts)
        with torch.no_grad():
            assert_same(net.apply(params, x, cfg), module(x).logits, name)


def test_files_of_timm(tmp_path):
    library = pytest.importorskip("timm", reason="timm is not installed")
    module = randomise(library.create_model("vit_tiny_patch16_224", num_classes=7)).eval()
    library.models._hub.save_for_hf(module, tmp_path, safe_serialization=True)
    params, cfg, facts = from_pretrained("vit_ti_16", str(tmp_path))
    assert cfg == replace(vit.PRESETS["vit_ti_16"], classes=7)
    assert facts == Published(str(tmp_path), None, 248, 224, "bicubic", **torchvision_weights.HALF)
    x = preprocess(images(1, 224), facts)
    with torch.no_grad():
        assert_same(vit.apply(params, x, cfg), module(x), "")
    small, cfg, _ = from_pretrained("vit_ti_16", str(tmp_path), size=64)
    assert cfg.image == 64 and small["positions"].shape == (1, 17, 192)


@pytest.mark.parametrize("net", [convnext, mobilenet_v2, resnet, vit], ids=lambda net: net.__name__)
def test_names_of_a_library_that_is_not_known(net):
    with pytest.raises(ValueError, match="source 'keras' is unknown; expected one of torchvision, transformers"):
        net.rename_table(next(iter(net.PRESETS.values())), "keras")


def test_resnets_with_strides_elsewhere_are_refused(tmp_path):
    description = {"model_type": "resnet", "downsample_in_bottleneck": True}
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(WeightsError, match="has strides elsewhere: downsample_in_bottleneck is true"):
        from_pretrained("resnet50", str(tmp_path))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("preprocessor_config.json", '{"size": 224}', r"its preprocessor_config.json does not say how .*'image_mean'"),
        ("config.json", '{"pretrained_cfg": {"input_size": []}}', "its config.json does not say how images are prep"),
        ("config.json", "{", "config.json' is not readable as JSON"),
    ],
    ids=["transformers", "timm", "json"],
)
def test_descriptions_that_lack_something(file, text, message, tmp_path):
    (tmp_path / file).write_text(text)
    with pytest.raises(WeightsError, match=message):
        from_pretrained("vit_b_16", str(tmp_path))


@pytest.mark.parametrize("name", torchvision_weights.REPOSITORIES)
def test_repositories_are_asked_where_torchvision_has_nothing(name, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repository, file, **_):
        assert repository == torchvision_weights.REPOSITORIES[name]
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert name not in torchvision_weights.PUBLISHED
    with pytest.raises(WeightsError, match="it is not in the local cache, and the hub cannot be reached"):
        from_pretrained(name)
