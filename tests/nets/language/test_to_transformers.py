"""GPTs and Llamas written in transformers' form: transformers reads them and computes the same, and they come back."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from core import random, spec, tree
from nets.language import gpt2, llama
from nets.language.to_transformers import published, write_transformers
from nets.weights import Rename, WeightsError, published_state

GPT2 = gpt2.Config(31, 24, layers=2, heads=2, width=16, dropout=0.1)
LLAMA = llama.Config(31, 24, layers=2, heads=4, kv_heads=2, width=16, hidden=24, theta=77.0)
STRETCHED = {"rope_factor": 4.0, "rope_high": 3.0, "rope_context": 12, "theta": 500.0}
CONFIGS = {
    "gpt2": GPT2,
    "gpt2 without biases": replace(GPT2, bias=False, dropout=0.0),
    "gpt": replace(GPT2, norm_first=False),
    "llama": LLAMA,
    "llama, tied, stretched": replace(LLAMA, tied=True, **STRETCHED),
    "mistral": replace(LLAMA, window=5, depth=6),
    "qwen2": replace(LLAMA, qkv_bias=True, tied=True, eps=1e-3),
}


def values(cfg):
    """Parameters far from their start: biases and norms are seen."""
    net = llama if isinstance(cfg, llama.Config) else gpt2
    params = spec.init(random.key(0), net.spec(cfg))
    keys = iter(random.split(random.key(1), len(tree.leaves(params))))
    return net, tree.map(lambda leaf: leaf + 0.2 * random.normal(next(keys), leaf.shape), params)


@pytest.mark.filterwarnings("ignore")  # transformers', of its own
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_them_and_they_come_back(tmp_path, name):
    cfg = CONFIGS[name]
    net, params = values(cfg)
    write_transformers(tmp_path / "out", params, cfg)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    tokens = random.randint(random.key(2), (2, 20), 0, 31).long()
    with torch.no_grad():
        theirs = model(tokens).logits
    # Rounding of float32 over two layers.
    torch.testing.assert_close(net.apply(params, tokens, cfg), theirs, rtol=1e-4, atol=1e-5)
    back, read = net.from_pretrained(str(tmp_path / "out"))
    assert read == (replace(cfg, bias=True) if name == "gpt2 without biases" else cfg)
    ours = dict(tree.items(params))
    for path, leaf in tree.items(back):
        assert torch.equal(leaf, ours[path]) if path in ours else not leaf.any(), path


def test_refusals(tmp_path):
    net, params = values(LLAMA)
    with pytest.raises(WeightsError, match="exists already; expected a new folder"):
        write_transformers(tmp_path, params, LLAMA)
    with pytest.raises(WeightsError, match="transformers has no such model"):
        published(params, replace(LLAMA, qkv_bias=True, window=5))
    with pytest.raises(WeightsError, match="the rename table has no entry for 'extra'"):
        published({**params, "extra": torch.ones(1)}, LLAMA)
    with pytest.raises(WeightsError, match=r"the 64 rows of 'blocks.0.attn.qkv.weight' are not those of"):
        write_transformers(tmp_path / "a", {**params, "blocks": [_wide(b) for b in params["blocks"]]}, LLAMA)
    assert not list(tmp_path.iterdir())
    with pytest.raises(WeightsError, match="the 3 rows of 'w' are not those of"):
        published_state({"w": torch.ones(3, 2)}, {"w": Rename(("a", "b"))})


def _wide(block):
    return {**block, "attn": {**block["attn"], "qkv": {"weight": torch.ones(64, 16)}}}


def test_halves_and_metadata_of_other_precisions(tmp_path):
    _, params = values(LLAMA)
    write_transformers(tmp_path / "half", tree.cast(params, torch.bfloat16), LLAMA)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert sorted(path.name for path in (tmp_path / "half").iterdir()) == ["config.json", "model.safetensors"]
