"""The captioner against transformers' ViT-GPT2, its files, and its decoding."""

import json
import math

import pytest
import torch
import transformers

from core import random, spec, tree
from nets.language.beam_search import beam_search
from nets.language.decoding import greedy
from nets.multimodal import captioner, captioner_weights
from nets.weights import WeightsError
from tests.registry.multimodal import CAPTIONER, STEM

IMAGE = {"image_size": 16, "patch_size": 4, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 30, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 40}
TEXT |= {"bos_token_id": 29, "eos_token_id": 29, "add_cross_attention": True, "is_decoder": True}


def inputs(cfg, count=3, time=7, dtype=torch.float64):
    pictures, words = random.split(random.key(3)).unbind(0)
    images = random.normal(pictures, (count, cfg.channels, cfg.image, cfg.image)).to(dtype)
    return images, random.randint(words, (count, time), 0, cfg.vocabulary).long()


@pytest.fixture(params=[24, 16], ids=["bridge", "one width"])
def published(request, tmp_path):
    """(folder, model) of transformers."""
    image, text = transformers.ViTConfig(**IMAGE, hidden_size=request.param), transformers.GPT2Config(**TEXT)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.VisionEncoderDecoderModel(config=config).eval()
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_logits_and_gradients_equal_transformers(published):
    folder, model = published
    params, cfg = captioner_weights.from_pretrained(str(folder))
    params, (images, tokens) = tree.cast(params, torch.float64), inputs(cfg)
    expected = model.double()(pixel_values=images, decoder_input_ids=tokens).logits
    torch.testing.assert_close(captioner.apply(params, (images, tokens), cfg), expected, rtol=0, atol=1e-12)
    expected.square().sum().backward()

    grads = torch.func.grad(lambda p: captioner.apply(p, (images, tokens), cfg).square().sum())(params)
    theirs = {name: p.grad for name, p in model.named_parameters()}
    back = captioner_weights.from_published(saved_names({n: g for n, g in theirs.items() if g is not None}), cfg)
    for (name, ours), other in zip(tree.items(grads), tree.leaves(back), strict=True):
        scale = float(other.abs().max().clamp(min=1e-3))
        torch.testing.assert_close(ours.float(), other, rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


def saved_names(state):
    """The names of files for those of a module of transformers."""
    out = {}
    for name, value in state.items():
        if name.startswith("encoder.layers."):
            name = name.replace("encoder.layers.", "encoder.encoder.layer.").replace("mlp.fc1", "intermediate.dense")
            name = name.replace("mlp.fc2", "output.dense").replace("attention.o_proj", "attention.output.dense")
            for part in ("query", "key", "value"):
                name = name.replace(f"attention.{part[0]}_proj", f"attention.attention.{part}")
        out[name] = value
    return out


def test_attention_maps_equal_transformers(published):
    folder, model = published
    params, cfg = captioner_weights.from_pretrained(str(folder))
    images, tokens = inputs(cfg, dtype=torch.float32)
    model.set_attn_implementation("eager")
    expected = model(pixel_values=images, decoder_input_ids=tokens, output_attentions=True).cross_attentions
    maps = captioner.attention_maps(params, (images, tokens), cfg)
    torch.testing.assert_close(maps, torch.stack(expected, 1), rtol=0, atol=1e-5)


def test_greedy_and_beams_equal_transformers(published):
    folder, model = published
    params, cfg = captioner_weights.from_pretrained(str(folder))
    images, _ = inputs(cfg, 5, dtype=torch.float32)
    cache = captioner.start(params, captioner.encode(params, images, cfg), cfg, 3)
    first, step = torch.full((5,), 29), captioner.stepper(params, cfg)
    options = {"max_length": 9, "end": 29, "padding": 29, "positions_axis": 2, "shared": cache["shared"]}
    same = {"max_new_tokens": 9, "do_sample": False, "decoder_start_token_id": 29, "eos_token_id": 29}
    same |= {"pad_token_id": 29}
    expected = model.generate(images, num_beams=1, **same)[:, 1:]
    assert torch.equal(greedy(step, cache["past"], first, **options).tokens, expected)
    expected = model.generate(images, num_beams=3, length_penalty=0.6, **same)[:, 1:]
    out = beam_search(step, cache["past"], first, beams=3, length_penalty=0.6, **options)
    assert torch.equal(out.tokens[:, 0], expected)


@pytest.mark.parametrize("cfg", [CAPTIONER, STEM], ids=["bridge", "stem"])
def test_a_word_at_a_time_equals_the_whole(cfg):
    params, (images, tokens) = spec.init(random.key(0), captioner.spec(cfg), torch.float64), inputs(cfg)
    cache = captioner.start(params, captioner.encode(params, images, cfg), cfg, 7)
    columns = []
    for t in range(7):
        logits, cache = captioner.step(params, cache, tokens[:, t], torch.tensor(t), cfg)
        columns.append(logits)
    torch.testing.assert_close(torch.stack(columns, 1), captioner.apply(params, (images, tokens), cfg))


def test_positions_of_patches_start_as_sinusoids_of_row_and_column():
    cfg = captioner.Config(16, patch=4, image_width=16, image_heads=2, text_width=8, text_heads=2)
    table = captioner.spec(cfg)["encoder"]["positions"].init(random.key(0), (1, 17, 16), torch.float64)[0]
    assert not table[0].any()
    grid = table[1:].unflatten(0, (4, 4))  # (rows, columns, width)
    for place in range(4):
        angles = [place / 10000 ** (2 * i / 8) for i in range(4)]
        expected = torch.tensor([f(a) for a in angles for f in (math.sin, math.cos)], dtype=torch.float64)
        torch.testing.assert_close(grid[place, 2, :8], expected)
        torch.testing.assert_close(grid[1, place, 8:], expected)


def test_count_of_the_published_net():
    with torch.device("meta"):
        image, text = transformers.ViTConfig(), transformers.GPT2Config(add_cross_attention=True, is_decoder=True)
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(image, text)
        model = transformers.VisionEncoderDecoderModel(config=config)
    names = {name for name, _ in model.named_parameters() if ".pooler." not in name}
    count = sum(p.numel() for name, p in model.named_parameters() if name in names and "lm_head" not in name)
    assert tree.count(captioner.spec(captioner.PRESETS["vit-gpt2"])) == count


def test_old_files_and_files_of_other_functions(published):
    folder, model = published
    _, cfg = captioner_weights.from_pretrained(str(folder))
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    old = state | {"decoder.transformer.h.0.attn.bias": torch.ones(12, 12).tril()}
    old |= {"decoder.lm_head.weight": state["decoder.transformer.wte.weight"].clone()}
    same = captioner_weights.from_published(old, cfg)
    assert all(map(torch.equal, tree.leaves(same), tree.leaves(captioner_weights.from_published(state, cfg))))
    with pytest.raises(WeightsError, match="lm_head.weight' differs"):
        captioner_weights.from_published(old | {"decoder.lm_head.weight": torch.zeros(30, 16)}, cfg)
    with pytest.raises(WeightsError, match="wpe.weight"):
        captioner_weights.from_published({n: x for n, x in state.items() if "wpe" not in n}, cfg)
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(WeightsError, match="the decoder has model_type='bert'; only 'gpt2'"):
        captioner_weights.published_config(config | {"decoder": config["decoder"] | {"model_type": "bert"}})
    with pytest.raises(WeightsError, match="model_type 'vit', expected vision-encoder-decoder"):
        captioner_weights.published_config(config["encoder"])


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"image": 9}, "image 9 is not divisible by patch 4"),
        ({"stem": (9,)}, "expected multiples of 8"),
        ({"stem": (8, 8, 8)}, "patch 4 is not divisible by the stem's 2\\^3"),
        ({"text_heads": 3}, "text_width 8 is not divisible by 3 heads"),
        ({"dropout": 1.0}, "dropout 1.0 is outside"),
        ({"context": 0}, "context is 0; expected at least 1"),
    ],
)
def test_configurations_that_cannot_be(changes, error):
    with pytest.raises(ValueError, match=error):
        captioner.Config(**({"image": 8, "patch": 4, "text_width": 8, "text_heads": 2} | changes))


def test_inputs_that_do_not_fit():
    params, (images, tokens) = spec.init(random.key(0), captioner.spec(CAPTIONER)), inputs(CAPTIONER)
    memory = captioner.encode(params, images.float(), CAPTIONER)
    for call, error in (
        (lambda: captioner.encode(params, torch.zeros(1, 3, 9, 8), CAPTIONER), "the images are 9 x 8; expected 8 x 8"),
        (lambda: captioner.decode(params, tokens[:, [0] * 8], memory, CAPTIONER), "time up to 7"),
        (lambda: captioner.decode(params, tokens[:2], memory, CAPTIONER), "expected a memory of shape"),
        (lambda: captioner.apply(params, (images.float(), tokens), CAPTIONER, train=True), "pass key="),
        (lambda: captioner.start(params, memory, CAPTIONER, 8), "8 positions exceed the context of 7"),
    ):
        with pytest.raises(ValueError, match=error):
            call()
