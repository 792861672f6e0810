"""ViT against torchvision, transformers and timm."""

import dataclasses

import pytest
import torch

from core import random, spec, tree
from nets.classifiers import vit
from nets.weights import WeightsError, read
from tests.nets.parity import assert_same, randomise
from tests.registry.classifier_modules import VIT, random_vit


def images(n=4, size=12, channels=3):
    return random.normal(random.key(0), (n, channels, size, size))


def params_of(cfg):
    return spec.init(random.key(0), vit.spec(cfg))


def torchvision(image=12):
    return randomise(random_vit(dataclasses.replace(VIT, image=image)))


def transformers(image=12):
    library = pytest.importorskip("transformers")
    sizes = {"patch_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 12}
    sizes |= {"intermediate_size": 20}
    config = library.ViTConfig(image_size=image, num_labels=7, layer_norm_eps=1e-6, **sizes)
    return randomise(library.ViTForImageClassification(config)).eval()


def timm(image=12):
    library = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"embed_dim": 12, "depth": 2, "num_heads": 2, "mlp_ratio": 20 / 12}
    return randomise(library.models.vision_transformer.VisionTransformer(image, 4, num_classes=7, **sizes)).eval()


# The same numbers.


def test_parity_with_timm(tmp_path):
    module = timm()
    torch.save(module.state_dict(), tmp_path / "vit.pth")
    params = vit.from_pretrained(str(tmp_path / "vit.pth"), VIT)
    with torch.no_grad():
        assert_same(vit.apply(params, images(), VIT), module(images()), "")


def test_parity_with_transformers(tmp_path):
    module = transformers()
    module.save_pretrained(tmp_path)
    params = vit.from_pretrained(str(tmp_path), VIT)
    pooler = {"pooler.dense.bias": torch.zeros(12)}  # as the encoder alone has it
    assert_same(vit.from_published(read(str(tmp_path)) | pooler, VIT), params, "", 0.0)
    with torch.no_grad():
        expected = module(images(), output_hidden_states=True)
    assert_same(vit.apply(params, images(), VIT), expected.logits, "logits")
    states = vit.hidden_states(params, images(), VIT)
    assert_same(states[:-1], list(expected.hidden_states)[:-1], "hidden states ")


# Files.


def test_first_files_of_torchvision_are_read():
    state = torchvision().state_dict()
    expected = vit.from_published(state, VIT)
    old = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): x for n, x in state.items()}
    assert set(old) != set(state)
    assert_same(vit.from_published(old, VIT), expected, "", 0.0)


@pytest.mark.parametrize("image", [12, 8, 20])
def test_positions_of_another_size_are_resized_as_torchvision_does(image):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    state = torchvision().state_dict()
    cfg = dataclasses.replace(VIT, image=image)
    params = vit.from_published(state, cfg)
    positions = models.vision_transformer.interpolate_embeddings(image, 4, dict(state))["encoder.pos_embedding"]
    torch.testing.assert_close(params["positions"], positions)

    module = torchvision(image)
    module.load_state_dict(state | {"encoder.pos_embedding": positions})
    with torch.no_grad():
        assert_same(vit.apply(params, images(size=image), cfg), module.eval()(images(size=image)), "logits")


