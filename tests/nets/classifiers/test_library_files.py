"""Files of transformers and timm, with the descriptions beside them: every field that changes the net is looked at."""

import json
from dataclasses import replace

import pytest
import torch

from core import random, spec, tree
from nets.classifiers import by_name, convnext, mobilenet_v1, mobilenet_v2, resnet, torchvision_weights, vit
from nets.classifiers.torchvision_weights import Published, from_pretrained, preprocess
from nets.weights import WeightsError
from tests.nets.parity import assert_same, randomise

RESNET = resnet.Config((1, 1), width=4, classes=7)
VIT = vit.Config(image=12, patch=4, layers=2, heads=2, width=12, hidden=20, classes=7)
SEVEN = ("its head is for 7 classes",)


def images(n=2, size=64):
    return random.uniform(random.key(0), (n, 3, size, size))


# preprocessor_config.json as transformers writes it, and (resize, crop, interpolation).
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
        convnext.Config((1, 2), (4, 6), eps=0.1, classes=7),
        (
            "ConvNext",
            {"hidden_sizes": [4, 6], "depths": [1, 2], "num_stages": 2, "layer_scale_init_value": 0.5}
            | {"layer_norm_eps": 0.1},
        ),
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


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a row of TRANSFORMERS; the preset has 1000 classes and the usual padding and norms."""
    library = pytest.importorskip("transformers", reason="transformers is not installed")

    def write(name, base=False, **changes):
        cfg, (kind, options), _ = TRANSFORMERS[name]
        net, usual = by_name.find(name)
        plain = {field: getattr(usual, field) for field in ("eps", "padding") if hasattr(usual, field)}
        monkeypatch.setitem(net.PRESETS, name, replace(cfg, classes=1000, **plain))
        config = getattr(library, f"{kind}Config")(num_labels=7, **options | changes)
        module = getattr(library, f"{kind}Model" if base else f"{kind}ForImageClassification")(config)
        module = randomise(module).eval()
        module.save_pretrained(tmp_path)
        return net, cfg, module

    return write


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_files_of_transformers(name, written, tmp_path):
    """The fields of config.json make our Config, those of preprocessor_config.json the preparation of images."""
    net, cfg, module = written(name)
    _, _, (preparation, prepared) = TRANSFORMERS[name]
    constants = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preparation | constants))

    params, loaded, facts = from_pretrained(name, str(tmp_path))
    assert loaded == cfg
    assert facts == Published(str(tmp_path), None, *prepared, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), SEVEN)
    for side in [facts.crop] if net is vit else [64, 55]:  # TensorFlow's padding differs for odd sizes
        x = preprocess(images(size=side), facts)
        with torch.no_grad():
            assert_same(net.apply(params, x, cfg), module(x).logits, name)


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "mobilenet_v1-0.25", "mobilenet_v2-0.35", "vit_b_16"])
def test_files_of_transformers_without_a_head(name, written, tmp_path):
    net, cfg, module = written(name, base=True)
    params, loaded, facts = from_pretrained(name, str(tmp_path), size=12 if net is vit else None)
    assert loaded == replace(cfg, classes=1000) and facts.notes == ("it has no head",) and "head" not in params
    x = images(size=12 if net is vit else 64)
    with torch.no_grad():
        actual = net.features(params, x, loaded)
        out = module(x)
    assert_same(actual, out.last_hidden_state[:, 0] if net is vit else out.pooler_output.flatten(1), name)


@pytest.mark.parametrize(
    ("name", "field", "value", "expected"),
    [
        ("convnext_tiny", "hidden_act", "relu", "'gelu'"),
        ("mobilenet_v1-0.25", "hidden_act", "relu", "'relu6'"),
        ("mobilenet_v1-0.25", "layer_norm_eps", 1e-5, "0.001"),
        ("mobilenet_v2-0.35", "hidden_act", "hardswish", "'relu6'"),
        ("mobilenet_v2-0.35", "output_stride", 16, "32"),
        ("resnet18", "hidden_act", "gelu", "'relu'"),
        ("resnet18", "downsample_in_first_stage", True, "False"),
        ("resnet50", "downsample_in_bottleneck", True, "False"),
        ("vit_b_16", "hidden_act", "quick_gelu", "'gelu'"),
        ("vit_b_16", "num_attention_heads", 3, "2"),
    ],
)
def test_nets_of_transformers_that_compute_something_else(name, field, value, expected, written, tmp_path):
    """Their files have the names and shapes of the usual net: config.json alone tells."""
    written(name, **{field: value})
    message = f"is of another net than {name}: {field} is {value!r}, expected {expected}"
    with pytest.raises(WeightsError, match=message):
        from_pretrained(name, str(tmp_path))


def test_another_family_of_transformers(written, tmp_path):
    written("vit_b_16")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "vit_msn"}))
    with pytest.raises(WeightsError, match="another net than vit_b_16: model_type is 'vit_msn', expected 'vit'"):
        from_pretrained("vit_b_16", str(tmp_path))


def test_files_of_timm(tmp_path):
    library = pytest.importorskip("timm", reason="timm is not installed")
    module = randomise(library.create_model("vit_tiny_patch16_224", num_classes=7)).eval()
    library.models._hub.save_for_hf(module, tmp_path, safe_serialization=True)
    params, cfg, facts = from_pretrained("vit_ti_16", str(tmp_path))
    assert cfg == replace(vit.PRESETS["vit_ti_16"], classes=7)
    assert facts == Published(str(tmp_path), None, 248, 224, "bicubic", **torchvision_weights.HALF, notes=SEVEN)
    x = preprocess(images(1, 224), facts)
    with torch.no_grad():
        assert_same(vit.apply(params, x, cfg), module(x), "")
    small, cfg, _ = from_pretrained("vit_ti_16", str(tmp_path), size=64)
    assert cfg.image == 64 and small["positions"].shape == (1, 17, 192)


def timm_folder(folder, **changes):
    """A ViT without a head and the config.json that timm writes beside it."""
    cfg = vit.PRESETS["vit_ti_16"]
    table, values = vit.rename_table(cfg, "timm"), spec.init(random.key(0), vit.spec(cfg))
    state = {table[name].theirs: x for name, x in tree.items(values) if not name.startswith("head.")}
    torch.save(state, folder / "pytorch_model.bin")
    preparation = {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bicubic"}
    preparation |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    description = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "pretrained_cfg": preparation}
    (folder / "config.json").write_text(json.dumps(description | changes))
    return values


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architecture": "vit_tiny_patch16_384", "global_pool": "token"},
        {
            "architecture": "deit_tiny_patch16_224",
            "model_args": {"img_size": 224, "drop_path_rate": 0.1, "num_heads": 3},
        },
    ],
    ids=["tiny", "384", "deit"],
)
def test_files_of_timm_without_a_head(changes, tmp_path):
    values = timm_folder(tmp_path, **changes)
    params, cfg, facts = from_pretrained("vit_ti_16", str(tmp_path))
    assert cfg == vit.PRESETS["vit_ti_16"] and facts.notes == ("it has no head",)
    assert_same(params, {name: x for name, x in values.items() if name != "head"}, "", 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "vit_tiny_r_s16_p8_224"},
            "architecture is 'vit_tiny_r_s16_p8_224', expected 'vit_tiny_patch16_224'",
        ),
        ({"architecture": "vit_tiny_patch16_rope_224"}, "architecture is 'vit_tiny_patch16_rope_224', expected"),
        ({"architecture": "vit_small_patch16_224"}, "architecture is 'vit_small_patch16_224', expected"),
        ({"global_pool": "avg"}, "global_pool is 'avg', expected 'token'"),
        ({"model_args": {"act_layer": "quick_gelu"}}, "model_args.act_layer is 'quick_gelu', expected None"),
        ({"model_args": {"num_heads": 4}}, "model_args.num_heads is 4, expected 3"),
    ],
    ids=["hybrid", "rope", "another size", "pool", "activation", "heads"],
)
def test_nets_of_timm_that_compute_something_else(changes, message, tmp_path):
    timm_folder(tmp_path, **changes)
    with pytest.raises(WeightsError, match=f"is of another net than vit_ti_16: {message}"):
        from_pretrained("vit_ti_16", str(tmp_path))


def test_convolutional_nets_of_timm_with_torchvisions_names(tmp_path, monkeypatch):
    """Such as its ResNets: those with blurred strides have the same names and shapes."""
    monkeypatch.setitem(resnet.PRESETS, "resnet18", RESNET)
    table, values = resnet.rename_table(RESNET), spec.init(random.key(0), resnet.spec(RESNET))
    torch.save({table[name].theirs: x for name, x in tree.items(values)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18", "global_pool": "avg"}')
    assert_same(from_pretrained("resnet18", str(tmp_path))[0], values, "", 0.0)
    (tmp_path / "config.json").write_text('{"architecture": "resnetblur18", "global_pool": "avg"}')
    with pytest.raises(WeightsError, match="architecture is 'resnetblur18', expected 'resnet18'"):
        from_pretrained("resnet18", str(tmp_path))


@pytest.mark.parametrize("net", [convnext, mobilenet_v2, resnet, vit], ids=lambda net: net.__name__)
def test_names_of_a_library_that_is_not_known(net):
    with pytest.raises(ValueError, match=f"source 'keras' is unknown; expected one of {', '.join(net.NAMES)}"):
        net.rename_table(next(iter(net.PRESETS.values())), "keras")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("preprocessor_config.json", '{"size": 224}', r"its preprocessor_config.json does not say how .*'image_mean'"),
        ("config.json", '{"pretrained_cfg": {"input_size": []}}', "its config.json does not say how images are prep"),
        ("config.json", "{", "config.json' is not readable as JSON"),
        (
            "preprocessor_config.json",
            '{"size": 224, "rescale_factor": 0.00784}',
            "prepares images in another way: rescale_factor is 0.00784, expected bytes that are divided by 255",
        ),
    ],
    ids=["transformers", "timm", "json", "scale"],
)
def test_descriptions_that_lack_something(file, text, message, tmp_path):
    (tmp_path / file).write_text(text)
    with pytest.raises(WeightsError, match=message):
        from_pretrained("vit_b_16", str(tmp_path))


def test_images_that_are_not_normalised(written, tmp_path):
    written("resnet18")
    (tmp_path / "preprocessor_config.json").write_text('{"size": 224, "do_normalize": false}')
    _, _, facts = from_pretrained("resnet18", str(tmp_path))
    assert torch.equal(preprocess(images(), facts), images())


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
