"""ViT against torchvision, transformers and timm."""

import dataclasses

import pytest
import torch

from core import random, spec, tree
from nets.classifiers import vit
from nets.weights import WeightsError, read
from tests.nets.parity import assert_same, check_parity, randomise

SIZES = {"patch": 4, "layers": 2, "heads": 2, "width": 12, "hidden": 20}
TINY = vit.Config(image=12, **SIZES, classes=7, zero_head=False)
TIMM = {"vit_ti_16": "vit_tiny_patch16_224", "vit_s_16": "vit_small_patch16_224"}


def images(n=4, size=12, channels=3):
    return random.normal(random.key(0), (n, channels, size, size))


def params_of(cfg):
    return spec.init(random.key(0), vit.spec(cfg))


def torchvision(image=12):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    names = {"patch": "patch_size", "layers": "num_layers", "heads": "num_heads"}
    names |= {"width": "hidden_dim", "hidden": "mlp_dim"}
    sizes = {names[name]: value for name, value in SIZES.items()}
    module = randomise(models.VisionTransformer(image_size=image, num_classes=7, **sizes))
    torch.nn.init.normal_(module.heads.head.weight)
    torch.nn.init.normal_(module.class_token)
    return module


def transformers(image=12):
    library = pytest.importorskip("transformers")
    names = {"patch": "patch_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    names |= {"width": "hidden_size", "hidden": "intermediate_size"}
    sizes = {names[name]: value for name, value in SIZES.items()}
    config = library.ViTConfig(image_size=image, num_labels=7, layer_norm_eps=1e-6, **sizes)
    return randomise(library.ViTForImageClassification(config)).eval()


def timm(image=12):
    library = pytest.importorskip("timm", reason="timm is not installed")
    made = library.models.vision_transformer.VisionTransformer
    module = made(image, 4, num_classes=7, embed_dim=12, depth=2, num_heads=2, mlp_ratio=20 / 12)
    return randomise(module).eval()


# Sizes.


@pytest.mark.parametrize("name", [name for name in vit.PRESETS if name not in TIMM])
def test_size_is_that_of_torchvision(name):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    with torch.device("meta"):
        module = getattr(models, name)()
    check_size(name, module, "torchvision")


@pytest.mark.parametrize("name", TIMM)
def test_size_is_that_of_timm(name):
    library = pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        module = library.create_model(TIMM[name])
    check_size(name, module, "timm")


def check_size(name, module, source):
    cfg = vit.PRESETS[name]
    expected = {key: tuple(x.shape) for key, x in module.state_dict().items()}
    table = vit.rename_table(cfg, source)
    assert {table[key].theirs: tuple(leaf.shape) for key, leaf in tree.items(vit.spec(cfg))} == expected


# The same numbers.


def test_parity():
    check_parity(vit, TINY, torchvision(), images())


def test_parity_with_timm(tmp_path):
    module = timm()
    torch.save(module.state_dict(), tmp_path / "vit.pth")
    with torch.no_grad():
        assert_same(
            vit.apply(vit.from_pretrained(str(tmp_path / "vit.pth"), TINY), images(), TINY), module(images()), ""
        )


def test_parity_with_transformers(tmp_path):
    module = transformers()
    module.save_pretrained(tmp_path)
    params = vit.from_pretrained(str(tmp_path), TINY)
    pooler = {"pooler.dense.bias": torch.zeros(12)}  # as the encoder alone has it
    assert_same(vit.from_published(read(str(tmp_path)) | pooler, TINY), params, "", 0.0)
    with torch.no_grad():
        expected = module(images(), output_hidden_states=True)
    assert_same(vit.apply(params, images(), TINY), expected.logits, "logits")
    states = vit.hidden_states(params, images(), TINY)
    assert_same(states[:-1], list(expected.hidden_states)[:-1], "hidden states ")


# Files.


def test_first_files_of_torchvision_are_read():
    state = torchvision().state_dict()
    wanted = vit.from_published(state, TINY)
    old = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): x for n, x in state.items()}
    assert set(old) != set(state)
    assert_same(vit.from_published(old, TINY), wanted, "", 0.0)


@pytest.mark.parametrize("image", [12, 8, 20])
def test_positions_of_another_size_are_resized_as_torchvision_does(image):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    state = torchvision().state_dict()
    cfg = dataclasses.replace(TINY, image=image)
    found = vit.from_published(state, cfg)
    wanted = models.vision_transformer.interpolate_embeddings(image, 4, dict(state))["encoder.pos_embedding"]
    torch.testing.assert_close(found["positions"], wanted)

    module = torchvision(image)
    module.load_state_dict(state | {"encoder.pos_embedding": wanted})
    with torch.no_grad():
        assert_same(vit.apply(found, images(size=image), cfg), module.eval()(images(size=image)), "logits")