def test_resize_leaves_its_input_as_it_was():
    params = params_of(VIT)
    before = tree.map(torch.clone, params)
    other, cfg = vit.resize(params, VIT, 20)
    assert cfg == dataclasses.replace(VIT, image=20) and other["positions"].shape == (1, 26, 12)
    assert_same(params, before, "", 0.0)
    same, _ = vit.resize(params, VIT, 12)
    assert_same(same, before, "", 0.0)
    with pytest.raises(ValueError, match="image 13 is not divisible by patch 4"):
        vit.resize(params, VIT, 13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": None}, r"'pos_embed' is missing; expected for 'positions' \(1, 10, 12\); the file has '"),
        ({"pos_embed": torch.zeros(1, 9, 12)}, r"'pos_embed' has shape \(1, 9, 12\), expected \(1, 10, 12\)"),
        ({"pos_embed": torch.zeros(10)}, r"'pos_embed' has shape \(10,\), expected \(1, 10, 12\)"),
        ({"pos_embed": torch.zeros(1, 10, 8)}, r"'pos_embed' has shape \(1, 10, 8\), expected \(1, 10, 12\)"),
        ({"norm_pre.bias": torch.zeros(12)}, "1 tensors that the model has no place for: 'norm_pre.bias'"),
    ],
)
def test_files_that_do_not_fit(change, message):
    table = vit.rename_table(VIT, "timm")
    state = {table[name].theirs: leaf for name, leaf in tree.items(params_of(VIT))} | change
    with pytest.raises(WeightsError, match=message):
        vit.from_published({name: x for name, x in state.items() if x is not None}, VIT)


# Besides logits.


def test_feature_maps_are_the_patches_at_their_positions():
    """With blocks that add nothing they are the embedded patches plus their positions."""
    params = params_of(VIT)
    params = tree.map_with_names(lambda name, x: 0 * x if "proj" in name or "down" in name else x, params)
    maps = vit.feature_maps(params, images(), VIT)
    patch = images()[:, :, 4:8, 8:12].reshape(4, -1)  # row 1, column 2 of 3
    weight = params["patches"]["weight"].reshape(12, -1)
    for x in maps:
        torch.testing.assert_close(x[:, :, 1, 2], patch @ weight.T + params["positions"][:, 1 + 5])
    assert [tuple(x.shape) for x in maps] == [(4, 12, 3, 3)] * 3


def test_pooled_by_the_mean():
    params, cfg = params_of(VIT), dataclasses.replace(VIT, pool="mean")
    last = vit.hidden_states(params, images(), cfg)[-1]
    norm = torch.nn.functional.layer_norm(last, (12,), eps=1e-6)
    torch.testing.assert_close(vit.features(params, images(), cfg), norm[:, 1:].mean(1))
    torch.testing.assert_close(vit.features(params, images(), VIT), norm[:, 0])


def test_head_starts_at_zero():
    cfg = dataclasses.replace(VIT, zero_head=True)
    assert (vit.apply(params_of(cfg), images(), cfg) == 0).all()


# Random sites.


def test_stochastic_depth_drops_the_branches_of_whole_examples():
    """Each of the last block's two branches is dropped or doubled; the first block is unchanged."""
    cfg = dataclasses.replace(VIT, stochastic_depth=0.5)
    params, x = params_of(cfg), images(32)
    _, first, last = vit.hidden_states(params, x, cfg, key=random.split(random.key(1), 32), train=True)
    _, same, full = vit.hidden_states(params, x, cfg)
    torch.testing.assert_close(first, same)
    dropped = (last == first).flatten(1).all(1)
    assert 2 <= dropped.sum() <= 16  # a quarter of 32 on average
    p = params["blocks"][1]
    without = p | {"attn": p["attn"] | {"proj": tree.map(torch.zeros_like, p["attn"]["proj"])}}
    feed = vit.block(without, first, 2, activation="gelu", eps=1e-6) - first
    alone = ((last - first - 2 * feed).abs() < 1e-5).flatten(1).all(1)
    assert 2 <= alone.sum() <= 16 and not (alone & dropped).any()


@pytest.mark.parametrize("name", vit.RATES)
def test_each_rate_draws_by_itself(name):
    cfg = dataclasses.replace(VIT, **{name: 0.5})
    params = params_of(cfg)
    keys = random.split(random.key(1), 4)
    together = vit.apply(params, images(), cfg, key=keys, train=True)
    assert not torch.allclose(together, vit.apply(params, images(), cfg))
    alone = vit.apply(params, images()[1:2], cfg, key=keys[1:2], train=True)
    torch.testing.assert_close(alone, together[1:2])
    with pytest.raises(ValueError, match=f"vit: training with {name} 0.5 draws random numbers; pass key="):
        vit.apply(params, images(), cfg, train=True)
