"""CLIP against transformers and open_clip, and its files."""

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file

from core import random, spec, tree
from nets.multimodal import clip, clip_weights
from nets.weights import WeightsError
from tests.registry.multimodal import RESNET, VIT

TEXT = {"vocab_size": 50, "max_position_embeddings": 12, "hidden_size": 64, "intermediate_size": 256}
TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 1, "eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0}
IMAGE = {"image_size": 32, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512}
IMAGE |= {"num_hidden_layers": 2, "num_attention_heads": 2}


def inputs(dtype=torch.float64):
    keys = random.split(random.key(3)).unbind(0)
    tokens = random.randint(keys[1], (3, 12), 0, 48).long()
    tokens[:, 7], tokens[:, 9] = 49, 49  # a text ends at the first of them
    return random.normal(keys[0], (3, 3, 32, 32)).to(dtype), tokens


@pytest.fixture
def published(tmp_path):
    """(folder, model) of transformers."""
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=24)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config).eval()
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_equals_transformers(published):
    folder, model = published
    params, cfg = clip_weights.from_pretrained(str(folder))
    images, tokens = inputs()
    expected = model.double()(input_ids=tokens, pixel_values=images)
    params = tree.map(torch.Tensor.double, params)
    out = clip.apply(params, (images, tokens), cfg)
    torch.testing.assert_close(out["image"], expected.image_embeds, rtol=0, atol=1e-12)
    torch.testing.assert_close(out["text"], expected.text_embeds, rtol=0, atol=1e-12)
    logits = clip.logits(params, out["image"], out["text"])
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=0, atol=1e-11)
    torch.testing.assert_close(out["similarity"], logits.diagonal())


def test_gradients_equal_transformers(published):
    folder, model = published
    params, cfg = clip_weights.from_pretrained(str(folder))
    images, tokens = inputs()
    model.double()(input_ids=tokens, pixel_values=images).logits_per_image.square().sum().backward()

    def loss(params):
        out = clip.apply(params, (images, tokens), cfg)
        return clip.logits(params, out["image"], out["text"]).square().sum()

    grads = torch.func.grad(loss)(tree.map(torch.Tensor.double, params))
    theirs = {name: p.grad for name, p in model.named_parameters()}
    flat = tree.flatten(grads)
    for name, rename in clip_weights.transformers_table(cfg).items():
        expected = (
            torch.cat([theirs[other] for other in rename.names]) if len(rename.names) > 1 else theirs[rename.theirs]
        )
        torch.testing.assert_close(flat[name], expected, rtol=0, atol=1e-9 * float(expected.abs().max().clamp(min=1)))


def test_what_follows_the_end_does_not_count(published):
    folder, _ = published
    params, cfg = clip_weights.from_pretrained(str(folder))
    images, tokens = inputs(torch.float32)
    changed = tokens.clone()
    changed[:, 8:] = 5
    ours = [clip.encode_text(params, t, cfg) for t in (tokens, changed, tokens[:, :8])]
    assert torch.equal(ours[0], ours[1])
    torch.testing.assert_close(ours[0], ours[2])


@pytest.mark.parametrize("cfg", [VIT, RESNET], ids=["vit", "resnet"])
def test_files_with_the_names_of_openai(cfg, tmp_path):
    """Heads of 64 and MLPs of 4 are what the shapes of OpenAI's files leave unsaid."""
    sizes = {"text_width": 64, "text_heads": 1, "vocabulary": 13, "context": 7, "end_id": None}
    cfg = replace(cfg, **sizes, **({"image_width": 64, "image_heads": 1 if not cfg.depths else 32}))
    params = spec.init(random.key(0), clip.spec(cfg))
    state = {}
    for name, rename in clip_weights.openai_table(cfg).items():
        leaf = tree.flatten(params)[name]
        leaf = leaf.T if rename.transposed else leaf
        parts = leaf.chunk(len(rename.names)) if len(rename.names) > 1 else [leaf]
        state |= {theirs: part.contiguous() for theirs, part in zip(rename.names, parts, strict=True)}
    save_file(state | {"context_length": torch.tensor(7)}, tmp_path / "model.safetensors")
    loaded, stored = clip_weights.from_pretrained(str(tmp_path))
    other = {"patch", "image_layers", "zero_init"} if cfg.depths else {"image_heads"}
    assert all(getattr(stored, f) == getattr(cfg, f) for f in cfg.__dataclass_fields__ if f not in other)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(loaded), tree.leaves(params), strict=True))
    for model, activation in (({}, "gelu"), ({"quick_gelu": True}, "quick_gelu")):
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
        assert clip_weights.from_pretrained(str(tmp_path))[1].activation == activation


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_equals_open_clip(kind):
    open_clip = pytest.importorskip("open_clip", exc_type=ImportError)
    vision = {"layers": 2, "width": 128, "patch_size": 16} if kind == "vit" else {"layers": [1, 2, 1, 1], "width": 64}
    text = {"context_length": 12, "vocab_size": 50, "width": 64, "heads": 1, "layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(24, {"image_size": 32, **vision}, text, quick_gelu=True).eval()
        for p in model.parameters():
            p.data += 0.02 * torch.randn_like(p)
    state = model.double().state_dict()
    cfg = clip_weights.config_of(state)
    params = tree.map(torch.Tensor.double, clip_weights.from_published(state, cfg))
    images, tokens = inputs()
    with torch.no_grad():
        image, words, scale = model(images, tokens)
    out = clip.apply(params, (images, tokens), cfg)
    torch.testing.assert_close(out["image"], image, rtol=0, atol=1e-12)
    torch.testing.assert_close(out["text"], words, rtol=0, atol=1e-12)
    torch.testing.assert_close(params["scale"].exp(), scale)


def test_the_scale():
    params = spec.init(random.key(0), clip.spec(VIT))
    assert math.isclose(float(params["scale"]), math.log(1 / 0.07), rel_tol=1e-6)
    large = params | {"scale": torch.tensor(9.0)}
    assert math.isclose(float(clip.clipped(large)["scale"].exp()), 100.0, rel_tol=1e-5)
    assert torch.equal(clip.clipped(params)["scale"], params["scale"])


def test_errors(published):
    folder, _ = published
    params, cfg = clip_weights.from_pretrained(str(folder))
    images, tokens = inputs(torch.float32)
    with pytest.raises(ValueError, match="the images are 16 x 32; expected 32 x 32"):
        clip.encode_image(params, images[:, :, :16], cfg)
    with pytest.raises(ValueError, match=r"expected tokens \(batch, time up to 12\), found \(3, 24\)"):
        clip.encode_text(params, torch.cat([tokens, tokens], 1), cfg)
    with pytest.raises(ValueError, match="four stages"):
        replace(cfg, depths=(1, 1))
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"model_type": "siglip"}, "model_type 'siglip', expected clip"),
        (
            {"text_config": config["text_config"] | {"hidden_act": "gelu"}},
            "the towers have hidden_act gelu and quick_gelu",
        ),
        ({"text_config": config["text_config"] | {"intermediate_size": 100}}, "intermediate_size 100"),
        ({"projection_dim": 0}, "embedding is 0"),
    ):
        with pytest.raises(WeightsError, match=message):
            clip_weights.published_config(config | changes)
    with pytest.raises(WeightsError, match="'ln_final.weight' is missing"):
        clip_weights.config_of({"logit_scale": torch.zeros(())})


def test_old_files_end_texts_at_the_largest_id():
    config = {"model_type": "clip", "text_config": TEXT | {"eos_token_id": 2}, "vision_config": IMAGE}
    assert clip_weights.published_config(config).end_id is None