def test_resize_leaves_its_input_as_it_was():
    params = params_of(TINY)
    before = tree.map(torch.clone, params)
    other, cfg = vit.resize(params, TINY, 20)
    assert cfg == dataclasses.replace(TINY, image=20) and other["positions"].shape == (1, 26, 12)
    assert_same(params, before, "", 0.0)
    same, _ = vit.resize(params, TINY, 12)
    assert_same(same, before, "", 0.0)
    with pytest.raises(ValueError, match="image 13 is not divisible by patch 4"):
        vit.resize(params, TINY, 13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": None}, "no positions of a ViT; expected one of 'encoder.pos_embedding', "),
        ({"pos_embed": torch.zeros(1, 9, 12)}, r"'pos_embed' has shape \(1, 9, 12\), expected \(1, 10, 12\)"),
        ({"pos_embed": torch.zeros(10)}, r"'pos_embed' has shape \(10,\), expected \(1, 10, 12\)"),
        ({"pos_embed": torch.zeros(1, 10, 8)}, r"'pos_embed' has shape \(1, 10, 8\), expected \(1, 10, 12\)"),
        ({"norm_pre.bias": torch.zeros(12)}, "1 tensors that the model has no place for: 'norm_pre.bias'"),
    ],
)
def test_files_that_do_not_fit(change, message):
    table = vit.rename_table(TINY, "timm")
    state = {table[name].theirs: leaf for name, leaf in tree.items(params_of(TINY))} | change
    with pytest.raises(WeightsError, match=message):
        vit.from_published({name: x for name, x in state.items() if x is not None}, TINY)


def test_unknown_source():
    with pytest.raises(ValueError, match="source 'keras' is unknown; expected one of torchvision, transformers, timm"):
        vit.rename_table(TINY, "keras")


# What there is besides logits.


def test_feature_maps_are_the_patches_where_they_lie():
    """With blocks that add nothing they are the embedded patches and their positions."""
    params = params_of(TINY)
    params = tree.map_with_names(lambda name, x: 0 * x if "proj" in name or "down" in name else x, params)
    maps = vit.feature_maps(params, images(), TINY)
    patch = images()[:, :, 4:8, 8:12].reshape(4, -1)  # row 1, column 2 of 3
    weight = params["patches"]["weight"].reshape(12, -1)
    for found in maps:
        torch.testing.assert_close(found[:, :, 1, 2], patch @ weight.T + params["positions"][:, 1 + 5])
    assert [tuple(x.shape) for x in maps] == [(4, 12, 3, 3)] * 3


def test_pooled_by_the_mean():
    params, cfg = params_of(TINY), dataclasses.replace(TINY, pool="mean")
    last = vit.hidden_states(params, images(), cfg)[-1]
    norm = torch.nn.functional.layer_norm(last, (12,), eps=1e-6)
    torch.testing.assert_close(vit.features(params, images(), cfg), norm[:, 1:].mean(1))
    torch.testing.assert_close(vit.features(params, images(), TINY), norm[:, 0])


def test_head_starts_at_zero():
    cfg = dataclasses.replace(TINY, zero_head=True)
    assert (vit.apply(params_of(cfg), images(), cfg) == 0).all()


# Random sites.


def test_stochastic_depth_drops_the_branches_of_whole_examples():
    """Of the last block each of two is gone or doubled; the first block is as it is."""
    cfg = dataclasses.replace(TINY, stochastic_depth=0.5)
    params, x = params_of(cfg), images(32)
    _, first, last = vit.hidden_states(params, x, cfg, key=random.split(random.key(1), 32), train=True)
    _, same, full = vit.hidden_states(params, x, cfg)
    torch.testing.assert_close(first, same)
    gone = (last == first).flatten(1).all(1)
    assert 2 <= gone.sum() <= 16  # a quarter of 32 on average
    p = params["blocks"][1]
    without = p | {"attn": p["attn"] | {"proj": tree.map(torch.zeros_like, p["attn"]["proj"])}}
    feed = vit.block(without, first, 2, activation="gelu", eps=1e-6) - first
    alone = ((last - first - 2 * feed).abs() < 1e-5).flatten(1).all(1)
    assert 2 <= alone.sum() <= 16 and not (alone & gone).any()


@pytest.mark.parametrize("name", vit.RATES)
def test_each_rate_draws_by_itself(name):
    cfg = dataclasses.replace(TINY, **{name: 0.5})
    params = params_of(cfg)
    keys = random.split(random.key(1), 4)
    together = vit.apply(params, images(), cfg, key=keys, train=True)
    assert not torch.allclose(together, vit.apply(params, images(), cfg))
    alone = vit.apply(params, images()[1:2], cfg, key=keys[1:2], train=True)
    torch.testing.assert_close(alone, together[1:2])
    with pytest.raises(ValueError, match=f"vit: training with {name} 0.5 draws random numbers; pass key="):
        vit.apply(params, images(), cfg, train=True)


# Wrong input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers is 0; expected at least 1"),
        ({"image": 13}, "image 13 is not divisible by patch 4"),
        ({"heads": 5}, "width 12 is not divisible by 5 heads"),
        ({"stochastic_depth": 1.0}, r"stochastic_depth 1.0 is outside \[0, 1\)"),
        ({"pool": "max"}, "pool 'max' is unknown; expected token or mean"),
    ],
)
def test_wrong_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 224, 224), r"expected images \(batch, 3, height, width\)"),
        ((2, 3, 224, 240), "224 x 240; expected 224 x 224"),
        ((2, 3, 8, 8), "8 x 8; expected at least 16 a side"),
    ],
)
def test_wrong_images(shape, message):
    cfg = vit.PRESETS["vit_ti_16"]
    params = spec.abstract(vit.spec(cfg))
    with pytest.raises(ValueError, match=message):
        vit.apply(params, torch.empty(shape, device="meta"), cfg)
